package awskms_test

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	sdk "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/awskms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/secret"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

const (
	id     = "ebs.csi.aws.com/vol-1"
	oneARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
)

func open(t *testing.T, uri string) *kms.KEK {
	t.Helper()
	kek, err := kms.Mux{awskms.Scheme: awskms.Open}.Open(t.Context(), uri)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return kek
}

// uri names a key of the peer.
func uri(a *peers.AWS, key string) string {
	return at(a.Endpoint, a.Region, a.CredentialsFile, key)
}

func at(endpoint, region, credentials, key string) string {
	return fmt.Sprintf("awskms:///%s?region=%s&endpoint=%s&credentials-file=%s", key, region, url.QueryEscape(endpoint), credentials)
}

func newKey(t *testing.T) secret.Bytes {
	k := secret.New(kms.KeySize)
	_, _ = rand.Read(k.Expose())
	t.Cleanup(k.Wipe)
	return k
}

// isolate keeps the machine's own AWS configuration out of a test.
func isolate(t *testing.T) {
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION",
		"AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_KMS", "AWS_CONTAINER_CREDENTIALS_FULL_URI"} {
		t.Setenv(name, "")
		_ = os.Unsetenv(name)
	}
	t.Setenv("AWS_CONFIG_FILE", "/nowhere")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
}

