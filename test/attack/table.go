package main

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// report is the table that the suite prints, a row at a time.
type report struct {
	w     io.Writer
	rows  int
	wrong []string
}

// The columns' widths; the message has what is left.
const (
	attackWidth = 58
	plainWidth  = 60
	oursWidth   = 15
)

func (r *report) heading(version string) {
	r.line("ATTACK", "PLAIN CRYPTSETUP "+version, "CRYPTCSI", "MESSAGE")
}

func (r *report) section(title string) { fmt.Fprintf(r.w, "\n-- %s\n", title) }

// row prints one. An error says that the outcome is not the one that it must be.
func (r *report) row(attack, plain, ours, message string, err error) {
	r.rows++
	if err != nil {
		r.wrong = append(r.wrong, fmt.Sprintf("%s: %v", attack, err))
		ours, message = "NO", err.Error()
	}
	r.line(attack, plain, ours, message)
}

func (r *report) line(attack, plain, ours, message string) {
	fmt.Fprintf(r.w, "%s  %s  %s  %s\n", cell(attack, attackWidth), cell(plain, plainWidth), cell(ours, oursWidth), short(message))
}

// cell cuts or fills a text to a width.
func cell(s string, width int) string {
	s = strings.ReplaceAll(s, "\n", "; ")
	if n := utf8.RuneCountInString(s); n <= width {
		return s + strings.Repeat(" ", width-n)
	}
	return string([]rune(s)[:width-1]) + "…"
}

// short leaves out of a message what all of its kind say, and what is said of
// both copies of a header alike.
func short(message string) string {
	message = strings.ReplaceAll(message, "\n", "; ")
	if _, reasons, ok := strings.Cut(message, "verifies ("); ok {
		message, _, _ = strings.Cut(reasons, "): ")
	}
	one, other, ok := strings.Cut(message, "; header at offset 16384: ")
	if one = strings.TrimPrefix(one, "header at offset 0: "); ok && one == other {
		message = one
	}
	if r := []rune(message); len(r) > 150 {
		message = string(r[:149]) + "…"
	}
	return message
}
