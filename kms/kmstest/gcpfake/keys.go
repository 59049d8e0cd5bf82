package gcpfake

import (
	"cmp"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"hash/crc32"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const (
	maxPage    = 2        // so that every list has pages
	maxData    = 64 << 10 // of plaintext, and of additional authenticated data
	tagSize    = 8        // names the version in a ciphertext
	destroyIn  = 30 * 24 * time.Hour
	minPeriod  = 24 * time.Hour
	versionsOf = "/cryptoKeyVersions/"
)

var (
	idForm     = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,63}$`)
	labelForm  = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,62}$`)
	labelValue = regexp.MustCompile(`^[a-z0-9_-]{0,63}$`)
)

// key is a CryptoKey with its versions, the oldest first.
type key struct {
	*kmspb.CryptoKey
	versions []*version
	primary  *version
}

type version struct {
	*kmspb.CryptoKeyVersion
	tag  string
	aead cipher.AEAD
}

func newKey(name string, spec *kmspb.CryptoKey) *key {
	k := &key{CryptoKey: proto.CloneOf(spec)}
	k.Name, k.CreateTime = name, timestamppb.Now()
	if k.Purpose == kmspb.CryptoKey_ENCRYPT_DECRYPT {
		k.primary = k.add()
	}
	return k
}