func TestConformance(t *testing.T) {
	isolate(t)
	a := peers.LocalKMS(t)
	keyARN, other := a.Key(t), a.Key(t)
	switchKey := func(t *testing.T, enabled bool) {
		var err error
		if enabled {
			_, err = a.Client.EnableKey(t.Context(), &sdk.EnableKeyInput{KeyId: &keyARN})
		} else {
			_, err = a.Client.DisableKey(t.Context(), &sdk.DisableKeyInput{KeyId: &keyARN})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	here := func(t *testing.T) *kms.KEK { return open(t, uri(a, keyARN)) }
	kmstest.Run(t, kmstest.Harness{
		Open:      here,
		OpenOther: func(t *testing.T) *kms.KEK { return open(t, uri(a, other)) },
		Disable:   func(t *testing.T) func() { switchKey(t, false); return func() { switchKey(t, true) } },
		Deny:      func(t *testing.T) func() { return a.Deny(t, "kms:Encrypt", "kms:Decrypt") },
		Unreachable: func(t *testing.T) *kms.KEK {
			return open(t, at("http://"+peers.Addr(t), a.Region, a.CredentialsFile, keyARN))
		},
		Slow: func(t *testing.T) *kms.KEK {
			kek, err := kms.Mux{awskms.Scheme: awskms.Open}.OpenWith(t.Context(), at("http://"+peers.Silent(t), a.Region, a.CredentialsFile, keyARN), kms.Options{Timeout: time.Second})
			if err != nil {
				t.Fatal(err)
			}
			return kek
		},
		Rotate:  func(t *testing.T) *kms.KEK { a.Rotate(t, keyARN); return here(t) },
		Secrets: [][]byte{[]byte(a.SecretKey)},
	})
}

// TestReal runs the suite against a key of AWS itself. It does not rotate it.
func TestReal(t *testing.T) {
	real := os.Getenv("TEST_KEK_URI_AWSKMS")
	if real == "" {
		t.Skip("TEST_KEK_URI_AWSKMS names no key")
	}
	a := peers.LocalKMS(t)
	other := a.Key(t)
	kmstest.Run(t, kmstest.Harness{
		Open:      func(t *testing.T) *kms.KEK { return open(t, real) },
		OpenOther: func(t *testing.T) *kms.KEK { return open(t, uri(a, other)) },
		Stride:    17,
	})
}

func TestManager(t *testing.T) {
	isolate(t)
	a := peers.LocalKMS(t)
	kmstest.RunManager(t, kmstest.Abilities{Labels: true, Rotation: true, List: true}, func(t *testing.T) (*kms.KEK, *kms.KEK) {
		u := uri(a, "alias/cryptcsi-"+strings.ToLower(rand.Text()))
		return open(t, u), open(t, u)
	})
}

// TestEncryptionContext: AWS holds the ciphertext together with the DEK's ID.
func TestEncryptionContext(t *testing.T) {
	isolate(t)
	a := peers.LocalKMS(t)
	keyARN := a.Key(t)
	kek := open(t, uri(a, keyARN))
	defer kek.Close()
	w, err := kek.Wrap(t.Context(), id, newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		context map[string]string
		opens   bool
	}{
		{map[string]string{"cryptcsi-dek-id": id}, true},
		{map[string]string{"cryptcsi-dek-id": id + "x"}, false},
		{map[string]string{"cryptcsi-dek-id": id, "more": "x"}, false},
		{nil, false},
	} {
		_, err := a.Client.Decrypt(t.Context(), &sdk.DecryptInput{KeyId: &keyARN, CiphertextBlob: w.Ciphertext, EncryptionContext: tt.context})
		if (err == nil) != tt.opens {
			t.Errorf("with %v: %v", tt.context, err)
		}
	}
}

// TestRotateRefused: AWS's limit, and AWS's slowness.
func TestRotateRefused(t *testing.T) {
	isolate(t)
	a := peers.LocalKMS(t)
	keyARN := a.Key(t)
	for range 25 {
		a.Rotate(t, keyARN)
	}
	kek := open(t, uri(a, keyARN))
	defer kek.Close()
	if _, err := kek.RotateKey(t.Context()); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "25 times") {
		t.Errorf("the 26th rotation: %v", err)
	}
	d, err := kek.DescribeKey(t.Context())
	if err != nil || len(d.Versions) != 26 || !d.Versions[25].Current {
		t.Errorf("DescribeKey: %+v, %v", d, err)
	}

	uriOf := service(t, func(op string, _ map[string]any) (int, string) {
		if op == "RotateKeyOnDemand" {
			return 400, `{"__type":"ConflictException"}` // it goes on already
		}
		return 200, `{"KeyMetadata":{"Arn":"` + oneARN + `","CurrentKeyMaterialId":"old"}}`
	})
	slow, err := kms.Mux{awskms.Scheme: awskms.Open}.OpenWith(t.Context(), uriOf(oneARN), kms.Options{Timeout: 300 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	if _, err := slow.RotateKey(t.Context()); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "has begun to rotate") {
		t.Errorf("a rotation that is not done: %v", err)
	}
}

func labels() map[string]string {
	return map[string]string{kms.LabelCluster: "one", kms.LabelPurpose: "kek"}
}

// TestWholeKey: disable, destroy and rescue; what the states look like.
func TestWholeKey(t *testing.T) {
	isolate(t)
	a := peers.LocalKMS(t)
	kek := open(t, uri(a, "alias/whole"))
	defer kek.Close()
	if _, err := kek.CreateKey(t.Context(), kms.NewKey{Labels: labels()}); err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	w, err := kek.Wrap(t.Context(), id, key)
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		set, want kms.VersionState
		unwraps   bool
	}{
		{kms.Disabled, kms.Disabled, false},
		{kms.Enabled, kms.Enabled, true},
		{kms.Destroyed, kms.Destroying, false},
		{kms.Destroyed, kms.Destroying, false},
		{kms.Disabled, kms.Disabled, false},
		{kms.Destroying, kms.Destroying, false},
		{kms.Enabled, kms.Enabled, true},
	} {
		if err := kek.SetVersion(t.Context(), "", step.set); err != nil {
			t.Fatalf("SetVersion(%s): %v", step.set, err)
		}
		d, err := kek.DescribeKey(t.Context())
		if err != nil || len(d.Versions) != 1 || d.Versions[0].State != step.want {
			t.Fatalf("after %s: %+v, %v", step.set, d, err)
		}
		until := time.Until(d.Versions[0].Until)
		if step.want == kms.Destroying && (until < 29*24*time.Hour || until > 31*24*time.Hour) {
			t.Errorf("gone for good in %v", until)
		}
		got, err := kek.Unwrap(t.Context(), id, w)
		if step.unwraps != (err == nil) || err != nil && !errors.Is(err, errdefs.ErrDenied) {
			t.Errorf("Unwrap after %s: %v", step.set, err)
		}
		got.Wipe()
	}
	if err := kek.SetVersion(t.Context(), w.KeyID, kms.Disabled); !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), "whole keys") {
		t.Errorf("SetVersion of a version: %v", err)
	}
}

