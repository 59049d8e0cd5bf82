package main

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/test/stack"
)

// metricsAddress is csi-plugin's, in a guest that is ours alone.
const metricsAddress = "127.0.0.1:9808"

// parts are those of a stage, in their order. Activation is what opening takes
// beside the header: mostly the worker and the kernel's tables.
func parts() []string {
	return []string{"borrow", "key", "header", "activation", "fill", "confirm", "mount", "state"}
}

// stageSteps shows where the time of a stage goes, of new volumes and of the
// same ones later.
func (b *bench) stageSteps() error {
	for _, kind := range []struct {
		name, fstype string
		context      map[string]string
	}{
		{"ext4", "ext4", nil},
		{"ext4 with integrity", "ext4", map[string]string{"cryptcsi.io/integrity": "hmac-sha256"}},
		{"xfs with integrity", "xfs", map[string]string{"cryptcsi.io/integrity": "hmac-sha256"}},
	} {
		fresh, later := map[string]time.Duration{}, map[string]time.Duration{}
		for i := range b.rounds {
			v, err := b.stack.Create(b.ctx, fmt.Sprintf("steps-%s-%d", strings.ReplaceAll(kind.name, " ", "-"), i), 1<<30, stack.MountCapability(kind.fstype), kind.context)
			if err != nil {
				return err
			}
			for _, sum := range []map[string]time.Duration{fresh, later} {
				if err := b.stepsOf(v, sum); err != nil {
					return err
				}
			}
			if err := v.Delete(b.ctx); err != nil {
				return err
			}
		}
		b.bars = append(b.bars, bars("new 1 GiB volume, "+kind.name, fresh, b.rounds)...)
		b.bars = append(b.bars, bars("the same, staged again", later, b.rounds)...)
	}
	return nil
}

// stepsOf stages and unstages a volume and adds what each part took.
func (b *bench) stepsOf(v *stack.Volume, sum map[string]time.Duration) error {
	before, err := b.scrape()
	if err != nil {
		return err
	}
	if err := v.Stage(b.ctx); err != nil {
		return err
	}
	after, err := b.scrape()
	if err != nil {
		return err
	}
	took := func(step string) time.Duration { return after[step] - before[step] }
	for _, part := range parts() {
		switch part {
		case "activation":
			sum[part] += took("open") - took("header")
		case "state":
			sum[part] += took("announce") + took("note")
		default:
			sum[part] += took(part)
		}
	}
	return v.Unstage(b.ctx)
}

var stepSum = regexp.MustCompile(`^cryptcsi_stage_step_seconds_sum\{step="(\w+)"\} (\S+)$`)

// scrape returns the time that all stages so far have spent in each step.
func (b *bench) scrape() (sums map[string]time.Duration, err error) {
	req, err := http.NewRequestWithContext(b.ctx, http.MethodGet, "http://"+metricsAddress+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	sums = map[string]time.Duration{}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if m := stepSum.FindStringSubmatch(lines.Text()); m != nil {
			s, err := strconv.ParseFloat(m[2], 64)
			if err != nil {
				return nil, err
			}
			sums[m[1]] = time.Duration(s * float64(time.Second))
		}
	}
	return sums, lines.Err()
}

// bars draws one line for each part, as long as its share of the whole.
func bars(title string, sum map[string]time.Duration, rounds int) []string {
	const width = 50
	var all time.Duration
	for _, part := range parts() {
		all += sum[part]
	}
	mean := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 / float64(max(rounds, 1)) }
	lines := []string{fmt.Sprintf("%s: %.0f ms (mean of %d)", title, mean(all), rounds)}
	at := 0.0
	for _, part := range parts() {
		share := width * float64(sum[part]) / float64(cmp.Or(all, 1))
		bar := strings.Repeat(" ", int(at+.5)) + strings.Repeat("#", int(at+share+.5)-int(at+.5))
		lines = append(lines, fmt.Sprintf("  %-10s %8.1f ms  |%-*s|", part, mean(sum[part]), width, bar))
		at += share
	}
	return append(lines, "")
}
