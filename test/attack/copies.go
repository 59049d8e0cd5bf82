package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/secret"
)

// clone is a copy of a volume's disk that was used once: volume is what it is
// now, source and unused what it was before.
type clone struct {
	*volume
	source *volume
	unused dek.DEK
}

// clone copies v as a snapshot or clone of the cloud's does, with a record of
// its own, and uses it once.
func (s *suite) clone(name string, v *volume) (clone, error) {
	key := secret.New(dek.Size)
	_, _ = rand.Read(key.Expose())
	c := clone{volume: &volume{}, source: v}
	*c.volume = *v
	c.d.ID, c.d.Source, c.d.State, c.d.Key, c.d.Previous = dek.ID("attack.cryptcsi.io/"+name), v.d.ID, dek.Rotating, key, v.d.Key
	c.d.Header = dek.HeaderID{UUID: v.d.Header.UUID}
	c.unused = c.d
	c.disk = filepath.Join(s.dir, name+"-disk")
	if err := copyDisk(c.disk, v.disk); err != nil {
		return c, err
	}
	dev, detach, err := loop(c.disk, false)
	if err != nil {
		return c, err
	}
	defer detach()
	m, err := s.mapper.Open(s.ctx, cryptmapper.Volume{Name: s.mapping, Device: dev}, c.d)
	if err != nil {
		return c, err
	}
	if m.Header.Fingerprint != dek.Fingerprint(key) {
		err = errors.New("the copy has no key of its own")
	}
	c.d.State, c.d.Previous = dek.Formatted, secret.Bytes{}
	c.d.Header = dek.HeaderID{UUID: m.Header.UUID, Sequence: m.Header.Sequence}
	return c, errors.Join(err, s.close())
}

// copies are disks that the cloud has copied, and their relatives in their place.
func (s *suite) copies() error {
	bare, err := s.clone("copy", s.bare)
	if err != nil {
		return fmt.Errorf("a copy: %w", err)
	}
	second, err := s.clone("second", s.bare)
	if err != nil {
		return fmt.Errorf("a second copy: %w", err)
	}
	sealed, err := s.clone("sealed-copy", s.sealed)
	if err != nil {
		return fmt.Errorf("a copy with integrity: %w", err)
	}
	disk := func(path string) func(*target) error { return replace(func(*target) string { return path }) }
	source := disk(s.bare.disk)

	s.section("a copy of a volume (snapshot, clone) at its first use: its record has the key of its source, too")
	s.try([]attack{
		{"the copy, untouched", bare.volume, steps(source, bare.first), "data readable", same("opened with its source's key, and given its own")},
		{"the copy with integrity, untouched", sealed.volume, steps(disk(s.sealed.disk), sealed.first), "data readable", same("opened with its source's key, and given its own")},
		{"another volume's disk", bare.volume, steps(disk(s.other.disk), bare.first), "refused", forged("no header")},
		{"a blank disk", bare.volume, steps(resize(0), resize(24*mib), bare.first), "refused", forged("no header")},
		{"null cipher", bare.volume, steps(source, bare.first, both(nullSegment())), "PLAINTEXT ON DISK", forged(`segments.0.encryption is "cipher_null-ecb"`)},
		{"integrity removed, null cipher", sealed.volume, steps(disk(s.sealed.disk), sealed.first, both(drop("segments/0/integrity"), nullSegment())), "integrity gone", forged(`segments.0.encryption is "cipher_null-ecb"`)},
		{"a copy that has its own key by now, another one's", bare.volume, steps(disk(second.disk), bare.first), "refused", forged("no header")},
		{"source that was not finished when it was copied", bare.volume, steps(disk(s.bare.unmade), bare.first), "opens", forged("the header on device")},
		{"device shrunk", bare.volume, steps(source, bare.first, resize(20*mib)), "other size", forged("it was shrunk")},
		{"an older state of the source", bare.volume, steps(disk(s.bare.older), bare.first), "older data", limit(olderData)},
		{"the source's own disk", bare.volume, steps(source, bare.first), "data readable", limit(takenOver)},
	})

	s.section("a copy that has its own key, and its relatives")
	s.try([]attack{
		{"the copy, untouched", bare.volume, nil, "data readable", same("its own key alone opens it")},
		{"as it was before it had its own key", bare.volume, steps(source, bare.old), "data readable", forged(`belongs to "attack.cryptcsi.io/bare"`)},
		{"the header as it was before", bare.volume, steps(part(func(*target) string { return s.bare.disk }, 0, dataOffset), bare.old), "data readable", forged(`belongs to "attack.cryptcsi.io/bare"`)},
		{"the header as it was before, its own put aside", bare.volume, steps(asideOf(bare.disk), part(func(*target) string { return s.bare.disk }, 0, 8*mib), bare.old), "data readable", forged(`belongs to "attack.cryptcsi.io/bare"`)},
		{"as it was before, with integrity", sealed.volume, steps(disk(s.sealed.disk), sealed.old), "data readable", forged(`belongs to "attack.cryptcsi.io/sealed"`)},
		{"the primary as it was before", bare.volume, part(func(*target) string { return s.bare.disk }, 0, copySize), "opens", repaired("the secondary passes, the primary is written anew")},
		{"another copy of its source", bare.volume, disk(second.disk), "refused", forged(`belongs to "attack.cryptcsi.io/second"`)},
		{"its source in its place", bare.volume, source, "refused", forged(`belongs to "attack.cryptcsi.io/bare"`)},
		{"the copy in its source's place", s.bare, disk(bare.disk), "refused", forged(`belongs to "attack.cryptcsi.io/copy"`)},
		{"sectors of its source", bare.volume, part(func(*target) string { return s.bare.older }, dataOffset, 24*mib), "older data", limit(relatives)},
		{"sectors and tags of its source, with integrity", sealed.volume, part(func(*target) string { return s.sealed.older }, dataOffset, 24*mib), "older data", limit(relatives)},
	})
	return nil
}

// first makes the record the one before the first use.
func (c clone) first(t *target) error {
	t.d = c.unused
	return c.old(t)
}

// old gives plain cryptsetup the key of the source.
func (c clone) old(t *target) error {
	t.plainKey = c.source.d.Key.Expose()
	return nil
}

// asideOf puts the header of a disk where re-keying puts one aside.
func asideOf(path string) func(*target) error {
	return func(t *target) error {
		b, err := read(path, 0, 2*mib)
		if err == nil {
			_, err = t.file.WriteAt(b, 8*mib)
		}
		return err
	}
}

// takenOver: nothing tells a copy from what it is a copy of.
func takenOver(t *target, m cryptmapper.Mapping) (string, error) {
	err := t.identical(m)
	if m.Header.Fingerprint != dek.Fingerprint(t.d.Key) {
		err = errors.Join(err, errors.New("it was not given its own key"))
	}
	return "a copy is the same bytes: it is taken over, and its source, which is not there, does not open with it any more", err
}

// relatives share the volume key.
func relatives(_ *target, m cryptmapper.Mapping) (string, error) {
	if c := content(m.Path); c != "older data" {
		return "", fmt.Errorf("the content is: %s", c)
	}
	return "relatives share the volume key: the source's content of then, at the place where it stood; only a copy of the data to a new volume ends it", nil
}