// add makes an enabled version.
func (k *key) add() *version {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // never fails, see crypto/rand
	block, err := aes.NewCipher(secret)
	if err != nil {
		panic(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	v := &version{aead: aead, tag: rand.Text()[:tagSize], CryptoKeyVersion: &kmspb.CryptoKeyVersion{
		Name: k.Name + versionsOf + strconv.Itoa(len(k.versions)+1), State: kmspb.CryptoKeyVersion_ENABLED,
		Algorithm: kmspb.CryptoKeyVersion_GOOGLE_SYMMETRIC_ENCRYPTION, CreateTime: timestamppb.Now(),
	}}
	k.versions = append(k.versions, v)
	return v
}

// shown is the key as the service tells it.
func (k *key) shown() *kmspb.CryptoKey {
	c := proto.CloneOf(k.CryptoKey)
	if k.primary != nil {
		c.Primary = proto.CloneOf(k.primary.CryptoKeyVersion)
	}
	return c
}

func (v *version) enabled() error {
	if v.State != kmspb.CryptoKeyVersion_ENABLED {
		return status.Errorf(codes.FailedPrecondition, "%s is not enabled, current state is: %s.", v.Name, v.State)
	}
	return nil
}

func (s *Server) find(name string) (*key, error) {
	if k := s.keys[name]; k != nil {
		return k, nil
	}
	return nil, notFound("CryptoKey", name)
}

func (s *Server) findVersion(name string) (*key, *version, error) {
	keyName, _, _ := strings.Cut(name, versionsOf)
	k, err := s.find(keyName)
	if err != nil {
		return nil, nil, err
	}
	i := slices.IndexFunc(k.versions, func(v *version) bool { return v.Name == name })
	if i < 0 {
		return nil, nil, notFound("CryptoKeyVersion", name)
	}
	return k, k.versions[i], nil
}

// CreateKeyRing is part of the service.
func (s *Server) CreateKeyRing(_ context.Context, r *kmspb.CreateKeyRingRequest) (*kmspb.KeyRing, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := r.GetParent() + "/keyRings/" + r.GetKeyRingId()
	if !idForm.MatchString(r.GetKeyRingId()) {
		return nil, invalid("KeyRing ID %q is invalid.", r.GetKeyRingId())
	}
	if s.rings[name] {
		return nil, status.Errorf(codes.AlreadyExists, "KeyRing %s already exists.", name)
	}
	s.rings[name] = true
	return &kmspb.KeyRing{Name: name, CreateTime: timestamppb.Now()}, nil
}

// CreateCryptoKey is part of the service.
func (s *Server) CreateCryptoKey(_ context.Context, r *kmspb.CreateCryptoKeyRequest) (*kmspb.CryptoKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := r.GetParent() + "/cryptoKeys/" + r.GetCryptoKeyId()
	switch spec := r.GetCryptoKey(); {
	case !s.rings[r.GetParent()]:
		return nil, notFound("KeyRing", r.GetParent())
	case !idForm.MatchString(r.GetCryptoKeyId()):
		return nil, invalid("CryptoKey ID %q is invalid.", r.GetCryptoKeyId())
	case spec.GetPurpose() == kmspb.CryptoKey_CRYPTO_KEY_PURPOSE_UNSPECIFIED:
		return nil, invalid("The purpose must be set.")
	case s.keys[name] != nil:
		return nil, status.Errorf(codes.AlreadyExists, "CryptoKey %s already exists.", name)
	default:
		if err := checkKey(spec); err != nil {
			return nil, err
		}
		s.keys[name] = newKey(name, spec)
		return s.keys[name].shown(), nil
	}
}

// checkKey checks what can be set of a key.
func checkKey(k *kmspb.CryptoKey) error {
	for name, value := range k.GetLabels() {
		if !labelForm.MatchString(name) || !labelValue.MatchString(value) {
			return invalid("The label %q: %q is invalid.", name, value)
		}
	}
	period := k.GetRotationPeriod()
	switch {
	case len(k.GetLabels()) > 64:
		return invalid("There are more than 64 labels.")
	case period != nil && (period.AsDuration() < minPeriod || period.AsDuration() > 876000*time.Hour):
		return invalid("rotation_period must be at least 24 hours and at most 876,000 hours.")
	case period != nil && k.GetNextRotationTime() == nil:
		return invalid("next_rotation_time must be set when rotation_period is.")
	case k.GetNextRotationTime() != nil && k.GetNextRotationTime().AsTime().Before(time.Now().Add(-time.Minute)):
		return invalid("next_rotation_time must be in the future.")
	}
	return nil
}

// GetCryptoKey is part of the service.
func (s *Server) GetCryptoKey(_ context.Context, r *kmspb.GetCryptoKeyRequest) (*kmspb.CryptoKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, err := s.find(r.GetName())
	if err != nil {
		return nil, err
	}
	return k.shown(), nil
}

// UpdateCryptoKey is part of the service.
func (s *Server) UpdateCryptoKey(_ context.Context, r *kmspb.UpdateCryptoKeyRequest) (*kmspb.CryptoKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, err := s.find(r.GetCryptoKey().GetName())
	if err != nil {
		return nil, err
	}
	changed := proto.CloneOf(k.CryptoKey)
	if len(r.GetUpdateMask().GetPaths()) == 0 {
		return nil, invalid("update_mask must be set.")
	}
	for _, field := range r.GetUpdateMask().GetPaths() {
		switch field {
		case "labels":
			changed.Labels = maps.Clone(r.GetCryptoKey().GetLabels())
		case "rotation_period":
			changed.RotationSchedule = r.GetCryptoKey().GetRotationSchedule()
		case "next_rotation_time":
			changed.NextRotationTime = r.GetCryptoKey().GetNextRotationTime()
		default:
			return nil, invalid("update_mask: %q cannot be updated.", field)
		}
	}
	if err := checkKey(changed); err != nil {
		return nil, err
	}
	k.CryptoKey = changed
	return k.shown(), nil
}

// ListCryptoKeys is part of the service. It has pages and no filter.
func (s *Server) ListCryptoKeys(_ context.Context, r *kmspb.ListCryptoKeysRequest) (*kmspb.ListCryptoKeysResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.rings[r.GetParent()] {
		return nil, notFound("KeyRing", r.GetParent())
	}
	if r.GetFilter() != "" || r.GetOrderBy() != "" {
		return nil, status.Error(codes.Unimplemented, "this fake neither filters nor sorts")
	}
	var all []*kmspb.CryptoKey
	for name, k := range s.keys {
		if path.Dir(path.Dir(name)) == r.GetParent() {
			all = append(all, k.shown())
		}
	}
	slices.SortFunc(all, func(a, b *kmspb.CryptoKey) int { return cmp.Compare(a.GetName(), b.GetName()) })
	page, next, err := paged(all, r.GetPageToken(), r.GetPageSize())
	return &kmspb.ListCryptoKeysResponse{CryptoKeys: page, NextPageToken: next, TotalSize: int32(len(all))}, err
}

// ListCryptoKeyVersions is part of the service; the newest come first.
func (s *Server) ListCryptoKeyVersions(_ context.Context, r *kmspb.ListCryptoKeyVersionsRequest) (*kmspb.ListCryptoKeyVersionsResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, err := s.find(r.GetParent())
	if err != nil {
		return nil, err
	}
	var all []*kmspb.CryptoKeyVersion
	for _, v := range slices.Backward(k.versions) {
		all = append(all, proto.CloneOf(v.CryptoKeyVersion))
	}
	page, next, err := paged(all, r.GetPageToken(), r.GetPageSize())
	return &kmspb.ListCryptoKeyVersionsResponse{CryptoKeyVersions: page, NextPageToken: next, TotalSize: int32(len(all))}, err
}

// paged returns one page, which is never longer than maxPage.
func paged[T any](all []T, token string, size int32) (page []T, next string, err error) {
	from := 0
	if token != "" {
		if from, err = strconv.Atoi(token); err != nil || from < 0 || from > len(all) {
			return nil, "", invalid("The page token is invalid.")
		}
	}
	n := maxPage
	if size > 0 {
		n = min(n, int(size))
	}
	to := min(from+n, len(all))
	if to < len(all) {
		next = strconv.Itoa(to)
	}
	return all[from:to], next, nil
}

// CreateCryptoKeyVersion is part of the service.
func (s *Server) CreateCryptoKeyVersion(_ context.Context, r *kmspb.CreateCryptoKeyVersionRequest) (*kmspb.CryptoKeyVersion, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, err := s.find(r.GetParent())
	if err != nil {
		return nil, err
	}
	return proto.CloneOf(k.add().CryptoKeyVersion), nil
}

// GetCryptoKeyVersion is part of the service.
func (s *Server) GetCryptoKeyVersion(_ context.Context, r *kmspb.GetCryptoKeyVersionRequest) (*kmspb.CryptoKeyVersion, error) {
	return s.change(r.GetName(), func(*version) error { return nil })
}

// change changes a version and returns it.
func (s *Server) change(name string, f func(*version) error) (*kmspb.CryptoKeyVersion, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, v, err := s.findVersion(name)
	if err != nil {
		return nil, err
	}
	if err := f(v); err != nil {
		return nil, err
	}
	return proto.CloneOf(v.CryptoKeyVersion), nil
}

// switchable says whether a version is one of those that can be enabled,
// disabled and destroyed.
func switchable(v *version) error {
	if v.State != kmspb.CryptoKeyVersion_ENABLED && v.State != kmspb.CryptoKeyVersion_DISABLED {
		return status.Errorf(codes.FailedPrecondition, "%s cannot be changed, current state is: %s.", v.Name, v.State)
	}
	return nil
}

// UpdateCryptoKeyVersion is part of the service: enable and disable.
func (s *Server) UpdateCryptoKeyVersion(_ context.Context, r *kmspb.UpdateCryptoKeyVersionRequest) (*kmspb.CryptoKeyVersion, error) {
	state := r.GetCryptoKeyVersion().GetState()
	if paths := r.GetUpdateMask().GetPaths(); len(paths) != 1 || paths[0] != "state" {
		return nil, invalid("update_mask must be \"state\".")
	}
	if state != kmspb.CryptoKeyVersion_ENABLED && state != kmspb.CryptoKeyVersion_DISABLED {
		return nil, invalid("The state can be ENABLED or DISABLED.")
	}
	return s.change(r.GetCryptoKeyVersion().GetName(), func(v *version) error {
		if err := switchable(v); err != nil {
			return err
		}
		v.State = state
		return nil
	})
}

// DestroyCryptoKeyVersion is part of the service.
func (s *Server) DestroyCryptoKeyVersion(_ context.Context, r *kmspb.DestroyCryptoKeyVersionRequest) (*kmspb.CryptoKeyVersion, error) {
	return s.change(r.GetName(), func(v *version) error {
		if err := switchable(v); err != nil {
			return err
		}
		v.State = kmspb.CryptoKeyVersion_DESTROY_SCHEDULED
		v.DestroyTime = timestamppb.New(time.Now().Add(destroyIn))
		return nil
	})
}

// RestoreCryptoKeyVersion is part of the service.
func (s *Server) RestoreCryptoKeyVersion(_ context.Context, r *kmspb.RestoreCryptoKeyVersionRequest) (*kmspb.CryptoKeyVersion, error) {
	return s.change(r.GetName(), func(v *version) error {
		if v.State != kmspb.CryptoKeyVersion_DESTROY_SCHEDULED {
			return status.Errorf(codes.FailedPrecondition, "%s is not scheduled for destruction, current state is: %s.", v.Name, v.State)
		}
		v.State, v.DestroyTime = kmspb.CryptoKeyVersion_DISABLED, nil
		return nil
	})
}

// UpdateCryptoKeyPrimaryVersion is part of the service.
func (s *Server) UpdateCryptoKeyPrimaryVersion(_ context.Context, r *kmspb.UpdateCryptoKeyPrimaryVersionRequest) (*kmspb.CryptoKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, v, err := s.findVersion(r.GetName() + versionsOf + r.GetCryptoKeyVersionId())
	if err != nil {
		return nil, err
	}
	if err := v.enabled(); err != nil {
		return nil, err
	}
	k.primary = v
	return k.shown(), nil
}

// Encrypt is part of the service. A ciphertext is the version's tag, then
// nonce, encrypted and tag of AES-GCM.
func (s *Server) Encrypt(_ context.Context, r *kmspb.EncryptRequest) (*kmspb.EncryptResponse, error) {
	verified, err := verify("plaintext", r.GetPlaintext(), r.GetPlaintextCrc32C())
	if err != nil {
		return nil, err
	}
	aadVerified, err := verify("additional_authenticated_data", r.GetAdditionalAuthenticatedData(), r.GetAdditionalAuthenticatedDataCrc32C())
	if err != nil {
		return nil, err
	}
	if len(r.GetPlaintext()) > maxData || len(r.GetAdditionalAuthenticatedData()) > maxData {
		return nil, invalid("plaintext and additional_authenticated_data must be no larger than 64KiB.")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.encrypter(r.GetName())
	if err != nil {
		return nil, err
	}
	ciphertext := v.aead.Seal([]byte(v.tag), nil, r.GetPlaintext(), r.GetAdditionalAuthenticatedData())
	return &kmspb.EncryptResponse{
		Name: v.Name, Ciphertext: ciphertext, CiphertextCrc32C: checksum(ciphertext),
		VerifiedPlaintextCrc32C: verified, VerifiedAdditionalAuthenticatedDataCrc32C: aadVerified,
		ProtectionLevel: kmspb.ProtectionLevel_SOFTWARE,
	}, nil
}

// encrypter returns the version that encrypts for a name of key or version.
func (s *Server) encrypter(name string) (*version, error) {
	if strings.Contains(name, versionsOf) {
		_, v, err := s.findVersion(name)
		if err != nil {
			return nil, err
		}
		return v, v.enabled()
	}
	k, err := s.find(name)
	if err != nil {
		return nil, err
	}
	if k.primary == nil {
		return nil, status.Errorf(codes.FailedPrecondition, "%s has no primary version, its purpose is %s.", name, k.Purpose)
	}
	return k.primary, k.primary.enabled()
}

// Decrypt is part of the service.
func (s *Server) Decrypt(_ context.Context, r *kmspb.DecryptRequest) (*kmspb.DecryptResponse, error) {
	if _, err := verify("ciphertext", r.GetCiphertext(), r.GetCiphertextCrc32C()); err != nil {
		return nil, err
	}
	if _, err := verify("additional_authenticated_data", r.GetAdditionalAuthenticatedData(), r.GetAdditionalAuthenticatedDataCrc32C()); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	k, err := s.find(r.GetName())
	if err != nil {
		return nil, err
	}
	tag, sealed := r.GetCiphertext(), []byte(nil)
	if len(tag) > tagSize {
		tag, sealed = tag[:tagSize], tag[tagSize:]
	}
	i := slices.IndexFunc(k.versions, func(v *version) bool { return v.tag == string(tag) })
	if i < 0 {
		return nil, invalid("Decryption failed: verify that 'name' refers to the correct CryptoKey.")
	}
	v := k.versions[i]
	if err := v.enabled(); err != nil {
		return nil, err
	}
	plaintext, err := v.aead.Open(nil, nil, sealed, r.GetAdditionalAuthenticatedData())
	if err != nil {
		return nil, invalid("Decryption failed: the ciphertext is invalid.")
	}
	return &kmspb.DecryptResponse{
		Plaintext: plaintext, PlaintextCrc32C: checksum(plaintext), UsedPrimary: v == k.primary,
		ProtectionLevel: kmspb.ProtectionLevel_SOFTWARE,
	}, nil
}

func checksum(data []byte) *wrapperspb.Int64Value {
	return wrapperspb.Int64(int64(crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli))))
}
