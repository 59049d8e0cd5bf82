package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cryptcsi/cryptcsi/test/stack"
)

// stageAgainstHand stages an existing 1 GiB volume by RPC, opens and mounts the
// very same volume by hand, and one with Constellation's key derivation
// (argon2id, 64 MiB, 4 threads, 2 s), in turn.
func (b *bench) stageAgainstHand() error {
	v, err := b.stack.Create(b.ctx, "bench", 1<<30, stack.MountCapability("ext4"), nil)
	if err != nil {
		return err
	}
	if err := v.Stage(b.ctx); err != nil {
		return err
	}
	if err := v.Unstage(b.ctx); err != nil {
		return err
	}
	key, err := v.Key(b.ctx)
	if err != nil {
		return err
	}
	slow, err := b.stack.Create(b.ctx, "argon2id", 1<<30, stack.BlockCapability(), nil)
	if err != nil {
		return err
	}
	if err := formatByHand(slow.Device(), key); err != nil {
		return err
	}
	var ours, hand, argon []time.Duration
	for range b.rounds {
		d, err := timed(func() error { return v.Stage(b.ctx) })
		if err != nil {
			return err
		}
		ours = append(ours, d)
		if err := v.Unstage(b.ctx); err != nil {
			return err
		}
		for device, list := range map[string]*[]time.Duration{v.Device(): &hand, slow.Device(): &argon} {
			d, err := openByHand(device, key)
			if err != nil {
				return err
			}
			*list = append(*list, d)
		}
	}
	b.row("stage of an existing 1 GiB ext4 volume", median(ours), "cryptsetup open + mount, same volume", median(hand), "at least 1")
	b.row("stage of an existing 1 GiB ext4 volume", median(ours), "the same with argon2id as Constellation's", median(argon), "at least 10")
	return errors.Join(v.Delete(b.ctx), slow.Delete(b.ctx))
}

const byHand = "by-hand"

func formatByHand(device string, key []byte) error {
	if err := command(key, "cryptsetup", "luksFormat", "-q", "--type=luks2", "--sector-size=4096", "--key-size=512",
		"--pbkdf=argon2id", "--pbkdf-memory=65536", "--pbkdf-parallel=4", "--iter-time=2000", "--key-file=-", device); err != nil {
		return err
	}
	if err := command(key, "cryptsetup", "open", "--key-file=-", device, byHand); err != nil {
		return err
	}
	return errors.Join(command(nil, "mkfs.ext4", "-q", "/dev/mapper/"+byHand), command(nil, "cryptsetup", "close", byHand))
}

// openByHand times open and mount; closing is not timed.
func openByHand(device string, key []byte) (time.Duration, error) {
	dir, err := os.MkdirTemp("", "by-hand-")
	if err != nil {
		return 0, err
	}
	defer func() { _ = os.Remove(dir) }()
	d, err := timed(func() error {
		if err := command(key, "cryptsetup", "open", "--key-file=-", device, byHand); err != nil {
			return err
		}
		return command(nil, "mount", "-t", "ext4", "/dev/mapper/"+byHand, dir)
	})
	if err != nil {
		return 0, err
	}
	return d, errors.Join(command(nil, "umount", dir), command(nil, "cryptsetup", "close", byHand))
}

func command(stdin []byte, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}

