package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/config"
	"github.com/cryptcsi/cryptcsi/internal/grpcserver"
	"github.com/cryptcsi/cryptcsi/internal/keyconfig"
	"github.com/cryptcsi/cryptcsi/keyservice"
)

const (
	// attemptTime bounds one attempt of an operator.
	attemptTime = 2 * time.Minute
	// deliverTime is how long the answer may take on its way.
	deliverTime = 15 * time.Second
)

// recoveryFlags say where and by whom a key may be brought.
type recoveryFlags struct {
	address, cert, key, clientCA, trustDomain string
	operators                                 []config.Item
}

func (f *recoveryFlags) add(fs *flag.FlagSet) {
	fs.StringVar(&f.address, "recovery-listen", "", "address, e.g. :7444, on which an operator may bring the key (key-service recover) while it cannot be had otherwise")
	fs.StringVar(&f.cert, "recovery-cert-file", "", "certificate to serve there with; read again when it changes")
	fs.StringVar(&f.key, "recovery-key-file", "", "its key")
	fs.StringVar(&f.clientCA, "recovery-client-ca-file", "", "authorities that sign operators' certificates")
	fs.StringVar(&f.trustDomain, "recovery-trust-domain", "", "SPIFFE trust domain of operators' certificates; empty refuses SPIFFE IDs")
	fs.Var(&config.List{Items: &f.operators}, "recovery-operator-identity", "common name or SPIFFE ID of an operator's certificate; may be repeated")
}

func (f *recoveryFlags) on() bool { return f.address != "" }

// check says what is missing, or given for nothing.
func (f *recoveryFlags) check() error {
	parts := []bool{f.cert != "", f.key != "", f.clientCA != "", len(f.operators) > 0}
	switch {
	case f.on() && slices.Contains(parts, false):
		return usageError("open: --recovery-listen needs --recovery-cert-file, --recovery-key-file, --recovery-client-ca-file and --recovery-operator-identity")
	case !f.on() && (slices.Contains(parts, true) || f.trustDomain != ""):
		return usageError("open: --recovery-listen is missing: the other --recovery flags do nothing without it")
	}
	return nil
}

// options are those of the gRPC server: the key service's, and mutual TLS. None
// where there is no recovery.
func (f *recoveryFlags) options(log *slog.Logger) ([]grpc.ServerOption, error) {
	if !f.on() {
		return nil, nil
	}
	var conf *tls.Config
	conf, err := keyservice.TLSFiles{Cert: f.cert, Key: f.key, ClientCA: f.clientCA, Log: log}.Config()
	if err != nil {
		return nil, fmt.Errorf("--recovery-listen: %w", err)
	}
	return append(keyservice.ServerOptions(), grpc.Creds(credentials.NewTLS(conf))), nil
}

// listen listens for operators. serve answers them until ctx ends, and after
// that those who were asking.
func (f *recoveryFlags) listen(ctx context.Context, o *opener, keys *keyconfig.Flags) (serve func(ctx context.Context) error, err error) {
	options, err := f.options(o.log)
	if err != nil {
		return nil, err
	}
	server := grpcserver.New(grpcserver.Config{Logger: o.log, Drain: deliverTime, HideRequests: true, Options: options})
	r := &recovery{opener: o, keys: keys, certificates: keyservice.Certificates{TrustDomain: f.trustDomain}}
	for _, i := range f.operators {
		r.operators = append(r.operators, i.Value)
	}
	keyservicev1.RegisterRecoveryServer(server, r)
	lis, err := (&net.ListenConfig{}).Listen(ctx, "tcp", f.address)
	if err != nil {
		return nil, fmt.Errorf("--recovery-listen: %w", err)
	}
	o.log.Info("an operator may bring the key: key-service recover", "address", lis.Addr().String(), "dek", o.id, "operators", r.operators)
	return func(ctx context.Context) error { return server.Serve(ctx, lis) }, nil
}

// recovery answers operators.
type recovery struct {
	keyservicev1.UnimplementedRecoveryServer
	opener       *opener
	keys         *keyconfig.Flags
	certificates keyservice.Certificates
	operators    []string
	busy         sync.Mutex // held while an attempt is under way
}

