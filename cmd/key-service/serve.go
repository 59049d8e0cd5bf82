package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/config"
	"github.com/cryptcsi/cryptcsi/internal/grpcserver"
	"github.com/cryptcsi/cryptcsi/internal/keyconfig"
	"github.com/cryptcsi/cryptcsi/keyservice"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kube"
	"github.com/cryptcsi/cryptcsi/secret"
)

// maxCacheFor is the longest --dek-cache-ttl: longer than an outage should be.
const maxCacheFor = 24 * time.Hour

// serveFlags are those of serve besides what all verbs have.
type serveFlags struct {
	listen, metricsAddress         string
	cert, key, clientCA            string
	trustDomain, tokenAudience     string
	kubeconfig                     string
	policy, prefixFile, auditFile  string
	controllers, operators, nodes  []config.Item
	sealed, constellation, reflect bool
	plaintext, keepAlive           bool
	maxInFlight, cacheSize         int
	timeout, drain, cacheFor       time.Duration
}

func (f *serveFlags) add(c *command) {
	c.StringVar(&f.listen, "listen", "0.0.0.0:7443", "address to serve on, or unix:///path.sock")
	c.StringVar(&f.metricsAddress, "metrics-address", "", "address for /metrics, /healthz and /readyz, e.g. :9808; empty for none")
	c.StringVar(&f.cert, "tls-cert-file", "", "certificate with its chain (cert-manager's tls.crt); read again when it changes")
	c.StringVar(&f.key, "tls-key-file", "", "its key (tls.key)")
	c.StringVar(&f.clientCA, "client-ca-file", "", "authorities that sign clients' certificates (ca.crt)")
	c.StringVar(&f.trustDomain, "trust-domain", "", "SPIFFE trust domain of clients' certificates; empty refuses SPIFFE IDs")
	c.StringVar(&f.tokenAudience, "token-audience", "", "accept Kubernetes service-account tokens for this audience, checked with TokenReview")
	c.StringVar(&f.kubeconfig, "kubeconfig", "", "how to reach the API server; empty is as a pod in the cluster")
	c.StringVar(&f.policy, "volume-policy", "attached", `which DEKs nodes may have: "attached" (volumes attached to them, as the API server says), "prefix" (--prefix-file alone), or "any" (everybody may do everything: tests, a single node)`)
	c.StringVar(&f.prefixFile, "prefix-file", "", "file that gives identities DEK IDs, beside the policy")
	c.Var(&config.List{Items: &f.nodes}, "node-identity", "service account (system:serviceaccount:NAMESPACE:NAME) whose tokens speak for the node that their pod runs on; may be repeated")
	c.Var(&config.List{Items: &f.controllers}, "controller-identity", "identity that may create and delete DEKs; may be repeated")
	c.Var(&config.List{Items: &f.operators}, "operator-identity", "identity that may rewrap, unseal and see the status; may be repeated")
	c.StringVar(&f.auditFile, "audit-log-file", "", "file for a line of JSON about each decision; empty is standard output")
	c.BoolVar(&f.sealed, "sealed", false, "start without KMS and store, and wait for key-service unseal")
	c.BoolVar(&f.constellation, "constellation-api", false, "also answer Constellation's GetDataKey (plain keys; needs a KEK that derives)")
	c.BoolVar(&f.reflect, "grpc-reflection", false, "let clients ask which methods there are")
	c.BoolVar(&f.plaintext, "insecure-plaintext-over-the-network", false, "serve without TLS on an address that is not loopback")
	c.BoolVar(&f.keepAlive, "kek-keepalive", false, "label the KEK as in use every 6 h, so that key-service kek list knows that it is")
	c.IntVar(&f.maxInFlight, "max-in-flight", 256, "calls that are worked on at a time")
	c.DurationVar(&f.cacheFor, "dek-cache-ttl", 0, "how long an unwrapped key may be handed out again without asking the KMS, from locked memory; 0 asks each time")
	c.IntVar(&f.cacheSize, "dek-cache-size", 10000, "how many keys --dek-cache-ttl keeps at most")
	c.DurationVar(&f.timeout, "call-timeout", 20*time.Second, "how long one call may take")
	c.DurationVar(&f.drain, "drain-timeout", 30*time.Second, "how long calls may go on after SIGTERM")
}

