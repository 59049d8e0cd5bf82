package main

import (
	"errors"
	"fmt"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// disks are whole disks that were exchanged, rolled back, blanked or resized.
func (s *suite) disks() {
	s.section("the whole disk")
	others := func(*target) string { return s.other.disk }
	s.try([]attack{
		{"another volume's disk", s.bare, replace(others), "refused", forged(`belongs to "attack.cryptcsi.io/other"`)},
		{"a disk with this DEK ID from another cluster, another key", s.bare, func(t *target) error { t.d.Key = s.other.d.Key; t.plainKey = s.other.d.Key.Expose(); return nil }, "refused", forged(badMAC)},
		{"another header of this volume (UUID that was not confirmed)", s.bare, func(t *target) error { t.d.Header.UUID = dek.NewUUID(); return nil }, noPlain, forged("an older disk was put in its place")},
		{"older header of this volume, newer one confirmed", s.bare, part(func(t *target) string { return t.unmade }, 0, dataOffset), "opens", forged("the disk was rolled back")},
		{"older disk, header below the confirmed sequence", s.bare, replace(func(t *target) string { return t.unmade }), "opens", forged("the disk was rolled back")},
		{"older primary beside the present secondary", s.bare, part(func(t *target) string { return t.unmade }, 0, copySize), "opens", repaired("the copy with the higher sequence counts")},
		{"older disk, header as confirmed", s.bare, replace(func(t *target) string { return t.older }), "older data", limit(olderData)},
		{"older disk with integrity, header as confirmed", s.sealed, replace(func(t *target) string { return t.older }), "older data", limit(olderData)},
		{"blank disk, record: formatted", s.bare, steps(resize(0), resize(24*mib)), "refused", forged("will not be formatted")},
		{"blank disk, record: prepared, nobody claimed", s.bare, steps(resize(0), resize(24*mib), prepared, unclaimed), "refused", refused(errdefs.ErrInvalid, "no node has claimed")},
		{"another volume's disk, record: prepared", s.bare, steps(replace(others), prepared), "refused", forged("not the remains of our own try")},
		{"LUKS2 of cryptsetup's own, record: prepared", s.bare, steps(s.luks2, prepared), "opens", forged("not the remains of our own try")},
		{"ext4 on the disk, record: prepared", s.bare, steps(s.ext4, prepared), "refused", forged(`holds "ext4"`)},
		{"an earlier try's header, record: prepared, another claim", s.bare, steps(prepared, claimed), "opens", forged("an earlier try was put in its place")},
		{"finished disk, record rolled back to prepared", s.bare, prepared, noPlain, same("the header verifies and says made: never formatted again")},
		{"blank disk and record rolled back to prepared and claimed", s.bare, steps(resize(0), resize(24*mib), prepared), "refused", limit(emptyVolume)},
		{"forged header with the claim's UUID, record rolled back as well", s.bare, steps(both(nullSegment()), prepared), "PLAINTEXT ON DISK", limit(emptyVolume)},
		{"device shrunk", s.bare, resize(20 * mib), "other size", forged("it was shrunk")},
		{"device shrunk, integrity", s.sealed, resize(20 * mib), "refused", forged("it was shrunk")},
		{"device cut within the header area", s.bare, resize(8 * mib), "refused", forged("it was shrunk")},
		{"device grown", s.bare, resize(40 * mib), "opens, other size", outcome{word: "opens larger", open: grown}},
		{"device grown, integrity", s.sealed, resize(40 * mib), "opens", same("as long as it was, until it is asked to grow")},
		{"device read-only", s.bare, func(t *target) error { t.readOnly = true; return nil }, "opens", forged("cannot be written")},
		{"device read-only, integrity", s.sealed, func(t *target) error { t.readOnly = true; return nil }, "opens", forged("cannot be written")},
		{"device read-only, volume read-only", s.bare, func(t *target) error { t.readOnly, t.cryptcsi.ReadOnly = true, true; return nil }, noPlain, same("opened read-only")},
	})
}

func prepared(t *target) error {
	t.d.State, t.d.Header = dek.Prepared, dek.HeaderID{}
	return nil
}

func claimed(t *target) error { t.d.Claim.UUID = dek.NewUUID(); return nil }

func unclaimed(t *target) error { t.d.Claim = dek.Claim{}; return nil }

func olderData(t *target, m cryptmapper.Mapping) (string, error) {
	got, err := readTable(m.Name)
	if err == nil && got != t.ours {
		err = fmt.Errorf("the mapping is %+v", got)
	}
	if c := content(m.Path); c != "older data" {
		err = errors.Join(err, fmt.Errorf("the content is: %s", c))
	}
	return "the volume's own earlier content, under its own key", err
}

// emptyVolume: a new volume, encrypted, that holds nothing of the earlier one.
func emptyVolume(t *target, m cryptmapper.Mapping) (string, error) {
	if m.Made || m.Header.UUID != t.d.Claim.UUID {
		return "", fmt.Errorf("the mapping is %+v", m)
	}
	if c := content(m.Path); c != "other data" {
		return "", fmt.Errorf("the content is: %s", c)
	}
	if err := write(m.Path, 3*mib, []byte(canary)); err != nil {
		return "", err
	}
	leaks, err := holds(t.file.Name(), canary)
	if leaks {
		err = errors.New("plaintext on disk")
	}
	return "looks like a new volume: formatted, empty, encrypted (who remembers: the note on the PersistentVolume)", err
}

// grown: as it must be, and as long as the device.
func grown(t *target, m cryptmapper.Mapping) (string, error) {
	got, err := readTable(m.Name)
	if d := got.differences(t.ours); err == nil && fmt.Sprint(d) != "[other size]" {
		err = fmt.Errorf("differs in %v", d)
	}
	n, e := intact(m.Path)
	if err = errors.Join(err, e); err == nil && (n != 2 || m.Size != 24*mib) {
		err = fmt.Errorf("%d bytes, %d of 2 blocks readable", m.Size, n)
	}
	return "growth is nothing that a host could not do anyway; the end is zeros under the key or noise", err
}
