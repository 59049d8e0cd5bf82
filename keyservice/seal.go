package keyservice

import (
	"crypto/ecdh"
	"crypto/hpke"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// What a sealed key is bound to; the client has the same.
const (
	sealInfo      = "cryptcsi keyservice v1"
	fieldKey      = "key"
	fieldPrevious = "previous"
)

// parseRecipient reads a caller's one-time public key.
func parseRecipient(raw []byte) (hpke.PublicKey, error) {
	pub, err := hpke.DHKEM(ecdh.X25519()).NewPublicKey(raw)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the recipient must be an X25519 public key of 32 bytes, made for this call")
	}
	return pub, nil
}

// sealTo seals a key to its recipient: encapsulated key ‖ ciphertext. The
// field's name and the ID are authenticated, so that no answer can be passed
// off as another. Empty for an empty key.
func sealTo(to hpke.PublicKey, field string, id dek.ID, key secret.Bytes) ([]byte, error) {
	if key.Len() == 0 {
		return nil, nil
	}
	enc, sender, err := hpke.NewSender(to, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(sealInfo))
	if err != nil {
		// Of 32 bytes that look like a key, those of a small-order point are none.
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the recipient is not a usable public key")
	}
	var ct []byte
	secret.Do(func() { ct, err = sender.Seal([]byte(field+"\x00"+string(id)), key.Expose()) })
	if err != nil {
		return nil, err
	}
	return append(enc, ct...), nil
}