// TestAlias: an alias that points elsewhere is another KEK; ARNs still open both.
func TestAlias(t *testing.T) {
	isolate(t)
	a := peers.LocalKMS(t)
	first, second := a.Key(t), a.Key(t)
	if _, err := a.Client.CreateAlias(t.Context(), &sdk.CreateAliasInput{AliasName: aws.String("alias/kek"), TargetKeyId: &first}); err != nil {
		t.Fatal(err)
	}
	kek, byARN, byID := open(t, uri(a, "alias/kek")), open(t, uri(a, first)), open(t, uri(a, first[strings.LastIndex(first, "/")+1:]))
	byAliasARN := open(t, uri(a, first[:strings.LastIndex(first, ":")]+":alias/kek"))
	key := newKey(t)
	w, err := kek.Wrap(t.Context(), id, key)
	if err != nil || !strings.HasPrefix(w.KeyID, first+"#") {
		t.Fatalf("Wrap: %q, %v", w.KeyID, err)
	}
	for name, k := range map[string]*kms.KEK{"alias": kek, "ARN": byARN, "ID": byID, "alias ARN": byAliasARN} {
		defer k.Close()
		got, err := k.Unwrap(t.Context(), id, w)
		if err != nil || !got.Equal(key) {
			t.Errorf("%s does not unwrap: %v", name, err)
		}
		got.Wipe()
	}
	if _, err := a.Client.UpdateAlias(t.Context(), &sdk.UpdateAliasInput{AliasName: aws.String("alias/kek"), TargetKeyId: &second}); err != nil {
		t.Fatal(err)
	}
	if current, err := kek.CurrentKeyID(t.Context()); err != nil || !strings.HasPrefix(current, second+"#") {
		t.Errorf("CurrentKeyID %q, %v, want %s", current, err, second)
	}
	for name, k := range map[string]*kms.KEK{"alias": kek, "alias ARN": byAliasARN} {
		if _, err := k.Unwrap(t.Context(), id, w); !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), first) {
			t.Errorf("%s, pointing elsewhere: %v, want ErrDenied that names %s", name, err, first)
		}
	}
	got, err := byARN.Unwrap(t.Context(), id, w)
	if err != nil {
		t.Errorf("by ARN: %v", err)
	}
	got.Wipe()
}

// TestCreateRefuses: what Create cannot make, and that it leaves nothing behind.
func TestCreateRefuses(t *testing.T) {
	isolate(t)
	a := peers.LocalKMS(t)
	day := 24 * time.Hour
	for _, tt := range []struct {
		name string
		key  string
		new  kms.NewKey
		want string
	}{
		{"an ARN", oneARN, kms.NewKey{}, "by an alias"},
		{"an ID", "1234abcd-12ab-34cd-56ef-1234567890ab", kms.NewKey{}, "by an alias"},
		{"89 days", "alias/x", kms.NewKey{RotationPeriod: 89 * day}, "90 to 2560"},
		{"2561 days", "alias/x", kms.NewKey{RotationPeriod: 2561 * day}, "90 to 2560"},
		{"half a day", "alias/x", kms.NewKey{RotationPeriod: 90*day + 12*time.Hour}, "whole days"},
		{"a policy that is no JSON", "alias/x", kms.NewKey{Policy: []byte("{")}, "JSON"},
	} {
		kek := open(t, uri(a, tt.key))
		_, err := kek.CreateKey(t.Context(), tt.new)
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want ErrInvalid with %q", tt.name, err, tt.want)
		}
		kek.Close()
	}
	if n := len(usable(t, a)); n != 0 {
		t.Errorf("%d keys were made", n)
	}
}

