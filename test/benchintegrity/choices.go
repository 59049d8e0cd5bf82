package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
)

// The parts about what lies below, built by hand.
const (
	partFlags     = "flags"
	partChoices   = "choices"
	partRegions   = "regions"
	partHydration = "hydration"

	partArea = "area"

	paused = "2 no_hydration no_discard_passdown 0"

	flagsNone  = "no flags"
	choiceOurs = "journal, defaults"
	regionNone = "no dm-clone"
)

// variant is one way to build a stack by hand.
type variant struct {
	name   string
	mode   string   // dm-integrity's; empty for none
	layer  []string // dm-integrity's options
	crypt  []string // dm-crypt's
	region int64    // of dm-clone; 0 for none
	clone  string   // dm-clone's options

	hydrate bool // in the background
}

// kept compares stacks that stay up and are written once before.
func (b *bench) kept(part, more string, variants []variant, workloads []string) (err error) {
	var subjects []subject
	for n, v := range variants {
		i, err := newImage(b.dir, fmt.Sprintf("%s-%d", part, n), b.size/2, false)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, i.remove()) }()
		t := &tower{prefix: fmt.Sprintf("bench-%s-%d", part, n)}
		defer func() { err = errors.Join(err, t.close()) }()
		path, err := t.build(i, b.size/2, v)
		if err != nil {
			return fmt.Errorf("%s: %w", v.name, err)
		}
		if err := fillAll(path); err != nil {
			return fmt.Errorf("%s: %w", v.name, err)
		}
		subjects = append(subjects, subject{name: v.name, up: func() (string, error) { return path, nil }, down: func() error { return nil }})
	}
	return b.compare(part, more, subjects, workloads)
}

// cryptFlags compares the flags of dm-crypt.
func (b *bench) cryptFlags() error {
	for _, kind := range []struct{ mode, more string }{{"", "; encryption only"}, {"J", "; integrity"}} {
		var variants []variant
		for _, flags := range [][]string{
			nil, {"no_read_workqueue", "no_write_workqueue"}, {"same_cpu_crypt"}, {"submit_from_crypt_cpus"}, {"no_read_workqueue"},
		} {
			name := flagsNone
			if flags != nil {
				name = fmt.Sprint(flags)
			}
			variants = append(variants, variant{name: name, mode: kind.mode, crypt: flags})
		}
		if err := b.kept(partFlags, kind.more, variants, workloads()); err != nil {
			return err
		}
	}
	return nil
}

// choices compares what dm-integrity lets one choose.
func (b *bench) choices() error {
	j := func(name string, layer ...string) variant { return variant{name: name, mode: "J", layer: layer} }
	return b.kept(partChoices, "", []variant{
		j(choiceOurs), {name: "direct", mode: "D"},
		j("journal 1 MiB", "journal_sectors:2048"), j("journal 4 MiB", "journal_sectors:8192"), j("journal 32 MiB", "journal_sectors:65536"),
		j("interleave 8 MiB", "interleave_sectors:16384"), j("interleave 128 MiB", "interleave_sectors:262144"),
		j("buffers 8 sectors", "buffer_sectors:8"), j("buffers 1024 sectors", "buffer_sectors:1024"),
		j("commit after 1 s", "commit_time:1000"),
	}, workloads())
}

// regions compares dm-clone's sizes of regions, and how it hydrates, on stacks
// that are made anew for each workload: nothing is hydrated at its begin.
func (b *bench) regions() (err error) {
	i, err := newImage(b.dir, "regions", b.size, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, i.remove()) }()
	var subjects []subject
	variants := []variant{{name: regionNone, mode: "J"}}
	for _, kib := range []int64{4, 16, 64, 256} {
		variants = append(variants, variant{name: fmt.Sprintf("%d KiB", kib), mode: "J", region: kib << 10, clone: paused})
	}
	for _, h := range []struct{ threshold, batch int }{{1, 1}, {1, 16}, {16, 16}, {256, 16}, {1024, 64}} {
		variants = append(variants, variant{
			name: fmt.Sprintf("4 KiB, hydrating, threshold %d, batch %d", h.threshold, h.batch), mode: "J", region: 4 << 10,
			hydrate: true,
			clone:   fmt.Sprintf("2 no_hydration no_discard_passdown 4 hydration_threshold %d hydration_batch_size %d", h.threshold, h.batch),
		})
	}
	for _, v := range variants {
		t := &tower{prefix: "bench-region"}
		subjects = append(subjects, subject{
			name:  v.name,
			up:    func() (string, error) { return t.build(i, b.size, v) },
			begin: func() error { return t.hydrate(v) },
			down:  t.close,
		})
	}
	if err := b.compare(partRegions, "", subjects, []string{seqWrite, randWrite, fsyncWrite}); err != nil {
		return err
	}
	return b.hydration(i, variants)
}

// hydration measures how fast each way of hydrating is when nothing else runs.
func (b *bench) hydration(i *image, variants []variant) error {
	for _, v := range variants {
		if !v.hydrate {
			continue
		}
		t := &tower{prefix: "bench-hydration"}
		path, err := t.build(i, b.size, v)
		if err == nil {
			err = t.hydrate(v)
		}
		if err == nil {
			err = b.watch(t, path, v.name)
		}
		if err := errors.Join(err, t.close()); err != nil {
			return err
		}
	}
	return nil
}

// watch sees how many regions dm-clone hydrates in a while.
func (b *bench) watch(t *tower, path, name string) error {
	var hydrated int
	took, err := b.timed(func() error {
		first, _, err := cloneStatus(path)
		if err != nil {
			return err
		}
		time.Sleep(3 * b.time)
		last, _, err := cloneStatus(path)
		hydrated = last - first
		return err
	})
	b.results.add(partHydration, "alone", name, "MiB/s", float64(hydrated)*4/1024/took.Seconds(), "")
	return err
}

// area measures what the number of regions costs when a volume is new (the
// area is zeroed and dm-clone makes its metadata in it) and when it is opened again.
func (b *bench) area() error {
	for range b.rounds {
		for _, size := range b.sizes {
			for _, kib := range []int64{4, 16, 64, 256} {
				if err := b.areaOf(size, kib<<10); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (b *bench) areaOf(size, region int64) (err error) {
	i, err := newImage(b.dir, "area", size, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, i.remove()) }()
	t := &tower{prefix: "bench-area"}
	defer func() { err = errors.Join(err, t.close()) }()
	path, sectors, err := t.integrity(i.device, variant{mode: "J"})
	if err != nil {
		return err
	}
	var clone string
	took, err := b.timed(func() (err error) { clone, err = t.clone(path, sectors, region, paused); return err })
	if err != nil {
		return err
	}
	name := fmt.Sprintf("%d KiB", region>>10)
	b.results.add(partArea, sized(size, "new"), name, "s", took.Seconds(), "")
	table, err := dm.Table(filepath.Base(clone))
	if err != nil {
		return err
	}
	if err := dm.Remove(filepath.Base(clone)); err != nil {
		return err
	}
	t.names = t.names[:len(t.names)-1]
	took, err = b.timed(func() error {
		_, err := t.add("clone", "clone", table[0].Params, int64(table[0].Length))
		return err
	})
	b.results.add(partArea, sized(size, "again"), name, "s", took.Seconds(), "")
	return err
}
