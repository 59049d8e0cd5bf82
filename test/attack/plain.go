package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
)

// plainName is the mapping that plain cryptsetup makes.
const plainName = "plain-cryptsetup"

// canary is written through a mapping that should encrypt.
const canary = "CANARY: nobody outside may read this, wherever it is written. "

// seen is what plain cryptsetup did with a disk.
type seen struct {
	opened  bool
	hangs   string // in which way, where it does
	message string // of a refusal
	table   table
	content string // of the volume, as its mapping shows it
	leaks   bool   // what is written through the mapping stands on the disk
}

// plainly opens a backing file with cryptsetup as an administrator would who
// trusts it. Nothing of ours takes part.
func (s *suite) plainly(file string, key []byte, patience time.Duration, args []string) (seen, error) {
	dev, detach, err := loop(file, false)
	if err != nil {
		return seen{}, err
	}
	defer detach()
	return s.plainlyOn(dev, file, key, patience, args)
}

func (s *suite) plainlyOn(dev, file string, key []byte, patience time.Duration, args []string) (seen, error) {
	// Bounded memory: a guest that runs out of it kills whom it likes.
	line := append([]string{"-c", `ulimit -v 1500000; exec cryptsetup "$@"`, "sh", "open", "--key-file=-", "--batch-mode"}, args...)
	out, hangs, err := bounded(patience, key, "sh", append(line, dev, plainName)...)
	if hangs != "" || err != nil {
		return seen{hangs: hangs, message: lastLine(out)}, errors.Join(removeMapping(plainName))
	}
	o := seen{opened: true}
	o.table, err = readTable(plainName)
	path := "/dev/mapper/" + plainName
	if _, statErr := os.Stat(path); err == nil && statErr == nil {
		o.content = content(path)
		if write(path, 3*mib, []byte(canary)) == nil {
			o.leaks, err = holds(file, canary)
		}
	}
	return o, errors.Join(err, removeMapping(plainName))
}

// content says what has become of the volume's blocks.
func content(path string) string {
	n, err := intact(path)
	if err == nil && n == 2 {
		return "data readable"
	}
	if err == nil {
		return "data unreadable"
	}
	got, err := read(path, firstAt, blockSize)
	switch {
	case err == nil && bytes.Equal(got, older()):
		return "older data"
	case err == nil && bytes.Equal(got, second()):
		return "data moved"
	default:
		return "other data"
	}
}

// removeMapping removes a mapping and the integrity layer below it.
func removeMapping(name string) error {
	var errs []error
	for _, n := range []string{name, name + "_dif"} {
		if err := dm.Remove(n); err != nil && !errors.Is(err, dm.ErrNotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// String is the table's cell.
func (o seen) String(normal table) string {
	switch {
	case o.hangs != "":
		return o.hangs
	case !o.opened:
		return "refused: " + o.message
	}
	parts := []string{"opens"}
	if o.leaks {
		parts = append(parts, "PLAINTEXT ON DISK")
	}
	parts = append(parts, o.table.differences(normal)...)
	if o.content != "" && o.content != "data readable" || len(parts) == 1 {
		parts = append(parts, o.content)
	}
	return strings.Join(parts, ", ")
}

// bounded runs a program and ends it when patience is over, the hard way where
// it has to; hangs says so.
func bounded(patience time.Duration, stdin []byte, name string, args ...string) (out, hangs string, err error) {
	cmd := exec.Command(name, args...)
	var b bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &b, &b
	if err := cmd.Start(); err != nil {
		return "", "", err
	}
	done := make(chan struct{})
	go func() {
		err = cmd.Wait()
		close(done)
	}()
	select {
	case <-done:
		return b.String(), "", err
	case <-time.After(patience):
	}
	_ = cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-done:
		return b.String(), fmt.Sprintf("runs without end (ended after %v)", patience), nil
	case <-time.After(2 * time.Second):
	}
	_ = cmd.Process.Kill()
	<-done
	return b.String(), "runs without end, ignores SIGTERM", nil
}

// output runs a program to its end.
func output(name string, args ...string) (string, error) {
	var out, errs bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.String(), nil
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}
