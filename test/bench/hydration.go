package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/test/stack"
)

// hydratingSize is that of the volume that is written to while it hydrates. It
// must not be done before all is measured.
const (
	hydratingSize = 1 << 30
	writtenSize   = 900 << 20 // of which not all can be used
)

// A load is a way to write to a block volume.
type load struct {
	name   string
	block  int
	writes int
	random bool
	sync   bool
	aim    string
}

func loads() []load {
	return []load{
		{"sequential writes of 1 MiB", 1 << 20, 24, false, false, "at least 0.9"},
		{"random writes of 4 KiB", 4 << 10, 6000, true, false, "at least 0.9"},
		{"random writes of 4 KiB, each synced", 4 << 10, 1500, true, true, "at least 0.5"},
	}
}

// whileHydrating writes to a volume that csi-plugin hydrates and, in turn with
// it, to one that is hydrated. csi-plugin stands still while the second is
// measured, so that nothing is written in the background then.
func (b *bench) whileHydrating() error {
	done, err := b.integrity("hydrated", hydratingSize)
	if err != nil {
		return err
	}
	took, err := timed(func() error { return b.until(done, func(m cryptmapper.Mapping) bool { return m.Regions == 0 }) })
	if err != nil {
		return err
	}
	b.table = append(b.table, []string{"hydrating 1 GiB that nobody uses", seconds(took), "", "", "", ""})
	v, err := b.integrity("hydrating", hydratingSize)
	if err != nil {
		return err
	}
	for _, l := range loads() {
		var ours, paused, that []time.Duration
		for range b.rounds {
			// A volume that was idle hydrates, and takes a moment to make way.
			for began := time.Now(); time.Since(began) < time.Second; {
				if _, err := (load{block: l.block, writes: 16, random: l.random, sync: l.sync}).run(v.Target); err != nil {
					return err
				}
			}
			n, err := l.run(v.Target)
			if err != nil {
				return err
			}
			ours = append(ours, n)
			if n, err = b.undisturbed(v, func() (time.Duration, error) { return l.run(v.Target) }); err != nil {
				return err
			}
			paused = append(paused, n)
			if n, err = b.undisturbed(v, func() (time.Duration, error) { return l.run(done.Target) }); err != nil {
				return err
			}
			that = append(that, n)
		}
		b.row(l.name+" while hydration is stopped", median(paused), "hydrated", median(that), "")
		b.row(l.name+" while it hydrates", median(ours), "hydrated", median(that), l.aim)
	}
	if m, err := b.mapping(v); err != nil || m.Regions == 0 {
		return fmt.Errorf("the volume was hydrated before all was measured: %w", err)
	}
	return errors.Join(v.Down(b.ctx), v.Delete(b.ctx), done.Down(b.ctx), done.Delete(b.ctx))
}

// integrity makes a block volume with integrity and brings it up.
func (b *bench) integrity(name string, size int64) (*stack.Volume, error) {
	v, err := b.stack.Create(b.ctx, name, size, stack.BlockCapability(), map[string]string{"cryptcsi.io/integrity": "hmac-sha256"})
	if err != nil {
		return nil, err
	}
	return v, v.Up(b.ctx)
}

// undisturbed runs do while csi-plugin is stopped and hydrates nothing.
func (b *bench) undisturbed(v *stack.Volume, do func() (time.Duration, error)) (took time.Duration, err error) {
	defer func() { err = errors.Join(err, unix.Kill(b.stack.PluginPID(), unix.SIGCONT)) }()
	for {
		if err := unix.Kill(b.stack.PluginPID(), unix.SIGSTOP); err != nil {
			return 0, err
		}
		m, err := b.mapping(v)
		if err != nil {
			return 0, err
		}
		if !m.Hydrating {
			return do()
		}
		if err := unix.Kill(b.stack.PluginPID(), unix.SIGCONT); err != nil {
			return 0, err
		}
		if _, err := (load{block: 4 << 10, writes: 64}).run(v.Target); err != nil {
			return 0, err
		}
	}
}

func (b *bench) until(v *stack.Volume, cond func(cryptmapper.Mapping) bool) error {
	for {
		m, err := b.mapping(v)
		if err != nil || cond(m) {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// mapping is a volume's, as the kernel shows it.
func (b *bench) mapping(v *stack.Volume) (cryptmapper.Mapping, error) {
	m := cryptmapper.New(cryptmapper.Options{})
	defer m.Shutdown()
	for range 10 { // while its table changes it cannot be described
		all, err := m.List()
		if err != nil {
			return cryptmapper.Mapping{}, err
		}
		for _, found := range all {
			if found.Name == driver.MappingName(b.stack.Name, v.ID) {
				return found, nil
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	return cryptmapper.Mapping{}, fmt.Errorf("volume %s is not open", v.ID)
}

// run writes and returns how long that took.
func (l load) run(path string) (took time.Duration, err error) {
	f, err := os.OpenFile(filepath.Clean(path), os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buf, err := unix.Mmap(-1, 0, l.block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unix.Munmap(buf)) }()
	for i := range buf {
		buf[i] = byte(i * 7)
	}
	blocks, random := int64(writtenSize/l.block), rand.New(rand.NewPCG(rand.Uint64(), 1))
	began := time.Now()
	for n := range int64(l.writes) {
		at := n % blocks
		if l.random {
			at = random.Int64N(blocks)
		}
		if _, err := f.WriteAt(buf, at*int64(l.block)); err != nil {
			return 0, err
		}
		if l.sync {
			if err := f.Sync(); err != nil {
				return 0, err
			}
		}
	}
	return time.Since(began), nil
}
