package luks2_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
)

func TestRealHeadersPass(t *testing.T) {
	for _, f := range all(t) {
		found := f.read(t, newKey(1))
		if found.Header == nil || !found.Whole || found.Header.SectorSize() != 4096 {
			t.Errorf("%s: %+v, %v", f.name, found.Header, found.Reason)
			continue
		}
		h := found.Header
		if got := h.ID(); f.ours == (h.Token.MAC == "") || got.Sequence != h.Token.Sequence || !bytes.Contains(f.head[168:204], []byte(got.UUID)) || len(got.UUID) != 36 {
			t.Errorf("%s: %+v with %+v", f.name, got, h.Token)
		}
	}
	if token := ours(t)[1].read(t, newKey(1)).Header.Token; token.Integrity == nil || *token.Integrity != (luks2.Geometry{Sectors: 81920, TagSize: 32, JournalSectors: 704, Interleave: 32768}) || !token.Made || token.Initialised != token.Size {
		t.Errorf("token %+v", token)
	}
}

// refused expects that both copies are refused with the words.
func (f fixture) refused(t *testing.T, words string) {
	t.Helper()
	found := f.read(t, newKey(1))
	switch {
	case found.Header != nil:
		t.Errorf("%s: accepted:\n%s", f.name, jsonOf(f.head))
	case strings.Count(found.Reason.Error(), words) != 2:
		t.Errorf("%s: refused with %q, want %q for both copies", f.name, found.Reason, words)
	}
}

const forgedSlot = `"1":{"type":"luks2","key_size":64,"af":{"type":"luks1","stripes":4000,"hash":"sha256"},"area":{"type":"raw","offset":"290816","size":"258048","encryption":"aes-xts-plain64","key_size":64},"kdf":{"type":"pbkdf2","hash":"sha256","iterations":1000,"salt":"Zf/m4C9/RRy3nI/YlBT4+HZmpt7E91wnfBvesLshjrg="}}`

// attack is a change to a header's JSON, and the words with which it is refused.
type attack struct{ name, old, new, words string }

// Every row of the table of attacks that a header can express, forged with
// right checksums, ours also with the right MAC: the template refuses it.
func TestAttacks(t *testing.T) {
	for _, tt := range slices.Concat(structureAttacks(), derivationAttacks(), tokenAttacks(), clonedTokenAttacks()) {
		t.Run(tt.name, func(t *testing.T) {
			hit := false
			for _, f := range all(t) {
				text := jsonOf(f.head)
				if !strings.Contains(text, tt.old) {
					continue
				}
				hit = true
				f = f.with(strings.Replace(text, tt.old, tt.new, 1))
				f.refused(t, tt.words)
			}
			if !hit {
				t.Error("no header has what this attack changes")
			}
		})
	}
}

