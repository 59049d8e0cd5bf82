package envelope

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

// MaxObject is the size of the largest object that a Store holds, in bytes.
const MaxObject = 64 << 10

// Store keeps small objects by name and changes them atomically. Methods may
// be called concurrently, also from other processes where the store is shared.
// A reader sees an object whole or not at all; once a method has returned nil
// its effect survives a crash. Errors are of errdefs' classes or ctx's; after
// any other error than those named here a change may or may not have happened.
//
// Names are made by ObjectName: 1 to 100 lower-case letters, digits and '-',
// beginning with a letter. Others are ErrInvalid, as is data longer than MaxObject.
type Store interface {
	// Create makes a new object. ErrExists, and no change, where there is one.
	Create(ctx context.Context, name string, data []byte) error
	// Read returns an object and its version, an opaque string that differs
	// whenever the data does. ErrNotFound where there is none; ErrCorrupt
	// where it is longer than MaxObject.
	Read(ctx context.Context, name string) (data []byte, version string, err error)
	// Replace changes the object if it is still the version given, else
	// ErrConflict and no change; so too where it is gone.
	Replace(ctx context.Context, name string, data []byte, version string) error
	// Delete removes the object under the condition of Replace.
	Delete(ctx context.Context, name, version string) error
	// List returns up to limit (at least 1) names of objects in ascending
	// order, and the token of the next page, "" after the last one. The
	// first page's token is "". Objects made or deleted while the pages are
	// read may or may not be seen; all others are, once each.
	List(ctx context.Context, token string, limit int) (names []string, next string, err error)
}

// ObjectName is where the record of id lies: "dek-" and the SHA-256 of the ID
// in hex. It has one length (68) and one alphabet for every ID, so every store
// can hold it, on a file system that ignores case too; and an operator finds
// the object of an ID with sha256sum. The ID itself is a field of the record.
func ObjectName(id dek.ID) string {
	digest := sha256.Sum256([]byte(id))
	return objectPrefix + hex.EncodeToString(digest[:])
}

const objectPrefix = "dek-"

// Eraser is a Store that can keep earlier versions of an object.
type Eraser interface {
	// EraseHistory removes every earlier version of an object, so that only
	// the current one is left. Where a lock or a retention rule forbids it,
	// until is when the last of them can go; zero where nothing is left.
	EraseHistory(ctx context.Context, name string) (until time.Time, err error)
}

// Maker is a Store whose container (bucket, namespace) can be made through it.
type Maker interface {
	// Make makes the container; nil where it exists and is ours.
	Make(ctx context.Context) error
}

// The operations of a store, as Permissions names them.
const (
	OpCreate  = "create"
	OpRead    = "read"
	OpReplace = "replace"
	OpDelete  = "delete"
	OpList    = "list"
	OpErase   = "erase-history"
	OpMake    = "make"
)

// Permitter is a Store whose service names its permissions.
type Permitter interface {
	// Permissions returns the permission, or several separated by ", ",
	// that each operation needs.
	Permissions() map[string]string
}

// StoreOpener opens the store that u names; it reads u's parameters with
// kms.Params. It does not call the service: what can be wrong without that (a
// missing file, a bad parameter) is an error now. A store that holds something
// open is an io.Closer too; a Keyring closes it.
type StoreOpener func(ctx context.Context, u *url.URL) (Store, error)

// StoreMux maps URI schemes to their openers. The full list is in
// envelope/stores.
type StoreMux map[string]StoreOpener

// LocalStores are those that need no service:
//
//	file:///var/lib/cryptcsi/keys   a directory on a local file system, shared
//	                                by the processes of one machine; it must
//	                                exist, or be made by ?create_dir=true
//	mem://                          memory of this process, empty at first:
//	                                for tests, every key is gone with it
func LocalStores() StoreMux {
	return StoreMux{
		"file": func(_ context.Context, u *url.URL) (Store, error) { return openFileStore(u) },
		"mem":  func(_ context.Context, u *url.URL) (Store, error) { return openMemStore(u) },
	}
}

// Open opens the store that uri names. The caller closes it, see StoreOpener.
func (m StoreMux) Open(ctx context.Context, uri string) (Store, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	u, err := kms.ParseURI(uri)
	if err != nil {
		return nil, fmt.Errorf("store URI %w", err)
	}
	open, ok := m[u.Scheme]
	if !ok {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "store URI: scheme %q is not known; this build knows %s",
			u.Scheme, strings.Join(slices.Sorted(maps.Keys(m)), ", "))
	}
	store, err := open(ctx, u)
	if err != nil {
		return nil, fmt.Errorf("store URI %s: %w", kms.Redact(u), err)
	}
	return store, nil
}

func closeStore(s Store) error {
	if c, ok := s.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// checkName keeps a store's names to what every store can hold.
func checkName(name string) error {
	ok := name != "" && len(name) <= 100 && name[0] >= 'a' && name[0] <= 'z'
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		ok = c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-'
	}
	if !ok {
		return errdefs.Errorf(errdefs.ErrInvalid, "object name %q: must be 1 to 100 lower-case letters, digits and '-', a letter first", name)
	}
	return nil
}

// checkWrite is what Create and Replace ask of their arguments.
func checkWrite(name string, data []byte) error {
	if len(data) > MaxObject {
		return errdefs.Errorf(errdefs.ErrInvalid, "object of %d bytes: at most %d", len(data), MaxObject)
	}
	return checkName(name)
}

// version of an object is its content's hash. Where content returned to an
// earlier state, replacing it is what the replacer meant.
func version(data []byte) string {
	digest := sha256.Sum256(data)
	return hex.EncodeToString(digest[:])
}

// readAll reads at most MaxObject bytes.
func readAll(r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxObject+1))
	if err != nil {
		return nil, err
	}
	if len(data) > MaxObject {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the object is longer than %d bytes: it is no record", MaxObject)
	}
	return data, nil
}

func errChanged() error {
	return errdefs.Errorf(errdefs.ErrConflict, "the object was changed or deleted by someone else")
}
