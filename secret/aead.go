package secret

import (
	"crypto/aes"
	"crypto/cipher"
)

// AEAD is AES with key in a mode, cipher.NewGCM for example, that expands the key,
// seals and opens by Do. key may be wiped afterwards; what AES expanded from it
// stays in memory until the garbage collector gives that away.
func AEAD(key Bytes, mode func(cipher.Block) (cipher.AEAD, error)) (a cipher.AEAD, err error) {
	Do(func() {
		var block cipher.Block
		if block, err = aes.NewCipher(key.Expose()); err == nil {
			a, err = mode(block)
		}
	})
	if err != nil {
		return nil, err
	}
	return aead{a}, nil
}

type aead struct{ cipher.AEAD }

func (a aead) Seal(dst, nonce, plaintext, additional []byte) (out []byte) {
	Do(func() { out = a.AEAD.Seal(dst, nonce, plaintext, additional) })
	return out
}

func (a aead) Open(dst, nonce, ciphertext, additional []byte) (out []byte, err error) {
	Do(func() { out, err = a.AEAD.Open(dst, nonce, ciphertext, additional) })
	return out, err
}
