package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/config"
	"github.com/cryptcsi/cryptcsi/kube"
	"github.com/cryptcsi/cryptcsi/secret"
)

const randomSize = 32 // bytes of each file

// randomSecretFlags say where a random secret lies, and where its mark.
type randomSecretFlags struct {
	kubeconfig, namespace, secret, markNamespace, mark string
	files                                              []config.Item
}

func (f *randomSecretFlags) add(c *command) {
	c.StringVar(&f.kubeconfig, "kubeconfig", "", "how to reach the API server; empty is as a pod in the cluster")
	c.StringVar(&f.namespace, "namespace", "cryptcsi", "namespace of the Secret")
	c.StringVar(&f.secret, "secret", "", "Secret for the files; it exists already, empty at first (required)")
	c.Var(&config.List{Items: &f.files}, "file", "file of 32 random bytes, e.g. master-secret (required); may be repeated")
	c.StringVar(&f.markNamespace, "mark-namespace", "cryptcsi-keys", "namespace of the ConfigMap: where the records are, if they are in the cluster")
	c.StringVar(&f.mark, "mark", "", "ConfigMap for the files' fingerprint; it exists already, empty at first (required)")
}

// randomSecret makes a secret that records depend on, once: beside them it
// leaves a mark by which a lost or another one is known, so that no second one
// is ever made for records that need the first.
func randomSecret(ctx context.Context, c *command) error {
	f := &randomSecretFlags{}
	f.add(c)
	if err := c.parse(0, 0); err != nil {
		return err
	}
	if f.secret == "" || f.mark == "" || len(f.files) == 0 {
		return usageError("secret create: --secret, --file and --mark are required")
	}
	if c.file.Check {
		return nil
	}
	if err := secret.Harden(); err != nil {
		return err
	}
	conf, err := kube.Config(f.kubeconfig, "")
	if err != nil {
		return err
	}
	held, err := kube.ReadSecret(ctx, conf, f.namespace, f.secret)
	if err != nil {
		return err
	}
	defer held.Wipe()
	mark, err := kube.ReadConfigMap(ctx, conf, f.markNamespace, f.mark)
	if err != nil {
		return err
	}
	marked := string(mark.Get("sha256"))
	names := values(f.files)
	if held.Empty() {
		if marked != "" {
			return errdefs.Errorf(errdefs.ErrState, "the secret is gone: Secret %s/%s is empty, and there was one that records were made with (ConfigMap %s/%s). "+
				"Restore it from its backup (docs/operations.md, Restore); another one would open no volume", f.namespace, f.secret, f.markNamespace, f.mark)
		}
		if err := fill(ctx, held, names); err != nil {
			return err
		}
		c.log.Info("made a secret; keep a copy outside the cluster: no volume opens without it", "secret", f.namespace+"/"+f.secret)
	}
	if slices.ContainsFunc(names, func(name string) bool { return len(held.Get(name)) == 0 }) {
		return errdefs.Errorf(errdefs.ErrState, "Secret %s/%s has not all of the files %s: restore it from its backup, or empty it if it was never used",
			f.namespace, f.secret, strings.Join(names, ", "))
	}
	is := fingerprint(held, names)
	if marked != "" && marked != is {
		return errdefs.Errorf(errdefs.ErrState, "Secret %s/%s is not the one that records were made with (ConfigMap %s/%s): restore the right one from its backup; "+
			"if this is the right one, and that was made by mistake, empty the ConfigMap (docs/operations.md, Restore)",
			f.namespace, f.secret, f.markNamespace, f.mark)
	}
	return mark.Put(ctx, map[string][]byte{"sha256": []byte(is)})
}

// fill writes random files.
func fill(ctx context.Context, held *kube.Files, names []string) error {
	random := secret.Random(len(names) * randomSize)
	defer random.Wipe()
	files := map[string][]byte{}
	for i, name := range names {
		files[name] = random.Expose()[i*randomSize : (i+1)*randomSize]
	}
	return held.Put(ctx, files)
}

// fingerprint tells secrets apart, and nothing of what they are: they are
// random.
func fingerprint(held *kube.Files, names []string) string {
	h := sha256.New()
	h.Write([]byte("cryptcsi secret v1"))
	for _, name := range slices.Sorted(slices.Values(names)) {
		for _, part := range [][]byte{[]byte(name), held.Get(name)} {
			h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(part)))) //nolint:gosec // a Secret has at most 1 MiB
			h.Write(part)
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}
