// Command promql reads PromQL as Prometheus does, and says as JSON what it
// asks for: every metric, with all the labels that it is selected, grouped or
// matched by; or which alerts fire.
//
//	promql RULES.yaml                   the alerts of a file of rules, strictly read
//	promql <EXPRESSIONS                 expressions, one on each line
//	promql fires RULES.yaml <SCENARIO   the alerts that fire, see scenario
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
)

// use is a metric in an expression.
type use struct {
	Where  string   `json:"where"` // the alert, or the expression
	Metric string   `json:"metric"`
	Labels []string `json:"labels"`
}

func main() {
	said, err := say(parser.NewParser(parser.Options{}))
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(said)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "promql:", err)
		os.Exit(1)
	}
}

func say(p parser.Parser) (any, error) {
	if len(os.Args) < 3 {
		return read(p)
	}
	groups, err := rules(p, os.Args[2])
	if err != nil {
		return nil, err
	}
	return fires(p, groups, os.Stdin)
}

func rules(p parser.Parser, file string) (*rulefmt.RuleGroups, error) {
	groups, errs := rulefmt.ParseFile(file, false, model.LegacyValidation, p, slog.New(slog.DiscardHandler))
	return groups, errors.Join(errs...)
}

func read(p parser.Parser) (uses []use, err error) {
	add := func(where, text string) error {
		expr, err := p.ParseExpr(text)
		if err != nil {
			return fmt.Errorf("%s: %w", where, err)
		}
		walk(expr, nil, func(metric string, labels []string) { uses = append(uses, use{where, metric, labels}) })
		return nil
	}
	if len(os.Args) < 2 {
		lines := bufio.NewScanner(os.Stdin)
		for lines.Scan() {
			err = errors.Join(err, add(lines.Text(), lines.Text()))
		}
		return uses, errors.Join(err, lines.Err())
	}
	groups, err := rules(p, os.Args[1])
	if err != nil {
		return nil, err
	}
	for _, g := range groups.Groups {
		for _, r := range g.Rules {
			err = errors.Join(err, add(r.Alert, r.Expr))
		}
	}
	return uses, err
}

// walk calls found for every selector, with the labels of what is around it.
func walk(node parser.Node, outer []string, found func(metric string, labels []string)) {
	switch n := node.(type) {
	case *parser.VectorSelector:
		names, metric := append([]string{}, outer...), n.Name
		for _, m := range n.LabelMatchers {
			if m.Name == labels.MetricName {
				metric = m.Value
				continue
			}
			names = append(names, m.Name)
		}
		found(metric, names)
		return
	case *parser.AggregateExpr:
		if !n.Without {
			outer = append(append([]string{}, outer...), n.Grouping...)
		}
	case *parser.BinaryExpr:
		if n.VectorMatching != nil && n.VectorMatching.On {
			outer = append(append([]string{}, outer...), n.VectorMatching.MatchingLabels...)
		}
	}
	for child := range parser.ChildrenIter(node) {
		walk(child, outer, found)
	}
}