// structureAttacks change what is mapped, and how.
func structureAttacks() []attack {
	const (
		segment = `"iv_tweak":"0","encryption":"aes-xts-plain64"`
		area    = `"encryption":"aes-xts-plain64","key_size":64`
		sheath  = `,"integrity":{"type":"hmac(sha256)","journal_encryption":"none","journal_integrity":"none"}`
	)
	return []attack{
		{"null cipher in the segment", segment, `"iv_tweak":"0","encryption":"cipher_null-ecb"`, `segments.0.encryption is "cipher_null-ecb" and must be "aes-xts-plain64"`},
		{"null cipher in the keyslot", area, `"encryption":"cipher_null-ecb","key_size":64`, `keyslots.0.area.encryption is "cipher_null-ecb" and must be "aes-xts-plain64"`},
		{"integrity removed", sheath, ``, `segments.0.integrity is missing`},
		{"integrity removed, key shortened", `"key_size":96`, `"key_size":64`, `keyslots.0.key_size is the number 64 and must be the number 96`},
		{"integrity without a key", `"hmac(sha256)"`, `"crc32c"`, `segments.0.integrity.type is "crc32c" and must be "hmac(sha256)"`},
		{"integrity none", `"hmac(sha256)"`, `"none"`, `segments.0.integrity.type is "none" and must be`},
		{"integrity key of its own", sheath, sheath[:len(sheath)-1] + `,"key_size":32}`, `segments.0.integrity.key_size is there and must not be`},
		{"chosen AES implementation", segment, `"iv_tweak":"0","encryption":"capi:xts(ecb(aes-generic))-plain64"`, `segments.0.encryption is "capi:xts(ecb(aes-generic))-plain64" and must be`},
		{"constant IV", segment, `"iv_tweak":"0","encryption":"aes-xts-null"`, `segments.0.encryption is "aes-xts-null" and must be`},
		{"shifted IV", segment, `"iv_tweak":"8","encryption":"aes-xts-plain64"`, `segments.0.iv_tweak is "8" and must be "0"`},
		{"segment shifted", `"offset":"16777216"`, `"offset":"16781312"`, `segments.0.offset is "16781312" and must be "16777216"`},
		{"segment shortened", `"size":"dynamic"`, `"size":"1048576"`, `segments.0.size is "1048576" and must be "dynamic"`},
		{"segment flags", segment, segment + `,"flags":["in-reencryption"]`, `segments.0.flags is there and must not be`},
		{"linear segment", `"type":"crypt"`, `"type":"linear"`, `segments.0.type is "linear" and must be "crypt"`},
		{"second segment", `"segments":{`, `"segments":{"1":{"type":"linear","offset":"33554432","size":"dynamic"},`, `segments.1 is there and must not be`},
		{"no segment", `"segments":{"0"`, `"segments":{},"x":{"0"`, `segments.0 is missing`},
		{"second keyslot", `"keyslots":{`, `"keyslots":{` + forgedSlot + `,`, `keyslots.1 is there and must not be`},
		{"another keyslot", `"keyslots":{"0":`, `"keyslots":{"1":`, `keyslots.0 is missing`},
		{"second digest", `"digests":{`, `"digests":{"1":{},`, `digests.1 is there and must not be`},
		{"digest of other segments", `"segments":["0"]`, `"segments":["1"]`, `digests.0.segments.0 is "1" and must be "0"`},
		{"digest of no segment", `"segments":["0"]`, `"segments":[]`, `digests.0.segments has 0 items and must have 1`},
		{"digest of no keyslot", `"keyslots":["0"],"segments"`, `"keyslots":[],"segments"`, `digests.0.keyslots has 0 items`},
		{"digest of another keyslot too", `"keyslots":["0"],"segments"`, `"keyslots":["0","1"],"segments"`, `digests.0.keyslots has 2 items`},
		{"weak digest", `"segments":["0"],"hash":"sha256"`, `"segments":["0"],"hash":"sha1"`, `digests.0.hash is "sha1" and must be "sha256"`},
		{"unknown field", `{"keyslots"`, `{"x":{},"keyslots"`, `: x is there and must not be`},
		{"persistent flags", `"config":{`, `"config":{"flags":["allow-discards","no-journal"],`, `config.flags is there and must not be`},
		{"requirements", `"config":{`, `"config":{"requirements":{"mandatory":["online-reencrypt-v2"]},`, `config.requirements is there and must not be`},
		{"unknown requirements", `"config":{`, `"config":{"requirements":{"mandatory":["x"]},`, `config.requirements is there`},
		{"keyslot area in the data", `"offset":"32768"`, `"offset":"16777216"`, `keyslots.0.area.offset is "16777216" and must be "32768"`},
		{"keyslot area in the header", `"offset":"32768"`, `"offset":"0"`, `keyslots.0.area.offset is "0"`},
		{"huge keyslot area", `"offset":"32768","size":"`, `"offset":"32768","size":"9`, `keyslots.0.area.size is "9`},
		{"keyslot of a re-encryption", `"type":"luks2"`, `"type":"reencrypt"`, `keyslots.0.type is "reencrypt" and must be "luks2"`},
		{"keyslot priority", `"type":"luks2"`, `"type":"luks2","priority":2`, `keyslots.0.priority is there and must not be`},
		{"few stripes", `"stripes":4000`, `"stripes":1`, `keyslots.0.af.stripes is the number 1 and must be the number 4000`},
		{"area of a journal", `"type":"raw"`, `"type":"journal"`, `keyslots.0.area.type is "journal" and must be "raw"`},
		{"short key of the area", area, `"encryption":"aes-xts-plain64","key_size":32`, `keyslots.0.area.key_size is the number 32 and must be the number 64`},
		{"small JSON area", `"json_size":"12288"`, `"json_size":"4096"`, `config.json_size is "4096" and must be "12288"`},
		{"small keyslots area", `"keyslots_size":"16744448"`, `"keyslots_size":"0"`, `config.keyslots_size is "0"`},
	}
}

