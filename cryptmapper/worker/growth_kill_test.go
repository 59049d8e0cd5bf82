package worker_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// writer writes to a volume and remembers every write that was acknowledged.
type writer struct {
	block  []byte
	model  map[int64]uint64 // what each block of 4096 bytes was last filled with
	number uint64
	random *rand.Rand
	stop   chan struct{}
	done   sync.WaitGroup
	err    error
}

func newWriter(t *testing.T, seed uint64) *writer {
	t.Helper()
	block, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(block) })
	return &writer{block: block, model: map[int64]uint64{}, random: rand.New(rand.NewPCG(seed, 1))}
}

// start writes anywhere in the first size bytes until end is called.
func (w *writer) start(path string, size int64) {
	w.stop = make(chan struct{})
	w.done.Go(func() {
		file, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			w.err = err
			return
		}
		defer file.Close()
		for {
			select {
			case <-w.stop:
				w.err = file.Sync()
				return
			default:
			}
			at := w.random.Int64N(size / 4096)
			w.number++
			w.fill(w.number)
			if _, w.err = file.WriteAt(w.block, at*4096); w.err != nil {
				return
			}
			w.model[at] = w.number
		}
	})
}

func (w *writer) fill(number uint64) {
	for i := 0; i < len(w.block); i += 8 {
		binary.NativeEndian.PutUint64(w.block[i:], number)
	}
}

// end stops the writing.
func (w *writer) end(t *testing.T) {
	t.Helper()
	close(w.stop)
	w.done.Wait()
	if w.err != nil {
		t.Fatalf("writing: %v", w.err)
	}
}

// check reads all that was written.
func (w *writer) check(t *testing.T, path string) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for at, number := range w.model {
		if _, err := file.ReadAt(w.block, at*4096); err != nil {
			t.Fatalf("block %d: %v", at, err)
		}
		got := bytes.Clone(w.block)
		if w.fill(number); !bytes.Equal(got, w.block) {
			t.Fatalf("block %d has number %d, want %d", at, binary.NativeEndian.Uint64(got), number)
		}
	}
}

// killing is a volume that grows again and again, is written to meanwhile, and
// whose worker is killed each time.
type killing struct {
	*fixture
	w    *writer
	m    cryptmapper.Mapping
	disk int64
}

func newKilling(t *testing.T, i int, seed uint64) *killing {
	t.Helper()
	f, m := newSealed(t, 24*mib, sorts[i].layout, sorts[i].without)
	return &killing{fixture: f, w: newWriter(t, seed), m: m, disk: 24 * mib}
}

// once lets the disk grow and the volume with it: by a Mapper that is killed
// somewhere, then by what a person, kubelet or a restart would do next. It tells
// whether the first was killed.
func (k *killing) once(t *testing.T, by int64, next int, resize func(k *killing) error) bool {
	t.Helper()
	k.disk += by
	kernel.Grow(t, k.v.Device, k.disk)
	k.w.start(k.m.Path, k.m.Size)
	killed := resize(k)
	if killed != nil && !strings.Contains(killed.Error(), "killed") && !strings.Contains(killed.Error(), "died") && !errors.Is(killed, context.Canceled) {
		t.Fatalf("Resize: %v", killed)
	}
	k.converge(t, func() error { _, err := k.Open(t.Context(), k.v, k.d); return err })
	k.w.end(t)
	if next == 1 { // unstaged and staged
		k.close(t)
		k.open(t)
	}
	var now cryptmapper.Mapping
	k.converge(t, func() (err error) { now, err = k.Resize(t.Context(), k.v, k.d); return err })
	if now.Size <= k.m.Size && by >= mib {
		t.Fatalf("%d bytes after %d, on a disk of %d", now.Size, k.m.Size, k.disk)
	}
	k.confirm(now)
	if fresh := readAt(t, now.Path, k.m.Size, int(now.Size-k.m.Size)); !bytes.Equal(fresh, make([]byte, len(fresh))) {
		t.Fatal("the new space is not zero")
	}
	k.w.check(t, now.Path)
	if next == 2 { // closed while it hydrates
		k.close(t)
		k.open(t)
		k.w.check(t, now.Path)
	}
	k.m = k.settled(t)
	return killed != nil
}

// converge repeats while a worker that was killed is not gone yet, or the growth
// that the killed one was at ended and left the volume hydrating.
func (k *killing) converge(t *testing.T, act func() error) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		err := act()
		if err == nil {
			return
		}
		if !errors.Is(err, errdefs.ErrConflict) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// at kills the worker at a step.
func (k *killing) at(t *testing.T, i, step int) func(*killing) error {
	return func(k *killing) error {
		m := cryptmapper.New(cryptmapper.Options{Worker: []string{os.Args[0], "crypt-worker", strconv.Itoa(step)}, LockDir: "/run/cryptcsi-test", WithoutClone: sorts[i].without})
		defer m.Shutdown()
		_, err := m.Resize(t.Context(), k.v, k.d)
		return err
	}
}

// after kills the worker when some time has passed.
func (k *killing) after(t *testing.T, d time.Duration) func(*killing) error {
	return func(k *killing) error {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		defer time.AfterFunc(d, cancel).Stop()
		_, err := k.Resize(ctx, k.v, k.d)
		return err
	}
}

// Killed at a step of its growth, under load, a volume converges. CRASH_EVERY=1
// (make crash) tries every step, otherwise it is a sample.
func TestKernelGrowKilledAtSteps(t *testing.T) {
	for i, sort := range sorts {
		t.Run(sort.name, func(t *testing.T) {
			k := newKilling(t, i, 1)
			step, stride := sample(t, 5) // no multiple of 3, so that what comes next changes
			for ; k.once(t, 2*mib, step%3, k.at(t, i, step)); step += stride {
				t.Logf("killed at step %d: %d bytes", step, k.m.Size)
			}
			k.close(t)
			k.open(t)
			k.w.check(t, k.m.Path)
			k.holds(t, nil)
		})
	}
}

// The same at random steps and at random instants. GROWTH_KILLS says how many,
// SEED repeats a run.
func TestKernelGrowKilledAtRandom(t *testing.T) {
	count := number(t, "GROWTH_KILLS", 6)
	seed := uint64(number(t, "SEED", int(time.Now().UnixNano()&0xffffff)))
	t.Logf("SEED=%d GROWTH_KILLS=%d", seed, count)
	random := rand.New(rand.NewPCG(seed, 2))
	for i, sort := range sorts {
		t.Run(sort.name, func(t *testing.T) {
			k, killed := newKilling(t, i, seed), 0
			for try := 0; killed < (count+len(sorts)-1)/len(sorts); try++ {
				by := (1 + random.Int64N(20)) * mib / 2
				how := k.at(t, i, 1+random.IntN(24))
				if try%2 == 1 {
					how = k.after(t, time.Duration(random.IntN(400))*time.Millisecond)
				}
				if k.once(t, by, random.IntN(4), how) {
					killed++
				}
			}
			t.Logf("%d kills, %d bytes, %d blocks written", killed, k.m.Size, k.w.number)
			k.holds(t, nil)
		})
	}
}

func number(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(fmt.Errorf("%s: %w", name, err))
	}
	return n
}
