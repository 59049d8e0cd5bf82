package kms_test

import (
	"encoding/hex"
	"errors"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/cluster"
)

// TestFromConstellation: every form of Constellation's; <secret> stands for
// the path of a file that holds the text that follows in secrets.
func TestFromConstellation(t *testing.T) {
	for _, tt := range []struct {
		uri, want string
		secrets   []string
	}{
		{
			"kms://aws?region=eu-central-1&accessKeyID=AKIA1&accessKey=a+b/c%2Bd=&keyName=alias/kek",
			"awskms:///alias/kek?region=eu-central-1&credentials-file=<secret>",
			[]string{"[default]\naws_access_key_id = AKIA1\naws_secret_access_key = a+b/c+d=\n"},
		},
		{ // nothing was escaped: '&' and '%' belong to the secret
			"kms://aws?keyName=arn:aws:kms:us-east-1:111122223333:key/1&accessKeyID=AKIA1&accessKey=x&y=%zz+%41&region=us-east-1",
			"awskms:///arn:aws:kms:us-east-1:111122223333:key/1?region=us-east-1&credentials-file=<secret>",
			[]string{"[default]\naws_access_key_id = AKIA1\naws_secret_access_key = x&y=%zz+%41\n"},
		},
		{ // escaped once, which is unescaped once
			"kms://azure?tenantID=t&clientID=c&clientSecret=a%2526b%2Bc&vaultName=v&vaultType=vault.azure.net&keyName=k",
			"azurekeyvault://v.vault.azure.net/keys/k?tenant-id=t&client-id=c&client-secret-file=<secret>",
			[]string{"a%26b+c"},
		},
		{
			"kms://azure?tenantID=t&clientID=c&clientSecret=s~.&vaultName=hsm&vaultType=managedhsm.azure.net&keyName=k",
			"azurekeyvault://hsm.managedhsm.azure.net/keys/k?tenant-id=t&client-id=c&client-secret-file=<secret>",
			[]string{"s~."},
		},
		{
			"kms://gcp?projectID=p&location=global&keyRing=r&credentialsPath=/etc/gcp%20creds.json&keyName=k",
			"gcpckms://projects/p/locations/global/keyRings/r/cryptoKeys/k?credentials-file=%2Fetc%2Fgcp%20creds.json", nil,
		},
		{
			"kms://cluster-kms?key=bWFzdGVya2V5&salt=c29tZXNhbHQ=",
			"cluster://<secret>?salt-file=<secret>", []string{"masterkey", "somesalt"},
		},
		{
			"kms://cluster-kms?salt=-_-_&masterSecret=bWFzdGVya2V5",
			"cluster://<secret>?salt-file=<secret>", []string{"masterkey", "\xfb\xff\xbf"},
		},
		{
			"storage://aws?bucket=b&region=r&accessKeyID=i&accessKey=k",
			"s3://b?region=r&credentials-file=<secret>", []string{"[default]\naws_access_key_id = i\naws_secret_access_key = k\n"},
		},
		{
			"storage://azure?account=a&container=c&tenantID=t&clientID=i&clientSecret=k",
			"azblob://c?storage-account=a&tenant-id=t&client-id=i&client-secret-file=<secret>", []string{"k"},
		},
		{"storage://gcp?projectID=p&bucket=b&credentialsPath=/c.json", "gs://b?project=p&credentials-file=%2Fc.json", nil},
		{"storage://no-store", "", nil},
	} {
		got, err := kms.FromConstellation(tt.uri)
		if err != nil {
			t.Errorf("%s: %v", tt.uri, err)
			continue
		}
		var secrets []string
		shown := regexp.MustCompile(`(/|%2F)proc(/|%2F)self(/|%2F)fd(/|%2F)[0-9]+`).ReplaceAllStringFunc(got.URI, func(path string) string {
			content, err := os.ReadFile(strings.ReplaceAll(path, "%2F", "/"))
			if err != nil {
				t.Errorf("%s: %v", tt.uri, err)
			}
			secrets = append(secrets, string(content))
			return "<secret>"
		})
		if shown != tt.want {
			t.Errorf("%s\n is %s,\nwant %s", tt.uri, shown, tt.want)
		}
		if strings.Join(secrets, "|") != strings.Join(tt.secrets, "|") || len(got.Warnings) != len(tt.secrets) {
			t.Errorf("%s: secrets %q, want %q; warnings %q", tt.uri, secrets, tt.secrets, got.Warnings)
		}
		if err := got.Close(); err != nil {
			t.Errorf("%s: Close: %v", tt.uri, err)
		}
	}
}

