package secret_test

import (
	"bufio"
	"bytes"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/secret"
)

// TestDerive: as crypto/hkdf does, for keys of all lengths that hashes treat
// differently.
func TestDerive(t *testing.T) {
	for _, n := range []int{1, 16, 31, 32, 33, 63, 64, 65, 100, 128} {
		for _, salt := range [][]byte{nil, []byte("salt")} {
			raw := make([]byte, n)
			_, _ = rand.Read(raw)
			want, err := hkdf.Key(sha256.New, raw, salt, "info", 48)
			if err != nil {
				t.Fatal(err)
			}
			key := secret.Take(raw)
			got, err := secret.Derive(key, salt, "info", 48)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes, salt %q: %x, %v; want %x", n, salt, got, err, want)
			}
			key.Wipe()
		}
	}
	key := secret.New(32)
	defer key.Wipe()
	if got, err := secret.Derive(key, nil, "info", 1<<20); err == nil {
		t.Errorf("%d bytes were derived", len(got))
	}
}

// TestDeriveLeavesNoCopy: after it the key is in this process's memory where it
// was before, and nowhere else.
func TestDeriveLeavesNoCopy(t *testing.T) {
	key, mask := maskedKey()
	defer key.Wipe()
	before := copies(t, mask)
	for range 20 {
		if _, err := secret.Derive(key, nil, "info", 32); err != nil {
			t.Fatal(err)
		}
	}
	if after := copies(t, mask); before != 1 || after != 1 {
		t.Errorf("the key was in memory %d times and is %d times", before, after)
	}
}

// maskedKey returns a key, and the mask by which copies looks for it, so that
// looking needs no copy of the key.
func maskedKey() (key secret.Bytes, mask []byte) {
	key = secret.Random(32)
	mask = bytes.Clone(key.Expose())
	for i := range mask {
		key.Expose()[i] ^= 0x5a
	}
	return key, mask
}

// copies counts how often the bytes of mask, each XOR 0x5a, stand in memory.
func copies(t *testing.T, mask []byte) int {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	found := 0
	const step = 1 << 16
	buf := make([]byte, step+len(mask)) // so that none is cut in two
	defer clear(buf)
	scanner := bufio.NewScanner(bytes.NewReader(maps))
	for scanner.Scan() {
		var from, to int64
		var mode string
		if n, _ := fmt.Sscanf(scanner.Text(), "%x-%x %s", &from, &to, &mode); n != 3 || !strings.HasPrefix(mode, "rw") {
			continue
		}
		for at := from; at < to; at += step {
			n, err := io.NewSectionReader(mem, at, to-at).Read(buf)
			if err != nil {
				break
			}
			unmask(buf) // a key here is the mask now
			found += bytes.Count(buf[:n], mask)
			clear(buf)
		}
	}
	return found
}

// unmask XORs each byte of buf, whose length is a multiple of 8, with 0x5a: eight
// at once, never a whole key in a register. Watched by the race detector it takes
// ten times as long, and all memory goes through it.
//
//go:norace
func unmask(buf []byte) {
	for ; len(buf) > 0; buf = buf[8:] {
		binary.NativeEndian.PutUint64(buf, binary.NativeEndian.Uint64(buf)^0x5a5a5a5a5a5a5a5a)
	}
}
