package azurefake

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"time"
)

// operations are what keys do, by their path: the name in key_ops, and the
// permission.
var operations = map[string]struct{ op, permission string }{
	"wrapkey":   {"wrapKey", "keys/wrapKey"},
	"unwrapkey": {"unwrapKey", "keys/unwrapKey"},
	"encrypt":   {"encrypt", "keys/encrypt"},
	"decrypt":   {"decrypt", "keys/decrypt"},
}

// newKey is a request to create a key.
type newKey struct {
	Kty     string            `json:"kty"`
	KeySize int               `json:"key_size"`
	KeyOps  []string          `json:"key_ops"`
	Tags    map[string]string `json:"tags"`
}

// version is one version of a key: RSA or AES.
type version struct {
	newKey
	id      string
	created time.Time
	enabled bool
	tags    map[string]string
	rsa     *rsa.PrivateKey
	aes     []byte
}

// version makes one.
func (s *Server) version(n newKey) (*version, error) {
	v := &version{newKey: n, id: newID(), created: time.Now(), enabled: true, tags: n.Tags}
	if len(v.KeyOps) == 0 {
		v.KeyOps = []string{"encrypt", "decrypt", "wrapKey", "unwrapKey"}
	}
	switch n.Kty {
	case "RSA", "RSA-HSM":
		if !slices.Contains([]int{2048, 3072, 4096}, n.KeySize) {
			return nil, fmt.Errorf("RSA keys of %d bits are not supported", n.KeySize)
		}
		private, err := s.rsaKey(n.KeySize)
		v.rsa = private
		return v, err
	case "oct-HSM":
		if !slices.Contains([]int{128, 192, 256}, n.KeySize) {
			return nil, fmt.Errorf("AES keys of %d bits are not supported", n.KeySize)
		}
		v.aes = make([]byte, n.KeySize/8)
		_, err := rand.Read(v.aes)
		return v, err
	}
	return nil, fmt.Errorf("key type %q is not supported", n.Kty)
}

// rsaKey returns a key that none before can decrypt for. To find primes takes
// seconds on a busy machine, so all keys of one size share them and differ in
// their exponents: far from safe, and good enough for tests.
func (s *Server) rsaKey(bits int) (*rsa.PrivateKey, error) {
	if s.moduli[bits] == nil {
		private, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			return nil, err
		}
		s.moduli[bits] = private
	}
	base, one := s.moduli[bits], big.NewInt(1)
	phi := new(big.Int).Mul(new(big.Int).Sub(base.Primes[0], one), new(big.Int).Sub(base.Primes[1], one))
	for {
		s.exponent++
		e := big.NewInt(int64(s.exponent))
		d := new(big.Int).ModInverse(e, phi)
		if !e.ProbablyPrime(0) || d == nil {
			continue
		}
		private := &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: base.N, E: s.exponent}, D: d, Primes: base.Primes}
		private.Precompute()
		return private, private.Validate()
	}
}

// like is the request for a new version like v.
func (v *version) like() newKey {
	n := v.newKey
	n.Tags = maps.Clone(v.tags)
	return n
}

func (v *version) jwk(kid string) map[string]any {
	k := map[string]any{"kid": kid, "kty": v.Kty, "key_ops": v.KeyOps}
	if v.rsa != nil {
		k["n"] = b64(v.rsa.N.Bytes())
		k["e"] = b64(big.NewInt(int64(v.rsa.E)).Bytes())
	}
	return k
}

func (v *version) attributes() map[string]any {
	return map[string]any{
		"enabled": v.enabled, "created": v.created.Unix(), "updated": v.created.Unix(),
		"recoveryLevel": "Recoverable+Purgeable", "recoverableDays": int(retention.Hours() / 24),
	}
}

// parameters of an operation, and its result.
type parameters struct {
	Kid   string `json:"kid,omitempty"`
	Alg   string `json:"alg,omitempty"`
	Value string `json:"value"`
	AAD   string `json:"aad,omitempty"`
	IV    string `json:"iv,omitempty"`
	Tag   string `json:"tag,omitempty"`
}

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// operate encrypts or decrypts.
func (s *Server) operate(name, id, operation string, body []byte) (any, error) {
	v, err := s.find(name, id)
	if err != nil {
		return nil, err
	}
	op := operations[operation].op
	switch {
	case !v.enabled:
		return nil, problem{http.StatusForbidden, "Forbidden", "Operation " + op + " is not allowed on a disabled key.", "KeyDisabled"}
	case !slices.Contains(v.KeyOps, op):
		return nil, problem{http.StatusForbidden, "Forbidden", "Operation " + op + " is not permitted on this key.", "KeyOperationForbidden"}
	}
	var p parameters
	if err := json.Unmarshal(body, &p); err != nil {
		return nil, badParameter("The request body is invalid.")
	}
	result, err := v.operate(op, p)
	if err != nil {
		return nil, badParameter("The parameter is incorrect.")
	}
	result.Kid = s.kid(name, v.id)
	return result, nil
}

