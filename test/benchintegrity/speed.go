package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
)

// The subjects of the second part: the same volume in each of its states.
const (
	partSpeed   = "speed"
	partLatency = "latency" // half of the requests stay below

	wiped      = "wiped"
	unhydrated = "not hydrated"
	hydrating  = "hydrating at once"
	finished   = "finished"
	rawHMAC    = "cryptsetup with integrity"
	rawHMACWQ  = "the same without workqueues"
	encrypted  = "encryption only"
	rawPlain   = "cryptsetup, encryption only"
	rawPlainWQ = "that without workqueues"
)

// a subject comes up for one workload and goes again; those that a workload
// does not change stay up.
type subject struct {
	name  string
	up    func() (path string, err error)
	begin func() error // just before a workload; may be nil
	check func() error // just after; may be nil
	down  func() error
	busy  bool // it hydrates by itself from the begin: the guest does not settle
}

// compare runs every workload on every subject in turn, each time beginning with
// another.
// What it notes as done is the workload with a word more.
func (b *bench) compare(part, more string, subjects []subject, workloads []string) error {
	for round := range b.rounds {
		for _, workload := range workloads {
			for n := range subjects {
				s := subjects[(n+round*3)%len(subjects)]
				if err := b.one(part, workload+more, s, workload); err != nil {
					return fmt.Errorf("%s, %s: %w", s.name, workload, err)
				}
			}
			if err := b.save(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *bench) one(part, what string, s subject, workload string) (err error) {
	path, err := s.up()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.down()) }()
	if !s.busy {
		if err := b.settle(); err != nil {
			return err
		}
	}
	if s.begin != nil {
		if err := s.begin(); err != nil {
			return err
		}
	}
	got, err := b.load(path, workload, b.time, b.buf)
	if err != nil {
		return err
	}
	b.results.add(part, what, s.name, unit(workload), got.rate, "")
	if part == partSpeed {
		b.results.add(partLatency, what, s.name, "ms", got.median.Seconds()*1000, "")
	}
	if s.check != nil {
		return s.check()
	}
	return nil
}

// speed compares the states of a volume, and cryptsetup.
func (b *bench) speed() (err error) {
	hmac := dek.Spec{Integrity: dek.IntegrityHMAC}
	clone := dek.Spec{Integrity: dek.IntegrityHMAC, Layout: dek.LayoutClone}
	var subjects []subject
	var images []*image
	defer func() {
		for _, i := range images {
			err = errors.Join(err, i.remove())
		}
	}()
	image := func(name string) (*image, error) {
		i, err := newImage(b.dir, name, b.size, false)
		if err == nil {
			images = append(images, i)
		}
		return i, err
	}
	for _, kept := range []struct {
		name, file string
		spec       dek.Spec
	}{{wiped, "wiped", hmac}, {finished, "finished", clone}, {encrypted, "plain", dek.Spec{}}} {
		i, err := image(kept.file)
		if err != nil {
			return err
		}
		v := newVolume(b.mapper, i, kept.spec)
		if err := v.up(b.ctx, nil); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, v.close(context.WithoutCancel(b.ctx))) }()
		if err := b.finish(v, b.size); err != nil {
			return err
		}
		subjects = append(subjects, subject{name: kept.name, up: func() (string, error) { return v.path(), nil }, down: func() error { return nil }})
	}
	for _, raw := range []struct {
		name, file   string
		format, open []string
	}{
		{rawHMAC, "raw-hmac", []string{"--integrity=hmac-sha256"}, nil},
		{rawHMACWQ, "raw-hmac", nil, noWorkqueues()},
		{rawPlain, "raw-plain", []string{}, nil},
		{rawPlainWQ, "raw-plain", nil, noWorkqueues()},
	} {
		if raw.format != nil {
			i, err := image(raw.file)
			if err != nil {
				return err
			}
			if err := cryptsetupFormat(i.device, passphrase(), raw.format...); err != nil {
				return err
			}
		}
		device := images[len(images)-1].device
		subjects = append(subjects, subject{
			name: raw.name,
			up: func() (string, error) {
				return "/dev/mapper/" + byHand, cryptsetupOpen(device, passphrase(), raw.open...)
			},
			down: func() error { return command(nil, "cryptsetup", "close", byHand) },
		})
	}
	i, err := image("new")
	if err != nil {
		return err
	}
	subjects = append(subjects, b.fresh(unhydrated, i, clone, false), b.fresh(hydrating, i, clone, true))
	return b.compare(partSpeed, "", subjects, workloads())
}

// whole hydrates all of a volume on a disk that is given to the guest, once:
// what is extrapolated to otherwise.
func (b *bench) whole() error {
	f, err := os.Open(b.disk)
	if err != nil {
		return err
	}
	size, err := f.Seek(0, 2)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	v := newVolume(b.mapper, &image{file: "whole", device: b.disk}, dek.Spec{Integrity: dek.IntegrityHMAC, Layout: dek.LayoutClone})
	if err := v.up(b.ctx, nil); err != nil {
		return err
	}
	return errors.Join(b.finish(v, size), v.close(context.WithoutCancel(b.ctx)))
}

// finish hydrates all of a volume.
func (b *bench) finish(v *volume, size int64) error {
	if v.dek.Spec.Layout == "" {
		return nil
	}
	if err := v.Hydrate(v.v.Name, true); err != nil {
		return err
	}
	took, err := b.timed(func() error { return b.hydrated(v) })
	if err != nil {
		return err
	}
	b.results.add(partHydration, whole(size), "dm-clone alone", "MiB/s", float64(size/mib)/took.Seconds(), "")
	m, err := v.Finish(b.ctx, v.v, v.dek)
	v.confirm(m)
	return err
}

func whole(size int64) string {
	if size >= 2*gib {
		return fmt.Sprintf("all of %d GiB", size/gib)
	}
	return fmt.Sprintf("all of %d MiB", size/mib)
}

// fresh is a volume that is made anew for each workload.
func (b *bench) fresh(name string, i *image, spec dek.Spec, hydrate bool) subject {
	var v *volume
	return subject{
		name: name,
		up: func() (string, error) {
			if err := i.blank(); err != nil {
				return "", err
			}
			v = newVolume(b.mapper, i, spec)
			return v.path(), v.up(b.ctx, nil)
		},
		begin: func() error { return v.Hydrate(v.v.Name, hydrate) },
		down:  func() error { return v.close(context.WithoutCancel(b.ctx)) },
		check: func() error {
			m, err := b.mapping(v)
			if err == nil && hydrate && m.Hydrated == m.Regions {
				err = errors.New("hydration was over before the workload was")
			}
			return err
		},
	}
}

// hydrated waits until all of a volume is.
func (b *bench) hydrated(v *volume) error {
	for until := time.Now().Add(time.Hour); time.Now().Before(until); time.Sleep(100 * time.Millisecond) {
		if m, err := b.mapping(v); err != nil || m.Hydrated == m.Regions {
			return err
		}
	}
	return errors.New("hydration did not end within an hour")
}

// mapping of an open volume, as the kernel shows it.
func (b *bench) mapping(v *volume) (cryptmapper.Mapping, error) {
	list, err := b.mapper.List()
	i := slices.IndexFunc(list, func(m cryptmapper.Mapping) bool { return m.Name == v.v.Name })
	if err != nil || i < 0 {
		return cryptmapper.Mapping{}, fmt.Errorf("mapping %s is not there: %w", v.v.Name, err)
	}
	return list[i], nil
}
