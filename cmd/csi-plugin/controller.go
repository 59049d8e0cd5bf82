package main

import (
	"context"
	"io"
	"strings"

	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/kms/all"
	"github.com/cryptcsi/cryptcsi/secret"
)

// controllerFlags is the configuration of `csi-plugin controller`.
type controllerFlags struct {
	frontFlags
	guard guardFlags
}

// parseControllerFlags returns the configuration of `csi-plugin controller`.
func parseControllerFlags(args []string, stderr io.Writer) (*controllerFlags, error) {
	f := &controllerFlags{}
	fs := newFlags("controller", stderr)
	f.frontFlags.add(fs)
	f.keys.direct.Add(fs)
	f.keys.service.add(fs)
	fs.StringVar(&f.keys.kekNames, "kek-names", "", "names of the key service's KEKs that StorageClasses may choose by cryptcsi.io/kek, with commas in between; one that is not here is refused before a volume is made")
	fs.StringVar(&f.guard.name, "uninstall-guard", "", "name of the ValidatingAdmissionPolicy, and of its binding, that refuses to delete cryptcsi while there are encrypted volumes: it is kept from being deleted itself as long as there are any; empty for none")
	fs.StringVar(&f.guard.config, "kubernetes-config", "", "kubeconfig file for --uninstall-guard; empty for the pod's own service account")
	f.keys.create = true
	if err := f.parse(fs, args); err != nil {
		return nil, err
	}
	if keyclient.Protocol(f.keys.service.protocol) == keyclient.ProtocolConstellation {
		return nil, usageError("controller: --key-service-protocol=constellation: their key service keeps no records, so there is nothing to make or delete")
	}
	return f, nil
}

// controller serves the controller side of CSI until ctx ends.
func controller(ctx context.Context, args []string, stderr io.Writer) error {
	f, err := parseControllerFlags(args, stderr)
	if err != nil {
		return err
	}
	log, err := f.log.Logger(stderr)
	if err != nil {
		return usageError("controller: " + err.Error())
	}
	if f.file.Check {
		return f.tryKeys(ctx, log, stderr)
	}
	log.Info("csi-plugin controller starts", "version", version, "commit", commit, "kms", strings.Join(all.Usable(), ","))
	if err := secret.Harden(); err != nil {
		return err
	}
	m := newMeasured("", nil, nil)
	keys, closeKeys, err := f.keys.open(ctx, log, keyOptions{withoutKeys: true, kms: m.KMS, store: m.Store, service: m.keyCall, state: m.watchKeyService})
	if err != nil {
		return err
	}
	defer closeKeys()
	conn, err := dial(f.wrapped)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if err := f.guard.open(&f.frontFlags, log); err != nil {
		return err
	}
	keks, err := f.keys.keksOf(keys)
	if err != nil {
		return err
	}
	plaintext, err := f.plaintext.read()
	if err != nil {
		return err
	}
	starting, cancel := context.WithTimeout(ctx, f.startTimeout)
	defer cancel()
	c, err := driver.NewController(starting, driver.ControllerConfig{
		DriverName: f.driverName, Wrapped: conn, Profile: f.profileGiven(), Keys: keys, KEKs: keks, Plaintext: plaintext, Logger: log,
		Version: version, Manifest: map[string]string{"commit": commit, "kms": strings.Join(all.Usable(), ",")},
	})
	if err != nil {
		return err
	}
	return f.serve(ctx, log, c, conn, m)
}
