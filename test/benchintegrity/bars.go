package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// bar is one of the aims and what became of it.
type bar struct {
	aim    string
	figure float64
	most   bool // the aim is the most that is allowed; else the least
	limit  float64
	note   string
}

// what was aimed at, and with what it was compared.
func (b bar) what() string {
	if b.note == "" {
		return b.aim
	}
	return b.aim + " (" + b.note + ")"
}

func (b bar) wanted() string {
	if b.most {
		return fmt.Sprintf("at most %.2f", b.limit)
	}
	return fmt.Sprintf("at least %.2f", b.limit)
}

func (b bar) verdict() string {
	if b.most && b.figure <= b.limit || !b.most && b.figure >= b.limit {
		return "reached"
	}
	return "NOT REACHED"
}

// allBars are the aims of which there are figures.
func (r *results) allBars() []bar { return slices.Concat(r.readyBars(), r.speedBars()) }

// bars prints the aims.
func (r *results) bars(w io.Writer) error {
	fmt.Fprintln(w, "\nThe aims")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, b := range r.allBars() {
		fmt.Fprintf(t, "%s\t%.2f\t%s\t%s\n", b.what(), b.figure, b.wanted(), b.verdict())
	}
	return t.Flush()
}

// noise is how far apart two equal things may be found.
const noise = 0.05

func (r *results) readyBars() (bars []bar) {
	for _, part := range []struct{ part, subject, what string }{{partReady, oursNew, "Open"}, {partStage, staged, "NodeStageVolume"}} {
		var block []float64
		for _, x := range r.All {
			if x.Part == part.part && x.Subject == part.subject && strings.HasSuffix(x.What, "block") {
				block = append(block, x.median())
			}
		}
		if len(block) > 1 {
			bars = append(bars, bar{part.what + " of a new raw volume, slowest size to fastest", slices.Max(block) / slices.Min(block), true, 1.2, ""})
		}
	}
	_, whats := r.names(partMkfs)
	for _, what := range whats {
		base, note := wipedMade, "against a volume that was wiped"
		if _, ok := r.ratio(partMkfs, what, oursNew, base); !ok {
			base, note = oursAgain, "stand-in: the same again, where all that is written has its tags"
		}
		if ratio, ok := r.ratio(partMkfs, what, oursNew, base); ok {
			bars = append(bars, bar{"mkfs, new volume, " + what, ratio, true, 1.2, note})
		}
	}
	return bars
}

func (r *results) speedBars() (bars []bar) {
	add := func(aim, part, what, subject, base string, limit float64) {
		if ratio, ok := r.ratio(part, what, subject, base); ok {
			bars = append(bars, bar{aim + ": " + what, ratio, false, limit, ""})
		}
	}
	for _, what := range workloads() {
		add("finished against wiped", partSpeed, what, finished, wiped, 1-noise)
	}
	least := func(what string) float64 {
		if what == fsyncWrite {
			return 0.5
		}
		return 0.9
	}
	for _, what := range []string{seqWrite, randWrite, fsyncWrite} {
		add("not hydrated against wiped", partSpeed, what, unhydrated, wiped, least(what))
	}
	for _, what := range []string{seqWrite, randWrite, fsyncWrite} {
		add("csi-plugin hydrates, against one left alone", partDuring, what, duringNow, duringNever, least(what))
		add("csi-plugin hydrates, against finished", partDuring, what, duringNow, duringDone, least(what))
	}
	for _, what := range workloads() {
		for _, raw := range []string{rawHMAC, rawHMACWQ} {
			add("finished against "+raw, partSpeed, what, finished, raw, 1-noise)
		}
		for _, raw := range []string{rawPlain, rawPlainWQ} {
			add("encryption only against "+raw, partSpeed, what, encrypted, raw, 1-noise)
		}
	}
	return bars
}
