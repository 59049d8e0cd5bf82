package keyclient

import (
	"crypto/ecdh"
	"crypto/hpke"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
)

// Recipient is a recipient whose private key a test knows.
type Recipient struct{ to recipient }

func NewRecipient(private *ecdh.PrivateKey) (Recipient, error) {
	key, err := hpke.NewDHKEMPrivateKey(private)
	return Recipient{recipient{key}}, err
}

func (r Recipient) Public() []byte { return r.to.public() }

func (r Recipient) OpenDEK(a *keyservicev1.DEK, id dek.ID) (dek.DEK, error) {
	return r.to.openDEK(a, id)
}
