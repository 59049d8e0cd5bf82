package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/dek"
)

// The phases of a session, in which power is cut.
const (
	phaseOpen   = "open"
	phaseMade   = "made"
	phaseUse    = "use"
	phaseFinish = "finish"
	phaseClose  = "close"
)

// maxWait is the longest that anything here may take, on a slow machine.
const maxWait = 2 * time.Minute

// errOff ends a session whose power was cut.
var errOff = errors.New("power is off")

// A session is what happens to a volume between two boots: it is opened, used,
// hydrated, finished, closed, until power is cut.
type session struct {
	*life
	rng    *rand.Rand
	disk   *disk
	mapper *cryptmapper.Mapper
	v      cryptmapper.Volume
	ctx    context.Context
	stop   context.CancelFunc

	records []dek.DEK // the record's states in this session; marks in the log name them by number

	// Of dm-flakey: where and when power goes.
	cutIn   string
	cutWhen float64 // after which part of the usual time of that phase
	off     atomic.Bool
	cutAt   string // the phase in which it went
	cutErr  error
	phase   string
	began   time.Time
}

// begin boots: a new mapper, with locks that a boot has emptied.
func (l *life) begin(kind string) (*session, error) {
	d, err := openDisk(kind, l.image)
	if err != nil {
		return nil, err
	}
	locks := filepath.Join(l.dir, "locks")
	if err := os.RemoveAll(locks); err != nil {
		return nil, err
	}
	s := &session{
		life: l, rng: rand.New(rand.NewPCG(l.rng.Uint64(), 1)), disk: d, records: []dek.DEK{l.dek},
		mapper: cryptmapper.New(cryptmapper.Options{Worker: []string{l.worker}, LockDir: locks}),
		v:      cryptmapper.Volume{Name: volumeName, Device: d.path()},
	}
	s.ctx, s.stop = context.WithTimeout(context.Background(), 2*maxWait)
	return s, nil
}

// enter notes that a phase begins, in the log, and in a session that is to be
// cut in it sets the time.
func (s *session) enter(phase string) error {
	if s.off.Load() {
		return errOff
	}
	if s.phase != "" {
		s.usual[s.phase] = (s.usual[s.phase] + time.Since(s.began)) / 2
	}
	s.phase, s.began = phase, time.Now()
	if s.cutIn == phase {
		s.cutIn = ""
		time.AfterFunc(time.Duration(s.cutWhen*float64(s.usual[phase])), s.cut)
	}
	return s.disk.mark("phase=" + phase)
}

// cut turns power off: nothing is written any more, and what ran is killed.
func (s *session) cut() {
	if s.disk.kind != kindFlakey || !s.off.CompareAndSwap(false, true) {
		return
	}
	s.cutAt = s.phase
	s.cutErr = s.disk.cut()
	s.stop()
}

// open opens the volume, and where it is new finishes it.
func (s *session) open() error {
	if err := s.enter(phaseOpen); err != nil {
		return err
	}
	var m cryptmapper.Mapping
	err := s.insist(func(ctx context.Context) (err error) {
		m, err = s.mapper.Open(ctx, s.v, s.dek)
		return err
	})
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	if s.model == nil {
		s.model = newModel(s.seed, int(m.Size/sectorSize))
	}
	if m.Size != int64(len(s.model.acked))*sectorSize {
		return fmt.Errorf("open: the volume has %d bytes, and had %d sectors", m.Size, len(s.model.acked))
	}
	if err := s.notDiscarding(); err != nil || m.Made {
		return err
	}
	if err := s.enter(phaseMade); err != nil {
		return err
	}
	if m, err = s.mapper.MarkMade(s.ctx, s.v, s.dek); err != nil {
		return fmt.Errorf("mark made: %w", err)
	}
	return s.confirm(m)
}

// insist runs an operation; sometimes its worker is killed first.
func (s *session) insist(do func(context.Context) error) error {
	if s.rng.IntN(4) == 0 {
		ctx, cancel := context.WithTimeout(s.ctx, time.Duration(s.rng.Float64()*float64(s.usual[s.phase])))
		err := do(ctx)
		cancel()
		if err == nil || s.ctx.Err() != nil {
			return err
		}
		for len(s.mapper.Stuck()) > 0 {
			time.Sleep(time.Millisecond)
		}
		s.workersKilled++
	}
	return do(s.ctx)
}

// confirm does to the record what ConfirmDEK does. A node without power does
// nothing any more.
func (s *session) confirm(m cryptmapper.Mapping) error {
	if s.off.Load() {
		return s.ctx.Err()
	}
	s.dek.State, s.dek.Header = dek.Formatted, m.Header
	s.records = append(s.records, s.dek)
	return s.disk.mark(fmt.Sprintf("record=%d", len(s.records)-1))
}

// notDiscarding holds the mapping to it that nobody can discard: dm-clone would
// take what is discarded for hydrated.
func (s *session) notDiscarding() error {
	text, err := os.ReadFile(s.queue("discard_max_bytes"))
	if err == nil && strings.TrimSpace(string(text)) != "0" {
		err = fmt.Errorf("the mapping takes discards of %s bytes", strings.TrimSpace(string(text)))
	}
	return err
}

