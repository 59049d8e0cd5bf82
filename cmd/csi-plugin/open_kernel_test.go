package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

const mib = 1 << 20

// program is the path of one of our programs, all of one build.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs("../../bin/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// machine is a loop device, KMS and store, for the real programs.
type machine struct {
	device, name string
	dir          string
	direct       []string // flags
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	kernel.Need(t, "root", "loop", "dm-crypt", "dm-integrity", "keyring", "exec:blkid",
		"exec:"+program(t, "csi-plugin"), "exec:"+program(t, "crypt-worker"), "exec:"+program(t, "key-service"))
	kernel.NoLeaks(t)
	m := &machine{device: kernel.Loop(t, 48*mib), name: "State_disk.1+x", dir: t.TempDir()}
	for _, secret := range []string{"master", "salt", "wrong"} {
		if err := os.WriteFile(m.file(secret), bytes.Repeat([]byte(secret[:1]), 32), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m.direct = []string{"--kms-uri=cluster://" + m.file("master") + "?salt-file=" + m.file("salt"), "--storage-uri=file://" + m.file("store")}
	if err := os.Mkdir(m.file("store"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.close(t) })
	return m
}

func (m *machine) file(name string) string { return filepath.Join(m.dir, name) }

// process is one of our programs at work.
type process struct {
	cmd    *exec.Cmd
	stdout bytes.Buffer
	log    *logbook
	ended  chan error
}

func begin(t *testing.T, name string, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(program(t, name), args...), log: newLogbook(), ended: make(chan error, 1)}
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.ended <- p.cmd.Wait() }()
	return p
}

// code waits for the end and returns the exit code, -1 after a signal.
func (p *process) code(t *testing.T) int {
	t.Helper()
	select {
	case err := <-p.ended:
		if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(2 * time.Minute):
		_ = p.cmd.Process.Kill()
		t.Fatalf("%s does not end:\n%s", p.cmd, p.log)
		return 0
	}
}

func (m *machine) begin(t *testing.T, args ...string) *process {
	t.Helper()
	return begin(t, "csi-plugin", append([]string{"open", "--dek-id=" + stateDisk, "--device=" + m.device, "--name=" + m.name}, args...)...)
}

// opens runs open, which has to succeed and to print the path alone.
func (m *machine) opens(t *testing.T, args ...string) {
	t.Helper()
	m.opened(t, m.begin(t, args...))
}

func (m *machine) opened(t *testing.T, p *process) {
	t.Helper()
	if code := p.code(t); code != 0 || p.stdout.String() != dm.Path(m.name)+"\n" {
		t.Fatalf("%s ends with %d and prints %q:\n%s", p.cmd, code, &p.stdout, p.log)
	}
}

// refuses runs open, which has to end with 1 and the words and to print nothing.
func (m *machine) refuses(t *testing.T, words string, args ...string) {
	t.Helper()
	p := m.begin(t, args...)
	if code := p.code(t); code != 1 || p.stdout.Len() > 0 || !strings.Contains(p.log.String(), words) {
		t.Errorf("%s ends with %d and prints %q, want %q:\n%s", p.cmd, code, &p.stdout, words, p.log)
	}
}

func (m *machine) close(t *testing.T) {
	t.Helper()
	p := begin(t, "csi-plugin", "close", "--name="+m.name)
	if code := p.code(t); code != 0 {
		t.Errorf("close ends with %d:\n%s", code, p.log)
	}
	m.isClosed(t)
}

func (m *machine) isClosed(t *testing.T) {
	t.Helper()
	if _, err := dm.Status(m.name); !errors.Is(err, dm.ErrNotFound) {
		t.Errorf("the mapping is there: %v", err)
	}
}

// write writes something through the mapping, holds looks whether it is there.
func (m *machine) write(t *testing.T) {
	t.Helper()
	f := open(t, dm.Path(m.name), os.O_RDWR)
	defer f.Close()
	_, err := f.WriteAt([]byte("what the disk holds"), 8*mib)
	if err = errors.Join(err, f.Sync()); err != nil {
		t.Fatal(err)
	}
}

func (m *machine) holds(t *testing.T) {
	t.Helper()
	f := open(t, dm.Path(m.name), os.O_RDONLY)
	defer f.Close()
	got := make([]byte, len("what the disk holds"))
	if _, err := f.ReadAt(got, 8*mib); err != nil || string(got) != "what the disk holds" {
		t.Errorf("it holds %q, %v", got, err)
	}
}

// content is what stands on the device itself.
func (m *machine) content(t *testing.T) []byte {
	t.Helper()
	f := open(t, m.device, os.O_RDONLY)
	defer f.Close()
	content := make([]byte, 48*mib)
	if _, err := f.ReadAt(content, 0); err != nil {
		t.Fatal(err)
	}
	return content
}

// TestKernelOpen: with KMS and store of its own.
func TestKernelOpen(t *testing.T) {
	for _, integrity := range [][]string{nil, {"--integrity=" + string(dek.IntegrityHMAC)}} {
		m := newMachine(t)
		flags := append(m.direct, integrity...)
		m.refuses(t, "there is no record of this DEK", flags...)
		m.opens(t, append(flags, "--create-keys")...)
		m.write(t)
		m.opens(t, flags...) // again, while it is open
		m.close(t)
		if bytes.Contains(m.content(t), []byte("what the disk holds")) {
			t.Error("it stands on the disk in the clear")
		}
		m.opens(t, append(flags, "--read-only")...)
		m.holds(t)
		if f, err := os.OpenFile(dm.Path(m.name), os.O_RDWR, 0); err == nil {
			_, err = f.WriteAt(make([]byte, 4096), 0)
			if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
				t.Error("what is read-only can be written")
			}
		}
		m.close(t)
		m.close(t)

		// Another device under the name, and a disk that was blanked.
		m.opens(t, flags...)
		own := m.device
		m.device = kernel.Loop(t, 48*mib)
		m.refuses(t, "it will not be formatted", flags...)
		m.device = own
		m.holds(t) // through the mapping, which is there still
		m.close(t)
		f := open(t, m.device, os.O_RDWR)
		if _, err := f.WriteAt(make([]byte, 16*mib), 0); err != nil {
			t.Fatal(err)
		}
		f.Close()
		m.refuses(t, "it will not be formatted", flags...)
		m.isClosed(t)
	}
}

