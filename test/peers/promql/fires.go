package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
)

// scenario is what Prometheus has seen, a sample a minute from 0 on, written as
// promtool's tests have it.
type scenario struct {
	Series []string `json:"series"`
	Minute int      `json:"minute"` // when it is looked at
}

// fires returns the alerts that fire then, with the labels of each.
func fires(p parser.Parser, groups *rulefmt.RuleGroups, in io.Reader) (map[string][]map[string]string, error) {
	var s scenario
	if err := json.NewDecoder(in).Decode(&s); err != nil {
		return nil, err
	}
	var seen seriesSet
	for _, text := range s.Series {
		lset, values, err := p.ParseSeriesDesc(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", text, err)
		}
		var samples []chunks.Sample
		for i, v := range values {
			if !v.Omitted {
				samples = append(samples, sample{at: int64(i) * time.Minute.Milliseconds(), value: v.Value})
			}
		}
		seen = append(seen, storage.NewListSeries(lset, samples))
	}
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 1 << 20, Timeout: time.Minute, Parser: p})
	firing := map[string][]map[string]string{}
	for _, g := range groups.Groups {
		for _, r := range g.Rules {
			found, err := fire(engine, seen, r, s.Minute)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", r.Alert, err)
			}
			if len(found) > 0 {
				firing[r.Alert] = found
			}
		}
	}
	return firing, nil
}

// fire evaluates a rule once a minute for as long as it has to be true.
func fire(engine *promql.Engine, seen seriesSet, r rulefmt.Rule, minute int) ([]map[string]string, error) {
	held := map[string]int{}
	var last []map[string]string
	steps := int(time.Duration(r.For)/time.Minute) + 1
	for m := minute - steps + 1; m <= minute; m++ {
		q, err := engine.NewInstantQuery(context.Background(), seen, nil, r.Expr, time.Unix(int64(m)*60, 0))
		if err != nil {
			return nil, err
		}
		result := q.Exec(context.Background())
		vector, err := result.Vector()
		if err != nil {
			return nil, err
		}
		last = nil
		for _, v := range vector {
			key := v.Metric.String()
			if held[key]++; held[key] == steps {
				last = append(last, v.Metric.Map())
			}
		}
		q.Close()
	}
	return last, nil
}

// seriesSet is a storage.Queryable.
type seriesSet []storage.Series

func (s seriesSet) Querier(_, _ int64) (storage.Querier, error) {
	return &storage.MockQuerier{SelectMockFunction: func(_ bool, _ *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
		var found seriesSet
		for _, one := range s {
			matches := true
			for _, m := range matchers {
				matches = matches && m.Matches(one.Labels().Get(m.Name))
			}
			if matches {
				found = append(found, one)
			}
		}
		return &iterator{SeriesSet: storage.EmptySeriesSet(), rest: found}
	}}, nil
}

type iterator struct {
	storage.SeriesSet // which has no errors and no warnings
	at                storage.Series
	rest              seriesSet
}

func (i *iterator) At() storage.Series { return i.at }

func (i *iterator) Next() bool {
	if len(i.rest) == 0 {
		return false
	}
	i.at, i.rest = i.rest[0], i.rest[1:]
	return true
}

// sample is a number; Prometheus' histograms are none of ours.
type sample struct {
	chunks.Sample
	at    int64
	value float64
}

func (s sample) T() int64                 { return s.at }
func (s sample) ST() int64                { return 0 }
func (s sample) F() float64               { return s.value }
func (s sample) Type() chunkenc.ValueType { return chunkenc.ValFloat }
