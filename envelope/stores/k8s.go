package stores

import (
	"context"
	"net/url"
	"path/filepath"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kube"
)

// openK8s opens the Secrets of a namespace, see kube.Secrets:
//
//	k8s://NAMESPACE?prefix=prod-
//	k8s://NAMESPACE?kubeconfig=/etc/cryptcsi/kubeconfig&context=admin
//
// Without kubeconfig it is the cluster in which this runs, with the token of
// the pod's service account. Secrets are named by prefix and object name.
func openK8s(_ context.Context, u *url.URL) (envelope.Store, error) {
	params, err := kms.Params(u, "kubeconfig", "context", "prefix")
	if err != nil {
		return nil, err
	}
	file, given := params["kubeconfig"]
	switch {
	case u.Opaque != "" || u.Path != "" && u.Path != "/" || u.Port() != "" || u.Host == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the URI must name a namespace and nothing else: k8s://NAMESPACE")
	case given && !filepath.IsAbs(file):
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be the absolute path of a file", "kubeconfig")
	}
	config, err := kube.Config(file, params["context"])
	if err != nil {
		return nil, err
	}
	secrets, err := kube.NewSecrets(config, u.Host, params["prefix"])
	if err != nil {
		return nil, err
	}
	return secrets, nil
}