// usable returns the keys that are not being deleted.
func usable(t *testing.T, a *peers.AWS) (arns []string) {
	t.Helper()
	keys, err := a.Client.ListKeys(t.Context(), &sdk.ListKeysInput{})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys.Keys {
		d, err := a.Client.DescribeKey(t.Context(), &sdk.DescribeKeyInput{KeyId: k.KeyArn})
		if err != nil {
			t.Fatal(err)
		}
		if d.KeyMetadata.KeyState != types.KeyStatePendingDeletion {
			arns = append(arns, *k.KeyArn)
		}
	}
	return arns
}

// TestCreateDenied: each permission that Create lacks is named, and a key that
// is not finished is not kept.
func TestCreateDenied(t *testing.T) {
	isolate(t)
	a := peers.LocalKMS(t)
	kek := open(t, uri(a, "alias/denied"))
	defer kek.Close()
	for _, action := range []string{"kms:CreateKey", "kms:EnableKeyRotation", "kms:CreateAlias"} {
		undo := a.Deny(t, action)
		_, err := kek.CreateKey(t.Context(), kms.NewKey{Labels: labels(), RotationPeriod: 100 * 24 * time.Hour})
		if !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), "perform: "+action) {
			t.Errorf("without %s: %v", action, err)
		}
		undo()
		if left := usable(t, a); len(left) != 0 {
			t.Errorf("without %s: %v is left", action, left)
		}
	}
	made, err := kek.CreateKey(t.Context(), kms.NewKey{Labels: labels(), RotationPeriod: 100 * 24 * time.Hour})
	if err != nil || made.RotationPeriod != 100*24*time.Hour {
		t.Errorf("with all permissions: %+v, %v", made, err)
	}
}

// TestCreateRace: many create one alias; one key is left, and all have it.
func TestCreateRace(t *testing.T) {
	isolate(t)
	a := peers.LocalKMS(t)
	const racers = 8
	uris := make(chan string, racers)
	for range racers {
		go func() {
			kek, err := kms.Mux{awskms.Scheme: awskms.Open}.Open(t.Context(), uri(a, "alias/race"))
			if err != nil {
				uris <- err.Error()
				return
			}
			defer kek.Close()
			made, err := kek.CreateKey(t.Context(), kms.NewKey{Labels: labels()})
			if err != nil {
				made.URI = err.Error()
			}
			uris <- made.URI
		}()
	}
	first := <-uris
	for range racers - 1 {
		if other := <-uris; other != first {
			t.Errorf("%s and %s", first, other)
		}
	}
	if left := usable(t, a); len(left) != 1 || !strings.Contains(first, left[0]) {
		t.Errorf("left are %v, created was %s", left, first)
	}
}

