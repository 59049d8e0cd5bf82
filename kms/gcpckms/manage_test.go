package gcpckms_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/iam/apiv1/iampb"
	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/kms/kmstest/gcpfake"
)

func later() *timestamppb.Timestamp { return timestamppb.New(time.Now().Add(48 * time.Hour)) }

// spec is a key for a cluster.
func spec(cluster string) kms.NewKey {
	return kms.NewKey{Labels: map[string]string{kms.LabelCluster: cluster, kms.LabelPurpose: "kek"}}
}

func TestManager(t *testing.T) {
	s := gcpfake.Start(t)
	kmstest.RunManager(t, kmstest.Abilities{Labels: true, Rotation: true, Disable: true, Destroy: true, List: true},
		func(t *testing.T) (a, b *kms.KEK) { return open(t, s.URI("managed")), open(t, s.URI("managed")) })
}

func bindings(p *iampb.Policy) []string {
	var all []string
	for _, b := range p.GetBindings() {
		all = append(all, b.GetRole()+" "+strings.Join(b.GetMembers(), " ")+b.GetCondition().GetExpression())
	}
	return all
}

func mustHave(t *testing.T, s *gcpfake.Server, key string, want ...string) {
	t.Helper()
	if got := bindings(s.Policy(key)); !slices.Equal(got, want) {
		t.Errorf("policy %q, want %q", got, want)
	}
}

func defaultFor(account string) []string {
	return []string{"roles/cloudkms.cryptoKeyEncrypterDecrypter serviceAccount:" + account, "roles/cloudkms.viewer serviceAccount:" + account}
}

// TestDefaultPolicy binds the account that the credentials belong to.
func TestDefaultPolicy(t *testing.T) {
	gcpfake.NoAccount(t)
	s, server := gcpfake.Start(t), gcpfake.StartTokens(t)
	plain := "gcpckms://%s?endpoint=" + s.Endpoint
	impersonating := write(t, `{"type": "external_account", "service_account_impersonation_url":
		"https://iamcredentials.googleapis.com/v1/projects/-/serviceAccounts/sa@p.iam.gserviceaccount.com:generateAccessToken"}`)
	for name, tt := range map[string]struct{ uri, want string }{
		"account":       {s.URI("account"), gcpfake.Account},
		"impersonating": {fmt.Sprintf(plain, s.KeyName("impersonating")) + "&credentials-file=" + impersonating, "sa@p.iam.gserviceaccount.com"},
		"vm":            {fmt.Sprintf(plain, s.KeyName("vm")), gcpfake.VM},
	} {
		t.Setenv("GCE_METADATA_HOST", server.MetadataHost())
		if _, err := opened(t, tt.uri).CreateKey(t.Context(), spec("one")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		mustHave(t, s, name, defaultFor(tt.want)...)
	}

	// Where nobody knows the account there is no key either.
	for name, query := range map[string]string{
		"federated": "&credentials-file=" + write(t, `{"type": "external_account"}`),
		"user":      "&credentials-file=" + write(t, `{"type": "authorized_user"}`),
		"nowhere":   "",
	} {
		if name == "nowhere" {
			server.Status.Store(404)
		}
		kek := opened(t, fmt.Sprintf(plain, s.KeyName(name))+query)
		if _, err := kek.CreateKey(t.Context(), spec("one")); !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), "default policy") {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
		if _, err := kek.DescribeKey(t.Context()); !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("%s: a key was left behind, %v", name, err)
		}
	}
}

func TestPolicyDocuments(t *testing.T) {
	s := gcpfake.Start(t)
	n := spec("one")
	n.Policy = []byte(`{"version": 3, "etag": "BwWWja0YfJA=", "bindings": [{"role": "roles/cloudkms.cryptoKeyDecrypter",
		"members": ["group:g@example.com", "user:u@example.com"], "condition": {"title": "office", "expression": "request.time.getHours() < 17"}}]}`)
	if _, err := opened(t, s.URI("own")).CreateKey(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	mustHave(t, s, "own", "roles/cloudkms.cryptoKeyDecrypter group:g@example.com user:u@example.comrequest.time.getHours() < 17")
	if _, err := opened(t, s.URI("own")).CreateKey(t.Context(), n); err != nil {
		t.Errorf("again: %v", err)
	}

	n.Policy = []byte(`{"version": 3}`)
	before := s.Calls("SetIamPolicy")
	if _, err := opened(t, s.URI("inherits")).CreateKey(t.Context(), n); err != nil || s.Calls("SetIamPolicy") != before {
		t.Errorf("a policy without bindings was set, or %v", err)
	}

	for _, document := range []string{
		``, `{`, `[]`, `{"bindings": []}`, `{"version": 1}`, `{"version": 3, "binding": []}`, `{"version": 3, "auditConfigs": [{"service": "cloudkms.googleapis.com"}]}`,
	} {
		n.Policy = []byte(document)
		kek := opened(t, s.URI("refused"))
		if _, err := kek.CreateKey(t.Context(), n); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", document, err)
		}
		if _, err := kek.DescribeKey(t.Context()); !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("%s: a key was left behind, %v", document, err)
		}
	}
}