// check finds what can be found without touching anything.
func (f *serveFlags) check(keys *keyconfig.Flags) error {
	kek, store := keys.Given()
	tlsGiven := f.cert != "" || f.key != "" || f.clientCA != ""
	switch {
	case f.sealed && (kek || store):
		return usageError("serve: --sealed excludes --kms-uri and --storage-uri: unseal gives them")
	case f.sealed && len(f.operators) == 0 && f.policy != "any":
		return usageError("serve: --sealed needs an --operator-identity, or nobody can unseal it")
	case tlsGiven && (f.cert == "" || f.key == ""):
		return usageError("serve: --tls-cert-file and --tls-key-file go together")
	case tlsGiven && f.clientCA == "" && f.tokenAudience == "":
		return usageError("serve: --client-ca-file or --token-audience is required: who is asking could not be told")
	case !tlsGiven && !f.local() && !f.plaintext:
		return usageError("serve: --tls-cert-file is required on an address that others reach")
	case f.policy != "attached" && f.policy != "prefix" && f.policy != "any":
		return usageError(fmt.Sprintf("serve: --volume-policy %q: must be attached, prefix or any", f.policy))
	case f.tokenAudience != "" && f.policy == "attached" && len(f.nodes) == 0 && f.clientCA == "":
		return usageError("serve: --node-identity is required with --token-audience, or no node can show that it is one: any pod can have a token for any audience")
	case f.sealed && keys.RecordAuthGiven():
		return usageError("serve: --sealed excludes --record-auth-secret-file: unseal gives it")
	case f.cacheFor < 0 || f.cacheFor > maxCacheFor || f.cacheSize < 1:
		return usageError(fmt.Sprintf("serve: --dek-cache-ttl must be 0 to %v, and --dek-cache-size at least 1", maxCacheFor))
	case f.policy == "prefix" && f.prefixFile == "":
		return usageError("serve: --volume-policy=prefix needs --prefix-file")
	}
	err := keys.CheckRanges()
	if !f.sealed {
		err = keys.Check()
	}
	if err != nil {
		return usageError("serve: " + err.Error())
	}
	return nil
}

