package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
)

// badMAC is what a header is refused with that has the right form.
const badMAC = "does not verify under the DEK"

// nullSegment has the data "encrypted" by doing nothing.
func nullSegment() edit { return set("segments/0/encryption", `"cipher_null-ecb"`) }

func (s *suite) headers() {
	s.section("a volume without integrity, its header forged in both copies with right checksums")
	s.try([]attack{
		{"data segment: null cipher", s.bare, both(nullSegment()), "PLAINTEXT ON DISK", forged(`segments.0.encryption is "cipher_null-ecb"`)},
		{"keyslot: null cipher and the attacker's volume key", s.bare, steps(anyPassphrase, attackersKeyslot), "opens, other data", forged(`keyslots.0.area.encryption is "cipher_null-ecb"`)},
		{"both of these", s.bare, steps(anyPassphrase, attackersKeyslot, both(nullSegment())), "PLAINTEXT ON DISK", forged(`segments.0.encryption is "cipher_null-ecb"`)},
		{"cipher: capi:xts(ecb(aes-generic))-plain64", s.bare, both(set("segments/0/encryption", `"capi:xts(ecb(aes-generic))-plain64"`)), "opens, cipher capi:", forged(`segments.0.encryption is "capi:`)},
		{"cipher: aes-xts-null (one IV for all sectors)", s.bare, both(set("segments/0/encryption", `"aes-xts-null"`)), "opens, cipher aes-xts-null", forged(`segments.0.encryption is "aes-xts-null"`)},
		{"cipher: aes-cbc-plain", s.bare, both(set("segments/0/encryption", `"aes-cbc-plain"`)), "", forged(`segments.0.encryption is "aes-cbc-plain"`)},
		{"segment: offset + 4096", s.bare, both(set("segments/0/offset", `"16781312"`)), "offset", forged(`segments.0.offset is "16781312"`)},
		{"segment: IV tweak", s.bare, both(set("segments/0/iv_tweak", `"8"`)), "opens", forged(`segments.0.iv_tweak is "8"`)},
		{"segment: fixed size", s.bare, both(set("segments/0/size", `"4194304"`)), "opens", forged(`segments.0.size is "4194304"`)},
		{"segment: sector size 512", s.bare, both(set("segments/0/sector_size", "512")), "options", forged(badMAC)},
		{"segment: linear, no encryption at all", s.bare, both(set("segments/0", `{"type":"linear","offset":"16777216","size":"dynamic"}`)), "", forged(`segments.0.type is "linear"`)},
		{"segment: integrity added", s.bare, both(add("segments/0", `"integrity":{"type":"hmac(sha256)","journal_encryption":"none","journal_integrity":"none"}`)), "refused", forged("segments.0.integrity is there and must not be")},
		{"a second segment", s.bare, both(set("segments/0/size", `"4194304"`), add("segments", `"1":{"type":"linear","offset":"20971520","size":"dynamic"}`)), "", forged("segments.")},
		{"another keyslot beside ours", s.bare, extraKeyslot, "opens", forged("keyslots.1 is there and must not be")},
		{"another digest beside ours", s.bare, extraDigest, "", forged("digests.1 is there and must not be")},
		{"a field that nobody knows", s.bare, both(add("keyslots/0", `"attacker":"was here"`)), "opens", forged("keyslots.0.attacker is there and must not be")},
		{"a key twice", s.bare, both(add("segments/0", `"encryption":"cipher_null-ecb"`)), "opens", forged("stands twice in one object")},
		{"a key in other letters: Encryption", s.bare, both(add("segments/0", `"Encryption":"cipher_null-ecb"`)), "opens", forged("segments.0.Encryption is there and must not be")},
		{"flag allow-discards", s.bare, both(add("config", `"flags":["allow-discards"]`)), "allow_discards", forged("config.flags is there and must not be")},
		{"flags no-read-workqueue, same-cpu-crypt", s.bare, both(add("config", `"flags":["no-read-workqueue","same-cpu-crypt"]`)), "options", forged("config.flags is there and must not be")},
		{"requirement online-reencrypt-v2", s.bare, both(add("config", `"requirements":{"mandatory":["online-reencrypt-v2"]}`)), "refused", forged("config.requirements is there and must not be")},
		{"requirement that nobody knows", s.bare, both(add("config", `"requirements":{"mandatory":["attacker"]}`)), "", forged("config.requirements is there and must not be")},
		{"key derivation: pbkdf2, 2^32-1 iterations", s.bare, steps(impatient, both(set("keyslots/0/kdf/iterations", "4294967295"))), "runs without end", quick(forged("keyslots.0.kdf.iterations is the number 4294967295"))},
		{"key derivation: argon2id, time 2^32-1", s.bare, steps(impatient, argon2("4294967295", "65536")), "runs without end, ignores SIGTERM", quick(forged(`keyslots.0.kdf.type is "argon2id"`))},
		{"key derivation: argon2id, memory 4 GiB", s.bare, steps(impatient, argon2("4", "4194304")), "", quick(forged(`keyslots.0.kdf.type is "argon2id"`))},
		{"digest: 2^32-1 iterations", s.bare, steps(impatient, both(set("digests/0/iterations", "4294967295"))), "runs without end", quick(forged("digests.0.iterations is the number 4294967295"))},
		{"label and subsystem", s.bare, labelled, "opens", forged("label is there and must be empty")},
		{"UUID of another volume", s.bare, otherUUID, "opens", forged(badMAC)},
		{"key material, one bit", s.bare, flip(areaAt+7000, 1), "refused", forged(badMAC)},
		{"key material, noise", s.bare, put(areaAt, noise(areaSize)), "refused", forged(badMAC)},
	})

	s.section("our token")
	s.try([]attack{
		{"removed", s.bare, both(drop("tokens/0")), "opens", forged("tokens is empty")},
		{"there twice", s.bare, doubled, "opens", forged("tokens.1 is there and must not be")},
		{"with another DEK ID", s.bare, both(set("tokens/0/dek_id", `"attack.cryptcsi.io/other"`)), "opens", forged(`belongs to "attack.cryptcsi.io/other"`)},
		{"with a higher sequence", s.bare, both(set("tokens/0/sequence", "1000")), "opens", forged(badMAC)},
		{"with a smaller size", s.bare, both(set("tokens/0/size", "4096")), "opens", forged(badMAC)},
		{"not made any more", s.bare, both(set("tokens/0/made", "false")), "opens", forged(badMAC)},
		{"without its MAC", s.bare, both(drop("tokens/0/mac")), "opens", forged("tokens.0.mac is missing")},
		{"with a MAC of zeros", s.bare, both(set("tokens/0/mac", `"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="`)), "opens", forged(badMAC)},
		{"MAC made anew under another key", s.bare, rekeyed(), "data readable", forged(badMAC)},
		{"nothing changed, MAC made anew under the right key", s.bare, authenticated(), "data readable", same("the suite's own MAC: its tools do as ours do")},
	})

	s.section("headers that the attacker could authenticate, if the MAC had a hole")
	s.try([]attack{
		{"right MAC, null cipher", s.bare, authenticated(nullSegment()), "PLAINTEXT ON DISK", forged(`segments.0.encryption is "cipher_null-ecb"`)},
		{"right MAC, segment offset + 4096", s.bare, authenticated(set("segments/0/offset", `"16781312"`)), "offset", forged(`segments.0.offset is "16781312"`)},
		{"right MAC, flag allow-discards", s.bare, authenticated(add("config", `"flags":["allow-discards"]`)), "allow_discards", forged("config.flags is there and must not be")},
	})

	s.section("a volume with integrity")
	s.try([]attack{
		{"integrity removed, null cipher", s.sealed, both(drop("segments/0/integrity"), nullSegment()), "integrity gone", forged(`segments.0.encryption is "cipher_null-ecb"`)},
		{"integrity removed", s.sealed, both(drop("segments/0/integrity")), "refused", forged("segments.0.integrity is missing")},
		{"integrity removed, 64-byte key", s.sealed, both(drop("segments/0/integrity"), set("keyslots/0/key_size", "64")), "refused", forged("segments.0.integrity is missing")},
		{"integrity crc32c", s.sealed, both(set("segments/0/integrity/type", `"crc32c"`)), "refused", forged(`segments.0.integrity.type is "crc32c"`)},
		{"integrity none", s.sealed, both(set("segments/0/integrity/type", `"none"`)), "", forged(`segments.0.integrity.type is "none"`)},
		{"flag no-journal", s.sealed, both(add("config", `"flags":["no-journal"]`)), "integrity layer differs", forged("config.flags is there and must not be")},
		{"geometry in the token", s.sealed, both(set("tokens/0/integrity/sectors", "8")), "opens", forged(badMAC)},
		{"the record asks for none, the disk has it", s.sealed, func(t *target) error { t.d.Spec.Integrity = dek.IntegrityNone; return nil }, "opens", forged("is there and must not be")},
		{"the record asks for it, the disk has none", s.bare, func(t *target) error { t.d.Spec.Integrity = dek.IntegrityHMAC; return nil }, "opens", forged("segments.0.integrity is missing")},
	})

	s.section("the two copies")
	s.try([]attack{
		{"primary destroyed", s.bare, put(0, make([]byte, copySize)), "opens", repaired("the secondary passes, the primary is written anew")},
		{"secondary destroyed", s.bare, put(copySize, noise(copySize)), "opens", repaired("the primary passes, the secondary is written anew")},
		{"primary forged: null cipher", s.bare, primary(nullSegment()), "PLAINTEXT ON DISK", repaired("the secondary passes, the primary is written anew")},
		{"primary forged and newer", s.bare, steps(newer(0), primary(nullSegment())), "PLAINTEXT ON DISK", repaired("the secondary passes, the primary is written anew")},
		{"secondary forged and newer", s.bare, steps(newer(1), secondary(nullSegment())), "PLAINTEXT ON DISK", repaired("the primary passes, the secondary is written anew")},
		{"primary forged, secondary destroyed", s.bare, steps(primary(nullSegment()), put(copySize, make([]byte, copySize))), "PLAINTEXT ON DISK", forged(`segments.0.encryption is "cipher_null-ecb"`)},
		{"both forged, in different ways", s.bare, steps(newer(1), primary(nullSegment()), secondary(set("segments/0/offset", `"16781312"`))), "opens", forged(`segments.0.offset is "16781312"`)},
		{"primary of this volume, secondary of another", s.bare, part(func(*target) string { return s.other.disk }, copySize, 2*copySize), "opens", repaired("the primary passes, the secondary is written anew")},
	})
	s.otherFormats()
}