// lossy passes requests on and cuts the connection instead of the first answer
// to an operation.
func lossy(t *testing.T, a *peers.AWS, op string) (endpoint string) {
	lost := false
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		on, err := http.NewRequestWithContext(r.Context(), r.Method, a.Endpoint+r.URL.Path, r.Body)
		if err != nil {
			t.Error(err)
			return
		}
		on.Header, on.Host, on.ContentLength = r.Header, r.Host, r.ContentLength
		answer, err := http.DefaultClient.Do(on)
		if err != nil {
			return // the test is over
		}
		defer answer.Body.Close()
		if strings.HasSuffix(r.Header.Get("X-Amz-Target"), "."+op) && !lost {
			lost = true
			panic(http.ErrAbortHandler)
		}
		w.WriteHeader(answer.StatusCode)
		_, _ = io.Copy(w, answer.Body)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// TestLostAnswers: an operation that was done and not heard of ends well, at
// the latest when it is repeated.
func TestLostAnswers(t *testing.T) {
	isolate(t)
	for _, op := range []string{"CreateKey", "EnableKeyRotation", "CreateAlias", "DescribeKey", "RotateKeyOnDemand", "TagResource"} {
		a := peers.LocalKMS(t)
		kek := open(t, at(lossy(t, a, op), a.Region, a.CredentialsFile, "alias/lost"))
		n := kms.NewKey{Labels: labels(), RotationPeriod: 365 * 24 * time.Hour}
		made, err := kek.CreateKey(t.Context(), n)
		if op == "CreateKey" {
			if !errors.Is(err, errdefs.ErrUnavailable) {
				t.Errorf("CreateKey with its answer lost: %v, want ErrUnavailable", err)
			}
			made, err = kek.CreateKey(t.Context(), n)
		}
		if err != nil {
			t.Errorf("%s lost: CreateKey: %v", op, err)
			continue
		}
		rotated, err := kek.RotateKey(t.Context())
		if err != nil || rotated.URI != made.URI || len(rotated.Versions) != 2 {
			t.Errorf("%s lost: RotateKey: %+v, %v", op, rotated, err)
		}
		if err := kek.LabelKey(t.Context(), map[string]string{kms.LabelActive: "1"}); err != nil {
			t.Errorf("%s lost: LabelKey: %v", op, err)
		}
		kek.Close()
	}
}

// TestFleetDenied: keys whose tags nobody may read are no empty list.
func TestFleetDenied(t *testing.T) {
	isolate(t)
	a := peers.LocalKMS(t)
	kek := open(t, uri(a, a.Key(t)))
	defer kek.Close()
	if keys, err := kek.ListKeys(t.Context()); err != nil || len(keys) != 0 {
		t.Errorf("a key without labels is listed: %+v, %v", keys, err)
	}
	for _, action := range []string{"kms:ListKeys", "kms:ListResourceTags"} {
		undo := a.Deny(t, action)
		if _, err := kek.ListKeys(t.Context()); !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), "perform: "+action) {
			t.Errorf("without %s: %v", action, err)
		}
		undo()
	}
}

// TestPermissions: each operation works with what Permissions lists for it and
// fails, naming it, without any one of these that it always needs.
func TestPermissions(t *testing.T) {
	isolate(t)
	a := peers.LocalKMS(t)
	kek := open(t, uri(a, a.Key(t)))
	defer kek.Close()
	w, err := kek.Wrap(t.Context(), id, newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	calls := map[string]func() error{
		kms.OpWrap:         func() error { _, err := kek.Wrap(t.Context(), id, newKey(t)); return err },
		kms.OpUnwrap:       func() error { k, err := kek.Unwrap(t.Context(), id, w); k.Wipe(); return err },
		kms.OpCurrentKeyID: func() error { _, err := kek.CurrentKeyID(t.Context()); return err },
		kms.OpDescribe:     func() error { _, err := kek.DescribeKey(t.Context()); return err },
		kms.OpRotate:       func() error { _, err := kek.RotateKey(t.Context()); return err },
		kms.OpLabel:        func() error { return kek.LabelKey(t.Context(), labels()) },
	}
	every := map[string]bool{}
	for _, list := range kek.Permissions() {
		for action := range strings.SplitSeq(list, ", ") {
			every[action] = true
		}
	}
	for op, call := range calls {
		listed := strings.Split(kek.Permissions()[op], ", ")
		var others []string
		for action := range every {
			others = append(others, action)
		}
		for _, action := range listed {
			undo := a.Deny(t, action)
			if err := call(); !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), action) {
				t.Errorf("%s without %s: %v", op, action, err)
			}
			undo()
			others = remove(others, action)
		}
		undo := a.Deny(t, others...)
		if err := call(); err != nil {
			t.Errorf("%s with %s alone: %v", op, listed, err)
		}
		undo()
	}
}