func (v *version) operate(op string, p parameters) (parameters, error) {
	value, err := base64.RawURLEncoding.DecodeString(p.Value)
	if err != nil {
		return p, err
	}
	wrap := op == "wrapKey"
	forWrapping := strings.HasSuffix(op, "rapKey")
	switch {
	case p.Alg == "RSA-OAEP-256" && v.rsa != nil && (wrap || op == "encrypt"):
		value, err = rsa.EncryptOAEP(sha256.New(), rand.Reader, &v.rsa.PublicKey, value, nil)
	case p.Alg == "RSA-OAEP-256" && v.rsa != nil:
		value, err = rsa.DecryptOAEP(sha256.New(), nil, v.rsa, value, nil)
	case p.Alg == "A256KW" && len(v.aes) == 32 && wrap:
		value, err = wrapAES(v.aes, value)
	case p.Alg == "A256KW" && len(v.aes) == 32 && forWrapping:
		value, err = unwrapAES(v.aes, value)
	case p.Alg == "A256GCM" && len(v.aes) == 32 && op == "encrypt":
		return v.seal(p, value)
	case p.Alg == "A256GCM" && len(v.aes) == 32 && op == "decrypt":
		value, err = v.open(p, value)
	default:
		err = fmt.Errorf("%s does not fit the key", p.Alg)
	}
	return parameters{Value: b64(value)}, err
}

// seal encrypts with an IV of the service's own.
func (v *version) seal(p parameters, plaintext []byte) (parameters, error) {
	aead, err := v.gcm()
	aad, aadErr := base64.RawURLEncoding.DecodeString(p.AAD)
	if err := errors.Join(err, aadErr); err != nil {
		return p, err
	}
	iv := make([]byte, aead.NonceSize())
	_, _ = rand.Read(iv) // never fails, see crypto/rand
	sealed := aead.Seal(nil, iv, plaintext, aad)
	end := len(sealed) - aead.Overhead()
	return parameters{Value: b64(sealed[:end]), Tag: b64(sealed[end:]), IV: b64(iv), AAD: p.AAD}, nil
}

func (v *version) open(p parameters, ciphertext []byte) ([]byte, error) {
	aead, err := v.gcm()
	iv, ivErr := base64.RawURLEncoding.DecodeString(p.IV)
	tag, tagErr := base64.RawURLEncoding.DecodeString(p.Tag)
	aad, aadErr := base64.RawURLEncoding.DecodeString(p.AAD)
	if err := errors.Join(err, ivErr, tagErr, aadErr); err != nil {
		return nil, err
	}
	if len(iv) != aead.NonceSize() {
		return nil, errors.New("the IV has a wrong length")
	}
	return aead.Open(nil, iv, slices.Concat(ciphertext, tag), aad)
}

func (v *version) gcm() (cipher.AEAD, error) {
	block, err := aes.NewCipher(v.aes)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// kwIV is the initial value of RFC 3394, section 2.2.3.1.
const kwIV = "\xa6\xa6\xa6\xa6\xa6\xa6\xa6\xa6"

// wrapAES is RFC 3394's key wrap, with its index method.
func wrapAES(kek, key []byte) ([]byte, error) {
	block, err := aes.NewCipher(kek)
	if err != nil || len(key) < 16 || len(key)%8 != 0 {
		return nil, errors.Join(err, errors.New("the key's length does not suit AES-KW"))
	}
	n := len(key) / 8
	r := slices.Concat([]byte(kwIV), key)
	b := make([]byte, 16)
	for j := range 6 {
		for i := 1; i <= n; i++ {
			copy(b, r[:8])
			copy(b[8:], r[8*i:8*i+8])
			block.Encrypt(b, b)
			binary.BigEndian.PutUint64(r, binary.BigEndian.Uint64(b)^uint64(n*j+i))
			copy(r[8*i:], b[8:])
		}
	}
	return r, nil
}

// unwrapAES is its inverse.
func unwrapAES(kek, wrapped []byte) ([]byte, error) {
	block, err := aes.NewCipher(kek)
	if err != nil || len(wrapped) < 24 || len(wrapped)%8 != 0 {
		return nil, errors.Join(err, errors.New("the wrapped key's length does not suit AES-KW"))
	}
	n := len(wrapped)/8 - 1
	r := bytes.Clone(wrapped)
	b := make([]byte, 16)
	for j := 5; j >= 0; j-- {
		for i := n; i >= 1; i-- {
			binary.BigEndian.PutUint64(b, binary.BigEndian.Uint64(r)^uint64(n*j+i))
			copy(b[8:], r[8*i:8*i+8])
			block.Decrypt(b, b)
			copy(r, b[:8])
			copy(r[8*i:], b[8:])
		}
	}
	if subtle.ConstantTimeCompare(r[:8], []byte(kwIV)) != 1 {
		return nil, errors.New("the wrapped key does not verify")
	}
	return r[8:], nil
}