func (s *suite) otherFormats() {
	s.section("other formats in its place")
	s.try([]attack{
		{"header erased", s.bare, put(0, make([]byte, dataOffset)), "refused", forged("will not be formatted")},
		{"header overwritten with noise", s.bare, put(0, noise(64<<10)), "refused", forged("will not be formatted")},
		{"LUKS1, same key", s.bare, s.luks1, "opens", forged("LUKS version is 1")},
		{"LUKS2 of cryptsetup's own, same key", s.bare, s.luks2, "opens", forged("tokens is empty")},
		{"LUKS version 3", s.bare, inBinary(6, []byte{0, 3}), "refused", forged("LUKS version is 3")},
		{"header size of 32 KiB", s.bare, inBinary(8, []byte{0, 0, 0, 0, 0, 0, 0x80, 0}), "refused", forged("header size is 32768")},
		{"header that says it lies elsewhere", s.bare, inBinary(256, []byte{0, 0, 0, 0, 0, 0, 0x10, 0}), "refused", forged("it says that it lies at offset 4096")},
		{"checksum of another kind", s.bare, inBinary(72, append([]byte("sha512"), make([]byte, 26)...)), "", forged("checksum algorithm is")},
		{"JSON without an end", s.bare, endless, "", forged("the JSON has no end")},
		{"JSON that is none", s.bare, func(t *target) error {
			return t.header(func(h header) error { return errors.Join(setText(h[0], []byte("{")), setText(h[1], []byte("{"))) })
		}, "refused", forged("JSON, byte 1")},
		{"BitLocker's signature", s.bare, put(0, append([]byte("\xeb\x58\x90-FVE-FS-"), make([]byte, 32<<10)...)), "refused", forged("will not be formatted")},
		{"an ext4 filesystem", s.bare, s.ext4, "refused", forged("will not be formatted")},
	})
}

