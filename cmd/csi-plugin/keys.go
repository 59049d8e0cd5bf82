package main

import (
	"context"
	"errors"
	"flag"
	"log/slog"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/internal/keyconfig"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/kms"
)

// keys is where a node's DEKs come from: a key service, or a KMS and a store.
type keys interface {
	driver.Keys
	driver.Creator
	Close() error
}

// allKeys is the same for a controller too.
type allKeys interface {
	keys
	driver.ControllerKeys
}

// keyFlags say where a verb's DEKs come from: a key service, or KMS and store.
type keyFlags struct {
	direct            keyconfig.Flags
	service           keyServiceFlags
	create, keepAlive bool
	kekNames          string // a controller's
}

func (f *keyFlags) add(fs *flag.FlagSet) {
	f.direct.Add(fs)
	f.service.add(fs)
	fs.BoolVar(&f.create, "create-keys", false, "let this node create DEKs for volumes without one (no controller proxy: static volumes, demo, tests)")
}

// keyServiceFlags say how to reach the key service.
type keyServiceFlags struct {
	address, ca, cert, key, token, name, protocol string
	plaintext                                     bool
	timeout                                       time.Duration
}

func (f *keyServiceFlags) add(fs *flag.FlagSet) {
	fs.StringVar(&f.address, "key-service", "", "key service to get DEKs from, dns:///host:port or unix:///path.sock; excludes --kms-uri and --storage-uri")
	fs.StringVar(&f.ca, "key-service-ca-file", "", "authorities that sign its certificate")
	fs.StringVar(&f.cert, "key-service-cert-file", "", "this node's certificate; read again when it changes")
	fs.StringVar(&f.key, "key-service-key-file", "", "its key")
	fs.StringVar(&f.token, "key-service-token-file", "", "projected service-account token to show instead of, or besides, a certificate; read again when it changes")
	fs.StringVar(&f.name, "key-service-name", "", "name in the service's certificate, where that is not the address's host")
	fs.StringVar(&f.protocol, "key-service-protocol", "", `"constellation" asks Constellation's key service, for volumes that it made`)
	fs.DurationVar(&f.timeout, "key-service-timeout", 25*time.Second, "how long one attempt of a call may take; node makes four")
	fs.BoolVar(&f.plaintext, "key-service-insecure-plaintext", false, "reach it without TLS over the network")
}

// given says whether the flags name any source of keys.
func (f *keyFlags) given() bool {
	kek, store := f.direct.Given()
	return kek || store || f.service.address != ""
}

// check says whether the flags of that verb name one source of keys.
func (f *keyFlags) check(verb string) error {
	kek, store := f.direct.Given()
	direct := kek || store
	if _, err := f.names(); err != nil {
		return usageError(verb + ": --kek-names: " + err.Error())
	}
	switch {
	case direct && f.kekNames != "":
		return usageError(verb + ": --kek-names goes with --key-service: --kms-uri NAME=… names KEKs")
	case f.service.address != "" && direct:
		return usageError(verb + ": --key-service excludes --kms-uri and --storage-uri")
	case f.service.address == "" && !direct:
		return usageError(verb + ": where keys come from is missing: --key-service, or --kms-uri and --storage-uri")
	case direct:
		if err := f.direct.Check(); err != nil {
			return usageError(verb + ": " + err.Error())
		}
	}
	return nil
}

// names are those of --kek-names.
func (f *keyFlags) names() ([]string, error) {
	if f.kekNames == "" {
		return nil, nil
	}
	names := strings.Split(f.kekNames, ",")
	for _, name := range names {
		if err := dek.CheckKEK(name); err != nil {
			return nil, err
		}
	}
	return names, nil
}

// keksOf are the names of KEKs that may be asked for: a keyring's own, or those
// that the flags say of the key service's.
func (f *keyFlags) keksOf(k keys) ([]string, error) {
	if ring, ok := k.(*envelope.Keyring); ok {
		return ring.KEKNames(), nil
	}
	return f.names()
}

// keyOptions are what opening keys takes besides its flags. The zero value works.
type keyOptions struct {
	attempts  int  // of each call to the key service; 0 is its client's own
	checkOnly bool // the configuration is tried, nothing is used
	// withoutKeys: the key service's answers need no keys in them.
	withoutKeys bool
	kms         func(kms.Call)
	store       keyconfig.Observe
	service     func(keyclient.Call)
	state       func(func() string) // gets what tells the key service's client's state
}

// open opens what the flags name; the function closes it.
func (f *keyFlags) open(ctx context.Context, log *slog.Logger, o keyOptions) (allKeys, func(), error) {
	if f.service.address == "" {
		return f.openDirect(ctx, log, o)
	}
	c, err := keyclient.New(keyclient.Config{
		Address: f.service.address, CAFile: f.service.ca, CertFile: f.service.cert, KeyFile: f.service.key,
		TokenFile: f.service.token, ServerName: f.service.name, Protocol: keyclient.Protocol(f.service.protocol),
		AllowPlaintextOverTheNetwork: f.service.plaintext, Timeout: f.service.timeout, Attempts: o.attempts, Observe: o.service,
		WithoutKeys: o.withoutKeys,
	})
	if err != nil {
		return nil, nil, err
	}
	if o.state != nil {
		o.state(c.State)
	}
	return c, func() { _ = c.Close() }, nil
}

// openDirect opens KEKs and stores, as one Keyring: direct mode.
func (f *keyFlags) openDirect(ctx context.Context, log *slog.Logger, o keyOptions) (_ allKeys, closeAll func(), err error) {
	opened, err := f.direct.Open(ctx, keyconfig.Options{KMS: kms.Options{Observe: o.kms}, Store: o.store}, log)
	if err != nil {
		return nil, nil, err
	}
	if f.create && !o.checkOnly {
		err = opened.Probe(ctx, log)
	}
	keks := opened.Opened()
	var keyring *envelope.Keyring
	if err == nil {
		keyring, err = opened.Keyring(envelope.Options{Survives: func(id dek.ID, until time.Time) {
			log.Warn("a deleted key can still be unwrapped from an earlier version of its record, which the store keeps", "dek", id, "until", until)
		}})
	}
	if err != nil {
		return nil, nil, errors.Join(err, opened.Close())
	}
	if f.keepAlive && !o.checkOnly {
		go keyconfig.KeepAlive(ctx, keks, log)
	}
	return keyring, func() { _ = errors.Join(keyring.Close(), opened.Close()) }, nil
}
