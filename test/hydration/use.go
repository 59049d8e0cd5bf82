package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
)

const (
	writers   = 4
	maxExtent = 16 // sectors that are written at once
)

// files are the ways into the mapping.
type files struct {
	direct, dsync, buffered *os.File
}

func openFiles(path string) (f files, err error) {
	for _, way := range []struct {
		file  **os.File
		flags int
	}{
		{&f.direct, unix.O_DIRECT}, {&f.dsync, unix.O_DIRECT | unix.O_DSYNC}, {&f.buffered, 0},
	} {
		if *way.file, err = os.OpenFile(path, os.O_RDWR|way.flags, 0); err != nil {
			f.close()
			return f, err
		}
	}
	return f, nil
}

func (f files) close() {
	for _, file := range []*os.File{f.direct, f.dsync, f.buffered} {
		if file != nil {
			file.Close()
		}
	}
}

// use writes, reads and flushes at random: rounds in which writers work at once
// and a flush may go along, and between which there may be another.
func (s *session) use(rounds int) error {
	f, err := openFiles(dm.Path(s.v.Name))
	if err != nil {
		return err
	}
	defer f.close()
	for range rounds {
		if s.off.Load() {
			return errOff
		}
		var wg sync.WaitGroup
		errs := make([]error, writers+1)
		for i := range writers {
			rng := rand.New(rand.NewPCG(s.rng.Uint64(), 2))
			wg.Go(func() { errs[i] = s.work(f, rng, s.bufs[i]) })
		}
		if s.rng.IntN(4) == 0 {
			wg.Go(func() { errs[writers] = s.flush(f.direct) })
		}
		wg.Wait()
		if s.rng.IntN(2) == 0 {
			errs = append(errs, s.flush(f.buffered))
		}
		for _, err := range errs {
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// work is a few operations of one writer.
func (s *session) work(f files, rng *rand.Rand, buf []byte) error {
	for range 1 + rng.IntN(4) {
		var err error
		switch first, n := s.place(rng); rng.IntN(8) {
		case 0:
			err = s.read(f.direct, first, buf)
		case 1:
			err = s.writeFUA(f.dsync, first, n, buf)
		case 2:
			err = s.write(f.buffered, first, n, buf)
		default:
			err = s.write(f.direct, first, n, buf)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// place chooses sectors: half of them in a small part, to have them written
// again, and most single.
func (s *session) place(rng *rand.Rand) (first, n int) {
	n = 1
	if rng.IntN(3) == 0 {
		n += rng.IntN(maxExtent)
	}
	first = rng.IntN(len(s.model.acked) - n + 1)
	if rng.IntN(2) == 0 {
		first = first/64 + s.hot
	}
	return first, n
}

func (s *session) write(file *os.File, first, n int, buf []byte) error {
	b := s.model.begin(first, n, buf)
	if b == nil {
		return nil
	}
	_, err := file.WriteAt(b, int64(first)*sectorSize)
	s.model.end(first, n, err == nil)
	return err
}

// writeFUA writes so that it is durable when it is acknowledged.
func (s *session) writeFUA(file *os.File, first, n int, buf []byte) error {
	b := s.model.begin(first, n, buf)
	if b == nil {
		return nil
	}
	_, err := file.WriteAt(b, int64(first)*sectorSize)
	if err != nil || s.off.Load() {
		s.model.end(first, n, err == nil)
		return err
	}
	return s.promised(s.model.endFUA(first, n))
}

// flush makes durable what was acknowledged before.
func (s *session) flush(file *os.File) error {
	covered := s.model.beginFlush()
	if err := file.Sync(); err != nil || s.off.Load() {
		return err
	}
	return s.promised(s.model.endFlush(covered))
}

// promised notes in the log what was promised.
func (s *session) promised(flush int) error { return s.disk.mark(fmt.Sprintf("flush=%d", flush)) }

// read reads a sector that nobody writes, and holds it against the last write.
func (s *session) read(file *os.File, sector int, buf []byte) error {
	if !s.model.hold(sector) {
		return nil
	}
	defer s.model.release(sector)
	if _, err := file.ReadAt(buf[:sectorSize], int64(sector)*sectorSize); err != nil {
		return err
	}
	if _, err := s.model.check(buf[:sectorSize], sector, s.model.held(sector)); err != nil && !s.off.Load() {
		return fmt.Errorf("while in use: %w", err)
	}
	return nil
}