// anyPassphrase lets plain cryptsetup try without the key.
func anyPassphrase(t *target) error { t.plainKey = []byte("any passphrase at all"); return nil }

// impatient is for what plain cryptsetup would never finish.
func impatient(t *target) error { t.patience = 2 * time.Second; return nil }

// quick is for what costs nothing to refuse.
func quick(o outcome) outcome { o.quick = true; return o }

func attackersKeyslot(t *target) error {
	return t.header(func(h header) error {
		edits, area, offset, err := ownKeyslot(text(h[0]))
		if err != nil {
			return err
		}
		if err := errors.Join(edited(h[0], edits...), edited(h[1], edits...)); err != nil {
			return err
		}
		_, err = t.file.WriteAt(area, offset)
		return err
	})
}

// extraKeyslot adds a keyslot that is a copy of ours, with its material elsewhere.
func extraKeyslot(t *target) error {
	h, err := readHeader(t.file)
	if err != nil {
		return err
	}
	slot, err := value(text(h[0]), "keyslots/0")
	if err != nil {
		return err
	}
	area, err := read(t.disk, areaAt, areaSize)
	if err != nil {
		return err
	}
	slot = strings.Replace(slot, fmt.Sprintf(`"%d"`, areaAt), fmt.Sprintf(`"%d"`, areaAt+areaSize), 1)
	return steps(put(areaAt+areaSize, area), both(add("keyslots", `"1":`+slot), set("digests/0/keyslots", `["0","1"]`)))(t)
}

