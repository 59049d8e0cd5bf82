package azurefake

import (
	"bytes"
	"encoding/hex"
	"testing"
)

// TestKeyWrap is the vector of RFC 3394, section 4.6.
func TestKeyWrap(t *testing.T) {
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	kek := unhex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
	key := unhex("00112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f")
	want := unhex("28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21")
	if got, err := wrapAES(kek, key); err != nil || !bytes.Equal(got, want) {
		t.Errorf("wrapped: %x, %v", got, err)
	}
	if got, err := unwrapAES(kek, want); err != nil || !bytes.Equal(got, key) {
		t.Errorf("unwrapped: %x, %v", got, err)
	}
}