// TestCreateConverges: whatever is lost on the way, creating again ends with
// one key that has its policy; what others made of the policy stays.
func TestCreateConverges(t *testing.T) {
	s := gcpfake.Start(t)
	methods := []string{"CreateCryptoKey", "GetIamPolicy", "SetIamPolicy", "ListCryptoKeyVersions"}
	for _, lost := range []string{"request", "answer"} {
		for _, method := range methods {
			name := lost + "-" + method
			kek := opened(t, s.URI(name))
			stop := s.Intercept(func(_ context.Context, m string, _ proto.Message, serve func() (proto.Message, error)) (proto.Message, error) {
				if m == method && lost == "answer" {
					_, _ = serve()
				}
				if m == method {
					return nil, status.Error(codes.Unavailable, "lost")
				}
				return serve()
			})
			_, err := kek.CreateKey(t.Context(), spec("one"))
			stop()
			if !errors.Is(err, errdefs.ErrUnavailable) {
				t.Errorf("%s lost: %v, want ErrUnavailable", name, err)
			}
			made, err := kek.CreateKey(t.Context(), spec("one"))
			if err != nil || len(made.Versions) != 1 {
				t.Errorf("%s lost, then again: %+v, %v", name, made, err)
			}
			mustHave(t, s, name, defaultFor(gcpfake.Account)...)
		}
	}

	own := &iampb.Policy{Bindings: []*iampb.Binding{{Role: "roles/owner", Members: []string{"user:u@example.com"}}}}
	set := &iampb.SetIamPolicyRequest{Resource: s.KeyName("answer-SetIamPolicy"), Policy: own}
	if _, err := s.SetIamPolicy(t.Context(), set); err != nil {
		t.Fatal(err)
	}
	if _, err := opened(t, s.URI("answer-SetIamPolicy")).CreateKey(t.Context(), spec("one")); err != nil {
		t.Error(err)
	}
	mustHave(t, s, "answer-SetIamPolicy", "roles/owner user:u@example.com")
}

// TestPolicyRace: somebody sets a policy between our reading and our writing.
func TestPolicyRace(t *testing.T) {
	s := gcpfake.Start(t)
	own := &iampb.Policy{Bindings: []*iampb.Binding{{Role: "roles/owner", Members: []string{"user:u@example.com"}}}}
	raced := false
	defer s.Intercept(func(ctx context.Context, m string, _ proto.Message, serve func() (proto.Message, error)) (proto.Message, error) {
		if m == "SetIamPolicy" && !raced {
			raced = true
			if _, err := s.SetIamPolicy(ctx, &iampb.SetIamPolicyRequest{Resource: s.KeyName("one"), Policy: own}); err != nil {
				t.Error(err)
			}
		}
		return serve()
	})()
	if _, err := opened(t, s.URI("one")).CreateKey(t.Context(), spec("one")); err != nil {
		t.Error(err)
	}
	mustHave(t, s, "one", "roles/owner user:u@example.com")
}

