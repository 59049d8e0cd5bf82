package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/secret"
)

const (
	volumeName = cryptmapper.Prefix + "hydration"
	deviceSize = 40 << 20
)

// A life is that of one volume: sessions that end with a cut, and a last one in
// which it is finished.
type life struct {
	seed   uint64
	rng    *rand.Rand
	dir    string // on a tmpfs
	image  string
	worker string // the program crypt-worker
	wiped  bool   // the volume is wiped in full as it is made; nothing is to hydrate
	lose   string // what a self-test loses: loseStack, loseDisk

	dek      dek.DEK // the record
	model    *model  // nil until the volume was opened once
	finished bool    // Finish returned in this session
	hot      int     // where the sectors begin that are written often

	usual         map[string]time.Duration // how long phases take
	workersKilled int
	buf           []byte
	bufs          [writers][]byte
	said          func(format string, args ...any)
}

// What a self-test loses.
const (
	loseStack = "stack" // a flush that the mapping takes and does not pass on
	loseDisk  = "disk"  // a flush that the disk acknowledges and does not do
)

// newLife makes a new volume's disk and record. The seed decides about everything.
func newLife(seed uint64, dir, worker string, wiped bool) (*life, error) {
	l := &life{
		seed: seed, rng: rand.New(rand.NewPCG(seed, 0)), dir: dir, image: filepath.Join(dir, "disk"), worker: worker, wiped: wiped,
		usual: map[string]time.Duration{phaseOpen: time.Second, phaseMade: 200 * time.Millisecond, phaseUse: 200 * time.Millisecond, phaseFinish: 300 * time.Millisecond, phaseClose: 200 * time.Millisecond},
		said:  func(string, ...any) {},
	}
	key := sha256.Sum256(fmt.Appendf(nil, "key %d", seed))
	l.dek = dek.DEK{
		ID: "hydration.cryptcsi.io/vol", State: dek.Prepared, Key: secret.Take(key[:]),
		Spec:  dek.Spec{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, Layout: layout(wiped)},
		Claim: dek.Claim{Node: "guest", UUID: fmt.Sprintf("11111111-2222-4333-8444-%012x", seed&0xffffffffffff)},
	}
	for _, buf := range []*[]byte{&l.buf, &l.bufs[0], &l.bufs[1], &l.bufs[2], &l.bufs[3]} {
		b, err := aligned(maxExtent * sectorSize)
		if err != nil {
			return nil, err
		}
		*buf = b
	}
	l.hot = l.rng.IntN(4096)
	return l, makeFile(l.image, deviceSize)
}

// aligned returns memory that direct I/O takes.
func aligned(n int) ([]byte, error) {
	return unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
}

func (l *life) free() {
	l.dek.Key.Wipe()
	for _, b := range append(slices.Clone(l.bufs[:]), l.buf) {
		_ = unix.Munmap(b)
	}
}

// die runs a session and cuts its power, and then opens the volume and looks
// what is there.
func (l *life) die(kind string) error {
	s, err := l.begin(kind)
	if err != nil {
		return err
	}
	var allowed [][]uint32
	switch {
	case l.lose != "":
		err = s.loseFlush()
	case kind == kindFlakey:
		err = s.liveUntilCut()
	default:
		err = s.live()
	}
	err = errors.Join(err, s.end())
	if err != nil {
		return fmt.Errorf("before the cut: %w", err)
	}
	if kind == kindLog {
		allowed, err = s.fallBack()
	} else {
		l.dek = s.records[len(s.records)-1]
		allowed = s.allowed(len(s.flushes()))
		l.said("flakey: cut in %s after %d flushes", s.cutAt, len(s.flushes()))
	}
	if err != nil {
		return err
	}
	return l.survive(allowed)
}

// flushes of the session's model.
func (s *session) flushes() []map[int]uint32 {
	if s.model == nil {
		return nil
	}
	return s.model.flushes
}

// allowed is what the volume may hold after so many flushes; nil for a volume
// that was not even opened.
func (s *session) allowed(flushes int) [][]uint32 {
	if s.model == nil {
		return nil
	}
	return s.model.after(flushes)
}

// liveUntilCut cuts power in a random phase, or at the end where that phase did
// not come.
func (s *session) liveUntilCut() error {
	phases := []string{phaseOpen, phaseUse, phaseUse, phaseFinish, phaseFinish, phaseClose}
	if s.dek.State == dek.Prepared {
		phases = append(phases, phaseMade)
	}
	s.cutIn, s.cutWhen = phases[s.rng.IntN(len(phases))], 1.2*s.rng.Float64()
	err := s.live()
	if s.off.Load() {
		err = nil // what a node without power says counts for nothing
	}
	s.cut()
	return err
}

// survive opens the volume after a cut, reads all of it, and takes what was
// found for what is there.
func (l *life) survive(allowed [][]uint32) error {
	s, err := l.begin(kindFlakey)
	if err != nil {
		return err
	}
	err = s.open()
	if err == nil {
		if allowed == nil {
			allowed = s.model.now()
		}
		var found []uint32
		if found, err = s.verify(allowed); err == nil {
			s.model.restart(found)
		}
	}
	if err := errors.Join(err, s.end()); err != nil {
		return fmt.Errorf("after the cut: %w", err)
	}
	return nil
}

// grow up: hydrate the rest in use, finish, and find everything again.
func (l *life) complete() error {
	s, err := l.begin(kindFlakey)
	if err != nil {
		return err
	}
	err = s.toTheEnd()
	l.dek = s.dek
	if err := errors.Join(err, s.end()); err != nil {
		return fmt.Errorf("finishing: %w", err)
	}
	return nil
}

func (s *session) toTheEnd() error {
	if err := s.open(); err != nil {
		return err
	}
	for _, do := range []func() error{
		func() error { return s.use(10) }, s.finish, s.same, func() error { return s.use(10) }, s.same, s.close, s.open, s.same,
	} {
		if err := do(); err != nil {
			return err
		}
	}
	return nil
}

// same holds the open volume against what was written.
func (s *session) same() error {
	_, err := s.verify(s.model.now())
	return err
}

// run cuts power n times, in as many lives as that takes.
func run(ctx context.Context, c config) error {
	for done, number := 0, uint64(c.first); done < c.n; number++ {
		l, err := newLife(c.seed<<16+number, c.dir, c.worker, c.wiped)
		if err != nil {
			return err
		}
		l.said = func(format string, args ...any) { c.say("life %d: "+format, append([]any{number}, args...)...) }
		err = l.all(&done, c)
		l.free()
		if err := errors.Join(err, os.Remove(l.image)); err != nil {
			return fmt.Errorf("seed %d, life %d, cut %d: %w", c.seed, number, done, err)
		}
	}
	return ctx.Err()
}

// all of a life: one to four cuts and the end.
func (l *life) all(done *int, c config) error {
	for range min(1+l.rng.IntN(4), c.n-*done) {
		kind := kindLog
		if len(c.kinds) > 0 {
			kind = c.kinds[l.rng.IntN(len(c.kinds))]
		}
		*done++
		c.counts[kind]++
		if err := l.die(kind); err != nil {
			return err
		}
	}
	return l.complete()
}