func remove(from []string, what string) (rest []string) {
	for _, s := range from {
		if s != what {
			rest = append(rest, s)
		}
	}
	return rest
}

// TestCredentials: what is wrong with them is a refusal that tells where to look.
func TestCredentials(t *testing.T) {
	isolate(t)
	a := peers.LocalKMS(t)
	keyARN := a.Key(t)
	for _, tt := range []struct{ name, file, want string }{
		{"an unknown access key", peers.AWSCredentials(t, "AKIAUNKNOWN", a.SecretKey), "UnrecognizedClientException"},
		{"a wrong secret", peers.AWSCredentials(t, a.AccessKey, "S3CR3T"), "secret access key right"},
	} {
		kek := open(t, at(a.Endpoint, a.Region, tt.file, keyARN))
		_, err := kek.CurrentKeyID(t.Context())
		if !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want ErrDenied with %q", tt.name, err, tt.want)
		}
		if err != nil && (strings.Contains(err.Error(), "S3CR3T") || strings.Contains(err.Error(), "x-amz-date")) {
			t.Errorf("%s shows the request: %v", tt.name, err)
		}
		kek.Close()
	}
	kek := open(t, "awskms:///"+keyARN+"?endpoint="+url.QueryEscape(a.Endpoint))
	defer kek.Close()
	if _, err := kek.CurrentKeyID(t.Context()); !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), "AWS_ACCESS_KEY_ID") {
		t.Errorf("no credentials: %v", err)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", a.AccessKey)
	t.Setenv("AWS_SECRET_ACCESS_KEY", a.SecretKey)
	fromEnv := open(t, "awskms:///"+keyARN+"?endpoint="+url.QueryEscape(a.Endpoint))
	defer fromEnv.Close()
	if _, err := fromEnv.CurrentKeyID(t.Context()); err != nil {
		t.Errorf("credentials in the environment: %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	isolate(t)
	for _, tt := range []struct{ uri, want string }{
		{"awskms:///alias/x", "region is not known"},
		{"awskms:///1234abcd-12ab-34cd-56ef-1234567890ab", "region is not known"},
		{"awskms://alias/x?region=eu-central-1", "three slashes"},
		{"awskms:alias/x?region=eu-central-1", "three slashes"},
		{"awskms:///?region=eu-central-1", "must name a key"},
		{"awskms:///alias/?region=eu-central-1", "must name a key"},
		{"awskms:///alias/a:b?region=eu-central-1", "must name a key"},
		{"awskms:///key?region=eu-central-1", "must name a key"},
		{"awskms:///arn:aws:kms:eu-central-1:111122223333:key/x", "must name a key"},
		{"awskms:///arn:aws:kms:eu-central-1:111122223333:key/alias/x", "must name a key"},
		{"awskms:///arn:aws:kms:eu-central-1:111122223333:1234abcd-12ab-34cd-56ef-1234567890ab", "must name a key"},
		{"awskms:///arn:aws:s3:::bucket", "none of a KMS key"},
		{"awskms:///arn:aws:kms:", "none of a KMS key"},
		{"awskms:///" + oneARN + "?region=us-east-1", "not the region of the ARN, eu-central-1"},
		{"awskms:///alias/x?region=eu%2Fcentral", "no region like"},
		{"awskms:///alias/x?region=", `"region" is empty`},
		{"awskms:///alias/x?zone=a", `"zone" is not known`},
		{"awskms:///" + oneARN + "?endpoint=ftp%3A%2F%2Fhost", "https://host:port"},
		{"awskms:///" + oneARN + "?endpoint=http%3A%2F%2Fkms.example.com", "must be https"},
		{"awskms:///" + oneARN + "?credentials-file=/nowhere/file", "/nowhere/file"},
	} {
		_, err := kms.Mux{awskms.Scheme: awskms.Open}.Open(t.Context(), tt.uri)
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Open(%q) = %v, want ErrInvalid with %q", tt.uri, err, tt.want)
		}
	}
	t.Setenv("AWS_ENDPOINT_URL_KMS", "http://kms.example.com")
	_, err := kms.Mux{awskms.Scheme: awskms.Open}.Open(t.Context(), "awskms:///"+oneARN)
	if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), "must be https") {
		t.Errorf("plain HTTP by the environment: %v", err)
	}
}

