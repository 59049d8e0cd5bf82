package keyclient_test

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/keyclient/keyclienttest"
	"github.com/cryptcsi/cryptcsi/keyservice"
)

// onlyNode allows one node one DEK.
type onlyNode struct {
	node string
	id   dek.ID
}

func (o onlyNode) Allowed(_ context.Context, who keyservice.Identity, id dek.ID) error {
	if who.Node != o.node || id != o.id {
		return errdefs.Errorf(errdefs.ErrDenied, "not attached")
	}
	return nil
}

// realServer starts our own server over mutual TLS and returns its address.
func realServer(t *testing.T, ca *authority, cfg keyservice.Config) string {
	t.Helper()
	cfg.Authenticators = []keyservice.Authenticator{keyservice.Certificates{TrustDomain: "cluster.example"}}
	cfg.Audit, cfg.Version = slog.New(slog.DiscardHandler), "v-test"
	s, err := keyservice.New(cfg)
	must(t, "New", err)
	cert, key := ca.issue(t.TempDir(), "localhost", time.Hour)
	conf, err := keyservice.TLSFiles{Cert: cert, Key: key, ClientCA: ca.file}.Config()
	must(t, "Config", err)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, "Listen", err)
	g := grpc.NewServer(append(keyservice.ServerOptions(), grpc.Creds(credentials.NewTLS(conf)))...)
	s.Register(g)
	var serving sync.WaitGroup
	serving.Go(func() { _ = g.Serve(lis) })
	t.Cleanup(func() { g.Stop(); serving.Wait() })
	return "dns:///" + lis.Addr().String()
}

// as returns the configuration of who has a certificate of that name.
func (a *authority) as(address, name string) keyclient.Config {
	cert, key := a.issue(a.t.TempDir(), name, time.Hour)
	return keyclient.Config{Address: address, CAFile: a.file, CertFile: cert, KeyFile: key}
}

func TestContractWithOurServer(t *testing.T) {
	ca := newAuthority(t)
	keyclienttest.Run(t, func(t *testing.T) keyclienttest.Keys {
		ring := newRing(t)
		c := open(t, ca.as(realServer(t, ca, keyservice.Config{Keys: ring, Policy: keyservice.Policy{Any: true}}), "node-a"))
		return keyclienttest.Keys{NodeKeys: c, AdminKeys: adminKeys{c, ring}}
	})
}

func TestRolesWithOurServer(t *testing.T) {
	ca, ctx := newAuthority(t), t.Context()
	ring := newRing(t)
	address := realServer(t, ca, keyservice.Config{
		Unseal: func(_ context.Context, r *keyservicev1.UnsealRequest) (keyservice.Keys, error) {
			if len(r.GetKmsUris()) != 1 {
				return nil, errdefs.Errorf(errdefs.ErrInvalid, "one KMS URI, please")
			}
			return ring, nil
		},
		Policy: keyservice.Policy{
			Controllers: []string{"spiffe://cluster.example/node/controller"}, Operators: []string{"spiffe://cluster.example/node/operator"},
			Attached: onlyNode{"node-a", id},
		},
	})
	nodeA, nodeB, operator := open(t, ca.as(address, "node-a")), open(t, ca.as(address, "node-b")), open(t, ca.as(address, "operator"))
	withKey := ca.as(address, "controller")
	keyless := withKey
	keyless.WithoutKeys = true
	controller := open(t, keyless)

	_, err := controller.CreateDEK(ctx, id, spec())
	mustBe(t, "CreateDEK while it is sealed", err, errdefs.ErrUnavailable, "sealed", address)
	status, err := operator.Status(ctx)
	must(t, "Status", err)
	if !status.Sealed || status.Version != "v-test" {
		t.Errorf("Status = %+v", status)
	}
	_, err = nodeA.Unseal(ctx, keyclient.Given{KMSURIs: []string{"x://"}})
	mustBe(t, "Unseal by a node", err, errdefs.ErrDenied)
	_, err = operator.Unseal(ctx, keyclient.Given{})
	mustBe(t, "Unseal with nothing", err, errdefs.ErrInvalid)
	status, err = operator.Unseal(ctx, keyclient.Given{KMSURIs: []string{"x://"}, StorageURIs: []string{"mem://"}})
	must(t, "Unseal", err)
	if status.Sealed {
		t.Errorf("Unseal = %+v", status)
	}

	d, err := controller.CreateDEK(ctx, id, spec())
	must(t, "CreateDEK", err)
	if d.Key.Len() != 0 || d.State != dek.Prepared {
		t.Errorf("CreateDEK = %+v", d)
	}
	_, err = open(t, withKey).CreateDEK(ctx, id, spec())
	mustBe(t, "CreateDEK by a controller that wants the key", err, errdefs.ErrInvalid, "recipient")
	got, err := nodeA.GetDEK(ctx, id)
	must(t, "GetDEK", err)
	got.Wipe()
	_, otherNode := nodeB.GetDEK(ctx, id)
	_, otherVolume := nodeA.GetDEK(ctx, id+"0")
	_, byController := open(t, withKey).GetDEK(ctx, id)
	told, err := controller.GetDEK(ctx, id)
	must(t, "GetDEK without keys by a controller", err)
	if told.Key.Len() != 0 || told.ID != id || told.Spec != spec() {
		t.Errorf("GetDEK without keys = %+v", told)
	}
	_, err = controller.GetDEK(ctx, id+"0")
	mustBe(t, "GetDEK without keys of none", err, errdefs.ErrNotFound)
	keylessNode := ca.as(address, "node-a")
	keylessNode.WithoutKeys = true
	_, keyless2 := open(t, keylessNode).GetDEK(ctx, id)
	mustBe(t, "GetDEK without a recipient by a node", keyless2, errdefs.ErrInvalid, "recipient")
	cloned, err := controller.CloneDEK(ctx, "snap:"+id, spec(), id)
	must(t, "CloneDEK by a controller", err)
	if cloned.Key.Len()+cloned.Previous.Len() != 0 || cloned.Source != id {
		t.Errorf("CloneDEK without keys = %+v", cloned)
	}
	_, err = nodeA.CloneDEK(ctx, "snap2:"+id, spec(), id)
	mustBe(t, "CloneDEK by a node", err, errdefs.ErrDenied)
	_, err = open(t, withKey).CloneDEK(ctx, "snap2:"+id, spec(), id)
	mustBe(t, "CloneDEK by a controller that wants the keys", err, errdefs.ErrInvalid, "recipient")
	for what, err := range map[string]error{
		"another node's": otherNode, "none's": otherVolume, "a controller's": byController,
		"RewrapDEK by a node": nodeA.RewrapDEK(ctx, id), "DeleteDEK by a node": nodeA.DeleteDEK(ctx, id),
	} {
		mustBe(t, what, err, errdefs.ErrDenied)
	}
	must(t, "RewrapDEK by an operator", operator.RewrapDEK(ctx, id))
	must(t, "DeleteDEK by a controller", controller.DeleteDEK(ctx, id))
}