// queue is the path of a property of the mapping's queue.
func (s *session) queue(name string) string {
	info, _ := dm.Status(s.v.Name)
	return fmt.Sprintf("/sys/dev/block/%s/queue/%s", info.Number, name)
}

// status of dm-clone; nothing is to hydrate where there is none.
func (s *session) status() (hydrated, regions int, err error) {
	lines, err := dm.TargetStatus(cryptmapper.CloneName(s.v.Name))
	if errors.Is(err, dm.ErrNotFound) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	// "<metadata block size> <used>/<all> <region size> <hydrated>/<all> …"
	fields := strings.Fields(lines[0].Params)
	if len(fields) < 4 {
		return 0, 0, fmt.Errorf("dm-clone's status is %q", lines[0].Params)
	}
	_, err = fmt.Sscanf(fields[3], "%d/%d", &hydrated, &regions)
	return hydrated, regions, err
}

// finish hydrates what is left while the volume is used, and has the hydration ended.
func (s *session) finish() error {
	if err := s.hydrate(true); err != nil {
		return err
	}
	for until := time.Now().Add(maxWait); ; {
		hydrated, regions, err := s.status()
		if err != nil {
			return err
		}
		if hydrated == regions {
			break
		}
		if time.Now().After(until) {
			return fmt.Errorf("hydration stands at %d of %d regions", hydrated, regions)
		}
		if err := s.use(1); err != nil {
			return err
		}
	}
	if err := s.enter(phaseFinish); err != nil {
		return err
	}
	if s.wiped {
		return nil
	}
	var m cryptmapper.Mapping
	err := s.insist(func(ctx context.Context) (err error) {
		m, err = s.mapper.Finish(ctx, s.v, s.dek)
		return err
	})
	if err != nil {
		return fmt.Errorf("finish: %w", err)
	}
	if err := s.confirm(m); err != nil {
		return err
	}
	if _, regions, err := s.status(); regions != 0 || err != nil {
		return fmt.Errorf("finish: dm-clone is still there (%w)", err)
	}
	s.finished = true
	return s.notDiscarding()
}

func (s *session) hydrate(on bool) error {
	if err := s.mapper.Hydrate(s.v.Name, on); err != nil {
		return fmt.Errorf("hydrate: %w", err)
	}
	return nil
}

// close closes the volume.
func (s *session) close() error {
	if err := s.enter(phaseClose); err != nil {
		return err
	}
	if err := s.mapper.Close(s.ctx, s.v.Name); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	return nil
}

// live is one session as its decisions have it, without what cuts it.
func (s *session) live() error {
	if err := s.open(); err != nil {
		return err
	}
	for range 1 + s.rng.IntN(3) {
		if s.rng.IntN(3) > 0 {
			if err := s.hydrate(s.rng.IntN(3) > 0); err != nil {
				return err
			}
		}
		if err := s.enter(phaseUse); err != nil {
			return err
		}
		if err := s.use(5 + s.rng.IntN(50)); err != nil {
			return err
		}
		if s.rng.IntN(3) == 0 || s.cutIn == phaseFinish {
			if err := s.finish(); err != nil {
				return err
			}
		}
		if s.rng.IntN(4) == 0 {
			if err := errors.Join(s.close(), s.open()); err != nil {
				return err
			}
		}
	}
	return s.close()
}

// end takes everything down. After a cut nothing below the mapping can be
// trusted to be removed in order.
func (s *session) end() error {
	s.stop()
	defer s.mapper.Shutdown()
	for len(s.mapper.Stuck()) > 0 {
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(context.Background(), maxWait)
	defer cancel()
	return errors.Join(s.cutErr, s.mapper.Close(ctx, s.v.Name), s.disk.close())
}

// verify reads the whole volume and returns what is there; an error where a
// sector holds what it may not.
func (s *session) verify(allowed [][]uint32) ([]uint32, error) {
	file, err := os.OpenFile(dm.Path(s.v.Name), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	found := make([]uint32, len(allowed))
	var wrong []string
	for first := 0; first < len(allowed); first += len(s.buf) / sectorSize {
		n := min(len(s.buf)/sectorSize, len(allowed)-first)
		if _, err := file.ReadAt(s.buf[:n*sectorSize], int64(first)*sectorSize); err != nil {
			wrong = append(wrong, fmt.Sprintf("sectors %d to %d: %v", first, first+n-1, err))
			continue
		}
		for i := first; i < first+n; i++ {
			found[i], err = s.model.check(s.buf[(i-first)*sectorSize:][:sectorSize], i, allowed[i])
			if err != nil {
				wrong = append(wrong, err.Error())
			}
		}
	}
	if len(wrong) > 0 {
		return nil, &wrongError{len(wrong), wrong[:min(len(wrong), 5)]}
	}
	return found, nil
}

// wrongError says that a volume holds what it may not.
type wrongError struct {
	n    int
	some []string
}

func (e *wrongError) Error() string {
	return fmt.Sprintf("%d wrong: %s", e.n, strings.Join(e.some, "; "))
}
