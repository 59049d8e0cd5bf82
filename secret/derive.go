package secret

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
)

// Derive is HKDF-SHA-256 of key with salt (nil for none) and info: n bytes, at
// most 8160, which the caller clears if they are secret. Other than
// crypto/hkdf, whose hash keeps what it was last fed with in memory until the
// garbage collector gives that away, it leaves no copy of key.
func Derive(key Bytes, salt []byte, info string, n int) (out []byte, err error) {
	Do(func() { out, err = derive(key, salt, info, n) })
	return out, err
}

func derive(key Bytes, salt []byte, info string, n int) ([]byte, error) {
	extract := hmac.New(sha256.New, salt)
	extract.Write(key.Expose())
	pseudorandom := extract.Sum(nil)
	defer clear(pseudorandom)
	// The hash's buffer holds up to 63 bytes of key: fill it with others.
	extract.Reset()
	extract.Write(make([]byte, sha256.BlockSize-1))
	return hkdf.Expand(sha256.New, pseudorandom, info, n)
}
