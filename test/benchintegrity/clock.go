package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A machine that does other things too stretches a guest's time by chance, and
// the guest cannot tell. So in a guest the host's clock of the CPU time that all
// of the guest has used is what is measured by: the disks are memory and there
// is one CPU, so that nothing is waited for. The two ends talk by names in a
// directory, because the guest may not read what the host writes there later.

// clock tells how much time has passed.
type clock struct {
	dir   string // where the host answers; empty: the time on the wall
	asked int
}

// now returns the time since some moment.
func (c *clock) now() (time.Duration, error) {
	if c.dir == "" {
		return time.Duration(time.Now().UnixNano()), nil
	}
	c.asked++
	name := filepath.Join(c.dir, strconv.Itoa(c.asked))
	if err := os.WriteFile(name+".asked", nil, 0o600); err != nil {
		return 0, err
	}
	for range 60_000 {
		if text, err := os.Readlink(name + ".answer"); err == nil {
			ns, err := strconv.ParseInt(text, 10, 64)
			return time.Duration(ns), err
		}
		time.Sleep(time.Millisecond)
	}
	return 0, errors.New("the host does not say how much CPU time the guest has used")
}

// timed returns how long do took.
func (c *clock) timed(do func() error) (time.Duration, error) {
	began, err := c.now()
	if err != nil {
		return 0, err
	}
	err = do()
	end, e := c.now()
	return end - began, errors.Join(err, e)
}

// timer tells when a time is over, without asking the host all the time: no
// more can have passed than on the wall.
type timer struct {
	*clock
	end   time.Duration
	until time.Time // not over before
}

func (c *clock) timer(length time.Duration) (*timer, error) {
	now, err := c.now()
	return &timer{clock: c, end: now + length, until: time.Now().Add(length)}, err
}

func (t *timer) over() (bool, error) {
	if time.Now().Before(t.until) {
		return false, nil
	}
	now, err := t.now()
	left := t.end - now
	t.until = time.Now().Add(max(left, 10*time.Millisecond))
	return left <= 0, err
}

// settle waits until the guest has done what an earlier step left behind, or a
// while. By the time on the wall nobody can tell, so it waits a moment.
func (c *clock) settle() error {
	for range 50 {
		used, err := c.timed(func() error { time.Sleep(100 * time.Millisecond); return nil })
		if err != nil || c.dir == "" || used < 10*time.Millisecond {
			return err
		}
	}
	return nil
}

// tick is the unit of CPU times in /proc/PID/stat.
const tick = 10 * time.Millisecond

// host runs a command, which is to boot a guest, and answers the guest's clock.
func host(ctx context.Context, dir string, command []string) error {
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return err
	}
	if _, err := unix.InotifyAddWatch(watch, dir, unix.IN_CLOSE_WRITE); err != nil {
		return err
	}
	events := os.NewFile(uintptr(watch), "inotify")
	defer events.Close()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) } // it stops the guest
	if err := cmd.Start(); err != nil {
		return err
	}
	go answer(events, dir, cmd.Process.Pid)
	return cmd.Wait()
}

// answer answers until events is closed.
func answer(events *os.File, dir string, pid int) {
	buf := make([]byte, 64<<10)
	for {
		if _, err := events.Read(buf); err != nil {
			return
		}
		asked, _ := filepath.Glob(filepath.Join(dir, "*.asked"))
		for _, path := range asked {
			_ = os.Remove(path)
			_ = os.Symlink(strconv.FormatInt(used(pid), 10), strings.TrimSuffix(path, ".asked")+".answer")
		}
	}
}

// used is the CPU time of a process and all below it, and of those that ended,
// in nanoseconds.
func used(root int) (ns int64) {
	parent, times := map[int]int{}, map[int]int64{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		// After the name, which may hold anything: state, parent, …, and as the
		// 14th and 15th the ticks of children that ended.
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		parent[pid], _ = strconv.Atoi(f[1])
		for _, field := range f[13:15] {
			ticks, _ := strconv.ParseInt(field, 10, 64)
			times[pid] += ticks * int64(tick)
		}
	}
	for pid, t := range times {
		for p := pid; p > 1; p = parent[p] {
			if p == root {
				ns += t + running(pid)
				break
			}
		}
	}
	return ns
}

// running is the CPU time of a process itself.
func running(pid int) (ns int64) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	for _, path := range tasks {
		var n int64
		if b, err := os.ReadFile(path); err == nil {
			_, _ = fmt.Sscan(string(b), &n)
		}
		ns += n
	}
	return ns
}

// clockDir empties the directory that both ends know.
func clockDir(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("directory of the guest's clock: %w", err)
	}
	return nil
}
