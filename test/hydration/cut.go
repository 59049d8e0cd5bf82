package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
)

// fallBack makes the image what the disk was promised to be at a random flush
// or FUA write of a random phase, and sometimes lets a part of what was not
// flushed reach it too. It returns what the volume may hold then, and takes the
// record back to what it was.
func (s *session) fallBack() ([][]uint32, error) {
	entries, err := s.disk.entries()
	if err != nil {
		return nil, err
	}
	tear := s.lose == "" && s.rng.IntN(2) == 0
	at, phase := choose(entries, s.rng, tear)
	if s.lose != "" {
		at, phase = lastFlush(entries), phaseUse
	}
	at += marks(entries[at:])
	torn := 0
	if tear {
		torn = unflushed(entries[at:])
	}
	flushes, record := promises(entries[:at])
	kept := entries[:at]
	if s.lose == loseDisk {
		kept = withoutLast(kept)
	}
	if err := s.disk.rewind(kept); err != nil {
		return nil, err
	}
	if err := s.tear(entries[at : at+torn]); err != nil {
		return nil, err
	}
	s.life.dek, s.life.finished = s.records[record], false
	s.said("log: cut in %s, at entry %d of %d with parts of %d more, after %d flushes", phase, at, len(entries), torn, flushes)
	return s.allowed(flushes), nil
}

// choose returns where to stop: behind a flush or FUA write of a random phase,
// with writes that may be torn next to it where that is asked for.
func choose(entries []entry, rng *rand.Rand, tear bool) (int, string) {
	type place struct {
		at    int
		phase string
	}
	phase := "boot"
	byPhase := [][]place{}
	for i, e := range entries {
		if name, ok := strings.CutPrefix(e.mark, "phase="); ok {
			phase = name
			byPhase = append(byPhase, nil)
		}
		next := entries[i+1:]
		if e.stop() && len(byPhase) > 0 && (!tear || unflushed(next[marks(next):]) > 0) {
			last := len(byPhase) - 1
			byPhase[last] = append(byPhase[last], place{i + 1, phase})
		}
	}
	var some [][]place
	for _, places := range byPhase {
		if len(places) > 0 {
			some = append(some, places)
		}
	}
	if len(some) == 0 {
		return len(entries), phase
	}
	places := some[rng.IntN(len(some))]
	p := places[rng.IntN(len(places))]
	return p.at, p.phase
}

// marks counts the marks that come next: they are no writes.
func marks(entries []entry) int {
	for i, e := range entries {
		if e.flags&logMark == 0 {
			return i
		}
	}
	return len(entries)
}

// unflushed counts the writes that came next and that nothing had flushed yet:
// a disk may keep any part of them.
func unflushed(entries []entry) int {
	for i, e := range entries {
		if e.stop() || e.flags&logMark != 0 {
			return i
		}
	}
	return len(entries)
}

// promises returns how many flushes were acknowledged, and what the record was.
func promises(entries []entry) (flushes, record int) {
	for _, e := range entries {
		var n int
		if _, err := fmt.Sscanf(e.mark, "flush=%d", &n); err == nil {
			flushes = max(flushes, n+1) // two writers may mark out of order
		}
		_, _ = fmt.Sscanf(e.mark, "record=%d", &record)
	}
	return flushes, record
}

// tear writes a random part of these writes, in units of 512 bytes.
func (s *session) tear(entries []entry) error {
	log, err := os.Open(s.disk.log())
	if err != nil {
		return err
	}
	defer log.Close()
	image, err := os.OpenFile(s.image, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	for _, e := range entries {
		whole := s.rng.IntN(2) == 0
		for at := int64(0); at < e.length; at += 512 {
			if s.rng.IntN(3) == 0 && (at == 0 || !whole) {
				if whole {
					break
				}
				continue
			}
			from := io.NewSectionReader(log, e.data+at, 512)
			if _, err := io.Copy(io.NewOffsetWriter(image, e.offset+at), from); err != nil {
				return errors.Join(err, image.Close())
			}
		}
	}
	return image.Close()
}

// loseFlush is the session of a self-test: after some use one flush gets lost.
func (s *session) loseFlush() error {
	if err := s.open(); err != nil {
		return err
	}
	if err := errors.Join(s.enter(phaseUse), s.use(10)); err != nil {
		return err
	}
	file, err := os.OpenFile(dm.Path(s.v.Name), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	if s.lose == loseStack {
		// The kernel drops flushes to a device that says it has no cache.
		if err := os.WriteFile(s.queue("write_cache"), []byte("write through"), 0); err != nil {
			return err
		}
	}
	for i := range 8 {
		if err := s.write(file, i*97, 1, s.bufs[0]); err != nil {
			return err
		}
	}
	if err := s.flush(file); err != nil {
		return err
	}
	s.cut()
	return nil
}

// lastFlush returns where the mark of the last promise stands.
func lastFlush(entries []entry) int {
	for i, e := range slices.Backward(entries) {
		if strings.HasPrefix(e.mark, "flush=") {
			return i
		}
	}
	return 0
}

// withoutLast takes out what the last promised flush wrote.
func withoutLast(entries []entry) []entry {
	before := lastFlush(entries[:lastFlush(entries)])
	return entries[:before]
}
