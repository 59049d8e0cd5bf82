package luks2

import (
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/cryptcsi/cryptcsi/dek"
)

// What a header's JSON has to look like: everything in it is pinned to what
// libcryptsetup 2.4 to 2.8 writes for such a volume, or is one of the few values
// that may vary within bounds (salts, digest, costs of the key derivation, our
// token's own fields). So nothing that libcryptsetup could do with another
// header has to be thought of.

// The header areas that libcryptsetup lays out for data at 16 MiB.
const (
	jsonSize     = "12288"    // CopySize less the binary header
	keyslotsSize = "16744448" // DataOffset less two copies
	dataOffset   = "16777216" // DataOffset
	stripes      = 4000       // of the anti-forensic split
	areaKeySize  = 64         // AES-256-XTS, whatever the volume key is
	saltSize     = 32
	digestSize   = 32
)

// The costs of a key derivation, which a hostile header could choose so that an
// unlock takes for ever or all memory. libcryptsetup itself accepts 2³²−1.
const (
	// minPBKDF2 is libcryptsetup's own minimum and what our headers have.
	minPBKDF2 = 1000
	// maxPBKDF2 is four times what libcryptsetup's benchmark of 125 ms gives a
	// digest on a fast CPU with SHA instructions (545,000 iterations), and takes
	// half a second there for a keyslot; some seconds on a slow CPU without.
	maxPBKDF2 = 2_000_000
	// minTime, minMemory (KiB), maxMemory and maxCPUs are the bounds within
	// which libcryptsetup's benchmark chooses for Argon2id. Constellation asks
	// for 64 MiB, a plain luksFormat for up to 1 GiB.
	minTime   = 4
	minMemory = 64 << 10
	maxMemory = 1 << 20
	maxCPUs   = 4
	// maxWork bounds time × memory, in KiB: 16 GiB filled. The benchmark of two
	// seconds on four CPUs of the kind above gives 8 GiB; an unlock of 16 takes
	// two of them 8 seconds.
	maxWork = 16 << 20
)

// form checks one JSON value, which stands at path.
type form func(path string, v *value) error

type field struct {
	key      string
	form     form
	optional bool
}

func must(key string, f form) field { return field{key, f, false} }
func may(key string, f form) field  { return field{key, f, true} }

// object has exactly these members, but for the optional ones, in any order.
// Differences are told in the order of fields, unknown members last.
func object(fields ...field) form {
	return func(path string, v *value) error {
		if v.kind != isObject {
			return differs(path, v, string(isObject))
		}
		for _, f := range fields {
			m := v.member(f.key)
			if m == nil && f.optional {
				continue
			}
			if m == nil {
				return fmt.Errorf("%s is missing", join(path, f.key))
			}
			if err := f.form(join(path, f.key), m); err != nil {
				return err
			}
		}
		for _, m := range v.members {
			if !slices.ContainsFunc(fields, func(f field) bool { return f.key == m.key }) {
				return fmt.Errorf("%s is there and must not be", join(path, m.key))
			}
		}
		return nil
	}
}

// list has exactly these items in this order.
func list(items ...form) form {
	return func(path string, v *value) error {
		if v.kind != isArray {
			return differs(path, v, string(isArray))
		}
		if len(v.items) != len(items) {
			return fmt.Errorf("%s has %d items and must have %d", path, len(v.items), len(items))
		}
		for i, f := range items {
			if err := f(join(path, strconv.Itoa(i)), &v.items[i]); err != nil {
				return err
			}
		}
		return nil
	}
}

// text is this string.
func text(want string) form {
	return func(path string, v *value) error {
		if v.kind != isString || v.text != want {
			return differs(path, v, strconv.Quote(want))
		}
		return nil
	}
}

// number is an integer within bounds; into, where not nil, gets it.
func number(low, high int64, into *int64) form {
	return func(path string, v *value) error {
		n, err := strconv.ParseInt(v.text, 10, 64)
		switch {
		case v.kind == isNumber && err == nil && n >= low && n <= high:
			if into != nil {
				*into = n
			}
			return nil
		case low == high:
			return differs(path, v, "the number "+strconv.FormatInt(low, 10))
		default:
			return differs(path, v, fmt.Sprintf("a number from %d to %d", low, high))
		}
	}
}

// truth is true or false.
func truth(into *bool) form {
	return func(path string, v *value) error {
		if v.kind != isBool {
			return differs(path, v, "true or false")
		}
		*into = v.text == "true"
		return nil
	}
}

// encoded is the one base64 text of so many bytes; into, where not nil, gets it.
func encoded(size int, into *string) form {
	return func(path string, v *value) error {
		b, err := base64.StdEncoding.Strict().DecodeString(v.text)
		if v.kind != isString || err != nil || len(b) != size {
			return differs(path, v, fmt.Sprintf("%d bytes in base64", size))
		}
		if into != nil {
			*into = v.text
		}
		return nil
	}
}

func differs(path string, v *value, want string) error {
	return fmt.Errorf("%s is %s and must be %s", path, v, want)
}

func join(path, key string) string {
	key = fmt.Sprintf("%.40s", key)
	if path == "" {
		return key
	}
	return path + "." + key
}

