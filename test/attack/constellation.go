package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// theirs makes a volume as Constellation does, with cryptsetup; but for the time
// that a try of its key takes.
func (s *suite) theirs(name string, integrity dek.Integrity) (*volume, error) {
	key, uuid := secret.New(dek.Size), dek.NewUUID()
	_, _ = rand.Read(key.Expose())
	disk := filepath.Join(s.dir, name+"-disk")
	v := &volume{disk: disk, older: disk + "-older", d: dek.DEK{
		ID: dek.ID(uuid), State: dek.Formatted, Key: key, Header: dek.HeaderID{UUID: uuid},
		Spec: dek.Spec{Cipher: dek.CipherXTS, Integrity: integrity, Layout: dek.LayoutConstellation},
	}}
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(disk, 24*mib); err != nil {
		return nil, err
	}
	args := []string{"luksFormat", "--batch-mode", "--type=luks2", "--cipher=aes-xts-plain64", "--key-size=512", "--sector-size=4096",
		"--pbkdf=argon2id", "--pbkdf-force-iterations=4", "--pbkdf-memory=65536", "--pbkdf-parallel=4", "--uuid=" + uuid, "--key-file=-"}
	if integrity != "" {
		args = append(args, "--integrity=hmac-sha256")
	}
	dev, detach, err := loop(disk, false)
	if err != nil {
		return nil, err
	}
	defer detach()
	if out, hangs, err := bounded(time.Minute, key.Expose(), "cryptsetup", append(args, dev)...); err != nil || hangs != "" {
		return nil, fmt.Errorf("luksFormat: %w, %s%s", err, hangs, out)
	}
	cv := cryptmapper.Volume{Name: s.mapping, Device: dev}
	m, err := s.mapper.Open(s.ctx, cv, v.d)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(write(m.Path, secondAt, second()), write(m.Path, firstAt, older()), s.age(v, cv)); err != nil {
		return nil, err
	}
	detach()
	return v, s.seePlain(v)
}

// constellation is what can be done to volumes whose headers have no MAC: the
// form, the UUID and the key are all that is checked.
func (s *suite) constellation() error {
	bare, err := s.theirs("their-bare", "")
	if err != nil {
		return fmt.Errorf("a volume of Constellation's: %w", err)
	}
	sealed, err := s.theirs("their-sealed", "hmac-sha256")
	if err != nil {
		return fmt.Errorf("a volume of Constellation's with integrity: %w", err)
	}
	other, err := s.theirs("their-other", "")
	if err != nil {
		return fmt.Errorf("another volume of Constellation's: %w", err)
	}
	others := replace(func(*target) string { return other.disk })
	olders := replace(func(t *target) string { return t.older })
	const never = "will not be formatted"

	s.section("a volume that Constellation made, opened as it is: its header has no MAC")
	s.try([]attack{
		{"untouched", bare, nil, "data readable", same("opened as it is")},
		{"untouched, with integrity", sealed, nil, "data readable", same("opened as it is")},
		{"another volume's disk", bare, others, "refused", forged(never)},
		{"another volume's disk, with this one's UUID", bare, steps(others, inBinary(168, []byte(bare.d.ID))), "refused", refused(errdefs.ErrDenied, "")},
		{"another UUID", bare, otherUUID, "opens", forged(never)},
		{"one of ours in its place", bare, replace(func(*target) string { return s.bare.disk }), "refused", forged(never)},
		{"blank disk", bare, steps(resize(0), resize(24*mib)), "refused", forged(never)},
		{"null cipher", bare, both(nullSegment()), "PLAINTEXT ON DISK", forged(never)},
		{"integrity removed, null cipher", sealed, both(drop("segments/0/integrity"), nullSegment()), "integrity gone", forged(never)},
		{"integrity removed, and not asked for", sealed, steps(both(drop("segments/0/integrity")), withoutIntegrity), "refused", forged(never)},
		{"primary with null cipher, whole secondary", bare, primary(nullSegment()), "PLAINTEXT ON DISK", same("the secondary passes, and nothing is written")},
		{"older disk", bare, olders, "older data", limit(olderData)},
		{"older disk, with integrity", sealed, olders, "older data", limit(olderData)},
	})
	return nil
}

func withoutIntegrity(t *target) error { t.d.Spec.Integrity = ""; return nil }
