package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// deadline is what an opening may take that a kubelet would wait for.
const deadline = 30 * time.Second

// attack is one row of the table.
type attack struct {
	name string
	on   *volume
	// do changes the target's disk, or what its record says.
	do func(t *target) error
	// plain is what the row says of cryptsetup 2.6.1, at least these words: it
	// proves that the attack is one. Nothing is tried where it is noPlain.
	plain string
	must  outcome
}

const noPlain = "-"

// target is a copy of a volume's disk under attack.
type target struct {
	*volume
	file *os.File // the backing file
	d    dek.DEK  // what cryptcsi is told

	plainKey  []byte        // what plain cryptsetup is given; the DEK where nil
	plainArgs []string      // more arguments for it
	patience  time.Duration // how long it may take
	readOnly  bool          // the device
	cryptcsi  cryptmapper.Volume
}

// outcome is what cryptcsi has to do: refuse with class and words, or open, and
// then what has to hold.
type outcome struct {
	word  string // in the table
	class error
	words string
	open  func(t *target, m cryptmapper.Mapping) (string, error)
	after func(t *target) error // of the disk, closed again
	quick bool                  // not slower than other refusals
}

// refused: with these words, and not a byte of the disk is changed.
func refused(class error, words string) outcome {
	return outcome{word: "refused", class: class, words: words}
}

// forged is how nearly all changed headers are refused.
func forged(words string) outcome { return refused(errdefs.ErrState, words) }

// same: the identical mapping opens, with the volume's data.
func same(message string) outcome {
	return outcome{word: "opens the same", open: func(t *target, m cryptmapper.Mapping) (string, error) {
		return message, t.identical(m)
	}}
}

// repaired: as same, and the header area is what it was before the attack.
func repaired(message string) outcome {
	o := same(message)
	o.after = func(t *target) error {
		for i, path := range []string{t.disk, t.file.Name()} {
			b, err := read(path, 0, 2*copySize)
			if err != nil {
				return err
			}
			if was, _ := read(t.disk, 0, 2*copySize); i == 1 && !bytes.Equal(b, was) {
				return errors.New("the header was not repaired")
			}
		}
		return nil
	}
	return o
}

// limit: what nothing on the node can notice, as the threat model says. open
// shows that this is all that happens.
func limit(open func(t *target, m cryptmapper.Mapping) (string, error)) outcome {
	return outcome{word: "known limit", open: open}
}

// identical tells whether the mapping is the one that the volume had before the
// attack, in the kernel's words, and its blocks are there.
func (t *target) identical(m cryptmapper.Mapping) error {
	got, err := readTable(m.Name)
	if err != nil {
		return err
	}
	if got != t.ours {
		return fmt.Errorf("the mapping is %+v and was %+v", got, t.ours)
	}
	if n, err := intact(m.Path); err != nil || n != 2 {
		return fmt.Errorf("%d of 2 blocks are readable: %w", n, err)
	}
	return nil
}

// try runs attacks and prints their rows.
func (s *suite) try(list []attack) {
	for _, a := range list {
		if !s.only.MatchString(a.name) {
			continue
		}
		plain, message, err := s.one(a)
		s.row(a.name, plain, a.must.word, message, err)
	}
}

func (s *suite) one(a attack) (plain, message string, err error) {
	t, err := s.target(a, "cryptcsi")
	if err != nil {
		return "", "", err
	}
	defer func() { _ = t.file.Close() }()
	if a.plain != noPlain {
		plain, err = s.onePlain(a)
		if err == nil && s.exact && !strings.Contains(plain, a.plain) {
			err = fmt.Errorf("the attack is none: cryptsetup must say %q", a.plain)
		}
		if err != nil {
			return plain, "", err
		}
	}
	message, err = s.oneOurs(a, t)
	return plain, message, err
}

// target makes a copy of the volume's disk and attacks it.
func (s *suite) target(a attack, name string) (*target, error) {
	path := filepath.Join(s.dir, name)
	if err := copyDisk(path, a.on.disk); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	t := &target{volume: a.on, file: file, d: a.on.d, patience: time.Minute, cryptcsi: cryptmapper.Volume{Name: s.mapping}}
	if a.do != nil {
		err = a.do(t)
	}
	if err != nil {
		_ = file.Close()
	}
	return t, err
}

func (s *suite) onePlain(a attack) (string, error) {
	t, err := s.target(a, "plain")
	if err != nil {
		return "", err
	}
	defer func() { _ = t.file.Close() }()
	key := t.plainKey
	if key == nil {
		key = a.on.d.Key.Expose()
	}
	dev, detach, err := loop(t.file.Name(), t.readOnly)
	if err != nil {
		return "", err
	}
	defer detach()
	seen, err := s.plainlyOn(dev, t.file.Name(), key, t.patience, t.plainArgs)
	return seen.String(a.on.plain), err
}

