package main

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/test/stack"
)

// memory stages volumes with a real csi-plugin and looks for their keys in its
// memory; and unstages them when what gave the keys is gone.
func (s *suite) memory() {
	s.section("the serving process: csi-plugin node, with loopdriver behind it")
	for _, mode := range []struct {
		name    string
		service bool
	}{{"direct mode", false}, {"by the key service", true}} {
		if !s.only.MatchString("the serving process, " + mode.name) {
			continue
		}
		if err := s.serving(mode.name, mode.service); err != nil {
			s.row("the serving process, "+mode.name, noPlain, "", "", err)
		}
	}
}

// nogroup is a group that csi-plugin is started with: what belongs to it in
// /proc belongs to root once a process cannot be dumped.
const nogroup = 65534

func (s *suite) serving(mode string, service bool) (err error) {
	dir, err := os.MkdirTemp(s.dir, "node-")
	if err != nil {
		return err
	}
	// The group of this process, while it starts the others.
	if err := syscall.Setresgid(-1, nogroup, -1); err != nil {
		return err
	}
	st, err := stack.Start(s.ctx, stack.Config{Dir: dir, Bin: s.bin, KeyService: service})
	if err := errors.Join(err, syscall.Setresgid(-1, 0, -1)); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, st.Logs())
		}
		err = errors.Join(err, st.Stop())
	}()
	v, err := st.Create(s.ctx, "one", 32*mib, stack.MountCapability("ext4"), nil)
	if err != nil {
		return err
	}
	for range 3 { // the last one finds what earlier ones left
		if err := errors.Join(v.Stage(s.ctx), v.Unstage(s.ctx)); err != nil {
			return err
		}
	}
	if err := v.Stage(s.ctx); err != nil {
		return err
	}
	keys, err := s.keysOf(v)
	if err != nil {
		return err
	}
	s.searched("DEK in the memory of csi-plugin, "+mode, st.PluginPID(), keys[0])
	s.searched("volume key in the memory of csi-plugin, "+mode, st.PluginPID(), keys[1])
	if service {
		pid, err := running(filepath.Join(s.bin, "key-service"))
		if err != nil {
			return err
		}
		s.searched("DEK in the memory of key-service, which gave it", pid, keys[0])
	}
	message, err := undumpable(st.PluginPID())
	s.row("core dump of csi-plugin, "+mode, noPlain, "impossible", message, err)
	message, err = keyring(v.Device())
	s.row("volume key in the kernel's table", noPlain, "not there", message, err)

	if service {
		err = st.StopKeyService(syscall.SIGKILL)
	} else {
		err = errors.Join(os.Rename(st.StoreDir(), dir+"/gone"), os.Rename(st.Path("master-secret"), dir+"/gone-secret"))
	}
	err = errors.Join(err, write(v.Device(), 0, noise(2*copySize)), v.Unstage(s.ctx), s.nothingLeft())
	s.row("unstage: what gives keys is gone, the header is noise; "+mode, noPlain, "closes", "", err)
	if !service {
		return errors.Join(os.Rename(dir+"/gone", st.StoreDir()), os.Rename(dir+"/gone-secret", st.Path("master-secret")))
	}
	return st.StartKeyService(s.ctx, "--kms-uri="+st.KEK(), "--storage-uri="+st.Store())
}

// keysOf returns a volume's DEK and, got with it from the disk, its volume key.
func (s *suite) keysOf(v *stack.Volume) ([2][]byte, error) {
	dek, err := v.Key(s.ctx)
	if err != nil {
		return [2][]byte{}, err
	}
	path := filepath.Join(s.dir, "volume-key")
	_ = os.Remove(path)
	out, _, err := bounded(deadline, dek, "cryptsetup", "luksDump", "--batch-mode", "--dump-volume-key", "--volume-key-file="+path, "--key-file=-", v.Device())
	if err != nil {
		return [2][]byte{}, fmt.Errorf("luksDump: %w: %s", err, lastLine(out))
	}
	vk, err := os.ReadFile(path)
	if err == nil && (len(dek) != 32 || len(vk) != 64) {
		err = fmt.Errorf("keys of %d and %d bytes", len(dek), len(vk))
	}
	return [2][]byte{dek, vk}, err
}

// searched prints a row about a key in a process's memory. That the search
// finds keys is seen in this process, which has them.
func (s *suite) searched(name string, pid int, key []byte) {
	forms := [][]byte{key, []byte(hex.EncodeToString(key)), []byte(base64.StdEncoding.EncodeToString(key)[:40])}
	if len(key) == 64 { // each of the two keys of XTS is worth as much
		forms = append(forms, key[:32], key[32:])
	}
	found, size, err := search(pid, forms)
	if own, _, e := search(os.Getpid(), forms[:1]); err == nil && (e != nil || len(own) == 0) {
		err = fmt.Errorf("the search does not find what is there: %w", e)
	}
	if err == nil && len(found) > 0 {
		err = fmt.Errorf("%d copies: %s", len(found), strings.Join(found, ", "))
	}
	s.row(name, noPlain, "0 copies", fmt.Sprintf("%d MiB read; as bytes, hexadecimal, base64", size/mib), err)
}

