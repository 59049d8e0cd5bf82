package keyclient

import (
	"context"
	"time"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// adminTimeout bounds Unseal and Status, for which the key service asks KMS and
// store and has a limit of its own. They are asked once: somebody is waiting
// for the words.
const adminTimeout = 3 * time.Minute

// Unsealing is what a sealed key service is given. The caller wipes it.
type Unsealing struct {
	KMSURIs, StorageURIs []string
	// Files are the contents of files that the URIs name as {0}, {1}, ….
	Files []secret.Bytes
	// RecordAuthSecret authenticates records; empty is none.
	RecordAuthSecret secret.Bytes
}

// Status is how a key service is.
type Status struct {
	Sealed       bool
	Version      string
	KEKs         []KEKStatus
	Records      int64  // -1 where they were not counted
	RecordsError string // why the store did not answer
}

// KEKStatus is how one KEK is.
type KEKStatus struct {
	Name  string // its URI without parameters
	KeyID string // its current version
	Error string // why the KMS did not answer
}

// Unseal gives a sealed key service its KMS and store, which it tries before
// it believes them. It says how the service is then. What is sent can be read
// by whoever the connection ends at: look at Config.VerifyServer. gRPC's
// buffers keep copies until they are reused.
func (c *Client) Unseal(ctx context.Context, u Unsealing) (Status, error) {
	files := make([][]byte, 0, len(u.Files))
	for _, f := range u.Files {
		files = append(files, f.Expose())
	}
	return c.admin(ctx, "Unseal", func(ctx context.Context, admin keyservicev1.AdminClient) (*keyservicev1.StatusResponse, error) {
		return admin.Unseal(ctx, &keyservicev1.UnsealRequest{
			KmsUris: u.KMSURIs, StorageUris: u.StorageURIs, Files: files, RecordAuthSecret: u.RecordAuthSecret.Expose(),
		})
	})
}

// Status asks how the key service, its KMS and its store are.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return c.admin(ctx, "Status", func(ctx context.Context, admin keyservicev1.AdminClient) (*keyservicev1.StatusResponse, error) {
		return admin.Status(ctx, &keyservicev1.StatusRequest{})
	})
}

func (c *Client) admin(ctx context.Context, method string, ask func(context.Context, keyservicev1.AdminClient) (*keyservicev1.StatusResponse, error)) (s Status, err error) {
	if c.cfg.Protocol == ProtocolConstellation {
		return Status{}, errdefs.Errorf(errdefs.ErrInvalid, "key service at %s: Constellation's key service knows no %s", c.cfg.Address, method)
	}
	err = c.call(ctx, method, 1, adminTimeout, func(ctx context.Context, conn *connection) error {
		a, err := ask(ctx, conn.admin)
		if err != nil {
			return err
		}
		s = Status{Sealed: a.GetSealed(), Version: a.GetVersion(), Records: a.GetRecords(), RecordsError: a.GetRecordsError()}
		for _, k := range a.GetKeks() {
			s.KEKs = append(s.KEKs, KEKStatus{Name: k.GetName(), KeyID: k.GetKeyId(), Error: k.GetError()})
		}
		return nil
	})
	return s, err
}
