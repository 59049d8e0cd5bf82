package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// The bar: how much longer than with the vendor's driver alone it may take from
// a claim and its pod to the pod's running.
const latencyBar = 2 * time.Second

// latency measures that, one after the other and by turns.
func (t *tester) latency(ctx context.Context) (string, error) {
	const rounds = 5
	took := map[string][]time.Duration{}
	for i := range rounds {
		for _, class := range []string{"plain", "encrypted"} {
			begin := time.Now()
			if err := t.up(ctx, want{name: fmt.Sprintf("latency-%s-%d", class, i), class: class, size: "64Mi"}); err != nil {
				return "", err
			}
			took[class] = append(took[class], time.Since(begin))
		}
	}
	// A pod beside those that are measured costs little, one that ends much.
	for class := range took {
		for i := range rounds {
			if err := t.discard(ctx, fmt.Sprintf("latency-%s-%d", class, i)); err != nil {
				return "", err
			}
		}
	}
	median := func(class string) time.Duration {
		slices.Sort(took[class])
		return took[class][rounds/2]
	}
	plain, encrypted := median("plain"), median("encrypted")
	detail := fmt.Sprintf("median of %d: %.1f s with the driver alone, %.1f s encrypted; each %s and %s",
		rounds, plain.Seconds(), encrypted.Seconds(), seconds(took["plain"]), seconds(took["encrypted"]))
	if encrypted-plain > latencyBar {
		return detail, errors.New("the difference is more than " + latencyBar.String())
	}
	return detail, nil
}

func seconds(all []time.Duration) string {
	var s []string
	for _, d := range all {
		s = append(s, fmt.Sprintf("%.1f", d.Seconds()))
	}
	return strings.Join(s, " ")
}
