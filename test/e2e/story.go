package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// story prints what is done, how it ended and how long it took, line by line.
type story struct {
	begin  time.Time
	o      options
	failed int
}

// that does one thing and prints a line. Where a thing fails those that build
// on it are not worth trying: the error comes back.
func (s *story) that(text string, do func() (string, error)) error {
	start := time.Now()
	detail, err := do()
	mark := "ok  "
	if err != nil {
		mark = "FAIL"
		s.failed++
	}
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
	if s.o.only.MatchString(text) {
		_ = s.that(text, do)
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
	st := &story{begin: time.Now(), o: o}
	err = tell(ctx, st, s)
	if err == nil && st.failed > 0 {
		err = fmt.Errorf("%d failed", st.failed)
	}
	return err
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
	err := st.that("images and a disk are made", func() (string, error) {
		images, err := makeImages(s)
		return images, errors.Join(err, makeDisk(ctx, s))
	})
	if err != nil {
		return err
	}
	err = st.that("the control plane starts: etcd, API server, controller manager, scheduler", func() (string, error) {
		plane, err = startControlPlane(ctx, s)
		node.plane = plane
		return "", err
	})
	if err != nil {
		return err
	}
	err = st.that("the node boots: a guest with dm-crypt, containerd, kubelet", func() (string, error) {
		begin := time.Now()
		if err := node.boot(); err != nil {
			return "", err
		}
		return "", node.ready(ctx, begin)
	})
	if err != nil {
		return err
	}
	err = st.that("a vendor's driver and the snapshot controller are installed", func() (string, error) {
		return "", errors.Join(serveDNS(ctx, plane.client), plane.installVendor(ctx))
	})
	if err != nil {
		return err
	}
	err = st.that("cryptcsi is installed: key service, controller with sidecars, node plugin; all pods are ready", func() (string, error) {
		if err := plane.install(ctx); err != nil {
			return "", err
		}
		return "", errors.Join(plane.installed(ctx, namespace, 3), plane.registered(ctx))
	})
	if err == nil {
		(&tester{plane, node}).scenarios(ctx, st)
	}
	return err
}
