//go:build !cgo

package pkcs11_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/pkcs11"
)

func TestWithoutCgo(t *testing.T) {
	mux := kms.Mux{pkcs11.Scheme: pkcs11.NewOpener().Open}
	_, err := mux.Open(t.Context(), "pkcs11:token=a;object=b?module-path="+write(t, "module.so", "no library"))
	if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), "CGO_ENABLED=1") {
		t.Errorf("Open without cgo: %v", err)
	}
}
