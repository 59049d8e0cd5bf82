package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"text/tabwriter"
)

// result is one figure: what was done, with what, and what it came to.
type result struct {
	Part    string    `json:"part"`
	What    string    `json:"what"`
	Subject string    `json:"subject"`
	Unit    string    `json:"unit"`
	Values  []float64 `json:"values"` // by round, in order
	Note    string    `json:"note,omitempty"`
}

// median of the rounds.
func (r result) median() float64 {
	v := slices.Sorted(slices.Values(r.Values))
	if len(v) == 0 {
		return 0
	}
	return v[len(v)/2]
}

// results of a run. Rounds of what is compared alternate, so that the same
// place in two lists of values is about the same moment.
type results struct {
	Kernel string   `json:"kernel"`
	Date   string   `json:"date"`
	All    []result `json:"results"`
}

// add appends a round.
func (r *results) add(part, what, subject, unit string, value float64, note string) {
	for i := range r.All {
		if x := &r.All[i]; x.Part == part && x.What == what && x.Subject == subject {
			x.Values = append(x.Values, value)
			return
		}
	}
	r.All = append(r.All, result{part, what, subject, unit, []float64{value}, note})
}

func (r *results) find(part, what, subject string) (result, bool) {
	for _, x := range r.All {
		if x.Part == part && x.What == what && x.Subject == subject {
			return x, true
		}
	}
	return result{}, false
}

// ratio is the median of the rounds' ratios; false where one is missing.
func (r *results) ratio(part, what, subject, base string) (float64, bool) {
	a, ok := r.find(part, what, subject)
	b, found := r.find(part, what, base)
	if !ok || !found {
		return 0, false
	}
	if len(a.Values) != len(b.Values) {
		return a.median() / b.median(), true
	}
	var each result
	for i := range a.Values {
		each.Values = append(each.Values, a.Values[i]/b.Values[i])
	}
	return each.median(), true
}

// names returns the distinct subjects and things done of a part, in order.
func (r *results) names(part string) (subjects, whats []string) {
	for _, x := range r.All {
		if x.Part != part {
			continue
		}
		if !slices.Contains(subjects, x.Subject) {
			subjects = append(subjects, x.Subject)
		}
		if !slices.Contains(whats, x.What) {
			whats = append(whats, x.What)
		}
	}
	return subjects, whats
}

// table prints a part: what was done down, with what across, each with its
// ratio to the base.
func (r *results) table(w io.Writer, title, part, base string) error {
	subjects, whats := r.names(part)
	if len(whats) == 0 {
		return nil
	}
	fmt.Fprintf(w, "\n%s\n", title)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, s := range subjects {
		fmt.Fprintf(t, "\t%s", s)
	}
	fmt.Fprintln(t)
	for _, what := range whats {
		fmt.Fprint(t, what)
		for _, s := range subjects {
			fmt.Fprintf(t, "\t%s", r.cell(part, what, s, base))
		}
		fmt.Fprintln(t)
	}
	return t.Flush()
}

// cell is a figure with its ratio to the base.
func (r *results) cell(part, what, subject, base string) string {
	x, ok := r.find(part, what, subject)
	if !ok {
		return "–"
	}
	text := number(x.median()) + " " + x.Unit
	if x.Unit[0] == '/' {
		text = number(x.median()) + x.Unit
	}
	if ratio, ok := r.ratio(part, what, subject, base); ok && subject != base {
		text += fmt.Sprintf(" (%.2f)", ratio)
	}
	if x.Note != "" {
		text += " " + x.Note
	}
	return text
}

func number(f float64) string {
	switch {
	case f >= 100:
		return fmt.Sprintf("%.0f", f)
	case f >= 10:
		return fmt.Sprintf("%.1f", f)
	}
	return fmt.Sprintf("%.2f", f)
}

func (r *results) save(path string) error {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

func loadResults(path string) (*results, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var r results
	return &r, json.Unmarshal(b, &r)
}
