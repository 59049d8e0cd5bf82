package kms_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
)

// testMux has one scheme, which takes one parameter.
func testMux() kms.Mux {
	return kms.Mux{"fake": func(_ context.Context, u *url.URL) (kms.Backend, error) {
		params, err := kms.Params(u, "region")
		if err != nil {
			return nil, err
		}
		if params["region"] == "nowhere" {
			return nil, fmt.Errorf("Get %q: no such host (%s)", u.String(), u.RawQuery) // as SDKs do
		}
		return kmstest.NewBackend(), nil
	}}
}

func TestMux(t *testing.T) {
	kek, err := testMux().Open(t.Context(), "fake://host/a/key?region=here")
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	if kek.Scheme() != "fake" || kek.Name() != "fake://host/a/key" {
		t.Errorf("scheme %q, name %q", kek.Scheme(), kek.Name())
	}

	const s = "S3CR3T"
	for _, tt := range []struct{ uri, want string }{
		{"", "is empty"},
		{s, "no scheme"},
		{"/etc/" + s, "no scheme"},
		{"fake://%zz" + s, "does not parse"},
		{"fake://host:" + s + "/", "does not parse"},
		{"1fake://" + s, "does not parse"},
		{"fake://user:" + s + "@host/key", "fake://host/key holds credentials"},
		{"fake://" + s + "@host/key", "fake://host/key holds credentials"},
		{"fake://host/key#" + s, "fragment"},
		{"fake://host/key#", "fragment"},
		{"real://host?token=" + s, `"real" is not known; this build knows fake`},
		{"fake://host?token=" + s, `"token" is not known; this scheme takes region`},
		{"fake://host?region=" + s + "&region=" + s, `"region" is given twice`},
		{"fake://host?region=%zz" + s, "do not parse"},
		{"fake://host?%zz" + s + "=", "do not parse"},
		{"fake://host?region=a&", `"" is not known`},
		{"fake:" + s + "?what=" + s, "fake:…"},
	} {
		_, err := testMux().Open(t.Context(), tt.uri)
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Open(%q) = %v, want ErrInvalid with %q", tt.uri, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), s) {
			t.Errorf("Open(%q) shows a secret: %v", tt.uri, err)
		}
	}

	_, err = testMux().Open(t.Context(), "fake://host/key?region=nowhere")
	if want := `KEK fake://host/key: opening: Get "fake://host/key": no such host (…)`; !errors.Is(err, errdefs.ErrUnavailable) || err.Error() != want {
		t.Errorf("an opener's error is %q, want %q", err, want)
	}
	_, err = kms.Mux{}.Open(t.Context(), "fake://host")
	if !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("an empty mux: %v", err)
	}
}

func TestParams(t *testing.T) {
	u, err := kms.ParseURI("fake://host/?file=/a+b%20c%2B;&pass=%26%25%3D=&empty=&bare")
	if err != nil {
		t.Fatal(err)
	}
	got, err := kms.Params(u, "file", "pass", "empty", "bare", "absent")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"file": "/a+b c+;", "pass": "&%==", "empty": "", "bare": ""}
	if !maps.Equal(got, want) {
		t.Errorf("Params = %q, want %q", got, want)
	}
}

// FuzzURI: whatever is written around it, a value where secrets are written
// (password, parameter, fragment) never shows in an error, and what opens
// shows nothing of it either.
func FuzzURI(f *testing.F) {
	f.Add("fake", "host", "path", "region", uint8(0))
	f.Add("fake", "", "", "token", uint8(1))
	f.Add("fake", "ho st", "%zz", "a=b&region", uint8(2))
	f.Add("cluster", "", "etc/secret", "salt-file", uint8(0))
	f.Add("", "[::1", "..", "", uint8(3))
	f.Fuzz(func(t *testing.T, scheme, host, path, param string, where uint8) {
		const s = "S3CR3T"
		uri := scheme + "://" + host + "/" + path
		switch where % 4 {
		case 0:
			uri += "?" + param + "=" + s
		case 1:
			uri = scheme + "://user:" + s + "@" + host + "/" + path
		case 2:
			uri += "#" + s
		case 3:
			uri = scheme + ":" + param + "?" + param + "=" + s
		}
		if strings.Contains(scheme+host+path+param, s) || strings.ContainsAny(scheme, "/?#:") || strings.ContainsAny(host, "/?#@") || strings.Contains(path, "@") {
			return // the secret is not where the comment says
		}
		kek, err := testMux().Open(t.Context(), uri)
		if err == nil {
			if strings.Contains(kek.Name(), s) {
				t.Errorf("%q is named %q", uri, kek.Name())
			}
			kek.Close()
			return
		}
		if strings.Contains(err.Error(), s) {
			t.Errorf("%q shows its secret: %v", uri, err)
		}
	})
}