// derivationAttacks make a key cheap to guess, or an opening take for ever.
func derivationAttacks() []attack {
	return []attack{
		{"pbkdf2 bomb", `"hash":"sha256","iterations":1000,"salt":"Zf`, `"hash":"sha256","iterations":4294967295,"salt":"Zf`, `keyslots.0.kdf.iterations is the number 4294967295 and must be a number from 1000 to 2000000`},
		{"pbkdf2 of next to nothing", `"hash":"sha256","iterations":1000,"salt":"Zf`, `"hash":"sha256","iterations":1,"salt":"Zf`, `keyslots.0.kdf.iterations is the number 1 and must be`},
		{"Argon2id bomb, time", `"time":`, `"time":429496729`, `keyslots.0.kdf.time is the number 429496729`},
		{"Argon2id bomb, memory", `"memory":65536`, `"memory":4194304`, `keyslots.0.kdf.memory is the number 4194304 and must be a number from 65536 to 1048576`},
		{"Argon2id bomb, both", `"time":21,"memory":65536`, `"time":256,"memory":1048576`, `keyslots.0.kdf would fill 1048576 KiB of memory 256 times and must not fill more than 16777216 KiB in all`},
		{"Argon2id, threads", `"cpus":2`, `"cpus":400`, `keyslots.0.kdf.cpus is the number 400 and must be a number from 1 to 4`},
		{"Argon2i", `"argon2id"`, `"argon2i"`, `keyslots.0.kdf.type is "argon2i" and must be "argon2id"`},
		{"digest bomb", `"segments":["0"],"hash":"sha256","iterations":`, `"segments":["0"],"hash":"sha256","iterations":429496`, `digests.0.iterations is the number 429496`},
	}
}

// tokenAttacks change whose the volume is, and how far it is in its life.
func tokenAttacks() []attack {
	const (
		rest   = `"dek_id":"test.cryptcsi.io/vol-1","sequence":7,"made":true,"size":41943040`
		sealed = `"version":1,` + rest
	)
	return []attack{
		{"token of another program", `"type":"cryptcsi"`, `"type":"systemd-tpm2"`, `tokens.0.type is "systemd-tpm2" and must be "cryptcsi"`},
		{"second token", `"tokens":{"0":`, `"tokens":{"1":{"type":"luks2-keyring","keyslots":["0"],"key_description":"k"},"0":`, `tokens.1 is there and must not be`},
		{"token where none must be", `"tokens":{}`, `"tokens":{"0":{"type":"luks2-keyring","keyslots":["0"],"key_description":"k"}}`, `tokens.0 is there and must not be`},
		{"no token", `"tokens":{"0":{"type":"cryptcsi"`, `"tokens":{},"x":{"0":{"type":"cryptcsi"`, `tokens is empty: the header was not made by cryptcsi`},
		{"token of no keyslot", `"keyslots":["0"],"version"`, `"keyslots":[],"version"`, `tokens.0.keyslots has 0 items and must have 1`},
		{"another volume", `"dek_id":"test.cryptcsi.io/vol-1"`, `"dek_id":"test.cryptcsi.io/vol-2"`, `it belongs to "test.cryptcsi.io/vol-2", not to test.cryptcsi.io/vol-1`},
		{"token of the future", `"version":1`, `"version":3,"new":{}`, `tokens.0.version is the number 3 and must be a number from 1 to 2`},
		{"growth without its version", `"initialised":41943040,`, `"initialised":41943040,"growing":{"sectors":90000,"size":42000384},`, `tokens.0.version is the number 1 and must be the number 2`},
		{"the version of a growth without one", `"version":1`, `"version":2`, `tokens.0.version is the number 2 and must be the number 1`},
		{"growth where there is no integrity", `"size":50565120`, `"size":50565120,"growing":{"sectors":90000,"size":50569216}`, `tokens.0.growing is there and must not be`},
		{"growth to less", sealed, `"growing":{"sectors":90000,"size":41943040},"version":2,` + rest, `grows to 41943040 bytes in 90000`},
		{"growth in fewer sectors", sealed, `"growing":{"sectors":80000,"size":41943041},"version":2,` + rest, `grows to 41943041 bytes in 80000`},
		{"growth beyond what there will be", sealed, `"growing":{"sectors":90000,"size":46080001},"version":2,` + rest, `grows to 46080001 bytes in 90000`},
		{"growth that has more than there will be", sealed, `"growing":{"sectors":90000,"size":41943041,"done":2},"version":2,` + rest, `and has 2 of them`},
		{"growth of what has no tags", `"version":1,"dek_id":"test.cryptcsi.io/vol-1","sequence":7,"made":true,"size":41943040,"initialised":4`, `"growing":{"sectors":90000,"size":41943041},"version":2,"dek_id":"test.cryptcsi.io/vol-1","sequence":7,"made":true,"size":41943040,"initialised":3`, `grows which is not initialised`},
		{"growth with more", sealed, `"growing":{"sectors":90000,"size":41943041,"x":1},"version":2,` + rest, `tokens.0.growing.x is there and must not be`},
		{"unknown field of the token", `"made":`, `"hydrated":1,"made":`, `tokens.0.hydrated is there and must not be`},
		{"geometry where there is no integrity", `"size":50565120`, `"size":50565120,"initialised":5`, `tokens.0.initialised is there and must not be`},
		{"geometry with more", `"tag_size":32`, `"tag_size":32,"x":1`, `tokens.0.integrity.x is there and must not be`},
		{"more initialised than there is", `"initialised":4`, `"initialised":9`, `tokens.0 says that 91943040 of 41943040 bytes were initialised`},
	}
}