// TestKernelOpenWaits: for a key service that comes up later, and not for one
// that refuses.
func TestKernelOpenWaits(t *testing.T) {
	m := newMachine(t)
	socket := "unix://" + m.file("key.sock")
	prefixes := m.file("prefixes")
	if err := os.WriteFile(prefixes, []byte("local: [\""+stateDisk+"\"]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	flags := []string{"--key-service=" + socket, "--key-service-timeout=300ms", "--wait=10m"}
	p := m.begin(t, append(flags, "--create-keys")...)
	p.log.await(t, `"not open yet" .*gives_up_in="(9m|10m)`)
	service := begin(t, "key-service", append([]string{"serve", "--listen=" + socket, "--volume-policy=prefix", "--prefix-file=" + prefixes, "--controller-identity=local"}, m.direct...)...)
	defer func() {
		_ = service.cmd.Process.Signal(syscall.SIGTERM)
		if code := service.code(t); code != 0 {
			t.Errorf("key-service ends with %d:\n%s", code, service.log)
		}
	}()
	m.opened(t, p)
	m.write(t)
	m.close(t)
	m.opens(t, flags...)
	m.holds(t)
	m.close(t)
	p = begin(t, "csi-plugin", append([]string{"open", "--dek-id=other.example.org/1", "--device=" + m.device, "--name=" + m.name}, flags...)...)
	if code := p.code(t); code != 1 || !strings.Contains(p.log.String(), "may not call GetDEK") {
		t.Errorf("the key of another disk: %d\n%s", code, p.log)
	}
	m.isClosed(t)
}

// TestKernelOpenKilled: whenever open is killed in the disk's first life, the
// next one goes on.
func TestKernelOpenKilled(t *testing.T) {
	m := newMachine(t)
	flags := append(m.direct, "--create-keys", "--wait=1m")
	killed := 0
	for after := 100 * time.Millisecond; ; after = after * 3 / 2 {
		p := m.begin(t, flags...)
		timer := time.AfterFunc(after, func() { _ = p.cmd.Process.Kill() })
		code := p.code(t)
		timer.Stop()
		if code == 0 {
			break
		}
		if code != -1 {
			t.Fatalf("after %d kills open ends with %d:\n%s", killed, code, p.log)
		}
		killed++
	}
	t.Logf("killed %d times", killed)
	m.write(t)
	m.close(t)
	m.opens(t, m.direct...)
	m.holds(t)
}

// TestKernelRecovery: the key service never comes. An operator does, after
// others who are not let in, with what is wrong and at last with what is right.
func TestKernelRecovery(t *testing.T) {
	m := newMachine(t)
	m.opens(t, append(m.direct, "--create-keys")...)
	m.write(t)
	m.close(t)
	before := m.content(t)

	ca := newAuthority(t)
	node := strings.Fields(writeFiles(t, ca, "node"))
	p := m.begin(t, append(node, "--key-service=unix://"+m.file("none.sock"), "--key-service-timeout=300ms",
		"--recovery-listen=127.0.0.1:0", "--recovery-operator-identity=operator")...)
	address := p.log.await(t, `"an operator may bring the key.*" address="([^"]+)"`)
	p.log.await(t, `"not open yet" .*gives_up_in="never"`)
	right := fingerprint(t, strings.TrimPrefix(node[0], "--recovery-cert-file="))
	recoverAs := func(who, master, pin string) (int, string) {
		cert, key := ca.issue(t, who)
		r := begin(t, "key-service", "recover", "--address=dns:///"+address, "--ca-file="+ca.file, "--cert-file="+cert, "--key-file="+key,
			"--server-key-sha256="+pin, "--kms-uri=cluster://{0}?salt-file={1}", "--storage-uri=file://"+m.file("store"),
			"--file="+m.file(master), "--file="+m.file("salt"))
		code := r.code(t)
		return code, r.stdout.String() + r.log.String()
	}
	for _, tt := range []struct{ who, master, pin, says string }{
		{"stranger", "master", right, "stranger may not recover this node"},
		{"operator", "master", strings.Repeat("0", 64), "nothing was sent"},
		{"operator", "wrong", right, "tried and not taken, nothing has changed"},
	} {
		if code, said := recoverAs(tt.who, tt.master, tt.pin); code != 1 || !strings.Contains(said, tt.says) {
			t.Errorf("%+v: exit code %d:\n%s", tt, code, said)
		}
	}
	if n := strings.Count(p.log.String(), `] "recovery" identity=`); n != 2 { // the one with the wrong pin has not called
		t.Errorf("%d attempts in the log, want 2:\n%s", n, p.log)
	}
	m.isClosed(t)
	if !bytes.Equal(before, m.content(t)) {
		t.Error("the device was written")
	}
	if code, said := recoverAs("operator", "master", right); code != 0 || !strings.Contains(said, `is open on the node as "`+m.name+`"`) {
		t.Errorf("what is right: exit code %d:\n%s", code, said)
	}
	m.opened(t, p)
	m.holds(t)
}

// fingerprint is that of a certificate's public key.
func fingerprint(t *testing.T, certFile string) string {
	t.Helper()
	text, err := os.ReadFile(certFile)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}
