package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// propertyDeadline is what no opening may exceed, whatever the disk holds.
const propertyDeadline = 10 * time.Second

// properties changes bytes at random: each disk either opens as the identical
// mapping, whose blocks are the volume's or an I/O error, or is refused.
func (s *suite) properties() {
	s.section(fmt.Sprintf("%d random changes; run again with SEED=%d N=%d", s.n, s.seed, s.n))
	for _, p := range []struct {
		name   string
		on     *volume
		from   int64
		to     int64
		rounds int
	}{
		{"both copies and the keyslot's area", s.bare, 0, areaAt + areaSize, s.n / 2},
		{"the same with integrity", s.sealed, 0, areaAt + areaSize, s.n / 6},
		{"first MiB of an integrity device", s.sealed, dataOffset, dataOffset + mib, s.n - s.n/2 - s.n/6},
	} {
		if !s.only.MatchString(p.name) {
			continue
		}
		r := rand.New(rand.NewPCG(s.seed, uint64(p.from)))
		opened, refused, slowest, err := 0, 0, time.Duration(0), error(nil)
		for i := range p.rounds {
			c := randomChange(r, p.from, p.to)
			began := time.Now()
			same, e := s.withChange(p.on, c)
			slowest = max(slowest, time.Since(began))
			if e != nil {
				err = fmt.Errorf("change %d, %s: %w", i, c.what, e)
				break
			}
			if same {
				opened++
			} else {
				refused++
			}
		}
		if err == nil && p.rounds > 20 && refused == 0 {
			err = errors.New("nothing was refused: the changes are none")
		}
		s.row(p.name, "", "never another", fmt.Sprintf("%d opened as the identical mapping, %d were refused; slowest %.1f s", opened, refused, slowest.Seconds()), err)
	}
}

// change is one random change of a disk.
type change struct {
	what string
	do   func(t *target) error
}

// randomChange picks what and where; small places of meaning (the binary
// header, the JSON, the superblock) are hit as often as large areas.
func randomChange(r *rand.Rand, from, to int64) change {
	starts := []int64{from, from + r.Int64N(to-from)}
	if from == 0 {
		copyAt := int64(r.IntN(2)) * copySize
		starts = append(starts, copyAt+r.Int64N(512), copyAt+binarySize+r.Int64N(2500), copyAt+binarySize+r.Int64N(2500), areaAt+r.Int64N(4096))
	} else {
		starts = append(starts, from+r.Int64N(64), from+r.Int64N(64), from+4096+r.Int64N(8192))
	}
	at := starts[r.IntN(len(starts))]
	n := []int64{1, 1, 1, 2, 8, 64, 512, 4096}[r.IntN(8)]
	b := make([]byte, min(n, to-at))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	kind := r.IntN(4)
	checksums, twice := from == 0 && r.IntN(2) == 0, from == 0 && at < 2*copySize && r.IntN(2) == 0
	what := fmt.Sprintf("%s of %d bytes at %d", [...]string{"noise", "flips", "printable noise", "zeros"}[kind], len(b), at)
	return change{what, func(t *target) error {
		places := []int64{at}
		if twice {
			places = []int64{at % copySize, at%copySize + copySize}
		}
		for _, place := range places {
			was := make([]byte, len(b))
			if _, err := t.file.ReadAt(was, place); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			for i := range b {
				switch kind {
				case 0:
					was[i] = b[i]
				case 1:
					was[i] ^= 1 << (b[i] % 8)
				case 2:
					was[i] = ' ' + b[i]%95
				case 3:
					was[i] = 0
				}
			}
			if _, err := t.file.WriteAt(was, place); err != nil {
				return err
			}
		}
		if checksums {
			return t.header(func(header) error { return nil })
		}
		return nil
	}}
}

// withChange tells whether a disk with the change opens as it must (true) or is
// refused; everything else is an error.
func (s *suite) withChange(v *volume, c change) (same bool, err error) {
	path := filepath.Join(s.dir, "property")
	if err := copyDisk(path, v.disk); err != nil {
		return false, err
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return false, err
	}
	defer func() { _ = file.Close() }()
	t := &target{volume: v, file: file, d: v.d}
	if err := c.do(t); err != nil {
		return false, err
	}
	dev, detach, err := loop(path, false)
	if err != nil {
		return false, err
	}
	defer detach()
	ctx, cancel := context.WithTimeout(s.ctx, propertyDeadline)
	defer cancel()
	m, err := s.mapper.Open(ctx, cryptmapper.Volume{Name: s.mapping, Device: dev}, t.d)
	if same = err == nil; same {
		err = identicalOrUnreadable(t, m)
	} else if errors.Is(err, errdefs.ErrState) || errors.Is(err, errdefs.ErrUnavailable) && !strings.Contains(err.Error(), "died") {
		err = nil
	}
	return same, errors.Join(err, s.close(), s.nothingLeft())
}

func identicalOrUnreadable(t *target, m cryptmapper.Mapping) error {
	got, err := readTable(m.Name)
	if err == nil && got != t.ours {
		err = fmt.Errorf("the mapping is %+v and was %+v", got, t.ours)
	}
	_, e := intact(m.Path)
	return errors.Join(err, e)
}
