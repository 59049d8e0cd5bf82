package main

import (
	"errors"
	"fmt"
	"html"
	"math"
	"os"
	"path/filepath"
	"strings"
)

// Where in performance.md the tables go.
const (
	figuresBegin = "<!-- figures: written by benchintegrity -draw -->"
	figuresEnd   = "<!-- end of figures -->"
)

// drawAll puts the figures of one or more runs of different parts into performance.md, and its plot beside it.
func drawAll(from, docs string) error {
	r := &results{}
	for path := range strings.SplitSeq(from, ",") {
		more, err := loadResults(path)
		if err != nil {
			return err
		}
		r.Kernel, r.Date, r.All = more.Kernel, more.Date, append(r.All, more.All...)
	}
	path := filepath.Join(docs, "performance.md")
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, begins := strings.Cut(string(text), figuresBegin)
	_, after, ends := strings.Cut(rest, figuresEnd)
	if !begins || !ends {
		return fmt.Errorf("%s has no place for figures: it must hold %q and %q", path, figuresBegin, figuresEnd)
	}
	page := before + figuresBegin + "\n\n" + r.markdown() + figuresEnd + after
	return errors.Join(
		os.WriteFile(path, []byte(page), 0o644),
		os.WriteFile(filepath.Join(docs, "performance.svg"), []byte(r.svg()), 0o644),
	)
}

// markdown is all tables and the aims.
func (r *results) markdown() string {
	var w strings.Builder
	fmt.Fprintf(&w, "Measured %s on Linux %s.\n\n", r.Date, r.Kernel)
	for _, t := range tables() {
		subjects, whats := r.names(t.part)
		if len(whats) == 0 {
			continue
		}
		first, _ := r.find(t.part, whats[0], subjects[0])
		fmt.Fprintf(&w, "**%s; %d rounds**\n\n| | %s |\n|---%s|\n", t.title, len(first.Values), strings.Join(subjects, " | "), strings.Repeat("|---", len(subjects)))
		for _, what := range whats {
			fmt.Fprintf(&w, "| %s |", what)
			for _, s := range subjects {
				fmt.Fprintf(&w, " %s |", r.cell(t.part, what, s, t.base))
			}
			fmt.Fprintln(&w)
		}
		fmt.Fprintln(&w)
	}
	fmt.Fprint(&w, "**The aims**\n\n| aim | figure | wanted | |\n|---|---|---|---|\n")
	for _, b := range r.allBars() {
		fmt.Fprintf(&w, "| %s | %.2f | %s | %s |\n", b.what(), b.figure, b.wanted(), b.verdict())
	}
	fmt.Fprintln(&w)
	return w.String()
}

// The plot: above, how long a new volume takes by its size, both on scales of
// tens; below, speeds as ratios to a volume that was wiped.
const (
	plotWidth, plotLeft    = 860, 250
	linesTop, linesHeight  = 50, 240
	barsTop, barHeight     = 350, 12
	barsScale, groupMargin = 380.0, 14
)

func colours() []string {
	return []string{"#1b6ca8", "#c8553d", "#4f8a3d", "#8a5fa8", "#b08a1e", "#5a5a5a"}
}

func (r *results) svg() string {
	var w strings.Builder
	lines := r.svgLines()
	bars, height := r.svgBars()
	fmt.Fprintf(&w, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", plotWidth, height)
	fmt.Fprintf(&w, `<rect width="%d" height="%d" fill="white"/>`+"\n%s%s</svg>\n", plotWidth, height, lines, bars)
	return w.String()
}

func text(w *strings.Builder, x, y float64, more, s string) {
	fmt.Fprintf(w, `<text x="%.0f" y="%.0f" %s>%s</text>`+"\n", x, y, more, html.EscapeString(s))
}

// svgLines draws the time until a new volume is usable.
func (r *results) svgLines() string {
	var w strings.Builder
	text(&w, 20, 25, `font-size="15"`, "Seconds until a new volume with integrity can be used, by its size")
	const low, high = 0.1, 10000.0
	y := func(s float64) float64 {
		return linesTop + linesHeight*(1-math.Log10(s/low)/math.Log10(high/low))
	}
	x := func(gib int) float64 { return 80 + 400*math.Log2(float64(gib))/8 }
	for s := low; s <= high; s *= 10 {
		fmt.Fprintf(&w, `<line x1="80" x2="480" y1="%.0f" y2="%[1]f" stroke="#ddd"/>`+"\n", y(s))
		text(&w, 72, y(s)+4, `text-anchor="end"`, fmt.Sprintf("%g", s))
	}
	for n, line := range []struct{ fs, subject, label string }{
		{"block", wipedNew, "wiped in full, raw (beyond the first extrapolated)"}, {"xfs", oursNew, "hydrating, xfs"},
		{"ext4", oursNew, "hydrating, ext4"}, {"block", oursNew, "hydrating, raw"}, {"block", plainNew, "encryption only, raw"},
	} {
		var points []string
		for _, gib := range []int{1, 16, 64, 256} {
			if f, ok := r.find(partReady, fmt.Sprintf("%d GiB %s", gib, line.fs), line.subject); ok {
				points = append(points, fmt.Sprintf("%.0f,%.0f", x(gib), y(f.median())))
				text(&w, x(gib), linesTop+linesHeight+18, `text-anchor="middle"`, fmt.Sprintf("%d GiB", gib))
			}
		}
		colour := colours()[n]
		fmt.Fprintf(&w, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(points, " "), colour)
		text(&w, 500, linesTop+20*float64(n)+10, `fill="`+colour+`"`, line.label)
	}
	return w.String()
}

// svgBars draws the speeds and returns where they end.
func (r *results) svgBars() (string, int) {
	var w strings.Builder
	text(&w, 20, barsTop-15, `font-size="15"`, "Speed, as a ratio to a volume that was wiped in full")
	subjects := []string{finished, unhydrated, hydrating, rawHMAC}
	y := float64(barsTop)
	for _, what := range workloads() {
		text(&w, plotLeft-8, y+barHeight*2.4, `text-anchor="end"`, what)
		for n, s := range subjects {
			ratio, _ := r.ratio(partSpeed, what, s, wiped)
			shown := min(ratio, 1.5)
			fmt.Fprintf(&w, `<rect x="%d" y="%.0f" width="%.0f" height="%d" fill="%s"/>`+"\n", plotLeft, y, shown*barsScale, barHeight-1, colours()[n])
			text(&w, plotLeft+shown*barsScale+4, y+barHeight-2, `font-size="10"`, fmt.Sprintf("%.2f", ratio))
			y += barHeight
		}
		y += groupMargin
	}
	fmt.Fprintf(&w, `<line x1="%.0f" x2="%[1]f" y1="%d" y2="%.0f" stroke="#333" stroke-dasharray="3"/>`+"\n", plotLeft+barsScale, barsTop-5, y)
	for n, s := range subjects {
		text(&w, plotLeft+float64(n)*150, y+16, `fill="`+colours()[n]+`"`, s)
	}
	return w.String(), int(y) + 30
}
