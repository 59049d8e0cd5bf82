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
	random bool
	sync   bool
	aim    string
}

func loads() []load {
	return []load{
		{"sequential writes of 1 MiB", 1 << 20, false, false, "at least 0.9"},
		{"random writes of 4 KiB", 4 << 10, true, false, "at least 0.9"},
		{"random writes of 4 KiB, each synced", 4 << 10, true, true, "at least 0.5"},
	}
}

// whileHydrating writes to a volume that csi-plugin hydrates, and then to the
// same one when that is done.
func (b *bench) whileHydrating() error {
	v, err := b.stack.Create(b.ctx, "hydrating", hydratingSize, stack.BlockCapability(), map[string]string{"cryptcsi.io/integrity": "hmac-sha256"})
	if err != nil {
		return err
	}
	if err := v.Up(b.ctx); err != nil {
		return err
	}
	before, err := b.measure(v)
	if err != nil {
		return err
	}
	m, err := progress(v, b.stack.Name)
	if err != nil {
		return err
	}
	if m.Regions == 0 {
		return errors.New("the volume was hydrated before it was measured")
	}
	began := time.Now()
	for m.Regions > 0 {
		time.Sleep(100 * time.Millisecond)
		if m, err = progress(v, b.stack.Name); err != nil {
			return err
		}
	}
	b.table = append(b.table, []string{"the rest of hydrating 1 GiB, idle", seconds(time.Since(began)), "", "", "", ""})
	after, err := b.measure(v)
	if err != nil {
		return err
	}
	for i, l := range loads() {
		b.table = append(b.table, []string{l.name + " while it hydrates", rate(before[i]), "hydrated", rate(after[i]), fmt.Sprintf("%.2f", before[i]/after[i]), l.aim})
	}
	return errors.Join(v.Down(b.ctx), v.Delete(b.ctx))
}

func rate(perSecond float64) string { return fmt.Sprintf("%.0f/s", perSecond) }

func progress(v *stack.Volume, driverName string) (cryptmapper.Mapping, error) {
	m := cryptmapper.New(cryptmapper.Options{})
	defer m.Shutdown()
	all, err := m.List()
	if err != nil {
		return cryptmapper.Mapping{}, err
	}
	for _, found := range all {
		if found.Name == driver.MappingName(driverName, v.ID) {
			return found, nil
		}
	}
	return cryptmapper.Mapping{}, fmt.Errorf("volume %s is not open", v.ID)
}

// measure runs each load for some seconds and returns writes per second.
func (b *bench) measure(v *stack.Volume) ([]float64, error) {
	var all []float64
	for _, l := range loads() {
		perSecond, err := l.run(v.Target, 4*time.Second)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.name, err)
		}
		all = append(all, perSecond)
	}
	return all, nil
}

func (l load) run(path string, window time.Duration) (perSecond float64, err error) {
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
	blocks, random := int64(writtenSize/l.block), rand.New(rand.NewPCG(1, uint64(l.block)))
	n, began := int64(0), time.Now()
	for time.Since(began) < window {
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
		n++
	}
	return float64(n) / time.Since(began).Seconds(), nil
}
