package keyclient

import (
	"crypto/ecdh"
	"crypto/hpke"
	"fmt"
	"unicode/utf8"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

const (
	// sealInfo separates what is sealed here from all other uses of HPKE.
	sealInfo = "cryptcsi keyservice v1"
	// encapsulated is the size of X25519's encapsulated key, and sealed that
	// of a sealed DEK with it and with AES-GCM's tag.
	encapsulated = 32
	sealed       = encapsulated + dek.Size + 16
)

// corrupt is the error for an answer that cannot be one.
func corrupt(format string, args ...any) error {
	return errdefs.Errorf(errdefs.ErrCorrupt, "the answer cannot be right: %w", fmt.Errorf(format, args...))
}

// recipient is a key pair for one answer.
type recipient struct{ private hpke.PrivateKey }

func newRecipient() (recipient, error) {
	private, err := hpke.DHKEM(ecdh.X25519()).GenerateKey()
	if err != nil {
		return recipient{}, fmt.Errorf("making a key pair for the answer: %w", err)
	}
	return recipient{private}, nil
}

func (r recipient) public() []byte { return r.private.PublicKey().Bytes() }

// describeDEK checks an answer about id in everything but its keys.
func describeDEK(a *keyservicev1.DEK, id dek.ID) (dek.DEK, error) {
	d := dek.DEK{
		ID:     dek.ID(a.GetId()),
		State:  dek.State(a.GetState()),
		Spec:   specFromWire(a.GetSpec()),
		Source: dek.ID(a.GetSource()),
		Claim:  dek.Claim{Node: a.GetClaim().GetNode(), UUID: a.GetClaim().GetUuid()},
		Header: dek.HeaderID{UUID: a.GetHeader().GetUuid(), Sequence: a.GetHeader().GetSequence(), Fingerprint: a.GetHeader().GetFingerprint(), Backup: a.GetHeader().GetBackup()},
	}
	if d.ID != id {
		return dek.DEK{}, corrupt("it is about DEK %.300q, and %s was asked for", d.ID, id)
	}
	if err := validDEK(d); err != nil {
		return dek.DEK{}, corrupt("%w", err)
	}
	return d, nil
}

// withoutKeys checks an answer about id to who asked for no key.
func withoutKeys(a *keyservicev1.DEK, id dek.ID) (dek.DEK, error) {
	if len(a.GetSealedKey())+len(a.GetSealedPrevious()) != 0 {
		return dek.DEK{}, corrupt("it has a key, and none was asked for")
	}
	return describeDEK(a, id)
}

// openDEK checks an answer about id and opens its keys; the caller wipes them.
func (r recipient) openDEK(a *keyservicev1.DEK, id dek.ID) (dek.DEK, error) {
	d, err := describeDEK(a, id)
	if err != nil {
		return dek.DEK{}, err
	}
	if (d.State == dek.Rotating) != (len(a.GetSealedPrevious()) != 0) {
		return dek.DEK{}, corrupt("it is %s, and its previous key has %d bytes: there is one exactly while %s", d.State, len(a.GetSealedPrevious()), dek.Rotating)
	}
	if d.Key, err = r.open("key", id, a.GetSealedKey()); err != nil {
		return dek.DEK{}, err
	}
	if d.State == dek.Rotating {
		if d.Previous, err = r.open("previous", id, a.GetSealedPrevious()); err != nil {
			d.Key.Wipe()
			return dek.DEK{}, err
		}
	}
	return d, nil
}

// open opens one sealed key of id, in the field of that name.
func (r recipient) open(field string, id dek.ID, b []byte) (secret.Bytes, error) {
	if len(b) != sealed {
		return secret.Bytes{}, corrupt("the field %s has %d bytes, and a sealed key has %d", field, len(b), sealed)
	}
	opener, err := hpke.NewRecipient(b[:encapsulated], r.private, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(sealInfo))
	if err != nil {
		return secret.Bytes{}, corrupt("the field %s was not sealed to anybody: %w", field, err)
	}
	var key []byte
	secret.Do(func() { key, err = opener.Open([]byte(field+"\x00"+string(id)), b[encapsulated:]) })
	if err != nil {
		return secret.Bytes{}, corrupt("the field %s was not sealed to us for DEK %s, or was changed on the way", field, id)
	}
	return secret.Take(key), nil
}

// validDEK checks everything but the keys as a record's fields are checked.
func validDEK(d dek.DEK) error {
	if err := validSpec(d.Spec); err != nil {
		return err
	}
	if d.Source != "" {
		if _, err := dek.ParseID(string(d.Source)); err != nil || d.Source == d.ID {
			return fmt.Errorf("it is a clone of %.300q", d.Source)
		}
	}
	if d.Claim != (dek.Claim{}) {
		if err := d.Claim.Validate(true); err != nil {
			return fmt.Errorf("claim: %w", err)
		}
	}
	switch d.State {
	case dek.Prepared:
		if d.Header != (dek.HeaderID{}) {
			return fmt.Errorf("it is %s, but with a header", d.State)
		}
	case dek.Formatted, dek.Rotating:
		if err := dek.CheckUUID(d.Header.UUID); err != nil {
			return fmt.Errorf("header: %w", err)
		}
		if err := dek.CheckBackup(d.Header.Backup); err != nil {
			return err
		}
	default:
		return fmt.Errorf("state %.40q is not known", d.State)
	}
	if d.Header.Fingerprint != "" {
		return fmt.Errorf("its header has a fingerprint")
	}
	return nil
}

// validSpec is dek.Spec's own check, and that the wire can carry the name.
func validSpec(s dek.Spec) error {
	if !utf8.ValidString(s.Name) {
		return fmt.Errorf("the name in the spec is not UTF-8")
	}
	return s.Validate()
}

func specToWire(s dek.Spec) *keyservicev1.Spec {
	return &keyservicev1.Spec{Name: s.Name, Cipher: s.Cipher, Integrity: string(s.Integrity), Layout: s.Layout, Discard: s.Discard, IntegrityMode: s.IntegrityMode, Kek: s.KEK}
}

func specFromWire(s *keyservicev1.Spec) dek.Spec {
	return dek.Spec{Name: s.GetName(), Cipher: s.GetCipher(), Integrity: dek.Integrity(s.GetIntegrity()), Layout: s.GetLayout(), Discard: s.GetDiscard(), IntegrityMode: s.GetIntegrityMode(), KEK: s.GetKek()}
}
