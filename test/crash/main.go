// Command crash runs inside a guest that is about to be killed: it opens the
// volume on a disk that outlives the guest, and says each step of the
// crypt-worker on standard output. Its tests boot guests, kill them at a step,
// boot again on the same disk and look what became of the volume.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"os"
	"strconv"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/worker"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/secret"
)

// content is what a finished volume begins with.
const content = "written before the crash"

func main() {
	if len(os.Args) == 3 && os.Args[1] == "crypt-worker" {
		os.Exit(serve(os.Args[2]))
	}
	device := flag.String("device", "/dev/ubda", "the disk")
	integrity := flag.String("integrity", "", "integrity of the volume")
	stop := flag.Int("stop", 0, "at which step to say so and wait for the end; 0 for none")
	flag.Parse()
	if err := run(*device, dek.Integrity(*integrity), *stop); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("the content is there")
}

// serve is a crypt-worker that stops at a step.
func serve(stop string) int {
	left, _ := strconv.Atoi(stop)
	err := worker.Serve(os.NewFile(cryptmapper.WorkerFD, "conn"), func(step string) {
		if left--; left != 0 {
			return
		}
		out, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/1", os.Getppid()), os.O_WRONLY, 0)
		if err == nil {
			fmt.Fprintf(out, "STOPPED AT: %s\n", step)
		}
		select {} // until the guest is killed
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// run finishes the volume, as a node with a fresh record would, and then reads
// it, as a node whose record says formatted would.
func run(device string, integrity dek.Integrity, stop int) error {
	ctx := context.Background()
	key := sha256.Sum256([]byte("the key of this volume"))
	d := dek.DEK{
		ID: "crash.cryptcsi.io/vol", State: dek.Prepared, Key: secret.Take(key[:]),
		Spec:  dek.Spec{Cipher: dek.CipherXTS, Integrity: integrity},
		Claim: dek.Claim{Node: "guest", UUID: "11111111-2222-4333-8444-555555555555"},
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	m := cryptmapper.New(cryptmapper.Options{Worker: []string{self, "crypt-worker", strconv.Itoa(stop)}})
	defer m.Shutdown()
	v := cryptmapper.Volume{Name: cryptmapper.Prefix + "crash", Device: device}
	mapping, err := m.Open(ctx, v, d)
	if err != nil {
		return err
	}
	if !mapping.Made {
		if err := write(mapping.Path); err != nil {
			return err
		}
		if mapping, err = m.MarkMade(ctx, v, d); err != nil {
			return err
		}
	}
	if err := m.Close(ctx, v.Name); err != nil {
		return err
	}
	d.State, d.Header = dek.Formatted, mapping.Header
	if mapping, err = m.Open(ctx, v, d); err != nil {
		return err
	}
	return errors.Join(check(mapping.Path), m.Close(ctx, v.Name))
}

func write(path string) error {
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteString(content)
	return errors.Join(err, file.Close())
}

// check reads the whole mapping: every sector must be readable.
func check(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	buf := make([]byte, 1<<20)
	for first := true; ; first = false {
		n, err := file.Read(buf)
		if first && !bytes.HasPrefix(buf[:n], []byte(content)) {
			return fmt.Errorf("the volume begins with %q", buf[:32])
		}
		if n == 0 {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