// keySize of the volume key in bytes: AES-256-XTS, and 32 for HMAC-SHA-256.
func (w Want) keySize() int64 {
	if w.Spec.Integrity == dek.IntegrityHMAC {
		return 96
	}
	return 64
}

// areaSize of a keyslot: the volume key split into stripes, in whole 4 KiB.
func (w Want) areaSize() int64 { return (w.keySize()*stripes + 4095) &^ 4095 }

// ours is the form of a header that cryptcsi made. What may vary goes into h.
// The token comes first: whose header this is counts more than how it differs.
func (w Want) ours(h *Header) form {
	kdf := object(
		must("type", text("pbkdf2")),
		must("hash", text("sha256")),
		must("iterations", number(minPBKDF2, maxPBKDF2, nil)),
		must("salt", encoded(saltSize, nil)),
	)
	tokens := func(path string, v *value) error {
		if v.kind == isObject && len(v.members) == 0 {
			return fmt.Errorf("%s is empty: the header was not made by cryptcsi", path)
		}
		return object(must("0", w.token(&h.Token)))(path, v)
	}
	return w.header(tokens, kdf, sectorSize(&h.sectorSize, 512, 4096))
}

// constellation is the form of a header that Constellation made.
func (w Want) constellation(h *Header) form {
	return w.header(object(), argon2id, sectorSize(&h.sectorSize, w.SectorSize))
}

// header is what both have in common. There is one keyslot: a second one has
// its place when keys rotate, and rotation will have to ask for it in Want.
func (w Want) header(tokens, kdf, sector form) form {
	keyslot := object(
		must("type", text("luks2")),
		must("key_size", number(w.keySize(), w.keySize(), nil)),
		must("af", object(
			must("type", text("luks1")),
			must("stripes", number(stripes, stripes, nil)),
			must("hash", text("sha256")),
		)),
		must("area", object(
			must("type", text("raw")),
			must("offset", text(strconv.Itoa(areaStart))),
			must("size", text(strconv.FormatInt(w.areaSize(), 10))),
			must("encryption", text("aes-xts-plain64")),
			must("key_size", number(areaKeySize, areaKeySize, nil)),
		)),
		must("kdf", kdf),
	)
	segment := []field{
		must("type", text("crypt")),
		must("offset", text(dataOffset)),
		must("size", text("dynamic")),
		must("iv_tweak", text("0")),
		must("encryption", text(w.Spec.Cipher)),
		must("sector_size", sector),
	}
	if w.Spec.Integrity == dek.IntegrityHMAC {
		segment = append(segment, must("integrity", object(
			must("type", text("hmac(sha256)")),
			must("journal_encryption", text("none")),
			must("journal_integrity", text("none")),
		)))
	}
	digest := object(
		must("type", text("pbkdf2")),
		must("keyslots", list(text("0"))),
		must("segments", list(text("0"))),
		must("hash", text("sha256")),
		must("iterations", number(minPBKDF2, maxPBKDF2, nil)),
		must("salt", encoded(saltSize, nil)),
		must("digest", encoded(digestSize, nil)),
	)
	return object(
		must("tokens", tokens),
		must("segments", object(must("0", object(segment...)))),
		must("keyslots", object(must("0", keyslot))),
		must("digests", object(must("0", digest))),
		must("config", object(
			must("json_size", text(jsonSize)),
			must("keyslots_size", text(keyslotsSize)),
		)),
	)
}

// argon2id is a key derivation as libcryptsetup's benchmark chooses it.
func argon2id(path string, v *value) error {
	var time, memory int64
	err := object(
		must("type", text("argon2id")),
		must("time", number(minTime, maxWork/minMemory, &time)),
		must("memory", number(minMemory, maxMemory, &memory)),
		must("cpus", number(1, maxCPUs, nil)),
		must("salt", encoded(saltSize, nil)),
	)(path, v)
	if err == nil && time*memory > maxWork {
		err = fmt.Errorf("%s would fill %d KiB of memory %d times and must not fill more than %d KiB in all", path, memory, time, maxWork)
	}
	return err
}

// sectorSize is one of the allowed ones.
func sectorSize(into *int, allowed ...int) form {
	return func(path string, v *value) error {
		i := slices.IndexFunc(allowed, func(n int) bool { return v.text == strconv.Itoa(n) })
		if v.kind != isNumber || i < 0 {
			return differs(path, v, "the number "+strings.Trim(strings.ReplaceAll(fmt.Sprint(allowed), " ", " or "), "[]"))
		}
		*into = allowed[i]
		return nil
	}
}

