package transit

import (
	"context"
	"encoding/json"
	"errors"
	"strconv"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

const (
	// keyType of the keys that Create makes.
	keyType = "aes256-gcm96"
	// maxVersions bounds what Describe lists. A key that is rotated every
	// hour, the server's shortest period, gets there in eleven years.
	maxVersions = 100_000
)

// Permissions returns policy capabilities and their paths.
func (b *Backend) Permissions() map[string]string {
	read := "read on " + b.mount + "/keys/" + b.key
	update := func(path string) string { return "update on " + b.mount + "/" + path }
	return map[string]string{
		kms.OpWrap:         read + ", " + update("encrypt/"+b.key),
		kms.OpUnwrap:       update("decrypt/" + b.key),
		kms.OpCurrentKeyID: read,
		kms.OpCreate:       read + ", " + update("keys/"+b.key),
		kms.OpDescribe:     read,
		kms.OpRotate:       read + ", " + update("keys/"+b.key+"/rotate"),
		kms.OpSetVersion: read + ", " + update("keys/"+b.key+"/config") + ", " + update("keys/"+b.key+"/trim") +
			" (the whole key: delete on " + b.mount + "/keys/" + b.key + "/soft-delete or " + b.mount + "/keys/" + b.key + ")",
	}
}

// Create makes a key of type aes256-gcm96 that can be neither exported nor
// backed up in plaintext. It keeps no labels. A key that exists is returned as
// it is if it is such a key, else ErrExists. RotationPeriod is whole hours or
// seconds, at least an hour.
func (b *Backend) Create(ctx context.Context, n kms.NewKey) (kms.Key, error) {
	switch {
	case n.Policy != nil:
		return kms.Key{}, errdefs.Errorf(errdefs.ErrInvalid, "a transit key has no policy of its own: write an ACL policy for the role that uses it")
	case n.RotationPeriod != 0 && n.RotationPeriod < time.Hour || n.RotationPeriod%time.Second != 0:
		return kms.Key{}, errdefs.Errorf(errdefs.ErrInvalid, "a rotation period of %v: must be whole seconds, at least an hour", n.RotationPeriod)
	}
	k, err := b.read(ctx)
	if errors.Is(err, errdefs.ErrNotFound) {
		_, err = b.write(ctx, b.mount+"/keys/"+b.key, map[string]any{
			"type": keyType, "derived": false, "exportable": false, "allow_plaintext_backup": false,
			"auto_rotate_period": strconv.FormatInt(int64(n.RotationPeriod/time.Second), 10) + "s",
		})
		if err == nil {
			k, err = b.read(ctx) // whoever made it: two may have tried at once
		}
	}
	switch {
	case err != nil:
		return kms.Key{}, err
	case k.Type != keyType || k.Derived || k.Exportable || k.PlaintextBackup:
		return kms.Key{}, errdefs.Errorf(errdefs.ErrExists, "the key %s exists, of type %.64q, derived %v, exportable %v, plaintext backup %v: choose another name", b.key, k.Type, k.Derived, k.Exportable, k.PlaintextBackup)
	}
	return b.describe(k), nil
}

// Describe returns the key, destroyed versions included.
func (b *Backend) Describe(ctx context.Context) (kms.Key, error) {
	k, err := b.read(ctx)
	if err != nil {
		return kms.Key{}, err
	}
	return b.describe(k), nil
}

func (b *Backend) describe(k *key) kms.Key {
	out := kms.Key{URI: b.uri, RotationPeriod: time.Duration(k.AutoRotate) * time.Second}
	for n := 1; n <= k.Latest; n++ {
		v := kms.Version{KeyID: b.keyID(n), State: kms.Enabled, Current: n == k.Latest, Created: created(k.Versions[strconv.Itoa(n)])}
		switch {
		case n < k.MinAvailable:
			v.State = kms.Destroyed
		case n < k.MinDecryption || k.softDeleted():
			v.State = kms.Disabled
		}
		out.Versions = append(out.Versions, v)
	}
	out.Created = out.Versions[0].Created
	return out
}

// created reads the Unix time that stands for a version of a symmetric key;
// zero where there is none.
func created(raw json.RawMessage) time.Time {
	var seconds int64
	if json.Unmarshal(raw, &seconds) != nil || seconds <= 0 {
		return time.Time{}
	}
	return time.Unix(seconds, 0)
}

// Rotate makes a new version.
func (b *Backend) Rotate(ctx context.Context) (kms.Key, error) {
	if _, err := b.write(ctx, b.mount+"/keys/"+b.key+"/rotate", nil); err != nil {
		return kms.Key{}, err
	}
	return b.Describe(ctx)
}

// SetVersion disables and destroys the oldest version and enables the youngest
// of those that are disabled; others are ErrInvalid.
func (b *Backend) SetVersion(ctx context.Context, keyID string, s kms.VersionState) error {
	if keyID == "" {
		return b.setKey(ctx, s)
	}
	n, ours := b.version(keyID)
	if !ours {
		return errdefs.Errorf(errdefs.ErrInvalid, "%.64q is no version of this key: they are named like %s", keyID, b.keyID(1))
	}
	k, err := b.read(ctx)
	if err != nil {
		return err
	}
	available, decrypts := max(k.MinAvailable, 1), max(k.MinDecryption, 1)
	switch {
	case n > k.Latest:
		return errdefs.Errorf(errdefs.ErrNotFound, "the key has no version %s: %s is the newest", keyID, b.keyID(k.Latest))
	case n == k.Latest && s != kms.Enabled:
		return errdefs.Errorf(errdefs.ErrState, "%s is the current version: rotate the key and rewrap first", keyID)
	case n < available && s != kms.Destroyed:
		return errdefs.Errorf(errdefs.ErrState, "%s is destroyed", keyID)
	}
	switch s {
	case kms.Enabled:
		if n >= decrypts {
			return nil
		}
		return b.setFrom(ctx, k, keyID, n, decrypts-1, n)
	case kms.Disabled:
		if n < decrypts {
			return nil
		}
		return b.setFrom(ctx, k, keyID, n, decrypts, n+1)
	case kms.Destroyed:
		if n < available {
			return nil
		}
		if err := b.setFrom(ctx, k, keyID, n, available, max(decrypts, n+1)); err != nil {
			return err
		}
		_, err := b.write(ctx, b.mount+"/keys/"+b.key+"/trim", map[string]any{"min_available_version": n + 1})
		return err
	}
	return errdefs.Errorf(errdefs.ErrInvalid, "a version cannot be set to %q", s)
}

// setFrom makes the versions from the given one on decrypt, if n's turn is now.
func (b *Backend) setFrom(ctx context.Context, k *key, keyID string, n, turn, from int) error {
	if n != turn {
		return errdefs.Errorf(errdefs.ErrInvalid, "not %s: transit disables and destroys from the oldest version on and enables in the opposite order, and %s comes first", keyID, b.keyID(turn))
	}
	config := map[string]any{"min_decryption_version": from}
	// Trimming wants it set, and the server lets neither be below the other.
	// 0 means the newest version, which is what we wrap under in any case.
	if k.MinEncryption > 0 || turn < from {
		config["min_encryption_version"] = max(k.MinEncryption, from)
	}
	_, err := b.write(ctx, b.mount+"/keys/"+b.key+"/config", config)
	return err
}

// setKey does it to the whole key.
func (b *Backend) setKey(ctx context.Context, s kms.VersionState) error {
	k, err := b.read(ctx)
	if errors.Is(err, errdefs.ErrNotFound) && s == kms.Destroyed {
		return nil
	}
	if err != nil {
		return err
	}
	path := b.mount + "/keys/" + b.key
	switch s {
	case kms.Disabled, kms.Enabled:
		switch {
		case k.softDeleted() == (s == kms.Disabled):
			return nil
		case k.SoftDeleted == nil:
			return errdefs.Errorf(errdefs.ErrInvalid, "this server cannot disable a whole key (OpenBao can): take the permissions on it away, or rotate and disable the older versions")
		case s == kms.Disabled:
			return b.delete(ctx, path+"/soft-delete")
		}
		_, err := b.write(ctx, path+"/soft-delete-restore", nil)
		return err
	case kms.Destroyed:
		if !k.DeletionAllowed {
			return errdefs.Errorf(errdefs.ErrState, "the server protects the key from deletion: if every DEK under it is to be lost, run `bao write %s/config deletion_allowed=true` and try again", path)
		}
		return b.delete(ctx, path)
	}
	return errdefs.Errorf(errdefs.ErrInvalid, "a key cannot be set to %q", s)
}