// manyAtOnce stages volumes one after another and then all at once, and looks
// how much memory csi-plugin has while all are open.
func (b *bench) manyAtOnce() error {
	var volumes []*stack.Volume
	for i := range b.many {
		v, err := b.stack.Create(b.ctx, "many-"+strconv.Itoa(i), 32*mib, stack.MountCapability("ext4"), nil)
		if err != nil {
			return err
		}
		if err := v.Stage(b.ctx); err != nil {
			return err
		}
		volumes = append(volumes, v)
	}
	memory, err := resident(b.stack.PluginPID())
	if err != nil {
		return err
	}
	if err := each(volumes, func(v *stack.Volume) error { return v.Unstage(b.ctx) }); err != nil {
		return err
	}
	one, err := timed(func() error {
		for _, v := range volumes {
			if err := v.Stage(b.ctx); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := each(volumes, func(v *stack.Volume) error { return v.Unstage(b.ctx) }); err != nil {
		return err
	}
	all, err := timed(func() error { return each(volumes, func(v *stack.Volume) error { return v.Stage(b.ctx) }) })
	if err != nil {
		return err
	}
	b.row(fmt.Sprintf("%d volumes staged at once", b.many), all, "one after another", one, "at least 1.6 with two CPUs")
	b.table = append(b.table, []string{fmt.Sprintf("memory of csi-plugin with %d volumes open", b.many), fmt.Sprintf("%d MiB", memory/mib), "", "", "", "under 60 MB"})
	return each(volumes, func(v *stack.Volume) error { return errors.Join(v.Unstage(b.ctx), v.Delete(b.ctx)) })
}

func each(volumes []*stack.Volume, do func(*stack.Volume) error) error {
	errs := make([]error, len(volumes))
	var wg sync.WaitGroup
	for i, v := range volumes {
		wg.Go(func() { errs[i] = do(v) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func resident(pid int) (int64, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	var kib int64
	_, err = fmt.Sscan(rest, &kib)
	return kib << 10, err
}

// stalledDevice stages a volume while another one's raw device does not
// answer, against the same with nothing stalled.
func (b *bench) stalledDevice() error {
	var v [2]*stack.Volume
	for i, name := range []string{"stalled", "healthy"} {
		var err error
		if v[i], err = b.stack.Create(b.ctx, name, 64*mib, stack.MountCapability("ext4"), nil); err != nil {
			return err
		}
		if err := errors.Join(v[i].Stage(b.ctx), v[i].Unstage(b.ctx)); err != nil {
			return err
		}
	}
	var free, beside []time.Duration
	for range b.rounds {
		d, err := timed(func() error { return v[1].Stage(b.ctx) })
		if err = errors.Join(err, v[1].Unstage(b.ctx)); err != nil {
			return err
		}
		free = append(free, d)
	}
	err := b.stall(v[0], func() error {
		for range b.rounds {
			d, err := timed(func() error { return v[1].Stage(b.ctx) })
			if err = errors.Join(err, v[1].Unstage(b.ctx)); err != nil {
				return err
			}
			beside = append(beside, d)
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.row("stage beside a volume whose device hangs", median(beside), "with nothing hanging", median(free), "about 1")
	return errors.Join(v[0].Unstage(b.ctx), v[0].Delete(b.ctx), v[1].Delete(b.ctx))
}

// stall puts a suspended dm-linear in the place of a volume's loop device and
// has it staged in the background while do runs.
func (b *bench) stall(v *stack.Volume, do func() error) error {
	const name = "bench-stalled"
	device := v.Device()
	if err := command([]byte("0 "+strconv.Itoa(64*mib/512)+" linear "+device+" 0\n"), "dmsetup", "create", name); err != nil {
		return err
	}
	if err := command(nil, "dmsetup", "suspend", name); err != nil {
		return err
	}
	v.PublishContext["devicePath"] = "/dev/mapper/" + name
	ctx, cancel := context.WithCancel(b.ctx)
	staged := make(chan error, 1)
	go func() { staged <- v.Stage(ctx) }()
	err := do()
	select {
	case e := <-staged:
		err = errors.Join(err, fmt.Errorf("staging on the hanging device came back: %w", e))
	default:
	}
	cancel()
	err = errors.Join(err, command(nil, "dmsetup", "resume", name))
	v.PublishContext["devicePath"] = device
	// The killed worker needs a moment to come out of the kernel.
	for until := time.Now().Add(20 * time.Second); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		if v.Unstage(b.ctx) == nil {
			break
		}
	}
	return errors.Join(err, command(nil, "dmsetup", "remove", name))
}