func (s *suite) oneOurs(a attack, t *target) (message string, err error) {
	dev, detach, err := loop(t.file.Name(), t.readOnly)
	if err != nil {
		return "", err
	}
	defer detach()
	before, err := digest(t.file.Name())
	if err != nil {
		return "", err
	}
	t.cryptcsi.Device = dev
	began := time.Now()
	m, err := s.open(t)
	took := time.Since(began)
	switch {
	case a.must.open == nil && err == nil:
		err = errors.New("it was opened")
	case a.must.open == nil:
		message, err = a.must.refusal(err)
		s.refusals = append(s.refusals, took)
		if a.must.quick {
			err = errors.Join(err, s.quickly(t, took))
		}
	case err == nil:
		message, err = a.must.open(t, m)
	}
	err = errors.Join(err, s.close(), s.nothingLeft())
	if a.must.open == nil {
		after, e := digest(t.file.Name())
		if err = errors.Join(err, e); after != before {
			err = errors.Join(err, errors.New("the refused disk was written to"))
		}
	}
	if a.must.after != nil && err == nil {
		err = a.must.after(t)
	}
	return message, err
}

// quickly fails where a refusal costs more than refusals do. What it took may be
// the machine's fault, which had other work: then it is tried again.
func (s *suite) quickly(t *target, took time.Duration) error {
	limit := max(3*s.usual(), time.Second)
	for try := 0; took > limit; try++ {
		if try == 4 {
			return fmt.Errorf("it took at least %v; refusals take %v", took, s.usual())
		}
		began := time.Now()
		_, _ = s.open(t)
		took = min(took, time.Since(began))
	}
	return nil
}

// usual is the median of how long refusals took so far.
func (s *suite) usual() time.Duration {
	slices.Sort(s.refusals)
	return s.refusals[len(s.refusals)/2]
}

func (s *suite) open(t *target) (cryptmapper.Mapping, error) {
	ctx, cancel := context.WithTimeout(s.ctx, deadline)
	defer cancel()
	return s.mapper.Open(ctx, t.cryptcsi, t.d)
}

// refusal checks the error of one.
func (o outcome) refusal(err error) (string, error) {
	message := strings.ReplaceAll(err.Error(), "\n", "; ")
	switch {
	case !errors.Is(err, o.class):
		return "", fmt.Errorf("refused with another class of error, must be %w: %s", o.class, message)
	case !strings.Contains(message, o.words):
		return "", fmt.Errorf("refused in other words than %q: %s", o.words, message)
	}
	return message, nil
}

// nothingLeft fails where there is a mapping that nobody has open.
func (s *suite) nothingLeft() error {
	list, err := dm.List()
	for _, m := range list {
		err = errors.Join(err, fmt.Errorf("left behind: mapping %s", m.Name))
	}
	return err
}

// both edits both copies and puts the checksums right.
func both(edits ...edit) func(*target) error {
	return func(t *target) error { return t.forge([]int{0, 1}, edits...) }
}

// primary and secondary edit one copy.
func primary(edits ...edit) func(*target) error {
	return func(t *target) error { return t.forge([]int{0}, edits...) }
}

func secondary(edits ...edit) func(*target) error {
	return func(t *target) error { return t.forge([]int{1}, edits...) }
}

func (t *target) forge(copies []int, edits ...edit) error {
	return t.header(func(h header) error {
		for _, i := range copies {
			if err := edited(h[i], edits...); err != nil {
				return err
			}
		}
		return nil
	})
}

// header changes the header of the target.
func (t *target) header(change func(h header) error) error {
	h, err := readHeader(t.file)
	if err != nil {
		return err
	}
	if err := change(h); err != nil {
		return err
	}
	return h.write(t.file)
}

// authenticated is both, with the MAC that cryptcsi would have given the header.
func authenticated(edits ...edit) func(*target) error {
	return func(t *target) error {
		return t.header(func(h header) error {
			for _, c := range h {
				if err := edited(c, edits...); err != nil {
					return err
				}
				if err := authenticate(c, t.file, t.d.Key.Expose()); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

// steps does several things in order.
func steps(list ...func(*target) error) func(*target) error {
	return func(t *target) error {
		for _, do := range list {
			if err := do(t); err != nil {
				return err
			}
		}
		return nil
	}
}

// flip inverts bits at a place of the disk.
func flip(offset int64, mask byte) func(*target) error {
	return func(t *target) error {
		b := make([]byte, 1)
		if _, err := t.file.ReadAt(b, offset); err != nil {
			return err
		}
		_, err := t.file.WriteAt([]byte{b[0] ^ mask}, offset)
		return err
	}
}

// put writes bytes at a place of the disk.
func put(offset int64, b []byte) func(*target) error {
	return func(t *target) error {
		_, err := t.file.WriteAt(b, offset)
		return err
	}
}

// replace puts another disk in the place of the target's.
func replace(path func(t *target) string) func(*target) error {
	return func(t *target) error {
		name := t.file.Name()
		_ = t.file.Close()
		if err := copyDisk(name, path(t)); err != nil {
			return err
		}
		var err error
		t.file, err = os.OpenFile(name, os.O_RDWR, 0)
		return err
	}
}

// part copies [from, to) of another disk over the target's.
func part(path func(t *target) string, from, to int64) func(*target) error {
	return func(t *target) error {
		b, err := read(path(t), from, int(to-from))
		if err != nil {
			return err
		}
		_, err = t.file.WriteAt(b, from)
		return err
	}
}

// resize changes the length of the disk.
func resize(size int64) func(*target) error {
	return func(t *target) error { return t.file.Truncate(size) }
}
