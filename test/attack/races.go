package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// twoFaced is a network block device whose server is the host: it decides at
// every read of some pages which of two disks it shows.
type twoFaced struct {
	dev    string
	good   *os.File
	forged *os.File
	from   int64 // the first of the pages
	n      int   // how many

	mu    sync.Mutex
	pages map[int64]int // how often each was read
	reads int
	show  func(n int) bool // true: the forged one, at the n-th read since reset
}

const nbdDevice = "/dev/nbd0"

// Requests of ioctl_nbd and of the protocol (Documentation/admin-guide/blockdev/nbd.rst).
const (
	nbdSetSocket     = 0xab00
	nbdSetBlockSize  = 0xab01
	nbdDoIt          = 0xab03
	nbdClearSocket   = 0xab04
	nbdSetSizeBlocks = 0xab07
	nbdDisconnect    = 0xab08
	nbdSetFlags      = 0xab0a

	nbdRequestMagic = 0x25609513
	nbdReplyMagic   = 0x67446698
)

// serve starts the device; stop takes it away.
func (f *twoFaced) serve() (stop func(), err error) {
	_ = exec.Command("modprobe", "nbd").Run()
	if err := node(nbdDevice, 43, 0); err != nil {
		return nil, err
	}
	size, err := f.good.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	device, err := os.OpenFile(nbdDevice, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	server := os.NewFile(uintptr(fds[1]), "nbd")
	fd := int(device.Fd())
	for _, set := range [][2]int{{nbdClearSocket, 0}, {nbdSetBlockSize, 4096}, {nbdSetSizeBlocks, int(size / 4096)}, {nbdSetFlags, 1}, {nbdSetSocket, fds[0]}} {
		if err := unix.IoctlSetInt(fd, uint(set[0]), set[1]); err != nil {
			return nil, fmt.Errorf("nbd ioctl %#x: %w", set[0], err)
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { f.answer(server) })
	wg.Go(func() {
		runtime.LockOSThread() // it stays in the kernel
		_ = unix.IoctlSetInt(fd, nbdDoIt, 0)
	})
	f.dev = nbdDevice
	// The kernel sets the size when it begins.
	for until := time.Now().Add(10 * time.Second); time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		if n, err := device.Seek(0, io.SeekEnd); err == nil && n == size {
			break
		}
	}
	return func() {
		_ = unix.IoctlSetInt(fd, nbdDisconnect, 0)
		_ = unix.Shutdown(fds[0], unix.SHUT_RDWR)
		wg.Wait()
		_ = unix.IoctlSetInt(fd, nbdClearSocket, 0)
		_ = errors.Join(device.Close(), server.Close(), unix.Close(fds[0]))
	}, nil
}

// answer serves requests until the other end is closed.
func (f *twoFaced) answer(conn io.ReadWriter) {
	head := make([]byte, 28)
	for {
		if _, err := io.ReadFull(conn, head); err != nil || binary.BigEndian.Uint32(head) != nbdRequestMagic {
			return
		}
		kind, from, n := binary.BigEndian.Uint32(head[4:])&0xffff, int64(binary.BigEndian.Uint64(head[16:])), binary.BigEndian.Uint32(head[24:])
		reply := make([]byte, 16)
		binary.BigEndian.PutUint32(reply, nbdReplyMagic)
		copy(reply[8:], head[8:16])
		var data []byte
		var err error
		switch kind {
		case 0:
			data, err = f.read(from, int(n))
		case 1:
			data = make([]byte, n)
			if _, err = io.ReadFull(conn, data); err == nil {
				_, err = f.good.WriteAt(data, from)
			}
			data = nil
		case 2:
			return
		}
		if err != nil {
			binary.BigEndian.PutUint32(reply[4:], uint32(unix.EIO))
		}
		if _, err := conn.Write(append(reply, data...)); err != nil {
			return
		}
	}
}

// read shows what the host likes, anew for each of the pages.
func (f *twoFaced) read(from int64, n int) ([]byte, error) {
	b := make([]byte, n)
	if _, err := f.good.ReadAt(b, from); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for at := from &^ 4095; at < from+int64(n); at += 4096 {
		if at < max(from, f.from) || at >= f.from+int64(f.n)*4096 {
			continue
		}
		f.reads++
		f.pages[at]++
		if f.show(f.reads) {
			if _, err := f.forged.ReadAt(b[at-from:at-from+4096], at); err != nil {
				return nil, err
			}
		}
	}
	return b, nil
}

// reset begins to count anew, with nothing of the device in a cache.
func (f *twoFaced) reset(show func(n int) bool) error {
	file, err := os.OpenFile(f.dev, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	err = unix.IoctlSetInt(int(file.Fd()), unix.BLKFLSBUF, 0)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pages, f.reads, f.show = map[int64]int{}, 0, show
	return errors.Join(err, file.Close())
}

// readOnce tells whether every page of the header was read exactly once. Only
// the first one may be read again: libcryptsetup tries there whether the device
// can do direct I/O, and looks at nothing.
func (f *twoFaced) readOnce() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for at, n := range f.pages {
		if n != 1 && (at != 0 || n != 2) {
			return fmt.Errorf("the page at %d was read %d times", at, n)
		}
	}
	if len(f.pages) != f.n {
		return fmt.Errorf("%d of %d pages were read", len(f.pages), f.n)
	}
	return nil
}

// headerPages is how many 4 KiB the two metadata copies have.
const headerPages = 2 * copySize / 4096

func (s *suite) races() {
	s.section("a host that answers each read as it likes (a network block device, its server the host)")
	for _, r := range []struct {
		name   string
		forged attack
		from   int64
		n      int
		run    func(name string, t *target, f *twoFaced) error
	}{
		{"header changed between check and use", attack{on: s.bare, do: both(nullSegment())}, 0, headerPages, s.headerRace},
		{"superblock changed between check and use", attack{on: s.sealed, do: put(dataOffset+17, []byte{8})}, dataOffset, 1, s.superblockRace},
	} {
		if !s.only.MatchString(r.name) {
			continue
		}
		if err := s.race(r.forged, r.from, r.n, func(t *target, f *twoFaced) error { return r.run(r.name, t, f) }); err != nil {
			s.row(r.name, "", "", "", err)
		}
	}
}

// race serves a volume's disk together with a forged one.
func (s *suite) race(a attack, from int64, n int, run func(t *target, f *twoFaced) error) error {
	t, err := s.target(a, "forged")
	if err != nil {
		return err
	}
	defer func() { _ = t.file.Close() }()
	path := filepath.Join(s.dir, "good")
	if err := copyDisk(path, t.disk); err != nil {
		return err
	}
	good, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { _ = good.Close() }()
	f := &twoFaced{good: good, forged: t.file, from: from, n: n, pages: map[int64]int{}, show: func(int) bool { return false }}
	stop, err := f.serve()
	if err != nil {
		return err
	}
	defer stop()
	t.cryptcsi.Device = f.dev
	return run(t, f)
}

// superblockRace: what the kernel was told by a superblock that nobody checked
// shows in its table.
func (s *suite) superblockRace(name string, t *target, f *twoFaced) error {
	seen := false                      // by the kernel, and refused
	for _, read := range []int{1, 2} { // ours, and the kernel's
		if err := f.reset(func(n int) bool { return n > read }); err != nil {
			return err
		}
		m, err := s.open(t)
		message, ours := "", "refused"
		switch {
		case err == nil:
			message, ours, err = "it was not read again", "opens the same", t.identical(m)
		case errors.Is(err, errdefs.ErrState), errors.Is(err, errdefs.ErrUnavailable):
			message, err, seen = err.Error(), nil, true
		}
		s.row(fmt.Sprintf("%s: good %d time(s)", name, read), noPlain, ours, message, errors.Join(err, s.close(), s.nothingLeft()))
	}
	if !seen {
		return errors.New("the kernel never saw the forged superblock: there was no race")
	}
	return nil
}

func (s *suite) headerRace(name string, t *target, f *twoFaced) error {
	plain, err := s.checkThenOpen(f)
	if err != nil {
		return err
	}
	// Good at the first read of every page, forged at all later ones.
	if err := f.reset(func(n int) bool { return n > headerPages }); err != nil {
		return err
	}
	m, err := s.open(t)
	if err == nil {
		err = t.identical(m)
	}
	err = errors.Join(err, f.readOnce(), s.close(), s.nothingLeft())
	s.row(name+": good once, then forged", plain, "opens the same", fmt.Sprintf("each of the header's %d pages was read once", headerPages), err)

	if err := f.reset(func(n int) bool { return n <= headerPages }); err != nil {
		return err
	}
	_, err = s.open(t)
	message := ""
	if err == nil {
		err = errors.New("it was opened")
	} else {
		message, err = forged("").refusal(err)
	}
	s.row(name+": forged once, then good", noPlain, "refused", message, errors.Join(err, s.close(), s.nothingLeft()))

	opened, refused, err := s.raceRounds(t, f)
	s.row(name+fmt.Sprintf(": %d rounds at random", raceRounds), noPlain, "never another", fmt.Sprintf("%d opened as the identical mapping, %d were refused", opened, refused), err)
	return nil
}

const raceRounds = 30

// raceRounds opens while every page of the header is good or forged by chance.
func (s *suite) raceRounds(t *target, f *twoFaced) (opened, refused int, err error) {
	for i := range raceRounds {
		chance := rand.New(rand.NewPCG(s.seed, uint64(i)))
		// From nearly always good to nearly always forged.
		if err := f.reset(func(int) bool { return chance.IntN(raceRounds) < i }); err != nil {
			return opened, refused, err
		}
		m, err := s.open(t)
		switch {
		case err == nil:
			opened++
			err = t.identical(m)
		case errors.Is(err, errdefs.ErrState):
			refused++
			err = nil
		}
		if err = errors.Join(err, s.close(), s.nothingLeft()); err != nil {
			return opened, refused, fmt.Errorf("round %d: %w", i, err)
		}
	}
	if opened == 0 || refused == 0 {
		err = errors.New("all rounds ended alike: there was no race")
	}
	return opened, refused, err
}

// checkThenOpen is what an administrator can do with cryptsetup alone: look at
// the header, and then open the disk.
func (s *suite) checkThenOpen(f *twoFaced) (string, error) {
	dump, err := output("cryptsetup", "luksDump", f.dev)
	if err != nil {
		return "", err
	}
	if err := f.reset(func(int) bool { return true }); err != nil {
		return "", err
	}
	o, err := s.plainlyOn(f.dev, f.good.Name(), s.bare.d.Key.Expose(), time.Minute, nil)
	if err == nil && s.exact && !(strings.Contains(dump, "cipher: aes-xts-plain64") && o.leaks) {
		err = fmt.Errorf("the attack is none: %s; %s", lastLine(dump), o.String(s.bare.plain))
	}
	return "luksDump is fine; then " + o.String(s.bare.plain), err
}