// search reads all memory of a process and returns where the forms are.
func search(pid int, forms [][]byte) (found []string, total int64, err error) {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = maps.Close() }()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = mem.Close() }()
	scanner := bufio.NewScanner(maps)
	for scanner.Scan() {
		fields := strings.Fields(scanner.Text())
		var from, to int64
		if _, err := fmt.Sscanf(fields[0], "%x-%x", &from, &to); err != nil || !strings.HasPrefix(fields[1], "r") || strings.HasPrefix(fields[len(fields)-1], "[v") {
			continue
		}
		where, n, err := searchRange(mem, from, to, forms)
		if err != nil {
			return nil, 0, fmt.Errorf("%s: %w", scanner.Text(), err)
		}
		total += n
		for _, w := range where {
			found = append(found, fmt.Sprintf("%s in %s", w, strings.Join(fields[1:], " ")))
		}
	}
	return found, total, scanner.Err()
}

func searchRange(mem *os.File, from, to int64, forms [][]byte) (found []string, total int64, err error) {
	const piece = 1 << 20
	const longest = 128
	buf := make([]byte, piece+longest)
	defer clear(buf) // or the search would find itself
	for at := from; at < to; at += piece {
		n, err := mem.ReadAt(buf[:min(int64(len(buf)), to-at)], at)
		if n == 0 && err != nil {
			if errors.Is(err, unix.EIO) || errors.Is(err, unix.EFAULT) || errors.Is(err, io.EOF) {
				return found, total, nil // a file's mapping beyond its end
			}
			return nil, 0, err
		}
		total += int64(min(n, piece))
		for _, form := range forms {
			for i := 0; ; i++ {
				j := bytes.Index(buf[i:n], form)
				if j < 0 || i+j >= piece {
					break
				}
				i += j
				found = append(found, fmt.Sprintf("%d bytes at %#x", len(form), at+int64(i)))
			}
		}
	}
	return found, total, nil
}

// running returns the process of a program.
func running(program string) (int, error) {
	links, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		return 0, err
	}
	for _, link := range links {
		if path, err := os.Readlink(link); err == nil && path == program {
			return strconv.Atoi(filepath.Base(filepath.Dir(link)))
		}
	}
	return 0, fmt.Errorf("%s does not run", program)
}

// undumpable shows that the kernel writes no core of a process.
func undumpable(pid int) (string, error) {
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		return "", err
	}
	_, rest, _ := strings.Cut(string(limits), "Max core file size")
	f := strings.Fields(rest)
	if len(f) < 2 || f[0] != "0" || f[1] != "0" {
		return "", errors.New("the limit of core files is not 0")
	}
	group, err := groupInProc(pid)
	if err != nil {
		return "", err
	}
	// The look at the group has to tell: a process that can be dumped shows it.
	control := exec.Command("sleep", "60")
	control.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Gid: nogroup, NoSetGroups: true}}
	if err := control.Start(); err != nil {
		return "", err
	}
	shown, err := groupInProc(control.Process.Pid)
	_, _ = control.Process.Kill(), control.Wait()
	if err != nil || shown != nogroup {
		return "", fmt.Errorf("a process that can be dumped has group %d in /proc: %w", shown, err)
	}
	if group == nogroup {
		return "", errors.New("it can be dumped (PR_SET_DUMPABLE)")
	}
	return "RLIMIT_CORE is 0, and the process cannot be dumped", nil
}

// groupInProc returns to which group a process, started with nogroup, belongs
// in /proc.
func groupInProc(pid int) (uint32, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(status), "\nGid:")
	if f := strings.Fields(rest); len(f) < 2 || f[1] != strconv.Itoa(nogroup) {
		return 0, fmt.Errorf("process %d does not run with the group that it was started with", pid)
	}
	var st unix.Stat_t
	err = unix.Stat(fmt.Sprintf("/proc/%d/environ", pid), &st)
	return st.Gid, err
}

// keyring: the key of a device's mapping is a reference.
func keyring(device string) (string, error) {
	out, err := output("dmsetup", "table", "--showkeys")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 5 && f[3] == "crypt" {
			if !strings.HasPrefix(f[5], ":64:logon:cryptsetup:") {
				return "", errors.New("the table holds the key")
			}
			return "a reference to the keyring: " + f[5], nil
		}
	}
	return "", fmt.Errorf("no mapping on %s", device)
}