func extraDigest(t *target) error {
	h, err := readHeader(t.file)
	if err != nil {
		return err
	}
	d, err := value(text(h[0]), "digests/0")
	if err != nil {
		return err
	}
	return both(add("digests", `"1":`+d), set("digests/1/keyslots", "[]"), set("digests/1/segments", "[]"))(t)
}

// argon2 changes the key derivation.
func argon2(time, memory string) func(*target) error {
	salt := `"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="`
	return both(set("keyslots/0/kdf", fmt.Sprintf(`{"type":"argon2id","time":%s,"memory":%s,"cpus":1,"salt":%s}`, time, memory, salt)))
}

// inBinary changes the binary header of both copies.
func inBinary(offset int, b []byte) func(*target) error {
	return func(t *target) error {
		return t.header(func(h header) error {
			copy(h[0][offset:], b)
			copy(h[1][offset:], b)
			return nil
		})
	}
}

func labelled(t *target) error {
	return steps(inBinary(24, []byte("attacker")), inBinary(208, []byte("attacker")))(t)
}

func otherUUID(t *target) error { return inBinary(168, []byte(dek.NewUUID()))(t) }

func endless(t *target) error {
	return t.header(func(h header) error {
		for _, c := range h {
			copy(c[binarySize+len(text(c)):], bytes.Repeat([]byte(" "), copySize))
		}
		return nil
	})
}

// newer lets LUKS2 prefer a copy.
func newer(i int) func(*target) error {
	return func(t *target) error {
		return t.header(func(h header) error { raiseSequence(h[i]); return nil })
	}
}

func doubled(t *target) error {
	h, err := readHeader(t.file)
	if err != nil {
		return err
	}
	token, err := value(text(h[0]), "tokens/0")
	if err != nil {
		return err
	}
	return both(add("tokens", `"1":`+token))(t)
}

// rekeyed edits both copies and makes the MAC anew, with a key of the attacker's.
func rekeyed(edits ...edit) func(*target) error {
	return func(t *target) error {
		key := make([]byte, 32)
		_, _ = rand.Read(key)
		return t.header(func(h header) error {
			for _, c := range h {
				if err := errors.Join(edited(c, edits...), authenticate(c, t.file, key)); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

func (s *suite) luks1(t *target) error {
	return s.format(t, "--type=luks1", "--pbkdf-force-iterations=1000")
}

func (s *suite) luks2(t *target) error {
	return s.format(t, "--type=luks2", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--sector-size=4096")
}

// format lets cryptsetup make a header of its own over the volume's.
func (s *suite) format(t *target, args ...string) error {
	dev, detach, err := loop(t.file.Name(), false)
	if err != nil {
		return err
	}
	defer detach()
	out, _, err := bounded(time.Minute, t.d.Key.Expose(), "cryptsetup", append(append([]string{"luksFormat", "--batch-mode", "--key-file=-"}, args...), dev)...)
	if err != nil {
		return fmt.Errorf("luksFormat: %w: %s", err, lastLine(out))
	}
	return nil
}

func (s *suite) ext4(t *target) error {
	if err := put(0, make([]byte, dataOffset))(t); err != nil {
		return err
	}
	_, err := output("mkfs.ext4", "-q", "-F", t.file.Name())
	return err
}

func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}
