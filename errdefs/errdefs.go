// Package errdefs is the project's vocabulary of errors.
//
// Every error that crosses a package border belongs to one of the classes
// below, tested with errors.Is. The classes say what the caller should do; the
// message says what is wrong and what a person can do about it. Messages end
// up as Kubernetes events, so they never hold a key, a token or the secret
// part of a URI.
//
// gRPC codes appear in package errgrpc and nowhere else.
package errdefs

import (
	"errors"
	"fmt"
)

// The classes. Table in docs/design.md, "Errors".
var (
	// ErrInvalid is a bad argument, URI, ID or parameter: retrying is useless.
	ErrInvalid = errors.New("invalid argument")
	// ErrNotFound is a DEK or volume that does not exist. It is never a reason to create one.
	ErrNotFound = errors.New("not found")
	// ErrExists is something that exists already and differs from what was asked for.
	ErrExists = errors.New("already exists and differs")
	// ErrDenied is a refusal by the KMS or the key service, or a DEK that opens no keyslot.
	ErrDenied = errors.New("permission denied")
	// ErrConflict is an operation on the same volume in progress: try again later.
	ErrConflict = errors.New("operation in progress")
	// ErrState is a device with foreign data, a header that fails its check, a
	// mapping on another device: a person has to look.
	ErrState = errors.New("failed precondition")
	// ErrCorrupt is a record or ciphertext that fails authentication.
	ErrCorrupt = errors.New("corrupt")
	// ErrUnavailable is a KMS, store, key service, worker or wrapped driver out
	// of reach, sealed, or not ready yet: try again later.
	ErrUnavailable = errors.New("unavailable")
)

// Errorf formats an error of the given class. The message is the formatted
// text alone; errors.Is reports the class and everything wrapped with %w.
func Errorf(class error, format string, args ...any) error {
	return &classified{class: class, err: fmt.Errorf(format, args...)}
}

type classified struct {
	class error
	err   error
}

func (e *classified) Error() string   { return e.err.Error() }
func (e *classified) Unwrap() []error { return []error{e.class, e.err} }

// Class returns the class that Errorf gave err, the outermost one where several
// did; nil where none did.
func Class(err error) error {
	if c, ok := errors.AsType[*classified](err); ok {
		return c.class
	}
	return nil
}
