package main

import (
	"context"
	"crypto/rand"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/keyservice"
)

// sealedSize is that of a sealed key: encapsulated key, key and tag.
const sealedSize = 32 + 32 + 16

// echo answers every request with an answer of GetDEK's size, and does nothing.
type echo struct {
	keyservicev1.UnimplementedKeyServiceServer
	sealed []byte
}

func (e echo) GetDEK(_ context.Context, req *keyservicev1.GetDEKRequest) (*keyservicev1.DEK, error) {
	return &keyservicev1.DEK{Id: req.GetId(), State: "prepared", Spec: &keyservicev1.Spec{Name: specName, Cipher: cipher}, SealedKey: e.sealed}, nil
}

// serveEcho serves the echo as the key service is served (the same TLS, the
// same options of gRPC), without its interceptors and logs.
func serveEcho(ctx context.Context, address string) error {
	conf, err := keyservice.TLSFiles{Cert: "tls.crt", Key: "tls.key", ClientCA: "ca.crt"}.Config()
	if err != nil {
		return err
	}
	e := echo{sealed: make([]byte, sealedSize)}
	if _, err := rand.Read(e.sealed); err != nil {
		return err
	}
	server := grpc.NewServer(append(keyservice.ServerOptions(), grpc.Creds(credentials.NewTLS(conf)))...)
	keyservicev1.RegisterKeyServiceServer(server, e)
	lis, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, server.Stop)()
	return server.Serve(lis)
}
