package main

import (
	"context"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/authority"
	"github.com/cryptcsi/cryptcsi/internal/config"
	"github.com/cryptcsi/cryptcsi/kube"
)

const day = 24 * time.Hour

// certificateFlags say where an authority and what it signs are kept.
type certificateFlags struct {
	kubeconfig, namespace        string
	authority, serving, publicly string
	names                        []config.Item
	plan                         authority.Plan
}

func (f *certificateFlags) add(c *command) {
	c.StringVar(&f.kubeconfig, "kubeconfig", "", "how to reach the API server; empty is as a pod in the cluster")
	c.StringVar(&f.namespace, "namespace", "cryptcsi", "namespace of the three objects, which exist already, empty at first")
	c.StringVar(&f.authority, "authority-secret", "key-service-authority", "Secret for the authority's certificates and private keys, which nobody else reads")
	c.StringVar(&f.serving, "serving-secret", "key-service-tls", "Secret for tls.crt, tls.key and ca.crt of the service")
	c.StringVar(&f.publicly, "authority-configmap", "key-service-ca", "ConfigMap for the authority's certificates, ca.crt, for all who connect")
	c.Var(&config.List{Items: &f.names}, "dns-name", "name that the service is reached by (required); may be repeated")
	c.DurationVar(&f.plan.Life, "validity", 90*day, "how long the certificate is valid; it is renewed when a third is left")
	c.DurationVar(&f.plan.AuthorityLife, "authority-validity", 5*365*day, "how long an authority is valid; the next one comes when a third is left")
	c.DurationVar(&f.plan.Settle, "settle", day, "how long a new authority is shown to nodes before it signs")
}

// certificate makes the authority and the certificate of the service, and
// renews them. Run again it changes nothing before the time has come.
func certificate(ctx context.Context, c *command) error {
	f := &certificateFlags{}
	f.add(c)
	if err := c.parse(0, 0); err != nil {
		return err
	}
	if f.plan.Names = values(f.names); len(f.plan.Names) == 0 {
		return usageError("certificate: --dns-name is required")
	}
	if c.file.Check {
		return nil
	}
	conf, err := kube.Config(f.kubeconfig, "")
	if err != nil {
		return err
	}
	held, err := kube.ReadSecret(ctx, conf, f.namespace, f.authority)
	if err != nil {
		return err
	}
	defer held.Wipe()
	serving, err := kube.ReadSecret(ctx, conf, f.namespace, f.serving)
	if err != nil {
		return err
	}
	defer serving.Wipe()
	publicly, err := kube.ReadConfigMap(ctx, conf, f.namespace, f.publicly)
	if err != nil {
		return err
	}
	if held.Empty() && len(publicly.Get("ca.crt")) > 0 && len(serving.Get("tls.crt")) > 0 {
		return errdefs.Errorf(errdefs.ErrState, "Secret %s and ConfigMap %s hold certificates, and Secret %s no authority that has made them: leave their renewal to whoever made them "+
			"(component certificates-elsewhere), or empty the first two and apply the manifests again (docs/operations.md, Upgrade)", f.serving, f.publicly, f.authority)
	}
	old := authority.Files{Authorities: held.Get("ca.crt"), Keys: held.Get("ca.key"), Cert: serving.Get("tls.crt"), Key: serving.Get("tls.key")}
	next, done, err := f.plan.Renew(old, time.Now())
	if err != nil {
		return err
	}
	// In this order: an authority that is kept has been shown, and one that
	// signs has been kept.
	if err := publicly.Put(ctx, map[string][]byte{"ca.crt": next.Authorities}); err != nil {
		return err
	}
	if err := held.Put(ctx, map[string][]byte{"ca.crt": next.Authorities, "ca.key": next.Keys}); err != nil {
		return err
	}
	if err := serving.Put(ctx, map[string][]byte{"tls.crt": next.Cert, "tls.key": next.Key, "ca.crt": next.Authorities}); err != nil {
		return err
	}
	c.log.Info("certificates of the key service", "done", done)
	return nil
}
