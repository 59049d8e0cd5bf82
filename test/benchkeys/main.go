// Command benchkeys measures the key service against what it could be compared
// with, in one run on one machine, and prints tables. Every figure is a
// comparison of things that take turns; none is a test. The service is
// bin/key-service in a process of its own, with TLS, a policy file and an audit
// log in a file.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	b := &bench{}
	short := flag.Bool("short", false, "a small run of some seconds, to see that it works")
	flag.IntVar(&b.rounds, "rounds", 7, "how often each of the compared is measured")
	flag.DurationVar(&b.round, "round", 2*time.Second, "how long each measurement takes")
	flag.IntVar(&b.callers, "callers", 64, "callers at a time, on 8 connections")
	flag.IntVar(&b.nodes, "nodes", 1000, "nodes of the storm")
	flag.IntVar(&b.volumes, "volumes", 30, "volumes of each node of the storm")
	flag.StringVar(&b.bin, "bin", "", "directory of key-service; empty is that of this program")
	echo := flag.String("serve-echo", "", "serve the echo that the service is compared with, on this address, with the TLS files in the working directory")
	flag.Parse()
	if *short {
		b.rounds, b.round, b.nodes, b.volumes = 1, 200*time.Millisecond, 20, 30
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	run := b.run
	if *echo != "" {
		run = func(ctx context.Context, _ io.Writer) error { return serveEcho(ctx, *echo) }
	}
	if err := run(ctx, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "benchkeys: %v\n", err)
		stop()
		os.Exit(1)
	}
}

// bench is one run.
type bench struct {
	rounds         int
	round          time.Duration
	callers        int
	nodes, volumes int
	bin            string

	*site
	echoed float64 // microseconds of processor for one call of the echo
}

func (b *bench) run(ctx context.Context, w io.Writer) (err error) {
	if b.bin == "" {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		b.bin = filepath.Dir(self)
	}
	if b.site, err = newSite(b.bin); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			fmt.Fprint(os.Stderr, b.logs())
		}
		err = errors.Join(err, b.remove())
	}()
	fmt.Fprintf(w, "%d CPUs for clients and servers together, %d callers on %d connections, median of %d rounds of %v\n\n",
		runtime.NumCPU(), b.callers, connections, b.rounds, b.round)
	for _, part := range []func(context.Context, io.Writer) error{b.rates, b.parts, b.storm} {
		if err := part(ctx, w); err != nil {
			return err
		}
	}
	return nil
}

// table prints rows in columns.
func table(w io.Writer, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		for i, cell := range row {
			if i > 0 {
				fmt.Fprint(t, "\t")
			}
			fmt.Fprint(t, cell)
		}
		fmt.Fprintln(t)
	}
	fmt.Fprintln(t)
	return t.Flush()
}
