// Command bench measures, on a kernel with device-mapper, staging through
// csi-plugin against the same done by hand, and prints a table. Every figure is
// a comparison of two things in one run on one kernel; none is a test.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/cryptcsi/cryptcsi/test/stack"
)

const mib = 1 << 20

func main() {
	rounds := flag.Int("rounds", 10, "how often each pair is measured")
	only := flag.String("only", "", "measure this part alone: stage, steps, many, stalled, hydration")
	many := flag.Int("volumes", 32, "how many volumes are staged at once")
	flag.Parse()
	b := &bench{ctx: context.Background(), rounds: *rounds, many: *many, only: *only}
	if err := b.run(os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

type bench struct {
	ctx          context.Context
	rounds, many int
	only         string
	stack        *stack.Stack
	table        [][]string
	bars         []string // where the time of stages goes
}

func (b *bench) run(w io.Writer) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "cryptcsi-bench-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	b.stack, err = stack.Start(b.ctx, stack.Config{Dir: dir, Bin: filepath.Dir(self), PluginArgs: []string{"--metrics-address=" + metricsAddress}})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			fmt.Fprintln(os.Stderr, b.stack.Logs())
		}
		err = errors.Join(err, b.stack.Stop())
	}()
	for _, part := range []struct {
		name string
		run  func() error
	}{{"stage", b.stageAgainstHand}, {"steps", b.stageSteps}, {"many", b.manyAtOnce}, {"stalled", b.stalledDevice}, {"hydration", b.whileHydrating}} {
		if b.only != "" && b.only != part.name {
			continue
		}
		if err := part.run(); err != nil {
			return err
		}
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "WHAT\tOURS\tAGAINST\tTHAT\tRATIO\tAIM")
	for _, row := range b.table {
		for i, cell := range row {
			if i > 0 {
				fmt.Fprint(t, "\t")
			}
			fmt.Fprint(t, cell)
		}
		fmt.Fprintln(t)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if len(b.bars) > 0 {
		fmt.Fprintln(w, "\nWhere the time of a stage goes (key: the KEK is local; fill: mkfs):\n\n"+strings.Join(b.bars, "\n"))
	}
	return nil
}

// row adds a comparison of two times.
func (b *bench) row(what string, ours time.Duration, against string, that time.Duration, aim string) {
	b.table = append(b.table, []string{what, seconds(ours), against, seconds(that), fmt.Sprintf("%.2f", that.Seconds()/ours.Seconds()), aim})
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.3f s", d.Seconds()) }

func timed(do func() error) (time.Duration, error) {
	began := time.Now()
	err := do()
	return time.Since(began), err
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}
