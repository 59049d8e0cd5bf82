package all_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms/all"
)

func TestMux(t *testing.T) {
	for _, scheme := range []string{"awskms", "azurekeyvault", "cluster", "gcpckms", "kmip", "pkcs11", "static", "transit"} {
		if _, ok := all.Mux()[scheme]; !ok {
			t.Errorf("the list lacks %s", scheme)
		}
	}
	delete(all.Mux(), "cluster")
	if _, ok := all.Mux()["cluster"]; !ok {
		t.Error("the list can be changed from outside")
	}
}

// FuzzURI: no scheme's opener panics, whatever the URI, or shows in an error
// what stands where secrets are written.
func FuzzURI(f *testing.F) {
	for _, uri := range []string{
		"awskms:///arn:aws:kms:eu-central-1:111122223333:key/1?region=eu-central-1",
		"azurekeyvault://v.vault.azure.net/keys/k?tenant-id=t&client-id=c",
		"cluster:///etc/cryptcsi/master-secret?salt-file=/etc/cryptcsi/salt",
		"gcpckms://projects/p/locations/l/keyRings/r/cryptoKeys/k?endpoint=http://127.0.0.1:1",
		"kmip://127.0.0.1:5696/1?cert-file=/c&key-file=/k",
		"pkcs11:token=t;object=o?module-path=/m.so&pin-source=file:/p",
		"static:///etc/key", "transit://host:8200/transit/kek?token-file=/t",
	} {
		f.Add(uri, "region")
	}
	mux := all.Mux()
	f.Fuzz(func(t *testing.T, uri, param string) {
		const s = "S3CR3T"
		if strings.Contains(uri+param, s) || strings.Contains(uri+param, "#") || strings.ContainsAny(param, "/?&=") {
			return // the secret is not in a parameter
		}
		between := "?"
		if strings.Contains(uri, "?") {
			between = "&"
		}
		kek, err := mux.Open(context.Background(), uri+between+"x-"+param+"="+s)
		if err == nil {
			t.Errorf("%q: a parameter that no scheme knows is accepted", uri)
			_ = kek.Close()
			return
		}
		if !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("%q: %v, want ErrInvalid", uri, err)
		}
		if strings.Contains(err.Error(), s) {
			t.Errorf("%q shows its secret: %v", uri, err)
		}
	})
}
