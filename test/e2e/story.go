package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// story prints what is done, how it ended and how long it took, line by line.
type story struct {
	begin time.Time
	o     options
	// keep writes down how things stand where one has failed; nil as long as
	// there is nothing to look at.
	keep func(n int)
	// interrupted is why the whole is to end, nil while it is to go on.
	interrupted func() error

	mu      sync.Mutex // things are done beside each other
	failed  int
	stopped bool // something was interrupted, or not begun
	told    []told
}

// told is what a line says.
type told struct {
	text string
	took time.Duration
}

// that does one thing and prints a line. Where a thing fails those that build
// on it are not worth trying: the error comes back.
func (s *story) that(text string, do func() (string, error)) error {
	start := time.Now()
	detail, err := do()
	s.mu.Lock()
	defer s.mu.Unlock()
	mark := "ok  "
	if why := s.interrupted(); err != nil && why != nil {
		// Whatever went wrong then says nothing.
		mark, err, s.stopped = "stop", why, true
	} else if err != nil {
		mark = "FAIL"
		s.failed++
		if s.keep != nil {
			s.keep(s.failed)
		}
	}
	s.told = append(s.told, told{text, time.Since(start)})
	fmt.Printf("%s %6.1fs %5.1fs  %s\n", mark, time.Since(s.begin).Seconds(), time.Since(start).Seconds(), text)
	if err != nil {
		detail = strings.TrimSpace(detail + "\n" + err.Error())
	}
	for line := range strings.Lines(detail) {
		fmt.Printf("                       %s\n", strings.TrimRight(line, "\n"))
	}
	return err
}

// scenario is that, for a thing that may fail and others are tried nevertheless.
func (s *story) scenario(text string, do func() (string, error)) {
	if !s.o.only.MatchString(text) {
		return
	}
	if s.interrupted() == nil {
		_ = s.that(text, do)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped = true
}

// thorough is a scenario that is left out where there is little time.
func (s *story) thorough(text string, do func() (string, error)) {
	if !s.o.short {
		s.scenario(text, do)
	}
}

// table prints where the time went, the longest first.
func (s *story) table() {
	slices.SortStableFunc(s.told, func(a, b told) int { return cmp.Compare(b.took, a.took) })
	fmt.Printf("\n%d things in %.0f s, %d failed:\n", len(s.told), time.Since(s.begin).Seconds(), s.failed)
	for _, t := range s.told {
		fmt.Printf("%7.1f s  %s\n", t.took.Seconds(), t.text)
	}
}

// run is the whole story.
func run(ctx context.Context, dir string, o options) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	bin := filepath.Dir(self)
	s := site{dir: dir, bin: bin, kub: filepath.Join(bin, "../.tools/bin/kubernetes")}
	if err := os.Mkdir(s.logs(), 0o755); err != nil {
		return err
	}
	st := &story{begin: time.Now(), o: o, interrupted: func() error { return interrupted(ctx) }}
	err = tell(ctx, st, s)
	st.table()
	if st.stopped {
		return fmt.Errorf("%w: not everything was tried", interrupted(ctx))
	}
	if err == nil && st.failed > 0 {
		err = fmt.Errorf("%d failed", st.failed)
	}
	return err
}

// interrupted is why a context has been cancelled, nil while it is not.
func interrupted(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	return fmt.Errorf("interrupted: %w", context.Cause(ctx))
}

// together does things beside each other, and returns when all are done.
func together(things ...func() error) error {
	errs := make([]error, len(things))
	var all sync.WaitGroup
	for i, do := range things {
		all.Go(func() { errs[i] = do() })
	}
	all.Wait()
	return errors.Join(errs...)
}

// beside does things beside each other that tell themselves how they ended.
func beside(things ...func()) {
	var all sync.WaitGroup
	for _, do := range things {
		all.Go(do)
	}
	all.Wait()
}

// tell brings the cluster up, runs the scenarios and takes the cluster down.
func tell(ctx context.Context, st *story, s site) error {
	var plane *controlPlane
	node := &guest{}
	defer func() {
		if st.o.keep && ctx.Err() == nil {
			fmt.Printf("kept until an interrupt; look around with kubectl --kubeconfig=%s\n", s.path("admin.kubeconfig"))
			<-ctx.Done()
		}
		if node.vm != nil {
			node.crash()
		}
	}()
	err := together(
		func() error {
			return st.that("a disk for the node, with images on it", func() (string, error) { return makeDisk(ctx, s, st.o) })
		},
		func() (err error) {
			return st.that("the control plane starts: etcd, API server, controller manager, scheduler", func() (string, error) {
				plane, err = startControlPlane(ctx, s)
				node.plane = plane
				return "", err
			})
		},
	)
	if err != nil {
		return err
	}
	if !st.o.upgrades() {
		node.taint = startupTaint // which the build before this one does not know
	}
	begin := time.Now()
	if err := node.boot(); err != nil {
		return err
	}
	err = together(
		func() error {
			return st.that("the node boots: a guest with dm-crypt, containerd, kubelet", func() (string, error) { return "", node.ready(ctx, begin) })
		},
		func() error {
			return st.that("a vendor's driver, the snapshot controller and cryptcsi are applied", func() (string, error) {
				install := plane.install
				if st.o.upgrades() {
					install = plane.installPrevious
				}
				return "", errors.Join(serveDNS(ctx, plane.client), plane.installVendor(ctx), install(ctx))
			})
		},
	)
	if err != nil {
		return err
	}
	err = st.that("cryptcsi is there: key service, controller with sidecars, node plugin; all pods are ready", func() (string, error) {
		return "", errors.Join(plane.installed(ctx, namespace, 3), plane.registered(ctx, driverName))
	})
	if err == nil {
		t := &tester{plane, node}
		st.keep = func(n int) { t.dump(ctx, n) }
		t.scenarios(ctx, st)
	}
	return err
}