// clonedTokenAttacks change what the layout clone has in the token.
func clonedTokenAttacks() []attack {
	return []attack{
		{"area in an old volume", `"initialised":41943040`, `"initialised":41943040,"reserved":4096`, `tokens.0.reserved is there and must not be`},
		{"hydration of an old volume", `"initialised":41943040`, `"initialised":4096,"hydration":{"start":4096,"region":4096}`, `tokens.0.hydration is there and must not be`},
		{"clone's token of before", `"version":2`, `"version":1`, `tokens.0.version is the number 1 and must be the number 2`},
		{"longer volume", `"size":39841792`, `"size":39845888`, `size 39845888 and reserved 2101248 do not make up the 81920 sectors`},
		{"shorter area", `"reserved":2101248`, `"reserved":4096`, `reserved 4096 do not make up the 81920 sectors`},
		{"no area", `"reserved":2101248,`, ``, `reserved 0 do not make up the 81920 sectors`},
		{"area of no end", `"reserved":2101248`, `"reserved":9223372036854775807`, `do not make up the 81920 sectors`},
		{"volume of no length", `"size":39841792,"initialised":8192,"reserved":2101248,"hydration":{"start":8192,"region":4096}`, `"size":0,"reserved":41943040`, `do not make up the 81920 sectors`},
		{"no geometry", `"region":4096},"integrity":{"sectors":81920,"tag_size":32,"journal_sectors":704,"interleave_sectors":32768}`, `"region":4096}`, `there is no integrity geometry`},
		{"not hydrating any more", `,"hydration":{"start":8192,"region":4096}`, ``, `has 8192 of 39841792 bytes initialised and nothing hydrates it`},
		{"hydrating from the start", `"start":8192`, `"start":0`, `hydration starts at 0, and 8192 of 39841792 bytes`},
		{"hydrating from further on", `"start":8192`, `"start":12288`, `hydration starts at 12288, and 8192 of`},
		{"hydrating half a sector", `8192,"reserved":2101248,"hydration":{"start":8192`, `8193,"reserved":2101248,"hydration":{"start":8193`, `hydration starts at 8193`},
		{"hydrating nothing", `8192,"reserved":2101248,"hydration":{"start":8192`, `39841792,"reserved":2101248,"hydration":{"start":39841792`, `hydration starts at 39841792`},
		{"odd regions", `"region":4096`, `"region":4097`, `tokens.0.hydration.region is 4097 and must be a power of two`},
		{"small regions", `"region":4096`, `"region":2048`, `tokens.0.hydration.region is the number 2048 and must be a number from 4096 to 65536`},
		{"large regions", `"region":4096`, `"region":131072`, `tokens.0.hydration.region is the number 131072 and must be`},
		{"hydration with more", `"region":4096`, `"region":4096,"source":"/dev/sda"`, `tokens.0.hydration.source is there and must not be`},
		{"hydration without a place", `"start":8192,`, ``, `tokens.0.hydration.start is missing`},
	}
}

// What the token of a volume with the layout clone can be in its life.
func TestClonedTokens(t *testing.T) {
	f := ours(t)[2]
	text := jsonOf(f.head)
	from, to := strings.Index(text, `"made":`), strings.Index(text, `,"mac"`)
	geometry := `,"integrity":{"sectors":81920,"tag_size":32,"journal_sectors":704,"interleave_sectors":32768}`
	for name, token := range map[string]string{
		"formatted":          `"made":false,"size":0`,
		"hydrating":          `"made":false,"size":39841792,"reserved":2101248,"hydration":{"start":0,"region":4096}` + geometry,
		"made and hydrating": `"made":true,"size":39841792,"reserved":2101248,"hydration":{"start":0,"region":65536}` + geometry,
		"grown":              `"made":true,"size":39841792,"initialised":39837696,"reserved":2101248,"hydration":{"start":39837696,"region":16384}` + geometry,
		"half wiped":         `"made":false,"size":39841792,"initialised":8388608,"reserved":2101248` + geometry,
		"finished":           `"made":true,"size":39841792,"initialised":39841792,"reserved":2101248` + geometry,
		"growing":            `"made":true,"size":39841792,"initialised":39841792,"reserved":2101248` + geometry + `,"growing":{"sectors":90000,"size":43974656,"done":4096}`,
	} {
		if found := f.with(text[:from]+token+text[to:]).read(t, newKey(1)); found.Header == nil || !found.Whole {
			t.Errorf("%s: %v", name, found.Reason)
		}
	}
	f.with(text[:from]+`"made":true,"size":0`+text[to:]).refused(t, "there is no integrity geometry")
}

