package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"strings"

	"github.com/cryptcsi/cryptcsi/internal/keyconfig"
)

// likeProcess takes the flags about keys from a `key-service serve` that runs, its
// --config included. A verb in the service's own pod needs no others: it has the same
// files and credentials there.
func (c *command) likeProcess(pid int) error {
	ours := flag.NewFlagSet("", flag.ContinueOnError)
	new(keyconfig.Flags).Add(ours)
	var also []string
	c.Visit(func(f *flag.Flag) {
		if ours.Lookup(f.Name) != nil {
			also = append(also, "--"+f.Name)
		}
	})
	if also != nil {
		return usageError(fmt.Sprintf("%s: --like-process excludes %s", c.Name(), strings.Join(also, ", ")))
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return fmt.Errorf("--like-process: %w", err)
	}
	args := strings.Split(string(bytes.TrimSuffix(line, []byte{0})), "\x00")
	if len(args) < 2 || args[1] != "serve" {
		return usageError(fmt.Sprintf("%s: process %d is no key-service serve", c.Name(), pid))
	}
	served := newCommand("serve", args[2:], c.stdout, c.stderr)
	f := &serveFlags{}
	f.add(served)
	if err := served.parse(0, 0); err != nil {
		return fmt.Errorf("--like-process: %w", err)
	}
	if f.sealed {
		return usageError(fmt.Sprintf("%s: the key-service of process %d was started with --sealed, and what it was given is in its memory only", c.Name(), pid))
	}
	c.keys = served.keys
	return nil
}
