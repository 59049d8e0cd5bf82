//go:build !cgo

package pkcs11

import (
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

// Built is whether this build can load modules: it was made with cgo.
const Built = false

type shared struct{}

func newShared() *shared { return &shared{} }

func (*shared) open(t target) (kms.Backend, error) {
	return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s: this build was made without cgo and cannot load a PKCS#11 module: use the image or binary built with CGO_ENABLED=1", &t)
}