func TestCreateRefuses(t *testing.T) {
	s := gcpfake.Start(t)
	s.CreateKey("unlabelled")
	if _, err := opened(t, s.URI("unlabelled")).CreateKey(t.Context(), kms.NewKey{}); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("a key that nobody labelled: %v, want ErrExists", err)
	}
	if len(s.Policy("unlabelled").GetBindings()) != 0 {
		t.Error("its policy was set")
	}
	signing := &kmspb.CreateCryptoKeyRequest{Parent: gcpfake.Ring, CryptoKeyId: "signing", CryptoKey: &kmspb.CryptoKey{
		Purpose: kmspb.CryptoKey_ASYMMETRIC_SIGN, Labels: spec("one").Labels,
	}}
	if _, err := s.CreateCryptoKey(t.Context(), signing); err != nil {
		t.Fatal(err)
	}
	kek := opened(t, s.URI("signing"))
	if _, err := kek.CreateKey(t.Context(), spec("one")); !errors.Is(err, errdefs.ErrExists) || !strings.Contains(err.Error(), "ASYMMETRIC_SIGN") {
		t.Errorf("a signing key: %v, want ErrExists", err)
	}
	if _, err := kek.CurrentKeyID(t.Context()); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("CurrentKeyID of a signing key: %v, want ErrInvalid", err)
	}
	elsewhere := opened(t, strings.Replace(s.URI("one"), "keyRings/cryptcsi", "keyRings/none", 1))
	if _, err := elsewhere.CreateKey(t.Context(), spec("one")); !errors.Is(err, errdefs.ErrNotFound) || !strings.Contains(err.Error(), "key ring") {
		t.Errorf("no key ring: %v, want ErrNotFound", err)
	}
	n := spec("one")
	n.RotationPeriod = time.Hour
	if _, err := opened(t, s.URI("fast")).CreateKey(t.Context(), n); !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), "24 hours") {
		t.Errorf("rotation every hour: %v, want ErrInvalid", err)
	}
}

// states returns what becomes of a key's versions.
func states(k kms.Key) []kms.VersionState {
	var all []kms.VersionState
	for _, v := range k.Versions {
		all = append(all, v.State)
	}
	return all
}

func mustDescribe(t *testing.T, kek *kms.KEK, want ...kms.VersionState) kms.Key {
	t.Helper()
	k, err := kek.DescribeKey(t.Context())
	if err != nil {
		t.Fatalf("DescribeKey: %v", err)
	}
	if !slices.Equal(states(k), want) {
		t.Errorf("versions are %v, want %v", states(k), want)
	}
	return k
}

func mustSet(t *testing.T, kek *kms.KEK, keyID string, s kms.VersionState) {
	t.Helper()
	if err := kek.SetVersion(t.Context(), keyID, s); err != nil {
		t.Fatalf("SetVersion(%q, %s): %v", keyID, s, err)
	}
}

// TestVersions walks versions through their states, more than fit on a page.
func TestVersions(t *testing.T) {
	s := gcpfake.Start(t)
	kek := opened(t, s.CreateKey("one"))
	for range 10 { // so that "10" and "2" are told apart
		s.Rotate("one")
	}
	k, err := kek.DescribeKey(t.Context())
	if err != nil || len(k.Versions) != 11 {
		t.Fatalf("%+v, %v", k, err)
	}
	for i, v := range k.Versions {
		if want := fmt.Sprintf("%s/cryptoKeyVersions/%d", s.KeyName("one"), i+1); v.KeyID != want || v.Current != (i == 10) || v.Created.IsZero() || !v.Until.IsZero() {
			t.Errorf("version %d: %+v", i, v)
		}
	}

	first, current := k.Versions[0].KeyID, k.Versions[10].KeyID
	mustSet(t, kek, first, kms.Destroyed)
	mustSet(t, kek, first, kms.Destroyed)
	k, err = kek.DescribeKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if v := k.Versions[0]; v.State != kms.Destroying || time.Until(v.Until) < 29*24*time.Hour {
		t.Errorf("after destroying: %+v", v)
	}
	if err := kek.SetVersion(t.Context(), first, kms.Disabled); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("disabling what is being destroyed: %v, want ErrState", err)
	}
	mustSet(t, kek, first, kms.Enabled)
	k, err = kek.DescribeKey(t.Context())
	if err != nil || k.Versions[0].State != kms.Enabled || !k.Versions[0].Until.IsZero() {
		t.Errorf("after taking that back: %+v, %v", k.Versions[0], err)
	}
	mustSet(t, kek, current, kms.Enabled)

	for _, tt := range []struct {
		keyID string
		state kms.VersionState
		want  error
	}{
		{current, kms.Destroyed, errdefs.ErrState},
		{current, kms.Disabled, errdefs.ErrState},
		{first, kms.Destroying, errdefs.ErrInvalid},
		{first, "", errdefs.ErrInvalid},
		{s.KeyName("two") + "/cryptoKeyVersions/1", kms.Disabled, errdefs.ErrInvalid},
		{s.KeyName("one") + "/cryptoKeyVersions/12", kms.Disabled, errdefs.ErrNotFound},
	} {
		if err := kek.SetVersion(t.Context(), tt.keyID, tt.state); !errors.Is(err, tt.want) {
			t.Errorf("SetVersion(%q, %q): %v, want %v", tt.keyID, tt.state, err, tt.want)
		}
	}
	missing := opened(t, s.URI("missing"))
	if err := missing.SetVersion(t.Context(), "", kms.Destroyed); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("SetVersion of a key that is not there: %v, want ErrNotFound", err)
	}
}