// A volume must be what the record says, not what its header says.
func TestOtherSpec(t *testing.T) {
	for _, f := range [][]fixture{ours(t), constellation(t)} {
		plain, protected := f[0], f[1]
		plain.want, protected.want = protected.want, plain.want
		plain.refused(t, "segments.0.integrity is missing")
		protected.refused(t, "is there and must not be")
	}
	old, cloned := ours(t)[1], ours(t)[2]
	old.want, cloned.want = cloned.want, old.want
	old.refused(t, "tokens.0.version is the number 1 and must be the number 2")
	cloned.refused(t, "tokens.0.reserved is there and must not be")
	for _, size := range []int{512, 4096} {
		for _, f := range all(t) {
			f = f.with(strings.Replace(jsonOf(f.head), `"sector_size":4096`, fmt.Sprintf(`"sector_size":%d`, size), 1))
			if f.ours || size == f.want.SectorSize {
				if found := f.read(t, newKey(1)); found.Header == nil || found.Header.SectorSize() != size {
					t.Errorf("%s with sectors of %d: %+v, %v", f.name, size, found.Header, found.Reason)
				}
				continue
			}
			f.refused(t, "segments.0.sector_size is the number 512 and must be the number 4096")
		}
	}
	for _, f := range ours(t) {
		f.with(strings.Replace(jsonOf(f.head), `"sector_size":4096`, `"sector_size":1024`, 1)).refused(t, "must be the number 512 or 4096")
	}
	for _, f := range constellation(t) {
		f.want.ID = uuid
		f.refused(t, `UUID is "`+constellationUUID+`" and must be "`+uuid+`"`)
	}
	for _, f := range all(t) {
		f.want.Spec.Cipher = ""
		f.refused(t, "what the volume must be is not known")
	}
}

// at changes a piece of the JSON and expects that to be refused.
func (f fixture) at(t *testing.T, from, to int, with, words string) {
	t.Helper()
	text := jsonOf(f.head)
	f.with(text[:from]+with+text[to:]).refused(t, words)
}

// Each kind of trick with keys, at every key.
func TestEveryKey(t *testing.T) {
	key := regexp.MustCompile(`"([a-z0-9_]+)":`)
	for _, f := range all(t) {
		text := jsonOf(f.head)
		for _, at := range key.FindAllStringSubmatchIndex(text, -1) {
			from, to, name := at[2], at[3], text[at[2]:at[3]]
			f.at(t, at[0], at[0], text[at[0]:at[1]]+`0,`, "stands twice in one object")
			if upper := strings.ToUpper(name); upper != name {
				f.at(t, from, to, upper, "header at offset")                               // missing, or not known where it is optional
				f.at(t, at[0], at[0], `"`+upper+`":0,`, upper+" is there and must not be") // beside the right one
			}
			f.at(t, from, to, name+`\u0000`, "stands where a quote or backslash")
			f.at(t, from, to, name+"\x00", "behind the JSON's end") // a C program's text ends there
			f.at(t, from, to, `\u00`+fmt.Sprintf("%02x", name[0])+name[1:], "stands where a quote or backslash")
			f.at(t, from, to, name+"\xff", "printable ASCII")
			f.at(t, from, to, name+"ſ", "printable ASCII") // folds to s
			f.at(t, at[1], at[1], " ", "stands where a value")
			f.at(t, at[0], at[0], "\t", "stands where a key")
		}
	}
}

// An unknown key, and a comma too many, in every object.
func TestEveryObject(t *testing.T) {
	for _, f := range all(t) {
		text := jsonOf(f.head)
		for at := range len(text) {
			if text[at] != '{' {
				continue
			}
			comma := ","
			if text[at+1] == '}' {
				comma = ""
			}
			f.at(t, at+1, at+1, `"zz":0`+comma, "zz is there and must not be")
			f.at(t, at+1, at+1, `,`, "stands where a key")
		}
	}
}

// Other kinds of values and other spellings of numbers, at every scalar.
func TestEveryScalar(t *testing.T) {
	scalar := regexp.MustCompile(`:("[^"]*"|[0-9]+|true|false)`)
	for _, f := range all(t) {
		text := jsonOf(f.head)
		for _, at := range scalar.FindAllStringSubmatchIndex(text, -1) {
			from, to, old := at[2], at[3], text[at[2]:at[3]]
			for _, other := range []string{`null`, `-1`, `1.0`, `1e3`, `01`, `0x10`, `NaN`, `'0'`, ``} {
				f.at(t, from, to, other, "JSON, byte")
			}
			for _, other := range []string{`{}`, `[]`, `""`, `99999999999999999999`, `18446744073709551616`, strings.Repeat("9", 9000)} {
				f.at(t, from, to, other, "and must be")
			}
			if n, err := strconv.Atoi(old); err == nil {
				f.at(t, from, to, `"`+strconv.Itoa(n)+`"`, "and must be")
				f.at(t, from, to, "0"+old, "not a plain integer")
				f.at(t, from, to, old+".0", "not a plain integer")
				f.at(t, from, to, old+"e0", "not a plain integer")
			} else if n, err := strconv.Atoi(strings.Trim(old, `"`)); err == nil {
				f.at(t, from, to, strconv.Itoa(n), "and must be")
				for _, before := range []string{" ", "+", "-", "0"} {
					f.at(t, from+1, from+1, before, "and must be")
				}
			}
		}
	}
}