// service answers every operation with what answer returns, and keeps requests.
func service(t *testing.T, answer func(op string, in map[string]any) (status int, body string)) (uriOf func(key string) string) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var in map[string]any
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			t.Error(err)
		}
		_, op, _ := strings.Cut(r.Header.Get("X-Amz-Target"), ".")
		status, body := answer(op, in)
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}))
	t.Cleanup(s.Close)
	file := peers.AWSCredentials(t, "AKIA", "x")
	return func(key string) string {
		return "awskms:///" + key + "?region=eu-central-1&credentials-file=" + file + "&endpoint=" + url.QueryEscape(s.URL)
	}
}

// TestPinned: which key AWS is asked for, whatever a record says.
func TestPinned(t *testing.T) {
	isolate(t)
	const (
		uuid  = "1234abcd-12ab-34cd-56ef-1234567890ab"
		mrk   = "mrk-0123456789abcdef0123456789abcdef"
		here  = "arn:aws:kms:eu-central-1:111122223333:key/"
		there = "arn:aws:kms:us-east-1:111122223333:key/"
		evil  = "arn:aws:kms:eu-central-1:999999999999:key/"
	)
	var asked []string
	uriOf := service(t, func(op string, in map[string]any) (int, string) {
		asked = append(asked, fmt.Sprint(op, " ", in["KeyId"]))
		return 400, `{"__type":"InvalidCiphertextException"}`
	})
	for _, tt := range []struct {
		key, record string
		asks        bool
	}{
		{here + uuid, here + uuid + "#m", true},
		{here + uuid, here + uuid, true},
		{here + uuid, there + uuid, false},
		{here + uuid, evil + uuid, false},
		{here + uuid, uuid, false},
		{here + uuid, "", false},
		{here + uuid, here + uuid[:35], false},
		{here + uuid, strings.Replace(here, "aws", "aws-cn", 1) + uuid, false},
		{here + uuid, strings.Replace(here, ":kms:", ":s3:", 1) + uuid, false},
		{here + mrk, there + mrk, true},
		{here + mrk, evil + mrk, false},
		{here + mrk, here + uuid, false},
		{uuid, here + uuid, true},
		{uuid, here + mrk, false},
	} {
		kek := open(t, uriOf(tt.key))
		asked = nil
		_, err := kek.Unwrap(t.Context(), id, kms.Wrapped{Ciphertext: []byte("c"), KeyID: tt.record, Mechanism: awskms.Mechanism})
		switch {
		case tt.asks && (!errors.Is(err, errdefs.ErrCorrupt) || len(asked) != 1 || asked[0] != "Decrypt "+tt.key):
			t.Errorf("%s for a record of %s: %v, asked %v", tt.key, tt.record, err, asked)
		case !tt.asks && (err == nil || len(asked) != 0):
			t.Errorf("%s for a record of %s: %v, asked %v, want a refusal", tt.key, tt.record, err, asked)
		}
		kek.Close()
	}
	kek := open(t, uriOf(here+uuid))
	defer kek.Close()
	asked = nil
	_, err := kek.Unwrap(t.Context(), id, kms.Wrapped{Ciphertext: []byte("c"), KeyID: here + uuid, Mechanism: "rsa-oaep"})
	if !errors.Is(err, errdefs.ErrCorrupt) || len(asked) != 0 {
		t.Errorf("another mechanism: %v, asked %v", err, asked)
	}
	_, err = kek.Unwrap(t.Context(), id, kms.Wrapped{Ciphertext: make([]byte, 6145), KeyID: here + uuid, Mechanism: awskms.Mechanism})
	if !errors.Is(err, errdefs.ErrCorrupt) || len(asked) != 0 {
		t.Errorf("a long ciphertext: %v, asked %v", err, asked)
	}
}

