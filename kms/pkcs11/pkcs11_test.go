package pkcs11_test

import (
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/pkcs11"
)

func write(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestURIRefused(t *testing.T) {
	const s = "S3CR3T"
	module, pin, empty := write(t, "module.so", "no library"), write(t, "pin", s), write(t, "empty", "")
	where := "?module-path=" + module + "&pin-source=file:" + pin
	mux := kms.Mux{pkcs11.Scheme: pkcs11.NewOpener().Open}
	for _, tt := range []struct{ uri, want string }{
		{"pkcs11://token/object" + where, "without slashes"},
		{"pkcs11:" + where, "without slashes"},
		{"pkcs11:object=b" + where, `"token" is missing`},
		{"pkcs11:token=a" + where, `"object" must be`},
		{"pkcs11:token=a;object=" + where, `"object" must be`},
		{"pkcs11:token=a;object=%ff" + where, `"object" must be`},
		{"pkcs11:token=a;object=" + strings.Repeat("o", 256) + where, `"object" must be`},
		{"pkcs11:token=a;object=b;id=" + where, `"id" must be`},
		{"pkcs11:token=a;object=b;token=c" + where, `"token" is given twice`},
		{"pkcs11:token=a;object=b;type=private" + where, `"type" must be secret-key`},
		{"pkcs11:token=a;object=b;slot-id=1" + where, "slots change their numbers"},
		{"pkcs11:token=a;object=b;library-version=1" + where, `"library-version" is not known`},
		{"pkcs11:token=a;object=b;" + where, `"" is not known`},
		{"pkcs11:token=a;object=%zz" + where, `"object" is not percent-encoded`},
		{"pkcs11:token=a;object=b;pin-value=" + s + where, "never authenticates"},
		{"pkcs11:token=a;object=b" + where + "&pin-value=" + s, "never authenticates"},
		{"pkcs11:token=a;object=b?module-name=softhsm&pin-source=file:" + pin, `"module-name"`},
		{"pkcs11:token=a;object=b?pin-source=file:" + pin, `"module-path" must be the absolute path`},
		{"pkcs11:token=a;object=b?module-path=softhsm.so", `"module-path" must be the absolute path`},
		{"pkcs11:token=a;object=b?module-path=/no/such.so", "/no/such.so is not there"},
		{"pkcs11:token=a;object=b?module-path=/tmp", "no regular file"},
		{"pkcs11:token=a;object=b?module-path=" + module + "&pin-source=pin", `"pin-source" must be an absolute path`},
		{"pkcs11:token=a;object=b?module-path=" + module + "&pin-source=|cat%20pin", `"pin-source" must be an absolute path`},
		{"pkcs11:token=a;object=b?module-path=" + module + "&pin-source=https://host/pin", `"pin-source" must be an absolute path`},
		{"pkcs11:token=a;object=b?module-path=" + module + "&pin-source=file:/no/pin", "the file of the PIN"},
		{"pkcs11:token=a;object=b?module-path=" + module + "&pin-source=" + empty, "1 to 255 bytes"},
		{"pkcs11:token=a;object=b" + where + "&mechanism=rsa", "aes-gcm or aes-kwp"},
		{"pkcs11:token=a;object=b" + where + "&colour=" + s, `"colour" is not known`},
	} {
		_, err := mux.Open(t.Context(), tt.uri)
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Open(%q) = %v, want ErrInvalid with %q", tt.uri, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), s) {
			t.Errorf("Open(%q) shows a secret: %v", tt.uri, err)
		}
	}
}

func FuzzURI(f *testing.F) {
	f.Add("pkcs11:token=a;object=b;id=%01;type=secret-key?module-path=/m&pin-source=file:///p&mechanism=aes-kwp")
	opener := pkcs11.NewOpener()
	f.Fuzz(func(t *testing.T, uri string) {
		u, err := url.Parse(uri)
		if err != nil || strings.Contains(u.RawQuery, "module-path=") && !strings.HasPrefix(u.RawQuery, "module-path=/m") {
			return // loads nothing that there is
		}
		if _, err := opener.Open(t.Context(), u); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("%q: %v", uri, err)
		}
	})
}
