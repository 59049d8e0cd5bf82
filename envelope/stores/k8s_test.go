package stores_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/envelope/envelopetest"
	"github.com/cryptcsi/cryptcsi/envelope/stores"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

func TestK8s(t *testing.T) {
	server := peers.Kube(t)
	kubeconfig := server.Kubeconfig(t, "store")
	envelopetest.RunStore(t, func(t *testing.T) (a, b envelope.Store) {
		namespace := server.Namespace(t)
		server.Allow(t, "store", namespace,
			peers.Core("secrets", "create", "get", "list", "update", "delete"), peers.Core("namespaces", "get"))
		open := func(prefix string) envelope.Store {
			s, err := stores.Mux().Open(t.Context(), "k8s://"+namespace+"?context=test&kubeconfig="+kubeconfig+"&prefix="+prefix)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		// Two more stores in the same namespace are not in the way.
		for _, prefix := range []string{"", "prod", "prod-1-"} {
			for _, name := range []string{"one-of-another", "dek-00"} {
				if err := open(prefix).Create(t.Context(), name, []byte("x")); err != nil {
					t.Fatal(err)
				}
			}
		}
		return open("prod-"), open("prod-")
	})
}

func TestK8sURI(t *testing.T) {
	file := filepath.Join(t.TempDir(), "kubeconfig")
	const s = "S3CR3T"
	if err := os.WriteFile(file, []byte("users: [{name: a, user: {token: "+s+"}}]\ncurrent-context: b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for uri, want := range map[string]string{
		"k8s://":                                "must name a namespace",
		"k8s:ns":                                "must name a namespace",
		"k8s://ns/name":                         "must name a namespace",
		"k8s://ns:1":                            "must name a namespace",
		"k8s://ns?token=" + s:                   `"token" is not known`,
		"k8s://ns":                              "name a kubeconfig file",
		"k8s://ns?context=a":                    "without kubeconfig",
		"k8s://ns?kubeconfig=":                  "absolute path",
		"k8s://ns?kubeconfig=config":            "absolute path",
		"k8s://ns?kubeconfig=/no/such":          "/no/such",
		"k8s://ns?kubeconfig=" + file:           "is not usable",
		"k8s://ns?context=x&kubeconfig=" + file: "is not usable",
	} {
		_, err := stores.Mux().Open(t.Context(), uri)
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("Open(%q) = %v, want ErrInvalid with %q", uri, err, want)
		}
		if err != nil && strings.Contains(err.Error(), s) {
			t.Errorf("Open(%q) shows a secret: %v", uri, err)
		}
	}
}