// local says whether only this machine reaches the address.
func (f *serveFlags) local() bool {
	if strings.HasPrefix(f.listen, "unix:") {
		return true
	}
	host, _, _ := net.SplitHostPort(f.listen)
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// serve answers until ctx ends.
func serve(ctx context.Context, c *command) error {
	f := &serveFlags{}
	f.add(c)
	if err := c.parse(0, 0); err != nil {
		return err
	}
	if err := f.check(&c.keys); err != nil {
		return err
	}
	if err := secret.Harden(); err != nil {
		return err
	}
	switch err := secret.CheckLocking(); {
	case err != nil && f.cacheFor > 0:
		return fmt.Errorf("--dek-cache-ttl: keys that are kept take memory that is locked against swapping, and this process cannot lock it: raise RLIMIT_MEMLOCK: %w", err)
	case err != nil:
		c.log.Warn("keys cannot be locked in memory and may reach swap space: raise RLIMIT_MEMLOCK", "error", err)
	}
	s := &service{flags: f, log: c.log, metrics: newMeasured(), health: health.NewServer()}
	s.served.cacheFor, s.served.cacheSize = f.cacheFor, f.cacheSize
	defer s.close()
	cfg, err := s.config(ctx, c)
	if err != nil || c.file.Check {
		return err
	}
	return s.run(ctx, cfg)
}

// service is what serve keeps.
type service struct {
	flags   *serveFlags
	log     *slog.Logger
	metrics *measured
	health  *health.Server
	follow  *kube.Attachments // nil: the API server is not asked
	audit   *os.File          // nil: standard output
	tls     *tls.Config       // nil: plaintext
	served  holder            // what was opened, now or by unseal
}

func (s *service) close() {
	s.served.close()
	if s.audit != nil {
		_ = s.audit.Close()
	}
}

// config wires the server.
func (s *service) config(ctx context.Context, c *command) (keyservice.Config, error) {
	f := s.flags
	cfg := keyservice.Config{
		Version: version, Constellation: f.constellation, Logger: s.log, Observe: s.metrics.decision,
		MaxInFlight: f.maxInFlight, Timeout: f.timeout,
		SealChanged: s.sealChanged, Status: s.served.status,
		Policy: keyservice.Policy{Controllers: values(f.controllers), Operators: values(f.operators), Any: f.policy == "any"},
	}
	if f.policy == "any" {
		s.log.Warn("every caller may have every key and do everything (--volume-policy=any)")
	}
	if f.prefixFile != "" && f.policy != "any" {
		prefixes, err := keyservice.OpenPrefix(f.prefixFile, s.log)
		if err != nil {
			return cfg, fmt.Errorf("--prefix-file: %w", err)
		}
		cfg.Policy.Prefixes = prefixes
	}
	err := s.askKubernetes(&cfg)
	if err != nil {
		return cfg, err
	}
	out := c.stdout
	if f.auditFile != "" {
		file, err := os.OpenFile(f.auditFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return cfg, fmt.Errorf("--audit-log-file: %w", err)
		}
		s.audit, out = file, file
	}
	cfg.Audit = slog.New(slog.NewJSONHandler(out, nil))
	if s.tls, err = f.tlsConfig(s.log); err != nil {
		return cfg, err
	}
	if f.sealed {
		cfg.Unseal = func(ctx context.Context, req *keyservicev1.UnsealRequest) (keyservice.Keys, error) {
			return s.unseal(ctx, req, &c.keys)
		}
		return cfg, nil
	}
	keys, err := c.keys.Open(ctx, keyconfig.Options{KMS: kms.Options{Observe: s.metrics.KMS}, Store: s.metrics.Store}, s.log)
	if err != nil {
		return cfg, err
	}
	if err := keys.Err(); err != nil || c.file.Check {
		return cfg, errors.Join(err, keys.Close())
	}
	if err := keys.Probe(ctx, s.log); err != nil {
		return cfg, errors.Join(err, keys.Close())
	}
	cfg.Keys, err = s.served.open(keys, s.log)
	return cfg, err
}

// askKubernetes adds authenticators, and the policy and notes that come from
// the API server.
func (s *service) askKubernetes(cfg *keyservice.Config) error {
	f := s.flags
	if f.clientCA != "" {
		cfg.Authenticators = append(cfg.Authenticators, keyservice.Certificates{TrustDomain: f.trustDomain})
	}
	if f.tokenAudience != "" || f.policy == "attached" {
		config, err := kube.Config(f.kubeconfig, "")
		if err != nil {
			return fmt.Errorf("--kubeconfig: %w", err)
		}
		if f.tokenAudience != "" {
			tokens, err := kube.NewTokens(config, kube.TokensOptions{Audiences: []string{f.tokenAudience}})
			if err != nil {
				return err
			}
			cfg.Authenticators = append(cfg.Authenticators, &keyservice.Tokens{Reviewer: reviewer{tokens, values(f.nodes)}})
		}
		if f.policy == "attached" {
			if s.follow, err = kube.NewAttachments(config, kube.AttachmentsOptions{}); err != nil {
				return err
			}
			cfg.Policy.Attached, cfg.Notes, cfg.Claims = attached{s.follow}, notes{kube.NewNotes(s.follow)}, s.follow
		}
	}
	if len(cfg.Authenticators) == 0 && f.local() { // a fallback would make no credentials better than bad ones
		node, _ := os.Hostname()
		cfg.Authenticators = append(cfg.Authenticators, keyservice.Local{Node: node})
	}
	return nil
}

// run serves on the socket until ctx ends.
func (s *service) run(ctx context.Context, cfg keyservice.Config) error {
	f := s.flags
	keys, err := keyservice.New(cfg)
	if err != nil {
		return err
	}
	options := keyservice.ServerOptions()
	if s.tls != nil {
		options = append(options, grpc.Creds(credentials.NewTLS(s.tls)))
	}
	server := grpcserver.New(grpcserver.Config{Logger: s.log, Observe: s.metrics.RPC, Drain: f.drain, HideRequests: true, Options: options})
	keys.Register(server)
	healthpb.RegisterHealthServer(server, s.health)
	if f.reflect {
		reflection.Register(server)
	}
	lis, err := listen(ctx, f.listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	s.metrics.watch(keys, s.served.lastCount)
	s.metrics.watchCertificate(s.tls)
	if f.cacheFor > 0 {
		s.metrics.watchCache(s.served.cacheStats)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return server.Serve(ctx, lis) })
	if s.follow != nil {
		g.Go(func() error { s.follow.Run(ctx); return nil })
	}
	g.Go(func() error { s.watchHealth(ctx, keys); return nil })
	if f.keepAlive {
		g.Go(func() error { s.served.keepAlive(ctx, s.log); return nil })
	}
	if f.metricsAddress != "" {
		g.Go(func() error { s.served.keepCounted(ctx); return nil })
		g.Go(func() error {
			return s.metrics.Serve(ctx, f.metricsAddress, func(context.Context) error { return s.ready(keys) })
		})
	}
	s.log.Info("serving", "address", lis.Addr().String(), "sealed", keys.Sealed(), "policy", f.policy)
	err = g.Wait()
	s.log.Info("key-service serve ends", "error", err)
	return err
}

// ready says why a caller would be turned away. It does not ask the KMS.
func (s *service) ready(keys *keyservice.Server) error {
	if keys.Sealed() {
		return errdefs.Errorf(errdefs.ErrUnavailable, "sealed: run key-service unseal")
	}
	if s.follow != nil {
		return s.follow.Ready()
	}
	return nil
}

func (s *service) sealChanged(sealed bool) { s.log.Info("seal", "sealed", sealed) }

// watchHealth keeps gRPC's health as ready has it, until ctx ends.
func (s *service) watchHealth(ctx context.Context, keys *keyservice.Server) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		status := healthpb.HealthCheckResponse_SERVING
		if s.ready(keys) != nil {
			status = healthpb.HealthCheckResponse_NOT_SERVING
		}
		s.health.SetServingStatus("", status)
		select {
		case <-ticker.C:
		case <-ctx.Done():
			s.health.Shutdown() // at the beginning of the drain
			return
		}
	}
}

// tlsConfig is nil for plaintext.
func (f *serveFlags) tlsConfig(log *slog.Logger) (*tls.Config, error) {
	if f.cert == "" {
		return nil, nil
	}
	return keyservice.TLSFiles{Cert: f.cert, Key: f.key, ClientCA: f.clientCA, Optional: f.tokenAudience != "", Log: log}.Config()
}

func listen(ctx context.Context, address string) (net.Listener, error) {
	if strings.HasPrefix(address, "unix:") {
		return grpcserver.Listen(address)
	}
	return (&net.ListenConfig{}).Listen(ctx, "tcp", address)
}

func values(items []config.Item) []string {
	var all []string
	for _, i := range items {
		all = append(all, i.Value)
	}
	return all
}