// What stands around the JSON, or is no object, or has no end.
func TestWholeText(t *testing.T) {
	var many strings.Builder
	for i := range 40 {
		fmt.Fprintf(&many, `"%d":0,`, i)
	}
	for _, f := range all(t) {
		text := jsonOf(f.head)
		for _, tail := range []string{" ", "\n", "}", "{}", "/**/", ",", "\x00x", "\x00" + text} {
			f.with(text+tail).refused(t, "behind the")
		}
		f.with(" "+text).refused(t, "stands where a value")
		f.with("\xef\xbb\xbf"+text).refused(t, "stands where a value")
		f.with("").refused(t, "the text ends")
		f.with(text[:len(text)-1]).refused(t, "the text ends")
		f.with(`[`+text+`]`).refused(t, "JSON is a list and must be an object")
		f.with(strings.Repeat(`[`, 12000)).refused(t, "nested deeper than 8")
		f.with(strings.Repeat(`{"a":`, 2400)).refused(t, "nested deeper than 8")
		f.with(strings.Repeat(" ", 12288)).refused(t, "the JSON has no end")
		f.with("{"+many.String()+text[1:]).refused(t, "more than 32 members")
		f.with(strings.Replace(text, `["0"]`, `["0"`+strings.Repeat(`,"0"`, 40)+`]`, 1)).refused(t, "more than 32 items")
	}
}

// Members may stand in any order: which one differs between versions of
// libcryptsetup and means nothing.
func TestAnyOrder(t *testing.T) {
	for _, f := range all(t) {
		for range 20 {
			g := f.with(shuffled(jsonOf(f.head)))
			if found := g.read(t, newKey(1)); found.Header == nil {
				t.Fatalf("%s: %v\n%s", f.name, found.Reason, jsonOf(g.head))
			}
		}
	}
}

// shuffled returns a JSON text with the members of every object in another order.
func shuffled(text string) string {
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		panic(err)
	}
	return shuffle(v)
}

func shuffle(v any) string {
	object, ok := v.(map[string]any)
	if !ok {
		if n, ok := v.(float64); ok {
			return strconv.FormatInt(int64(n), 10)
		}
		b, _ := json.Marshal(v)
		return string(b)
	}
	var members []string
	for k, m := range object {
		members = append(members, strconv.Quote(k)+":"+shuffle(m))
	}
	rand.Shuffle(len(members), func(i, j int) { members[i], members[j] = members[j], members[i] })
	return "{" + strings.Join(members, ",") + "}"
}

// The bounds of what may vary: the last value inside, the first one outside.
func TestBounds(t *testing.T) {
	for _, tt := range []struct {
		pattern string
		in, out []string
		sizes   bool
	}{
		{`("kdf":{"type":"pbkdf2","hash":"sha256","iterations":)[0-9]+`, []string{"1000", "2000000"}, []string{"999", "2000001", "0"}, false},
		{`("segments":\["0"\],"hash":"sha256","iterations":)[0-9]+`, []string{"1000", "2000000"}, []string{"999", "2000001", "0"}, false},
		{`("time":)[0-9]+`, []string{"4", "256"}, []string{"3", "257"}, false},
		{`("memory":)[0-9]+`, []string{"65536", "131072"}, []string{"65535", "1048577", "0"}, false},
		{`("time":)[0-9]+,"memory":[0-9]+`, []string{`16,"memory":1048576`, `17,"memory":986895`}, []string{`17,"memory":1048576`, `17,"memory":986896`}, false},
		{`("cpus":)[0-9]+`, []string{"1", "4"}, []string{"0", "5"}, false},
		{`("salt":)"[^"]*"`, []string{`"` + random(32) + `"`}, []string{`"` + random(31) + `"`, `"` + random(33) + `"`, `""`, `"` + strings.TrimRight(random(32), "=") + `"`, `"_` + random(32)[1:] + `"`}, false},
		{`("digest":)"[^"]*"`, []string{`"` + random(32) + `"`}, []string{`"` + random(20) + `"`, `"` + random(64) + `"`}, false},
		{`("sequence":)[0-9]+`, []string{"1", "9223372036854775807"}, []string{"0", "9223372036854775808"}, false},
		{`("size":)[0-9]+`, []string{"41943040", "9223372036854775807"}, []string{"9223372036854775808"}, true},
		{`("made":)[a-z]+`, []string{"true", "false"}, []string{"1", `"true"`}, false},
		{`("tag_size":)[0-9]+`, []string{"1", "64"}, []string{"0", "65"}, false},
		{`("initialised":)[0-9]+`, []string{"1", "41943040"}, []string{"0", "41943041"}, true},
	} {
		pattern, hit := regexp.MustCompile(tt.pattern), false
		for _, f := range all(t) {
			text := jsonOf(f.head)
			if !pattern.MatchString(text) || f.want.Spec.Layout != "" && tt.sizes {
				continue // its sizes depend on each other
			}
			hit = true
			for _, v := range append(slices.Clone(tt.in), tt.out...) {
				found := f.with(pattern.ReplaceAllString(text, "${1}"+v)).read(t, newKey(1))
				if got, want := found.Header != nil, slices.Contains(tt.in, v); got != want {
					t.Errorf("%s, %s with %s: accepted %v, want %v (%v)", f.name, tt.pattern, v, got, want, found.Reason)
				}
			}
		}
		if !hit {
			t.Errorf("no header has %s", tt.pattern)
		}
	}
	// The one text of 32 bytes: base64 that leaves bits over has others.
	for _, f := range all(t) {
		at := strings.Index(jsonOf(f.head), `="}`)
		text := []byte(jsonOf(f.head))
		const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
		text[at-1] = alphabet[strings.IndexByte(alphabet, text[at-1])+1]
		f.with(string(text)).refused(t, "and must be 32 bytes in base64")
	}
}

