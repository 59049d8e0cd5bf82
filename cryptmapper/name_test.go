package cryptmapper_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

func TestCheckName(t *testing.T) {
	for _, good := range []string{"state", "a", "State_disk-1.2+x", "sda5_crypt", "old_csi-disk2", cryptmapper.Prefix + "0a", strings.Repeat("x", 100)} {
		if err := cryptmapper.CheckName(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{
		"", ".", "..", ".hidden", "-x", "a/b", "a b", "a\x00", "ä", "a\\x2f", "a:b", strings.Repeat("x", 101),
		"control", "state_dif", "state_csi-crypt", "state_csi-clone", "temporary-cryptsetup-1", cryptmapper.Prefix,
	} {
		if err := cryptmapper.CheckName(bad); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
