package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/test/stack"
)

// The parts that go through csi-plugin, as a pod's volume does.
const (
	partStage  = "stage"
	partDuring = "during"

	staged     = "with integrity"
	stagedNone = "encryption only"

	duringDone  = "finished"
	duringNow   = "hydrating"
	duringNever = "left alone"
)

// withNode does something with a node.
func (b *bench) withNode(do func(*stack.Stack) error) (err error) {
	dir := filepath.Join(b.dir, "stack")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	s, err := stack.Start(b.ctx, stack.Config{Dir: dir, Bin: b.bin})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			fmt.Fprintln(os.Stderr, s.Logs())
		}
		err = errors.Join(err, s.Stop(), os.RemoveAll(dir))
	}()
	return do(s)
}

func (b *bench) staging() error { return b.withNode(b.stagingTime) }
func (b *bench) during() error  { return b.withNode(b.duringHydration) }

func (b *bench) create(s *stack.Stack, name string, size int64, fs string, integrity bool) (*stack.Volume, error) {
	c := stack.BlockCapability()
	if fs != "block" {
		c = stack.MountCapability(fs)
	}
	extra := map[string]string{}
	if integrity {
		extra["cryptcsi.io/integrity"] = "hmac-sha256"
	}
	return s.Create(b.ctx, name, size, c, extra)
}

// stagingTime stages new volumes of all sizes, in turn.
func (b *bench) stagingTime(s *stack.Stack) error {
	for round := range b.rounds {
		for _, size := range b.sizes {
			for _, fs := range []string{"block", "ext4", "xfs"} {
				for subject, integrity := range map[string]bool{staged: true, stagedNone: false} {
					v, err := b.create(s, fmt.Sprintf("stage-%d-%d-%s-%v", round, size, fs, integrity), size, fs, integrity)
					if err != nil {
						return err
					}
					took, err := b.timed(func() error { return v.Stage(b.ctx) })
					if err := errors.Join(err, v.Unstage(b.ctx), v.Delete(b.ctx)); err != nil {
						return err
					}
					b.results.add(partStage, sized(size, fs), subject, "s", took.Seconds(), "")
				}
			}
		}
	}
	return nil
}

// duringHydration compares a volume that csi-plugin hydrates, new for each workload, with
// one that it has finished, and with one that is as new and that csi-plugin,
// being stopped, leaves alone.
func (b *bench) duringHydration(s *stack.Stack) error {
	// Twice the size: it must not be hydrated before the workload is over.
	defer func(was int64) { b.size = was }(b.size)
	b.size *= 2
	done, err := b.raw(s, "done")
	if err != nil {
		return err
	}
	took, err := b.timed(func() error { return b.finishedBy(done) })
	if err != nil {
		return err
	}
	b.results.add(partHydration, whole(b.size), "by csi-plugin", "MiB/s", float64(b.size/mib)/took.Seconds(), "")
	// Long enough for what hydrated just before to be over.
	defer func(was time.Duration) { b.time = was }(b.time)
	b.time *= 3
	err = b.compare(partDuring, "", []subject{
		{name: duringDone, up: func() (string, error) { return done.Target, nil }, down: func() error { return nil }},
		b.under(s, duringNow, func(v *stack.Volume) error { return b.underWay(v) }, func() error { return nil }),
		b.under(s, duringNever, func(v *stack.Volume) error { return b.stopped(s, v) }, func() error { return unix.Kill(s.PluginPID(), unix.SIGCONT) }),
	}, []string{seqWrite, randWrite, fsyncWrite})
	return errors.Join(err, done.Down(b.ctx), done.Delete(b.ctx))
}

// under is a volume of csi-plugin that is made anew for each workload. begin is
// done just before that, end after it.
func (b *bench) under(s *stack.Stack, name string, begin func(*stack.Volume) error, end func() error) subject {
	var v *stack.Volume
	n := 0
	return subject{
		name: name, busy: true,
		up: func() (path string, err error) {
			n++
			v, err = b.raw(s, fmt.Sprintf("%s-%d", strings.ReplaceAll(name, " ", "-"), n))
			if err != nil {
				return "", err
			}
			return v.Target, nil
		},
		begin: func() error { return begin(v) },
		check: func() error {
			m, err := b.behind(v)
			if err == nil && m.Hydrated == m.Regions {
				err = errors.New("hydration was over before the workload was")
			}
			return err
		},
		down: func() error { return errors.Join(end(), v.Down(b.ctx), v.Delete(b.ctx)) },
	}
}

// raw brings up a raw volume with integrity whose file has all its memory.
func (b *bench) raw(s *stack.Stack, name string) (*stack.Volume, error) {
	v, err := b.create(s, name, b.size, "block", true)
	if err != nil {
		return nil, err
	}
	file, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(v.Device()), "loop/backing_file"))
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(strings.TrimSpace(string(file)), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		return nil, err
	}
	zeros := make([]byte, mib)
	for at := int64(0); at < size; at += mib {
		if _, err := f.WriteAt(zeros[:min(mib, size-at)], at); err != nil {
			return nil, err
		}
	}
	return v, v.Up(b.ctx)
}

// behind is the mapping that is published as a raw volume.
func (b *bench) behind(v *stack.Volume) (cryptmapper.Mapping, error) {
	var st unix.Stat_t
	if err := unix.Stat(v.Target, &st); err != nil {
		return cryptmapper.Mapping{}, err
	}
	list, err := b.mapper.List()
	number := dm.NumberOf(st.Rdev).String()
	i := slices.IndexFunc(list, func(m cryptmapper.Mapping) bool { return m.Number == number })
	if err != nil || i < 0 {
		return cryptmapper.Mapping{}, fmt.Errorf("no mapping has the number %s: %w", number, err)
	}
	return list[i], nil
}

// underWay waits until csi-plugin has hydrated some of the volume.
func (b *bench) underWay(v *stack.Volume) error {
	for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		if m, err := b.behind(v); err != nil || m.Hydrated*32 > m.Regions {
			return err
		}
	}
	return errors.New("csi-plugin does not hydrate the volume")
}

// stopped is underWay, and then stops csi-plugin at a moment at which it has
// paused.
func (b *bench) stopped(s *stack.Stack, v *stack.Volume) error {
	if err := b.underWay(v); err != nil {
		return err
	}
	for {
		if _, err := b.load(v.Target, randRead, 50*time.Millisecond, b.buf); err != nil {
			return err
		}
		if err := unix.Kill(s.PluginPID(), unix.SIGSTOP); err != nil {
			return err
		}
		if m, err := b.behind(v); err != nil || !m.Hydrating {
			return err
		}
		if err := unix.Kill(s.PluginPID(), unix.SIGCONT); err != nil {
			return err
		}
	}
}

// finishedBy waits until csi-plugin has hydrated all and taken dm-clone away.
func (b *bench) finishedBy(v *stack.Volume) error {
	for until := time.Now().Add(10 * time.Minute); time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
		if m, err := b.behind(v); err != nil || m.Regions == 0 {
			return err
		}
	}
	return errors.New("csi-plugin did not finish the volume within ten minutes")
}