// Whatever byte of the two copies changes, in one or both, with right checksums
// and nothing to vouch for them: a header is accepted only with the same
// content but for what may vary, by the reading of another JSON parser.
func TestEveryByteConstellation(t *testing.T) {
	f := constellation(t)[0]
	want, d := fixedPart(t, f, f.head), f.disk(t, newKey(1))
	end := 4096 + len(jsonOf(f.head)) + 2
	for at := range luks2.CopySize {
		if at > 520 && at < 4096 && at%61 != 0 || at > end && at%61 != 0 {
			continue // of the padding a sample
		}
		for range 3 {
			change := byte(1 + rand.IntN(255))
			first := bytes.Clone(f.head[:luks2.CopySize])
			g := f
			if at < 6 || at >= 256 && at < 264 || at >= 448 && at < 512 { // what twice would put right
				g.head = twice(first)
				g.head[at] ^= change
				g.head[luks2.CopySize+at] ^= change
			} else {
				first[at] ^= change
				g.head = twice(first)
			}
			copy(d.data, g.head)
			if f.readDisk(t, d, newKey(1)).Header == nil {
				continue
			}
			free := at >= 16 && at < 24 || at >= 104 && at < 168 // sequence number, salt
			if at < 4096 && !free {
				t.Fatalf("byte %d changed and the header is accepted", at)
			}
			if got := fixedPart(t, f, g.head); !reflect.DeepEqual(got, want) {
				t.Fatalf("byte %d changed and accepted is\n%v, not\n%v", at, got, want)
			}
		}
	}
	for at := 0; at < luks2.CopySize; at += 7 { // one copy, checksum wrong: the other one counts
		for _, c := range []int{0, luks2.CopySize} {
			copy(d.data, f.head)
			d.data[c+at] ^= 0x40
			found := f.readDisk(t, d, newKey(1))
			if found.Header == nil || found.Whole || !bytes.Equal(jsonArea(t, found.Header), f.head[4096:luks2.CopySize]) {
				t.Fatalf("byte %d of one copy changed: %+v, %v", c+at, found.Header, found.Reason)
			}
		}
	}
}

// jsonArea is that of a header, as it would be written.
func jsonArea(t *testing.T, h *luks2.Header) []byte {
	t.Helper()
	d := &disk{data: make([]byte, 2*luks2.CopySize), writes: -1}
	if err := h.WriteCopies(d, func(string) {}); err != nil {
		t.Fatal(err)
	}
	return d.data[4096:luks2.CopySize]
}

