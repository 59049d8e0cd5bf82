package main

import (
	"fmt"
	"net/url"
	"regexp"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"

	"github.com/cryptcsi/cryptcsi/kms/kmstest/azurefake"
	"github.com/cryptcsi/cryptcsi/kms/kmstest/gcpfake"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// A setup is flags that work, and what can be taken away from the service
// behind them: the permission's own name, and how.
type setup struct {
	name     string
	flags    []string
	sabotage []sabotage
}

// sabotage takes a permission away until undo is called, or gives flags with
// which the same service is reached without it.
type sabotage struct {
	permission string
	on         func(t *testing.T) (undo func())
	flags      []string
}

func localStore(t *testing.T) []string { return []string{"--storage-uri", "file://" + t.TempDir()} }

func localKEK(t *testing.T) []string {
	return []string{"--kms-uri", "static://" + write(t, strings.Repeat("k", 32))}
}

func awsSetup(t *testing.T) setup {
	a := peers.LocalKMS(t)
	s := setup{name: "awskms", flags: append(localStore(t), "--kms-uri",
		"awskms:///"+a.Key(t)+"?endpoint="+url.PathEscape(a.Endpoint)+"&credentials-file="+a.CredentialsFile)}
	for _, p := range []string{"kms:Encrypt", "kms:Decrypt", "kms:DescribeKey"} {
		s.sabotage = append(s.sabotage, sabotage{permission: p, on: func(t *testing.T) func() { return a.Deny(t, p) }})
	}
	return s
}

func azureSetup(t *testing.T) setup {
	a := azurefake.Start(t, false)
	a.CreateKey(t, "kek")
	s := setup{name: "azurekeyvault", flags: append(localStore(t), "--kms-uri", a.URI("kek"),
		"--record-auth-secret-file", write(t, strings.Repeat("s", 32)))}
	for _, p := range []string{"keys/get", "keys/wrapKey", "keys/unwrapKey"} {
		s.sabotage = append(s.sabotage, sabotage{permission: p, on: func(*testing.T) func() { return a.Deny(p) }})
	}
	return s
}

func gcpSetup(t *testing.T) setup {
	g := gcpfake.Start(t)
	s := setup{name: "gcpckms", flags: append(localStore(t), "--kms-uri", g.CreateKey("kek"))}
	for _, p := range []string{"cloudkms.cryptoKeyVersions.useToEncrypt", "cloudkms.cryptoKeyVersions.useToDecrypt", "cloudkms.cryptoKeys.get"} {
		s.sabotage = append(s.sabotage, sabotage{permission: p, on: func(*testing.T) func() { return g.Deny(p) }})
	}
	return s
}

func transitSetup(t *testing.T) setup {
	v := peers.Transit(t)
	v.CreateKey(t, "kek", nil)
	s := setup{name: "transit", flags: append(localStore(t), "--kms-uri", v.URI("kek"))}
	for path, p := range map[string]string{
		"transit/encrypt/kek": "update on transit/encrypt/kek",
		"transit/decrypt/kek": "update on transit/decrypt/kek",
		"transit/keys/kek":    "read on transit/keys/kek",
	} {
		s.sabotage = append(s.sabotage, sabotage{permission: p, on: func(t *testing.T) func() {
			v.Deny(t, path, true)
			return func() { v.Deny(t, path, false) }
		}})
	}
	return s
}

func kmipSetup(t *testing.T) setup {
	k := peers.PyKMIP(t)
	s := setup{name: "kmip", flags: append(localStore(t), "--kms-uri", k.URI(k.CreateKey(t, "kek")))}
	// PyKMIP has one permission for both.
	s.sabotage = []sabotage{{permission: "Encrypt", on: func(t *testing.T) func() { return k.Deny(t, "GET") }}}
	return s
}

func k8sSetup(t *testing.T) setup {
	k := peers.Kube(t)
	namespace := k.Namespace(t)
	all := []string{"create", "get", "list", "update", "delete"}
	k.Allow(t, "keys", namespace, peers.Core("secrets", all...))
	s := setup{name: "k8s", flags: append(localKEK(t), "--storage-uri", "k8s://"+namespace+"?kubeconfig="+k.Kubeconfig(t, "keys"))}
	for _, verb := range all {
		s.sabotage = append(s.sabotage, sabotage{permission: verb + " secrets", on: func(t *testing.T) func() {
			var rules []rbacv1.PolicyRule
			for _, other := range all {
				if other != verb {
					rules = append(rules, peers.Core("secrets", other))
				}
			}
			k.Allow(t, "keys", namespace, rules...)
			return func() { k.Allow(t, "keys", namespace, peers.Core("secrets", all...)) }
		}})
	}
	return s
}

func s3Setup(t *testing.T) setup {
	s3 := peers.VersityGW(t)
	kek, bucket := localKEK(t), s3.Bucket(t)
	s := setup{name: "s3", flags: append(kek, "--storage-uri", s3.URI(bucket))}
	for _, p := range []string{"s3:PutObject", "s3:GetObject", "s3:DeleteObject", "s3:ListBucket"} {
		s.sabotage = append(s.sabotage, sabotage{permission: p, flags: append(kek[:2:2], "--storage-uri", peers.DenyS3(t, s3, p).URI(bucket))})
	}
	return s
}

func gsSetup(t *testing.T) setup {
	gs := peers.FakeGCS(t)
	kek, bucket := localKEK(t), gs.Bucket(t)
	s := setup{name: "gs", flags: append(kek, "--storage-uri", gs.URI(bucket))}
	for _, p := range []string{"storage.objects.create", "storage.objects.get", "storage.objects.delete", "storage.objects.list"} {
		s.sabotage = append(s.sabotage, sabotage{permission: p, flags: append(kek[:2:2], "--storage-uri", peers.DenyGCS(t, gs, p).URI(bucket))})
	}
	return s
}

// TestCheckNamesWhatIsMissing: a permission that serving needs is taken away,
// one at a time, and check says its name; before and after, all is well.
func TestCheckNamesWhatIsMissing(t *testing.T) {
	n := 0
	for _, start := range []func(*testing.T) setup{awsSetup, azureSetup, gcpSetup, transitSetup, kmipSetup, k8sSetup, s3Setup, gsSetup} {
		s := start(t)
		args := with(s.flags, "check")
		must(t, args, "all [0-9]+ steps are right")
		for _, sab := range s.sabotage {
			n++
			t.Run(fmt.Sprintf("%s without %s", s.name, sab.permission), func(t *testing.T) {
				args := args
				if sab.on != nil {
					defer sab.on(t)()
				} else {
					args = with(sab.flags, "check")
				}
				mustFail(t, args, `steps failed; missing: .*`+regexp.QuoteMeta(sab.permission))
			})
		}
		must(t, args, "all [0-9]+ steps are right")
	}
	if n < 20 {
		t.Errorf("only %d set-ups were sabotaged", n)
	}
}

// TestCheckFindsOtherFaults: what is no missing permission is told in words.
func TestCheckFindsOtherFaults(t *testing.T) {
	a := azurefake.Start(t, false)
	a.CreateKey(t, "kek")
	azure := append(localStore(t), "--kms-uri", a.URI("kek"))
	mustFail(t, with(azure, "check"), "record authenticator +FAILED", "--record-auth-secret-file")

	deaf := peers.DeafS3(t)
	mustFail(t, with(append(localKEK(t), "--storage-uri", deaf.URI(deaf.Bucket(t))), "check"), "create refuses an existing object +FAILED", "ignores If-None-Match")
	s3 := peers.VersityGW(t)
	flags := append(localKEK(t), "--storage-uri", s3.URI("not-made-yet"))
	mustFail(t, with(flags, "check"), "key-service store create")
	must(t, with(flags, "store create"), "is there")
	must(t, with(flags, "check"), "all .* steps are right")

	g := gcpfake.Start(t)
	mustFail(t, with(append(localStore(t), "--kms-uri", g.URI("no-such-key")), "check"), "wrap +FAILED")
	mustFail(t, with(append(localStore(t), "--kms-uri", strings.ReplaceAll(g.URI("kek"), url.PathEscape(g.Endpoint), url.PathEscape("http://"+peers.Addr(t)))), "check"), "wrap +FAILED")
	mustFail(t, with(append(localKEK(t), "--storage-uri", "file:///does/not/exist"), "check"), "there is no directory")
	mustFail(t, with(localKEK(t), "check"), "give --storage-uri")
}
