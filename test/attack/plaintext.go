package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
)

// plaintext looks for what was written through mappings on the disks below.
func (s *suite) plaintext() {
	s.section("no plaintext on the disk, in any mode")
	for _, mode := range []struct {
		name      string
		integrity dek.Integrity
		size      int64
	}{
		{"4096-byte sectors", dek.IntegrityNone, 24 * mib},
		{"512-byte sectors", dek.IntegrityNone, 24*mib + 512},
		{"4096-byte sectors, integrity with journal", dek.IntegrityHMAC, 24 * mib},
		{"512-byte sectors, integrity with journal", dek.IntegrityHMAC, 24*mib + 512},
	} {
		name := "a text written through the mapping: " + mode.name
		if !s.only.MatchString(name) {
			continue
		}
		message, err := s.noPlaintext(mode.integrity, mode.size)
		s.row(name, noPlain, "0 times found", message, err)
	}
}

func (s *suite) noPlaintext(integrity dek.Integrity, size int64) (message string, err error) {
	v, err := s.make("plaintext", "attack.cryptcsi.io/plaintext", size, integrity)
	if err != nil {
		return "", err
	}
	path := filepath.Join(s.dir, "plaintext")
	if err := copyDisk(path, v.disk); err != nil {
		return "", err
	}
	dev, detach, err := loop(path, false)
	if err != nil {
		return "", err
	}
	defer detach()
	m, err := s.mapper.Open(s.ctx, cryptmapper.Volume{Name: s.mapping, Device: dev}, v.d)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	sector := "512"
	if strings.Contains(v.ours.top, "sector_size:4096") {
		sector = "4096"
	}
	if (size%4096 == 0) != (sector == "4096") {
		return "", fmt.Errorf("sectors of %s bytes on a device of %d", sector, size)
	}
	if err := write(m.Path, 3*mib, []byte(canary)); err != nil {
		return "", err
	}
	// The search has to find what is there.
	if b, err := read(m.Path, 3*mib, len(canary)); err != nil || string(b) != canary {
		return "", fmt.Errorf("the mapping does not hold the text: %w", err)
	}
	found, err := holds(path, canary[:16])
	if err == nil && found {
		err = errors.New("the text is on the disk")
	}
	return fmt.Sprintf("%d MiB read while it is open (sectors of %s bytes)", size/mib, sector), err
}