// fixedPart is what a header's JSON says, as encoding/json reads it, without
// what may vary; what varies must be within its bounds.
func fixedPart(t testing.TB, f fixture, head []byte) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal([]byte(jsonOf(head)), &v); err != nil {
		t.Fatalf("%s: accepted, and is no JSON: %v", f.name, err)
	}
	dig := func(path ...string) map[string]any {
		m := v
		for _, p := range path {
			m, _ = m[p].(map[string]any)
		}
		return m
	}
	kdf, digest := dig("keyslots", "0", "kdf"), dig("digests", "0")
	costs := map[string][2]float64{"iterations": {1000, 2e6}, "time": {4, 256}, "memory": {65536, 1 << 20}, "cpus": {1, 4}}
	for _, m := range []map[string]any{kdf, digest} {
		for name, bounds := range costs {
			if n, ok := m[name].(float64); ok {
				if n < bounds[0] || n > bounds[1] {
					t.Fatalf("%s: accepted with %s of %v", f.name, name, n)
				}
				m[name] = "free"
			}
		}
		for _, name := range []string{"salt", "digest"} {
			if s, ok := m[name].(string); ok && len(s) == 44 {
				m[name] = "free"
			}
		}
	}
	if token := dig("tokens", "0"); f.ours {
		for _, name := range []string{"sequence", "made", "size", "initialised", "mac"} {
			delete(token, name)
		}
		for _, name := range []string{"integrity", "reserved", "hydration"} {
			delete(token, name)
		}
	}
	return v
}

// Of two good copies of Constellation's the newer one counts, as it does for
// libcryptsetup; salts of their own do not make them differ.
func TestConstellationCopies(t *testing.T) {
	f := constellation(t)[0]
	if bytes.Equal(f.head[104:168], f.head[luks2.CopySize+104:luks2.CopySize+168]) {
		t.Fatal("both copies have one salt: not a header as libcryptsetup writes it")
	}
	newer := bytes.Clone(f.head)
	for at, sequence := range map[int]uint64{0: 90, luks2.CopySize: 91} {
		raw := newer[at : at+luks2.CopySize]
		binary.BigEndian.PutUint64(raw[16:], sequence)
		setChecksum(raw)
	}
	g := f
	g.head = newer
	if found := g.read(t, newKey(1)); found.Header == nil || found.Whole || found.Header.Copy.Sequence() != 91 {
		t.Errorf("the second copy is newer: %+v, %v", found.Header, found.Reason)
	}
	for _, at := range []int{0, luks2.CopySize} {
		g.head = bytes.Clone(f.head)
		clear(g.head[at : at+luks2.CopySize])
		found := g.read(t, newKey(1))
		if found.Header == nil || found.Whole || len(found.UUIDs) != 1 {
			t.Fatalf("without the copy at %d: %+v, %v", at, found, found.Reason)
		}
		d := g.disk(t, newKey(1))
		if err := found.Header.WriteCopies(d, func(string) {}); err != nil {
			t.Fatal(err)
		}
		if again := f.readDisk(t, d, newKey(1)); again.Header == nil || !again.Whole || again.Header.ID() != found.Header.ID() {
			t.Errorf("repaired: %+v, %v", again.Header, again.Reason)
		}
	}
}

// What libcryptsetup writes is checked before anything of it is on a device.
func TestSealRefuses(t *testing.T) {
	token := luks2.NewToken(id)
	for old, words := range map[string]string{
		`"iv_tweak":"0"`: "segments.0.iv_tweak",
		`"config":{`:     "config.x is there",
	} {
		d := unsealed(t, token.Unsealed())
		raw := d.data[:luks2.CopySize]
		changed := strings.Replace(jsonOf(raw), old, strings.NewReplacer(`"0"`, `"1"`, `{`, `{"x":1,`).Replace(old), 1)
		setJSON(raw, changed)
		if h, err := luks2.Seal(d, want, newKey(1)); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("Seal = %+v, %v; want %s", h, err, words)
		}
	}
}

// FuzzTemplate: what is accepted has the one content, whatever the text is. It
// leaves out the MAC, which would refuse nearly everything and take the time.
func FuzzTemplate(f *testing.F) {
	fixtures := all(f)
	for i, x := range fixtures {
		f.Add(jsonOf(x.head), uint8(i))
		f.Add(shuffled(jsonOf(x.head)), uint8(i))
		f.Add(strings.Replace(jsonOf(x.head), "aes-xts", "cipher_null-ecb", 1), uint8(i))
	}
	f.Fuzz(func(t *testing.T, text string, which uint8) {
		x := fixtures[int(which)%len(fixtures)]
		if len(text) >= 12288 {
			return
		}
		raw := bytes.Clone(x.head[:luks2.CopySize])
		setJSON(raw, text)
		if _, err := luks2.Match(raw, x.want, x.ours); err != nil {
			return
		}
		if got, want := fixedPart(t, x, raw), fixedPart(t, x, x.head); !reflect.DeepEqual(got, want) {
			t.Errorf("accepted\n%v, not\n%v", got, want)
		}
	})
}

func BenchmarkRead(b *testing.B) {
	key := newKey(1)
	for _, f := range all(b) {
		d := f.disk(b, key)
		b.Run(strings.ReplaceAll(f.name, " ", "-"), func(b *testing.B) {
			for b.Loop() {
				if f.readDisk(b, d, key).Header == nil {
					b.Fatal("refused")
				}
			}
		})
	}
}
