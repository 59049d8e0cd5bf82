package driver_test

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// watched is a staged volume whose kernel reports what the test sends.
func watched(t *testing.T, run func(m *machine, report func(mapping string), counted *int, log *bytes.Buffer)) {
	t.Helper()
	timed(t, plain, func(m *machine) {
		reports, counted, log := make(chan string), 0, &bytes.Buffer{}
		m.cfg.Failures = func(ctx context.Context, seen func(string)) error {
			for {
				select {
				case name := <-reports:
					seen(name)
				case <-ctx.Done():
					return nil
				}
			}
		}
		m.cfg.ObserveFailure = func() { counted++ }
		events := &told{}
		m.cfg.Events = events
		m.cfg.Logger = slog.New(slog.NewTextHandler(log, nil))
		m.start()
		ctx, cancel := context.WithCancel(m.t.Context())
		ended := make(chan error, 1)
		go func() { ended <- m.driver.WatchIntegrity(ctx) }()
		run(m, func(mapping string) {
			reports <- mapping
			pass(time.Millisecond)
		}, &counted, log)
		for _, e := range *events {
			if e.Reason != driver.ReasonDamaged || !e.Warning {
				m.t.Errorf("told: %+v", e)
			}
		}
		if n := strings.Count(log.String(), "not authentic"); len(*events) != n {
			m.t.Errorf("told %d times, logged %d times", len(*events), n)
		}
		cancel()
		m.ok("WatchIntegrity", <-ended)
	})
}

// pass lets time pass, and whoever is woken by it come to rest.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// damage is what Inspect says.
func (m *machine) damage() driver.Damage {
	m.t.Helper()
	infos, err := m.driver.Inspect(m.t.Context())
	m.ok("Inspect", err)
	return infos[0].Damage
}

// A disk that fails a thousand times is counted each time, written down once in
// a while and said once.
func TestDamageIsDebounced(t *testing.T) {
	watched(t, func(m *machine, report func(string), counted *int, log *bytes.Buffer) {
		name := m.mapping().Name
		if c := m.condition(); c.GetAbnormal() {
			m.t.Errorf("at first: %v", c)
		}
		report("cryptcsi-of-another-driver")
		if *counted != 0 || log.Len() > 0 {
			m.t.Errorf("another driver's volume was counted %d times: %s", *counted, log)
		}
		first := time.Now()
		for range 1000 {
			report(name)
		}
		if got := m.damage().Reports; got != 1 || !m.condition().GetAbnormal() {
			m.t.Errorf("the first moment has %d reports, want 1; %v", got, m.condition())
		}
		pass(10 * time.Second)
		if d := m.damage(); d.Reports != 1000 || d.First.Sub(first) > time.Second || !d.Last.After(d.First) || *counted != 1000 {
			m.t.Errorf("noted are %+v, counted %d", d, *counted)
		}
		if n := strings.Count(log.String(), "not authentic"); n != 1 {
			m.t.Errorf("it was said %d times", n)
		}
		pass(time.Hour)
		report(name)
		if n := strings.Count(log.String(), "not authentic"); n != 2 {
			m.t.Errorf("an hour later it was said %d times", n)
		}
		m.start() // another process knows it
		if c := m.condition(); !c.GetAbnormal() || !strings.Contains(c.GetMessage(), "1001 reports") {
			m.t.Errorf("the condition is %v", c)
		}
		m.ok("unstage", m.unstage())
		m.ok("stage", m.stage(blockCap()))
		if c := m.condition(); c.GetAbnormal() {
			m.t.Errorf("staged again: %v", c)
		}
	})
}

// What an earlier staging has left to note does not reach the next one, about
// which all is said anew.
func TestDamageOfAnEarlierStaging(t *testing.T) {
	watched(t, func(m *machine, report func(string), _ *int, log *bytes.Buffer) {
		name := m.mapping().Name
		for range 4 {
			report(name)
		}
		m.ok("unstage", m.unstage())
		pass(time.Millisecond)
		m.ok("stage", m.stage(blockCap()))
		pass(time.Minute)
		if d := m.damage(); d.Reports != 0 {
			m.t.Errorf("noted are %+v", d)
		}
		report(name)
		if d := m.damage(); d.Reports != 1 {
			m.t.Errorf("noted are %+v, want one report", d)
		}
		if n := strings.Count(log.String(), "not authentic"); n != 2 {
			m.t.Errorf("it was said %d times: %s", n, log)
		}
	})
}

// What is reported while a volume is not staged says nothing about its disk.
func TestDamageBeforeStaged(t *testing.T) {
	watched(t, func(m *machine, report func(string), counted *int, _ *bytes.Buffer) {
		name := m.mapping().Name
		m.ok("unstage", m.unstage())
		report(name)
		m.ok("stage", m.stage(blockCap()))
		pass(time.Minute)
		if d := m.damage(); d.Reports != 0 || *counted != 0 {
			m.t.Errorf("noted are %+v, counted %d", d, *counted)
		}
	})
}

func TestKernelLogUnreadable(t *testing.T) {
	m := newMachine(t)
	m.cfg.Failures = func(context.Context, func(string)) error {
		return errdefs.Errorf(errdefs.ErrUnavailable, "no log")
	}
	m.start()
	if err := m.driver.WatchIntegrity(t.Context()); err == nil {
		t.Error("nobody listens, and nobody knows")
	}
}
