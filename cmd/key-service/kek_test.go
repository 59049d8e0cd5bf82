package main

import (
	"encoding/json"
	"log/slog"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/internal/keyconfig"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/all"
	"github.com/cryptcsi/cryptcsi/kms/kmstest/azurefake"
	"github.com/cryptcsi/cryptcsi/kms/kmstest/gcpfake"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// TestLifeOfAKEK: made, rotated, its records moved, its old version retired,
// with each service that keeps versions one can disable.
func TestLifeOfAKEK(t *testing.T) {
	g := gcpfake.Start(t)
	flags := append(localStore(t), "--kms-uri", g.URI("kek"))
	mustFail(t, with(flags, "check"), "FAILED")
	mustFail(t, with(flags, "kek describe"), "not")
	must(t, with(flags, "kek create", "--cluster-id", "one", "--rotation-period", "8760h"),
		"label +cryptcsi-cluster=one", "rotation +every 365 days", "cryptoKeyVersions/1 +enabled, current")
	must(t, with(flags, "kek create", "--cluster-id-file", write(t, "one\n")), "cryptcsi-cluster=one")
	mustFail(t, with(flags, "kek create", "--cluster-id", "two"), "exists")
	must(t, with(flags, "check"), "all .* steps are right")

	must(t, with(flags, "dek create", "d/one"), "prepared")
	must(t, with(flags, "dek create", "d/two"), "prepared")
	must(t, with(flags, "kek rotate"), "cryptoKeyVersions/2 +enabled, current", "key-service rewrap")
	must(t, with(flags, "kek versions"), "cryptoKeyVersions/1 +enabled +.*Z +2\n", "cryptoKeyVersions/2 +enabled, current +.*Z +0\n")
	must(t, with(flags, "kek retire", "--yes"), "keep +.*cryptoKeyVersions/1: 2 records")
	mustFail(t, with(append(flags[2:4:4], localStore(t)...), "kek retire", "--yes"), "is it the right store")
	must(t, with(flags, "rewrap", "d/one"), "rewrapped 1 of 1")
	must(t, with(flags, "kek retire", "--yes"), "keep +.*cryptoKeyVersions/1: 1 records")
	must(t, with(flags, "rewrap"), "rewrapped 2 of 2")
	must(t, with(flags, "kek retire"), "would be +disabled: .*cryptoKeyVersions/1")
	must(t, with(flags, "kek retire", "--destroy", "--yes"), "keep .*cryptoKeyVersions/1: it is not disabled yet")
	must(t, with(flags, "kek versions"), "cryptoKeyVersions/1 +enabled")
	must(t, with(flags, "kek retire", "--yes"), "disabled +.*cryptoKeyVersions/1")
	must(t, with(flags, "kek versions"), "cryptoKeyVersions/1 +disabled", "cryptoKeyVersions/2 +enabled, current +.*Z +2\n")
	must(t, with(flags, "kek retire", "--destroy", "--yes"), "destroyed +.*cryptoKeyVersions/1")
	must(t, with(flags, "dek delete", "d/one"), "would be deleted") // it still opens
}

// label says when a KEK was last in use.
func label(t *testing.T, uri string, lastUse time.Time) {
	t.Helper()
	kek, err := all.Mux().Open(t.Context(), uri)
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	if err := keyconfig.LabelActive(t.Context(), kek, lastUse); err != nil {
		t.Fatal(err)
	}
}

// TestOneKEKOfAFleet: a key that nobody labels as in use is found and pruned,
// those in use and those that nobody ever labelled are not.
func TestOneKEKOfAFleet(t *testing.T) {
	g := gcpfake.Start(t)
	at := func(id string, lastUse time.Time) {
		t.Helper()
		must(t, with([]string{"--kms-uri", g.URI(id)}, "kek create", "--cluster-id", id))
		label(t, g.URI(id), lastUse)
	}
	at("ours", time.Now().Add(-30*24*time.Hour))
	at("gone", time.Now().Add(-30*24*time.Hour))
	at("alive", time.Now().Add(-time.Hour))
	g.CreateKey("strange") // without our labels
	flags := []string{"--kms-uri", g.URI("ours")}

	must(t, with(flags, "kek list"), `(?m)^gone +.*Z +true +enabled`, `(?m)^alive +.*Z +false +enabled`)
	must(t, with(flags, "kek prune"), `would be +disabled: .*cryptoKeys/gone\S* \(cluster gone`)
	if out := must(t, with(flags, "kek prune", "--yes"), `disabled +.*cryptoKeys/gone`); strings.Contains(out, "alive") || strings.Contains(out, "strange") || strings.Contains(out, "ours") {
		t.Errorf("prune took too much:\n%s", out)
	}
	must(t, with(flags, "kek list"), `(?m)^gone +.*Z +true +disabled`, `(?m)^ours +.*Z +true +enabled`, `(?m)^alive .* enabled`)
	both := append(slices.Clip(flags), "--kms-uri", g.URI("former"))
	at("former", time.Now().Add(-30*24*time.Hour))
	if out := must(t, with(both, "kek prune", "--yes")); strings.Contains(out, "former") {
		t.Errorf("prune takes a KEK that is configured:\n%s", out)
	}
	if code, _ := keyService(t, with(flags, "kek prune", "--older-than", "1h")...); code != 2 {
		t.Error("an --older-than below the keep-alive's period is accepted")
	}
	must(t, with(flags, "kek keep-alive"))
	must(t, with(flags, "kek list"), `(?m)^ours +.*Z +false +enabled`)
}

// TestKeyPolicy: a policy document reaches the KMS as it is.
func TestKeyPolicy(t *testing.T) {
	g := gcpfake.Start(t)
	policy, err := json.Marshal(map[string]any{"version": 3, "bindings": []any{map[string]any{
		"role": "roles/cloudkms.cryptoKeyEncrypterDecrypter", "members": []string{"user:somebody@example.com"},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	must(t, with([]string{"--kms-uri", g.URI("kek")}, "kek create", "--cluster-id", "one", "--policy-file", write(t, string(policy))))
	if got := g.Policy("kek").String(); !strings.Contains(got, "user:somebody@example.com") {
		t.Errorf("the policy is %s", got)
	}
}

// TestKEKsOfOtherServices: create, rotate, rewrap, retire where the service
// keeps its versions otherwise.
func TestKEKsOfOtherServices(t *testing.T) {
	a, v := peers.LocalKMS(t), peers.Transit(t)
	for name, uri := range map[string]string{
		"awskms":  "awskms:///alias/kek?region=" + a.Region + "&endpoint=" + url.PathEscape(a.Endpoint) + "&credentials-file=" + a.CredentialsFile,
		"transit": v.URI("new"),
		"pkcs11":  peers.SoftHSM(t).URI("new"),
		"kmip":    peers.PyKMIP(t).NameURI("new"),
		"azure":   azurefake.Start(t, false).URI("new"),
	} {
		t.Run(name, func(t *testing.T) {
			flags := append(localStore(t), "--kms-uri", uri, "--record-auth-secret-file", write(t, strings.Repeat("s", 32)))
			must(t, with(flags, "kek create", "--cluster-id", "one"), "current")
			must(t, with(flags, "check"), "all .* steps are right")
			must(t, with(flags, "dek create", "d/one"), "prepared")
			must(t, with(flags, "kek rotate"), "current")
			must(t, with(flags, "rewrap"), "rewrapped 1 of 1")
			versions := must(t, with(flags, "kek versions"), `, current +\S.* 1\n`)
			if strings.Count(versions, "\n") < 3 && name != "awskms" {
				t.Errorf("one version after rotation:\n%s", versions)
			}
			must(t, with(flags, "dek delete", "d/one"), "would be deleted")
		})
	}
}

// TestKeepAlive: a KEK is labelled at once.
func TestKeepAlive(t *testing.T) {
	g := gcpfake.Start(t)
	must(t, with([]string{"--kms-uri", g.URI("kek")}, "kek create", "--cluster-id", "one"))
	kek, err := all.Mux().Open(t.Context(), g.URI("kek"))
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	if err := kek.LabelKey(t.Context(), map[string]string{kms.LabelActive: "1"}); err != nil {
		t.Fatal(err)
	}
	before := g.Calls("UpdateCryptoKey")
	done := make(chan struct{})
	go func() { keyconfig.KeepAlive(t.Context(), []*kms.KEK{kek}, slog.New(slog.DiscardHandler)); close(done) }()
	for g.Calls("UpdateCryptoKey") == before {
		time.Sleep(time.Millisecond)
	}
	key, err := kek.DescribeKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if n, err := strconv.ParseInt(key.Labels[kms.LabelActive], 10, 64); err != nil || time.Since(time.Unix(n, 0)) > time.Minute {
		t.Errorf("labels %v", key.Labels)
	}
}

// TestKEKsByName: each verb works on the KEK that --kek names, records go to the
// one that they name, and nothing is retired or pruned that a record needs.
func TestKEKsByName(t *testing.T) {
	g := gcpfake.Start(t)
	flags := append(localStore(t), "--kms-uri", g.URI("plain"), "--kms-uri", "gold="+g.URI("gold"))
	must(t, with(flags, "kek create", "--cluster-id", "one"), "cryptoKeys/plain")
	must(t, with(flags, "kek create", "--kek", "gold", "--cluster-id", "one"), "cryptoKeys/gold")
	mustFail(t, with(flags, "kek create", "--kek", "lead", "--cluster-id", "one"), `no KEK is named "lead"`)
	must(t, with(flags, "dek create", "d/plain"), "prepared")
	must(t, with(flags, "dek create", "--kek", "gold", "d/gold"), "prepared")
	mustFail(t, with(flags, "dek create", "--kek", "lead", "d/lead"), `no KEK is named "lead"`)
	must(t, with(flags, "dek list"), `d/gold +prepared .* gold +.*cryptoKeys/gold/`, `d/plain +prepared .* - +.*cryptoKeys/plain/`)

	must(t, with(flags, "kek rotate", "--kek", "gold"), "cryptoKeys/gold/cryptoKeyVersions/2 +enabled, current")
	must(t, with(flags, "kek versions", "--kek", "gold"), "cryptoKeyVersions/1 +enabled +.*Z +1\n", "cryptoKeyVersions/2 +enabled, current +.*Z +0\n")
	must(t, with(flags, "kek retire", "--kek", "gold", "--yes"), "keep +.*gold/cryptoKeyVersions/1: 1 records")
	unnamed := append(slices.Clip(flags[:len(flags)-2]), "--kms-uri", g.URI("gold"))
	mustFail(t, with(unnamed, "kek retire", "--yes"), `d/gold names the KEK "gold", which is not configured`)
	mustFail(t, with(unnamed, "rewrap"), `no KEK is named "gold"`, "rewrapped 1 of 2")

	// The first KEK is another now: what names gold stays with gold.
	turned := append(slices.Clip(flags[:2]), "--kms-uri", "gold="+g.URI("gold"), "--kms-uri", g.URI("plain"))
	must(t, with(turned, "rewrap"), "rewrapped 2 of 2")
	must(t, with(turned, "dek list"), `d/gold .*gold/cryptoKeyVersions/2`, `d/plain .*gold/cryptoKeyVersions/2`)
	must(t, with(flags, "rewrap"), "rewrapped 2 of 2")
	must(t, with(flags, "dek list"), `d/gold .*gold/cryptoKeyVersions/2`, `d/plain .*plain/cryptoKeyVersions/1`)
	must(t, with(flags, "kek retire", "--kek", "gold", "--yes"), "disabled +.*gold/cryptoKeyVersions/1")
	must(t, with(flags, "dek delete", "d/gold"), "would be deleted") // it still opens

	// Long abandoned, as their labels say, and all in one place.
	for _, id := range []string{"plain", "gold", "needed", "gone"} {
		if id == "needed" || id == "gone" {
			must(t, with([]string{"--kms-uri", g.URI(id)}, "kek create", "--cluster-id", id))
		}
		label(t, g.URI(id), time.Now().Add(-30*24*time.Hour))
	}
	must(t, with(append(slices.Clip(flags), "--kms-uri", "more="+g.URI("needed")), "dek create", "--kek", "more", "d/more"), "prepared")
	mustFail(t, with(flags, "kek prune", "--yes"), `names the KEK "more", which is not configured`)
	misnamed := append(slices.Clip(flags), "--kms-uri", "more="+g.URI("plain"))
	for _, kek := range []string{"", "gold"} {
		code, out := keyService(t, with(misnamed, "kek prune", "--yes", "--kek", kek)...)
		if code != 1 || !strings.Contains(out, "1 records refer to its version") || strings.Contains(out, "disabled  "+g.URI("needed")) {
			t.Errorf("prune beside %q of a KEK that a record needs: exit code %d:\n%s", kek, code, out)
		}
	}
	must(t, with(flags[2:], "kek list"), `(?m)^needed +.* enabled`, `(?m)^gone +.* disabled`, `(?m)^one +.* enabled .*cryptoKeys/gold`, `(?m)^one +.* enabled .*cryptoKeys/plain`)
}