// TestErrors: the class of every error that AWS documents for what we call.
func TestErrors(t *testing.T) {
	isolate(t)
	var status int
	var body string
	uriOf := service(t, func(string, map[string]any) (int, string) { return status, body })
	kek := open(t, uriOf(oneARN))
	defer kek.Close()
	w := kms.Wrapped{Ciphertext: []byte("c"), KeyID: oneARN, Mechanism: awskms.Mechanism}
	for _, tt := range []struct {
		code   string
		status int
		want   error
	}{
		{"InvalidCiphertextException", 400, errdefs.ErrCorrupt},
		{"IncorrectKeyException", 400, errdefs.ErrCorrupt},
		{"NotFoundException", 400, errdefs.ErrDenied},
		{"DisabledException", 400, errdefs.ErrDenied},
		{"KMSInvalidStateException", 400, errdefs.ErrDenied},
		{"AccessDeniedException", 400, errdefs.ErrDenied},
		{"ExpiredTokenException", 400, errdefs.ErrDenied},
		{"UnrecognizedClientException", 400, errdefs.ErrDenied},
		{"InvalidSignatureException", 400, errdefs.ErrDenied},
		{"IncompleteSignature", 400, errdefs.ErrDenied},
		{"InvalidGrantTokenException", 400, errdefs.ErrUnavailable},
		{"InvalidKeyUsageException", 400, errdefs.ErrInvalid},
		{"ValidationException", 400, errdefs.ErrInvalid},
		{"KeyUnavailableException", 500, errdefs.ErrUnavailable},
		{"DependencyTimeoutException", 503, errdefs.ErrUnavailable},
		{"KMSInternalException", 500, errdefs.ErrUnavailable},
		{"ThrottlingException", 400, errdefs.ErrUnavailable},
	} {
		status, body = tt.status, fmt.Sprintf(`{"__type":%q,"message":"say\nthis"}`, tt.code)
		_, err := kek.Unwrap(t.Context(), id, w)
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.code, err, tt.want)
		}
		if err != nil && !strings.Contains(err.Error(), tt.code) {
			t.Errorf("%s is not named: %v", tt.code, err)
		}
	}
	for _, answer := range []string{"", "{}", "null", "<html>", `{"KeyId":"` + oneARN + `"}`, `{"KeyMetadata":{}}`} {
		status, body = 200, answer
		if _, err := kek.Unwrap(t.Context(), id, w); err == nil {
			t.Errorf("Unwrap takes %q", answer)
		}
		if _, err := kek.Wrap(t.Context(), id, newKey(t)); err == nil {
			t.Errorf("Wrap takes %q", answer)
		}
		if _, err := kek.CurrentKeyID(t.Context()); err == nil {
			t.Errorf("CurrentKeyID takes %q", answer)
		}
	}
	status, body = 200, `{"KeyId":"arn:aws:kms:eu-central-1:111122223333:key/other","Plaintext":"AAAA"}`
	if _, err := kek.Unwrap(t.Context(), id, w); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "key/other") {
		t.Errorf("AWS unwrapped with another key: %v", err)
	}
	status, body = 200, `{"KeyId":"`+strings.Repeat("x", 9<<20)
	if _, err := kek.Unwrap(t.Context(), id, w); !errors.Is(err, errdefs.ErrUnavailable) || len(err.Error()) > 1000 {
		t.Errorf("an endless answer: %.300v", err)
	}
}
