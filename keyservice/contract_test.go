package keyservice_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/internal/grpcserver"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/keyclient/keyclienttest"
	"github.com/cryptcsi/cryptcsi/keyservice"
)

// wired is a client's methods and, for what the API does not offer, the
// keyring's behind the server.
type wired struct {
	*keyclient.Client
	ring *envelope.Keyring
}

func (w wired) RotateDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	return w.ring.RotateDEK(ctx, id)
}

// TestContract: a client of a key service cannot be told from a keyring.
func TestContract(t *testing.T) {
	keyclienttest.Run(t, func(t *testing.T) keyclienttest.Keys {
		ring := newRing(t)
		srv, err := keyservice.New(keyservice.Config{
			Keys: ring, Authenticators: []keyservice.Authenticator{keyservice.Local{}},
			Policy: keyservice.Policy{Any: true}, Audit: slog.New(slog.DiscardHandler),
		})
		must(t, "New", err)
		dir, err := os.MkdirTemp("", "keyservice")
		must(t, "MkdirTemp", err)
		endpoint := "unix://" + filepath.Join(dir, "s.sock")
		lis, err := grpcserver.Listen(endpoint)
		must(t, "Listen", err)
		s := grpcserver.New(grpcserver.Config{Options: keyservice.ServerOptions()})
		srv.Register(s)
		ctx, stop := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- s.Serve(ctx, lis) }()
		c, err := keyclient.New(keyclient.Config{Address: endpoint})
		must(t, "keyclient.New", err)
		t.Cleanup(func() {
			_ = c.Close()
			stop()
			if err := <-ended; err != nil {
				t.Errorf("Serve: %v", err)
			}
			_ = os.RemoveAll(dir)
		})
		return keyclienttest.Keys{NodeKeys: c, AdminKeys: wired{c, ring}}
	})
}