func TestFromConstellationRefuses(t *testing.T) {
	const s = "S3CR3T"
	for _, tt := range []struct{ uri, want string }{
		{"kms://", "none of Constellation's"},
		{"kms://vault?key=" + s, "none of Constellation's"},
		{"storage://no-store/" + s, "none of Constellation's"},
		{"kms://aws", `none of region`},
		{"kms://aws?secret=" + s, `none of region`},
		{"kms://aws?region=r&accessKeyID=i&accessKey=" + s, `"keyName" is missing`},
		{"kms://aws?region=r&accessKeyID=i&accessKey=&keyName=k", `"accessKey" is missing`},
		{"kms://aws?region=r&accessKeyID=i&accessKey=" + s + "&accessKey=" + s + "&keyName=k", `"accessKey" is given twice`},
		{"kms://aws?region=r&accessKeyID=i&accessKey=a%0A" + s + "&keyName=k", `"accessKey" has a line break`},
		{"kms://aws?region=r&accessKeyID=i&accessKey=a%20" + s + "&keyName=k", `must not have spaces`},
		{"kms://azure?tenantID=t&clientID=c&clientSecret=" + s + "&vaultName=v&vaultType=example.com&keyName=k", `"vaultType" is none of`},
		{"kms://cluster-kms?key=" + s + "*&salt=AAAA", `"key" is not URL-safe base64`},
		{"kms://cluster-kms?masterSecret=" + s + "AA=", `"salt" is missing`},
		{"kms://cluster-kms?masterSecret=AAAA&key=AAAA&salt=AAAA", `"key" is given twice`},
		{"storage://no-store?bucket=" + s, "none of"},
		{"storage://aws?bucket=a/b@c&region=r&accessKeyID=i&accessKey=" + s, "cannot be part of a URI"},
	} {
		_, err := kms.FromConstellation(tt.uri)
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want ErrInvalid with %q", tt.uri, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), s) {
			t.Errorf("%s shows a secret: %v", tt.uri, err)
		}
	}
}

// TestConstellationClusterKMS opens what was translated and derives the key
// that Constellation's own tests publish for it.
func TestConstellationClusterKMS(t *testing.T) {
	translated, err := kms.FromConstellation("kms://cluster-kms?key=" +
		"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=&salt=ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=")
	if err != nil {
		t.Fatal(err)
	}
	defer translated.Close()
	kek, err := kms.Mux{cluster.Scheme: cluster.Open}.Open(t.Context(), translated.URI)
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	key, err := kek.Derive(t.Context(), "clusterID")
	if err != nil {
		t.Fatal(err)
	}
	defer key.Wipe()
	if got := hex.EncodeToString(key.Expose()); got != "128c164378fe8767f998fbdfe4b4d6463ec5ae1b664ea5999bc27417607ae9b6" {
		t.Errorf("derived %s", got)
	}
}

// FuzzFromConstellation: what is translated is a URI of ours, and no error
// shows what stood in a parameter.
func FuzzFromConstellation(f *testing.F) {
	f.Add("kms://aws?region=r&accessKeyID=i&keyName=k&accessKey=", "k")
	f.Add("kms://cluster-kms?salt=AAAA&key=", "AA==")
	f.Add("storage://azure?account=a&container=c&tenantID=t&clientID=i&clientSecret=", "%41&x")
	f.Add("kms://azure?tenantID=t&clientID=c&vaultName=v&vaultType=vault.azure.net&keyName=k&clientSecret=", "+")
	f.Add("storage://no-store?", "")
	f.Fuzz(func(t *testing.T, uri, tail string) {
		const s = "S3CR3T"
		if strings.Contains(uri+tail, s) || !strings.Contains(uri, "?") {
			return
		}
		translated, err := kms.FromConstellation(uri + s + tail)
		if err != nil {
			if strings.Contains(err.Error(), s) {
				t.Errorf("%q shows a secret: %v", uri, err)
			}
			return
		}
		defer translated.Close()
		if translated.URI == "" {
			return
		}
		if _, err := kms.ParseURI(translated.URI); err != nil {
			t.Errorf("%q becomes no URI of ours: %v", uri, err)
		}
	})
}