// Recover tries what an operator brings. Each attempt is a line in the log.
func (r *recovery) Recover(ctx context.Context, req *keyservicev1.RecoverRequest) (*keyservicev1.RecoverResponse, error) {
	defer keyservice.WipeGiven(req)
	who, err := r.admit(ctx)
	if err == nil {
		err = r.attempt(ctx, req)
	}
	from := ""
	if p, ok := peer.FromContext(ctx); ok {
		from = p.Addr.String()
	}
	if err != nil {
		r.opener.log.Warn("recovery", "identity", who, "peer", from, "dek", r.opener.id, "opened", false, "error", err)
		return nil, err
	}
	r.opener.log.Info("recovery", "identity", who, "peer", from, "dek", r.opener.id, "opened", true)
	return &keyservicev1.RecoverResponse{DekId: string(r.opener.id), Mapping: r.opener.volume.Name}, nil
}

// admit says who is asking, and whether that is an operator.
func (r *recovery) admit(ctx context.Context) (string, error) {
	who, err := r.certificates.Identify(ctx)
	switch {
	case errors.Is(err, errdefs.ErrDenied):
		return "", err
	case err != nil:
		return "", errdefs.Errorf(errdefs.ErrDenied, "the caller shows no client certificate: %w", err)
	case !slices.Contains(r.operators, who.Name):
		return who.Name, errdefs.Errorf(errdefs.ErrDenied, "%s may not recover this node: no --recovery-operator-identity names it", who.Name)
	}
	return who.Name, nil
}

// attempt gets the key from what was given and tries it on the device.
func (r *recovery) attempt(ctx context.Context, req *keyservicev1.RecoverRequest) error {
	if err := keyservice.CheckGiven(req); err != nil {
		return err
	}
	if !r.busy.TryLock() {
		return errdefs.Errorf(errdefs.ErrConflict, "another attempt is under way: wait for its end")
	}
	defer r.busy.Unlock()
	ctx, cancel := context.WithTimeout(ctx, attemptTime)
	defer cancel()
	if err := r.opener.devices.Present(r.opener.volume.Device); err != nil {
		return err
	}
	d, err := r.fetch(ctx, req)
	defer d.Wipe()
	if err == nil {
		err = r.opener.recover(ctx, d)
	}
	if err != nil {
		return fmt.Errorf("this KMS and store were tried and not taken, nothing has changed: %w", err)
	}
	return nil
}

// fetch returns the DEK by the KMS and store that were given, which are closed
// again. The caller wipes it.
func (r *recovery) fetch(ctx context.Context, req *keyservicev1.RecoverRequest) (d dek.DEK, err error) {
	given, err := r.keys.OpenGiven(ctx, req.GetKmsUris(), req.GetStorageUris(), req.GetFiles(), req.GetRecordAuthSecret(), keyconfig.Options{}, r.opener.log)
	if err != nil {
		return dek.DEK{}, err
	}
	keyring, err := given.Keyring(envelope.Options{})
	if err != nil {
		return dek.DEK{}, errors.Join(err, given.Close())
	}
	d, err = keyring.GetDEK(ctx, r.opener.id)
	if closed := errors.Join(keyring.Close(), given.Close()); closed != nil {
		r.opener.log.Warn("closing what was given", "error", closed)
	}
	return d, err
}

// recover opens the device with a key that an operator brought. It formats
// nothing and changes no record: what was never finished has nothing to recover.
func (o *opener) recover(ctx context.Context, d dek.DEK) error {
	if d.State == dek.Prepared {
		return errdefs.Errorf(errdefs.ErrState, "the record of %s says that the device was never finished: recovery opens what has data and formats nothing", o.id)
	}
	if err := o.demand(d); err != nil {
		return err
	}
	return o.alone(ctx, func() error {
		m, err := o.devices.Open(ctx, o.volume, d)
		if err == nil {
			o.finish(m, "by an operator")
		}
		return err
	})
}
