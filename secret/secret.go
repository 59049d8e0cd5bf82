// Package secret holds key bytes in memory that is locked, left out of core
// dumps, never printed, and wiped by its owner.
package secret

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"
)

const redacted = "[secret]"

// Bytes is a run of secret bytes outside the Go heap: anonymous memory, locked
// against swapping where the process may lock memory (see CheckLocking) and
// excluded from core dumps. Copies of a Bytes share the same memory, as copies
// of a slice do. Every way of printing or encoding it gives "[secret]" or an
// error. The zero value is empty.
//
// Whoever creates a Bytes owns it and calls Wipe. Methods may be called
// concurrently, but not concurrently with Wipe.
type Bytes struct {
	m *memory
}

type memory struct {
	mapped []byte // whole pages
	data   []byte // the secret within them
}

// New returns n zero bytes. It panics where the system has no memory left, as
// the Go runtime does.
func New(n int) Bytes {
	b, _ := allocate(n) // locked if possible; CheckLocking tells at start what this process gets
	return b
}

// NewLocked is New that fails where the memory cannot be locked: for secrets
// that stay.
func NewLocked(n int) (Bytes, error) {
	b, err := allocate(n)
	if err != nil {
		b.Wipe()
		return Bytes{}, fmt.Errorf("locking %d bytes in memory: %w", n, err)
	}
	return b, nil
}

// allocate returns n zero bytes, and why they are not locked.
func allocate(n int) (Bytes, error) {
	if n == 0 {
		return Bytes{}, nil
	}
	page := unix.Getpagesize()
	mapped, err := unix.Mmap(-1, 0, (n+page-1)/page*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		panic(fmt.Sprintf("secret: no memory for %d bytes: %v", n, err))
	}
	err = unix.Mlock(mapped)
	_ = unix.Madvise(mapped, unix.MADV_DONTDUMP)
	_ = unix.Madvise(mapped, unix.MADV_DONTFORK)
	return Bytes{m: &memory{mapped: mapped, data: mapped[:n:n]}}, err
}

// Take moves b into a Bytes and wipes b.
func Take(b []byte) Bytes {
	s := New(len(b))
	Do(func() {
		copy(s.Expose(), b)
		clear(b)
	})
	return s
}

// Read reads exactly n bytes from r. A short read wipes what came and returns
// the reader's error.
func Read(r io.Reader, n int) (Bytes, error) {
	s := New(n)
	if _, err := io.ReadFull(r, s.Expose()); err != nil {
		s.Wipe()
		return Bytes{}, err
	}
	return s, nil
}

// Random returns n random bytes.
func Random(n int) Bytes {
	s := New(n)
	Do(func() { _, _ = rand.Read(s.Expose()) }) // never fails
	return s
}

// ReadFile reads the whole of a regular file of least to most bytes.
func ReadFile(path string, least, most int64) (Bytes, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe must not hang us
	if err != nil {
		return Bytes{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return Bytes{}, err
	case !info.Mode().IsRegular() || info.Size() < least || info.Size() > most:
		size := fmt.Sprintf("%d to %d bytes", least, most)
		if least == most {
			size = fmt.Sprintf("%d bytes", most)
		}
		return Bytes{}, fmt.Errorf("%s must be a regular file of %s", path, size)
	}
	s, err := Read(f, int(info.Size()))
	if err != nil {
		return Bytes{}, fmt.Errorf("reading %s: %w", path, err)
	}
	return s, nil
}

// Expose returns the bytes themselves. The slice is valid until Wipe and must
// not be kept beyond the call it is passed to.
func (b Bytes) Expose() []byte {
	if b.m == nil {
		return nil
	}
	return b.m.data
}

// Len returns the number of bytes; 0 after Wipe.
func (b Bytes) Len() int { return len(b.Expose()) }

// Clone returns a copy with an owner of its own.
func (b Bytes) Clone() Bytes {
	c := New(b.Len())
	c.Set(b.Expose())
	return c
}

// Set copies from into b, as far as the shorter of both goes.
func (b Bytes) Set(from []byte) { Do(func() { copy(b.Expose(), from) }) }

// Equal compares in constant time.
func (b Bytes) Equal(other Bytes) bool {
	return subtle.ConstantTimeCompare(b.Expose(), other.Expose()) == 1
}

// Wipe zeroes the bytes and gives the memory back. All copies of b are empty
// afterwards; a second Wipe does nothing.
func (b Bytes) Wipe() {
	if b.m == nil || b.m.mapped == nil {
		return
	}
	clear(b.m.mapped)
	_ = unix.Munmap(b.m.mapped) // cannot fail for a mapping of our own
	*b.m = memory{}
}

// Format makes every fmt verb print "[secret]".
func (b Bytes) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// String returns "[secret]".
func (b Bytes) String() string { return redacted }

// LogValue makes slog print "[secret]".
func (b Bytes) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON fails: a secret that is to be stored is wrapped first.
func (b Bytes) MarshalJSON() ([]byte, error) { return nil, errEncode }

// MarshalText fails like MarshalJSON.
func (b Bytes) MarshalText() ([]byte, error) { return nil, errEncode }

var errEncode = errors.New("secret: refusing to encode key bytes")

var (
	_ json.Marshaler = Bytes{}
	_ fmt.Formatter  = Bytes{}
)

// CheckLocking tells whether this process can lock secrets in memory. Without
// (RLIMIT_MEMLOCK too low, no CAP_IPC_LOCK) everything works, but key bytes
// may reach swap space: the process says so at start.
func CheckLocking() error {
	probe, err := unix.Mmap(-1, 0, 16*unix.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(probe) }()
	return unix.Mlock(probe)
}

// Harden keeps this process's memory from core dumps and from other processes
// of the same user: RLIMIT_CORE 0 and PR_SET_DUMPABLE 0, the latter because a
// core_pattern that is a pipe ignores the limit.
func Harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbidding core dumps: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("making the process undumpable: %w", err)
	}
	return nil
}
