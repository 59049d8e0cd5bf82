// Command demo shows, on a kernel with device-mapper, what cryptcsi does to the
// volumes of an unmodified CSI driver: one line per step with its time, a table
// of what held at the end, and exit code 0 only if all of it did. The node gets
// its keys from a key service; with --keys=direct from KMS and store themselves.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/cryptcsi/cryptcsi/test/stack"
)

func main() {
	keys := flag.String("keys", "service", `where the node gets keys: "service" (a key service) or "direct" (KMS and store)`)
	flag.Parse()
	if *keys != "service" && *keys != "direct" || flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "demo: --keys must be service or direct, and there are no arguments")
		os.Exit(2)
	}
	if err := run(context.Background(), os.Stdout, *keys == "service"); err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		os.Exit(1)
	}
}

// story runs statements one after the other and remembers which held. After
// one that did not, the others are not tried: they build on each other.
type story struct {
	w    io.Writer
	rows []row
	err  error
}

type row struct {
	statement, evidence string
	took                time.Duration
	held                bool
}

// that runs one statement; do returns the evidence for it.
func (s *story) that(statement string, do func() (string, error)) {
	if s.err != nil {
		return
	}
	began := time.Now()
	evidence, err := do()
	took := time.Since(began)
	s.rows = append(s.rows, row{statement, evidence, took, err == nil})
	if err != nil {
		s.err = fmt.Errorf("%s: %w", statement, err)
		fmt.Fprintf(s.w, "%7.2fs  FAILED  %s\n%20s%v\n", took.Seconds(), statement, "", err)
		return
	}
	fmt.Fprintf(s.w, "%7.2fs  %s\n", took.Seconds(), statement)
	for line := range strings.Lines(evidence) {
		fmt.Fprintf(s.w, "%9s    %s", "", line)
	}
	fmt.Fprintln(s.w)
}

func (s *story) table() {
	fmt.Fprintln(s.w)
	w := tabwriter.NewWriter(s.w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "HELD\tSECONDS\tSTATEMENT")
	for _, r := range s.rows {
		held := "yes"
		if !r.held {
			held = "NO"
		}
		fmt.Fprintf(w, "%s\t%.2f\t%s\n", held, r.took.Seconds(), r.statement)
	}
	_ = w.Flush()
}

func run(ctx context.Context, w io.Writer, keyService bool) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "cryptcsi-demo-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	t := &tale{ctx: ctx, story: &story{w: w}, config: stack.Config{Dir: dir, Bin: filepath.Dir(self), KeyService: keyService}}
	began := time.Now()
	t.tell()
	t.table()
	if t.err != nil && t.stack != nil {
		fmt.Fprintln(os.Stderr, t.stack.Logs())
	}
	if t.stack != nil {
		t.err = errors.Join(t.err, t.stack.Stop())
	}
	if t.err == nil {
		fmt.Fprintf(w, "\nAll %d statements held, in %.1f s.\n", len(t.rows), time.Since(began).Seconds())
	}
	return t.err
}
