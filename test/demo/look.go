package main

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/test/stack"
)

// podFile is where a pod with the volume writes.
func podFile(v *stack.Volume) string { return filepath.Join(v.Target, "data") }

func writeFile(path string, data []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	return errors.Join(err, file.Sync(), file.Close())
}

func contains(path, text string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	got := make([]byte, len(text))
	if _, err := io.ReadFull(file, got); err != nil {
		return err
	}
	if string(got) != text {
		return fmt.Errorf("%s begins with %q", path, got)
	}
	return nil
}

// scan reads a device or file to its end and fails if one of the texts, which
// have at most 64 bytes, is in it. It returns how many bytes it read.
func scan(path string, texts ...[]byte) (int64, error) {
	file, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer func() { _ = file.Close() }()
	// What mappings above wrote is not in the device's page cache.
	_ = unix.IoctlSetInt(int(file.Fd()), unix.BLKFLSBUF, 0)
	var total int64
	buf := make([]byte, 0, 4<<20)
	for {
		n, err := file.Read(buf[len(buf):cap(buf)])
		total += int64(n)
		buf = buf[:len(buf)+n]
		for _, text := range texts {
			if bytes.Contains(buf, text) {
				return total, fmt.Errorf("%s holds what it must not, before byte %d", path, total)
			}
		}
		if keep := min(len(buf), 64); len(buf) == cap(buf) {
			buf = buf[:copy(buf[:cap(buf)], buf[len(buf)-keep:])]
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// scanTree scans every regular file below dir but the volumes' backing files,
// which are read as devices, and what is mounted.
func scanTree(dir string, texts ...[]byte) (int, error) {
	n := 0
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || strings.HasPrefix(path, filepath.Join(dir, "volumes")) {
			return err
		}
		n++
		_, err = scan(path, texts...)
		return err
	})
	return n, err
}

// keyForms returns a volume's DEK as bytes, hexadecimal and base64.
func (t *tale) keyForms(v *stack.Volume) ([][]byte, error) {
	raw, err := v.Key(t.ctx)
	if err != nil {
		return nil, err
	}
	return [][]byte{raw, []byte(hex.EncodeToString(raw)), []byte(base64.StdEncoding.EncodeToString(raw)[:42])}, nil
}

// firstRecord shows a record of the store in short.
func firstRecord(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil || !json.Valid(b) {
			continue
		}
		var short bytes.Buffer
		if err := json.Compact(&short, b); err != nil {
			return "", err
		}
		return short.String()[:min(short.Len(), 330)] + "…", nil
	}
	return "", errors.New("the store has no record")
}

func space(path string) (int64, error) {
	var st unix.Statfs_t
	err := unix.Statfs(path, &st)
	return int64(st.Blocks) * st.Bsize, err
}

// mountSource returns what is mounted at path.
func mountSource(path string) (string, error) {
	table, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 1 && f[1] == path {
			return f[0], nil
		}
	}
	return "", fmt.Errorf("nothing is mounted at %s", path)
}

// leftovers lists mappings of ours, mounts below the node's directory, and loop
// devices of volumes that are gone.
func (t *tale) leftovers() (string, error) {
	var left []string
	nodes, err := filepath.Glob("/dev/mapper/cryptcsi-*")
	if err != nil {
		return "", err
	}
	left = append(left, nodes...)
	table, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); strings.HasPrefix(f[1], t.config.Dir) {
			left = append(left, f[1])
		}
	}
	if v, err := os.ReadDir(t.stack.Path("volumes")); err == nil && len(v) == 0 {
		loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
		left = append(left, loops...)
	}
	return strings.Join(left, " "), nil
}

// faults makes loopdriver misbehave as told, or behave.
func (t *tale) faults(faults ...string) error {
	b, err := json.Marshal(append([]string{}, faults...))
	if err != nil {
		return err
	}
	path := t.stack.Path("volumes", "faults.json")
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// refused turns a refusal with the words into evidence, and anything else into
// an error.
func refused(err error, words string) (string, error) {
	if err == nil {
		return "", errors.New("it was accepted")
	}
	if !strings.Contains(err.Error(), words) {
		return "", fmt.Errorf("refused in other words: %w", err)
	}
	return err.Error(), nil
}

// dataSector finds where on the raw device the sealed volume's file lies: it
// writes the file again with other content in the same place and looks which
// sector changed as a whole. Sectors before it may be the journal's.
func (t *tale) dataSector() (int64, error) {
	var images [2][]byte
	for i, text := range []string{marker, otherMarker} {
		if err := t.sealed.Up(t.ctx); err != nil {
			return 0, err
		}
		if err := writeFile(podFile(t.sealed), []byte(strings.Repeat(text, 64<<10/len(text)))); err != nil {
			return 0, err
		}
		if err := t.sealed.Down(t.ctx); err != nil {
			return 0, err
		}
		var err error
		if images[i], err = sample(t.sealed.Device()); err != nil {
			return 0, err
		}
	}
	for at := len(images[0]) - samples; at >= 0; at -= samples {
		changed := 0
		for i := range samples {
			if images[0][at+i] != images[1][at+i] {
				changed++
			}
		}
		if changed > samples*9/10 {
			return int64(at)*(4096/samples) + 2048, nil
		}
	}
	return 0, errors.New("the file's data was not found on the raw device")
}

// samples is how many bytes of each 4096-byte sector sample takes.
const samples = 64

// sample reads a device and returns evenly spaced bytes of it.
func sample(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	var out []byte
	buf := make([]byte, mib)
	for {
		n, err := io.ReadFull(file, buf)
		for i := 0; i < n; i += 4096 / samples {
			out = append(out, buf[i])
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// flip inverts bit 2 of the byte at an offset.
func flip(path string, at int64) error {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	b := make([]byte, 1)
	_, err = file.ReadAt(b, at)
	if err == nil {
		_, err = file.WriteAt([]byte{b[0] ^ 4}, at)
	}
	return errors.Join(err, file.Sync(), file.Close())
}