// TestWholeKey: everything of a key goes, its rotation first, and comes back.
func TestWholeKey(t *testing.T) {
	s := gcpfake.Start(t)
	kek := opened(t, s.URI("one"))
	n := spec("one")
	n.RotationPeriod = 48 * time.Hour
	made, err := kek.CreateKey(t.Context(), n)
	if err != nil || made.RotationPeriod != n.RotationPeriod {
		t.Fatalf("%+v, %v", made, err)
	}
	w := mustWrap(t, kek)
	s.Rotate("one")
	s.Rotate("one")

	mustSet(t, kek, w.KeyID, kms.Destroyed)
	mustSet(t, kek, "", kms.Disabled)
	k := mustDescribe(t, kek, kms.Destroying, kms.Disabled, kms.Disabled)
	if k.RotationPeriod != 0 {
		t.Error("the service would rotate a key that is switched off")
	}
	mustSet(t, kek, "", kms.Enabled)
	mustDescribe(t, kek, kms.Enabled, kms.Enabled, kms.Enabled)

	mustSet(t, kek, "", kms.Destroyed)
	mustSet(t, kek, "", kms.Destroyed)
	mustDescribe(t, kek, kms.Destroying, kms.Destroying, kms.Destroying)
	if _, err := kek.Unwrap(t.Context(), id, w); !errors.Is(err, errdefs.ErrDenied) {
		t.Errorf("Unwrap under a key that is being destroyed: %v, want ErrDenied", err)
	}
	mustSet(t, kek, "", kms.Enabled)
	mustUnwrap(t, kek, w)
}

// TestDestroyedForGood: nothing brings such a version back, and it hinders nothing.
func TestDestroyedForGood(t *testing.T) {
	s := gcpfake.Start(t)
	kek := opened(t, s.CreateKey("one"))
	s.Rotate("one")
	defer s.Intercept(func(_ context.Context, _ string, _ proto.Message, serve func() (proto.Message, error)) (proto.Message, error) {
		a, err := serve()
		if list, ok := a.(*kmspb.ListCryptoKeyVersionsResponse); ok {
			for _, v := range list.GetCryptoKeyVersions() {
				if strings.HasSuffix(v.GetName(), "/1") {
					v.State = kmspb.CryptoKeyVersion_DESTROYED
				}
			}
		}
		return a, err
	})()
	first := s.KeyName("one") + "/cryptoKeyVersions/1"
	mustDescribe(t, kek, kms.Destroyed, kms.Enabled)
	mustSet(t, kek, first, kms.Destroyed)
	mustSet(t, kek, "", kms.Disabled)
	mustSet(t, kek, "", kms.Enabled)
	for _, state := range []kms.VersionState{kms.Enabled, kms.Disabled} {
		if err := kek.SetVersion(t.Context(), first, state); !errors.Is(err, errdefs.ErrState) {
			t.Errorf("SetVersion(%s): %v, want ErrState", state, err)
		}
	}
}

// TestList finds our keys among others, over many pages.
func TestList(t *testing.T) {
	s := gcpfake.Start(t)
	want := map[string]string{}
	for i := range 7 {
		s.CreateKey(fmt.Sprintf("foreign-%d", i))
		cluster := fmt.Sprintf("cluster-%d", i)
		kek := opened(t, s.URI(cluster))
		made, err := kek.CreateKey(t.Context(), spec(cluster))
		if err != nil {
			t.Fatal(err)
		}
		want[made.URI] = cluster
	}
	update := &kmspb.UpdateCryptoKeyRequest{UpdateMask: mask("labels"), CryptoKey: &kmspb.CryptoKey{
		Name: s.KeyName("foreign-3"), Labels: map[string]string{"team": "a", "cryptcsi": "no"},
	}}
	if _, err := s.UpdateCryptoKey(t.Context(), update); err != nil {
		t.Fatal(err)
	}
	keys, err := opened(t, s.URI("any")).ListKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, k := range keys {
		got[k.URI] = k.Labels[kms.LabelCluster]
		if !slices.Equal(states(k), []kms.VersionState{kms.Enabled}) {
			t.Errorf("%s has versions %v", k.URI, states(k))
		}
		if strings.Contains(k.URI, "credentials") {
			t.Errorf("the URI %s says how to authenticate", k.URI)
		}
		opened(t, k.URI)
	}
	if !maps.Equal(got, want) {
		t.Errorf("ListKeys = %v, want %v", got, want)
	}
}

