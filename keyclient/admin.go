package keyclient

import (
	"context"
	"time"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// adminTimeout bounds Unseal, Recover and Status, for which the other side asks
// KMS and store and has a limit of its own. They are asked once: somebody is
// waiting for the words.
const adminTimeout = 3 * time.Minute

// Given is what an operator gives a sealed key service, or a node that waits
// for a key. The caller wipes it.
type Given struct {
	KMSURIs, StorageURIs []string
	// Files are the contents of files that the URIs name as {0}, {1}, ….
	Files []secret.Bytes
	// RecordAuthSecret authenticates records; empty is none.
	RecordAuthSecret secret.Bytes
}

// Wipe wipes the files and the secret.
func (g Given) Wipe() {
	for _, f := range g.Files {
		f.Wipe()
	}
	g.RecordAuthSecret.Wipe()
}

// files returns the files' contents, not copied.
func (g Given) files() [][]byte {
	files := make([][]byte, 0, len(g.Files))
	for _, f := range g.Files {
		files = append(files, f.Expose())
	}
	return files
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
func (c *Client) Unseal(ctx context.Context, g Given) (Status, error) {
	return c.status(ctx, "Unseal", func(ctx context.Context, admin keyservicev1.AdminClient) (*keyservicev1.StatusResponse, error) {
		return admin.Unseal(ctx, &keyservicev1.UnsealRequest{
			KmsUris: g.KMSURIs, StorageUris: g.StorageURIs, Files: g.files(), RecordAuthSecret: g.RecordAuthSecret.Expose(),
		})
	})
}

// Status asks how the key service, its KMS and its store are.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return c.status(ctx, "Status", func(ctx context.Context, admin keyservicev1.AdminClient) (*keyservicev1.StatusResponse, error) {
		return admin.Status(ctx, &keyservicev1.StatusRequest{})
	})
}

func (c *Client) status(ctx context.Context, method string, ask func(context.Context, keyservicev1.AdminClient) (*keyservicev1.StatusResponse, error)) (s Status, err error) {
	err = c.admin(ctx, method, func(ctx context.Context, conn *connection) error {
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

// Recovered is what a node opened by what it was given.
type Recovered struct {
	DEK     string // the ID of the key, as the node says
	Mapping string // the name under which the device is open there
}

// Recover gives a node that waits for the key of a device, at Config.Address,
// KMS and store to get it from. The node tries the key on the device before it
// believes it: on an error nothing has changed there. As with Unseal, what is
// sent can be read by whoever the connection ends at.
func (c *Client) Recover(ctx context.Context, g Given) (r Recovered, err error) {
	err = c.admin(ctx, "Recover", func(ctx context.Context, conn *connection) error {
		a, err := conn.recovery.Recover(ctx, &keyservicev1.RecoverRequest{
			KmsUris: g.KMSURIs, StorageUris: g.StorageURIs, Files: g.files(), RecordAuthSecret: g.RecordAuthSecret.Expose(),
		})
		if err != nil {
			return err
		}
		r = Recovered{DEK: a.GetDekId(), Mapping: a.GetMapping()}
		return nil
	})
	return r, err
}

// admin calls a method that only operators call.
func (c *Client) admin(ctx context.Context, method string, op operation) error {
	if c.cfg.Protocol == ProtocolConstellation {
		return errdefs.Errorf(errdefs.ErrInvalid, "key service at %s: Constellation's key service knows no %s", c.cfg.Address, method)
	}
	return c.call(ctx, method, 1, adminTimeout, op)
}