// token is the form of our token.
func (w Want) token(t *Token) form {
	id := func(path string, v *value) error {
		if _, err := dek.ParseID(v.text); v.kind != isString || err != nil {
			return differs(path, v, "a DEK ID")
		}
		if w.ID != "" && v.text != string(w.ID) {
			return fmt.Errorf("it belongs to %q, not to %s", v.text, w.ID)
		}
		t.DEKID = v.text
		return nil
	}
	const most = 1<<63 - 1
	var version, sequence int64
	fields := []field{
		must("type", text(TokenType)),
		must("version", number(tokenVersion, cloneVersion, &version)),
		must("dek_id", id),
		must("keyslots", list(text("0"))),
		must("sequence", number(1, most, &sequence)),
		must("made", truth(&t.Made)),
		must("size", number(0, most, &t.Size)),
		must("mac", encoded(macSize, &t.MAC)),
	}
	var g *Geometry
	var grows *Growth
	if w.Spec.Integrity == dek.IntegrityHMAC {
		fields = append(fields, may("initialised", number(1, most, &t.Initialised)), may("integrity", geometry(&g)), may("growing", growth(&grows)))
	}
	if w.Spec.Layout == dek.LayoutClone {
		fields = append(fields, may("reserved", number(1, most, &t.Reserved)), may("hydration", hydration(&t.Hydration)))
	}
	return func(path string, v *value) error {
		if err := object(fields...)(path, v); err != nil {
			return err
		}
		t.Type, t.Version, t.Keyslots = TokenType, int(version), []string{"0"}
		t.Sequence, t.Integrity, t.Growing = uint64(sequence), g, grows
		switch {
		case t.Version != w.version(*t):
			return fmt.Errorf("%s.version is the number %d and must be the number %d", path, t.Version, w.version(*t))
		case t.Initialised > t.Size:
			return fmt.Errorf("%s says that %d of %d bytes were initialised", path, t.Initialised, t.Size)
		}
		if w.Spec.Layout == dek.LayoutClone {
			if err := t.sound(); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
		}
		return t.checkGrowth(path)
	}
}

// sound says how the parts of a token with the layout clone disagree, if they do.
func (t *Token) sound() error {
	switch h := t.Hydration; {
	case t.Integrity == nil && (t.Made || t.Size != 0 || t.Reserved != 0 || h != nil):
		return errors.New("there is no integrity geometry to a volume that has a size")
	case t.Integrity == nil:
		return nil
	case t.Size == 0 || t.Reserved == 0 || t.Size%4096 != 0 || t.Size+t.Reserved != t.Integrity.Sectors*512:
		return fmt.Errorf("size %d and reserved %d do not make up the %d sectors of the integrity layer", t.Size, t.Reserved, t.Integrity.Sectors)
	case h == nil && t.Made && t.Initialised != t.Size:
		return fmt.Errorf("a volume that is made has %d of %d bytes initialised and nothing hydrates it", t.Initialised, t.Size)
	case h != nil && (h.Start != t.Initialised || h.Start%4096 != 0 || h.Start == t.Size):
		return fmt.Errorf("hydration starts at %d, and %d of %d bytes were initialised", h.Start, t.Initialised, t.Size)
	}
	return nil
}

// version of a token is the lowest one that has its fields.
func (w Want) version(t Token) int {
	if t.Growing != nil {
		return cloneVersion
	}
	return TokenVersion(w.Spec)
}

// growth is the form of a growth under way.
func growth(into **Growth) form {
	return func(path string, v *value) error {
		var g Growth
		*into = &g
		return object(
			must("sectors", number(1, 1<<54, &g.Sectors)),
			must("size", number(1, 1<<63-1, &g.Size)),
			may("done", number(1, 1<<63-1, &g.Done)),
		)(path, v)
	}
}

// checkGrowth: a volume that grows has all its tags, and all that it has and will
// have lies within what dm-integrity will provide.
func (t *Token) checkGrowth(path string) error {
	g := t.Growing
	switch {
	case g == nil:
		return nil
	case t.Integrity == nil, t.Initialised != t.Size, t.Hydration != nil:
		return fmt.Errorf("%s says that a volume grows which is not initialised", path)
	case g.Sectors < t.Integrity.Sectors, g.Size <= t.Size, g.Size > g.Sectors*512, g.Done > g.Size-t.Size:
		return fmt.Errorf("%s says that a volume of %d bytes in %d sectors grows to %d bytes in %d, and has %d of them", path, t.Size, t.Integrity.Sectors, g.Size, g.Sectors, g.Done)
	}
	return nil
}

// hydration is the form of what dm-clone is loaded with.
func hydration(into **Hydration) form {
	return func(path string, v *value) error {
		var h Hydration
		var region int64
		err := object(
			must("start", number(0, 1<<62, &h.Start)),
			must("region", number(4<<10, 64<<10, &region)),
		)(path, v)
		if err == nil && region&(region-1) != 0 {
			err = fmt.Errorf("%s.region is %d and must be a power of two", path, region)
		}
		h.Region = int(region)
		*into = &h
		return err
	}
}

// geometry is the form of a dm-integrity layer's.
func geometry(into **Geometry) form {
	return func(path string, v *value) error {
		var g Geometry
		var tag, interleave int64
		err := object(
			must("sectors", number(1, 1<<54, &g.Sectors)),
			must("tag_size", number(1, 64, &tag)),
			must("journal_sectors", number(0, 1<<32, &g.JournalSectors)),
			must("interleave_sectors", number(1, 1<<31, &interleave)),
		)(path, v)
		g.TagSize, g.Interleave = int(tag), int(interleave)
		*into = &g
		return err
	}
}