// TestLabel keeps the labels of others.
func TestLabel(t *testing.T) {
	s := gcpfake.Start(t)
	kek := opened(t, s.CreateKey("one"))
	update := &kmspb.UpdateCryptoKeyRequest{UpdateMask: mask("labels"), CryptoKey: &kmspb.CryptoKey{
		Name: s.KeyName("one"), Labels: map[string]string{"team": "a", kms.LabelCluster: "one", kms.LabelActive: "1"},
	}}
	if _, err := s.UpdateCryptoKey(t.Context(), update); err != nil {
		t.Fatal(err)
	}
	if err := kek.LabelKey(t.Context(), map[string]string{kms.LabelActive: "2"}); err != nil {
		t.Fatal(err)
	}
	raw, err := s.GetCryptoKey(t.Context(), &kmspb.GetCryptoKeyRequest{Name: s.KeyName("one")})
	want := map[string]string{"team": "a", kms.LabelCluster: "one", kms.LabelActive: "2"}
	if err != nil || !maps.Equal(raw.GetLabels(), want) {
		t.Errorf("labels %v, %v, want %v", raw.GetLabels(), err, want)
	}
	k := mustDescribe(t, kek, kms.Enabled)
	delete(want, "team")
	if !maps.Equal(k.Labels, want) {
		t.Errorf("DescribeKey: labels %v, want %v", k.Labels, want)
	}
}

// TestPermissions: each operation that lacks one permission of those it says
// it needs is refused by that name, and needs no other.
func TestPermissions(t *testing.T) {
	s := gcpfake.Start(t)
	kek := opened(t, s.CreateKey("one"))
	s.Rotate("one")
	w := mustWrap(t, kek)
	n := 0
	ops := map[string]func() error{
		kms.OpWrap:         func() error { _, err := kek.Wrap(t.Context(), id, random(t)); return err },
		kms.OpUnwrap:       func() error { _, err := kek.Unwrap(t.Context(), id, w); return err },
		kms.OpCurrentKeyID: func() error { _, err := kek.CurrentKeyID(t.Context()); return err },
		kms.OpDescribe:     func() error { _, err := kek.DescribeKey(t.Context()); return err },
		kms.OpRotate:       func() error { _, err := kek.RotateKey(t.Context()); return err },
		kms.OpList:         func() error { _, err := kek.ListKeys(t.Context()); return err },
		kms.OpLabel: func() error {
			return kek.LabelKey(t.Context(), map[string]string{kms.LabelActive: "1", kms.LabelCluster: "one"})
		},
		kms.OpCreate: func() error { // a new key, and one that is there
			n++
			for range 2 {
				if _, err := opened(t, s.URI(fmt.Sprintf("new-%d", n))).CreateKey(t.Context(), spec("one")); err != nil {
					return err
				}
			}
			return nil
		},
		kms.OpSetVersion: func() error {
			n++
			other := opened(t, s.URI(fmt.Sprintf("set-%d", n)))
			create := &kmspb.CreateCryptoKeyRequest{Parent: gcpfake.Ring, CryptoKeyId: fmt.Sprintf("set-%d", n), CryptoKey: &kmspb.CryptoKey{
				Purpose: kmspb.CryptoKey_ENCRYPT_DECRYPT, NextRotationTime: later(),
			}}
			if _, err := s.CreateCryptoKey(t.Context(), create); err != nil {
				t.Fatal(err)
			}
			for _, state := range []kms.VersionState{kms.Disabled, kms.Destroyed, kms.Enabled} {
				if err := other.SetVersion(t.Context(), "", state); err != nil {
					return err
				}
			}
			return nil
		},
	}
	if err := ops[kms.OpLabel](); err != nil { // so that List has something to describe
		t.Fatal(err)
	}
	all := map[string]bool{}
	for op := range kek.Permissions() {
		for p := range strings.SplitSeq(kek.Permissions()[op], ", ") {
			all[p] = true
		}
	}
	for op, do := range ops {
		needs := strings.Split(kek.Permissions()[op], ", ")
		for p := range all {
			undo := s.Deny(p)
			err := do()
			undo()
			switch {
			case slices.Contains(needs, p) && (!errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), "'"+p+"'")):
				t.Errorf("%s without %s: %v, want ErrDenied that names it", op, p, err)
			case !slices.Contains(needs, p) && err != nil:
				t.Errorf("%s without %s: %v, want no error", op, p, err)
			}
		}
	}
}
