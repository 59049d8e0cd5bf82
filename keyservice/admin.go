package keyservice

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"time"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// The most that a Given may hold.
const (
	maxURIs  = 16
	maxURI   = 4 << 10
	maxFiles = 32
	maxFile  = 64 << 10
	maxAuth  = 4 << 10
)

// Given is what an operator gives who unseals a key service or recovers a node:
// KEKs and stores, the contents of files that their URIs name as {0}, {1}, …,
// and a secret that authenticates records.
type Given interface {
	GetKmsUris() []string
	GetStorageUris() []string
	GetFiles() [][]byte
	GetRecordAuthSecret() []byte
}

// adminAPI answers Admin. Its calls wait for nobody's turn: an operator has to
// get through to a service that is overloaded.
type adminAPI struct {
	keyservicev1.UnimplementedAdminServer
	*Server
}

func administer[Answer any](ctx context.Context, s *Server, method string, do func(ctx context.Context, c *call) (Answer, error)) (Answer, error) {
	bounded, cancel := context.WithTimeout(ctx, s.cfg.AdminTimeout)
	defer cancel()
	c := &call{Server: s, Decision: Decision{Method: method}, start: time.Now()}
	return answer(ctx, bounded, c, do)
}

// Unseal opens what the service serves from then on. One of several at a time
// is tried, the others get ErrConflict. A repetition of the one that succeeded
// succeeds, any other is ErrExists.
func (a adminAPI) Unseal(ctx context.Context, req *keyservicev1.UnsealRequest) (*keyservicev1.StatusResponse, error) {
	defer WipeGiven(req)
	return administer(ctx, a.Server, "Unseal", func(ctx context.Context, c *call) (*keyservicev1.StatusResponse, error) {
		if err := c.mayOperate(ctx); err != nil {
			return nil, err
		}
		if err := CheckGiven(req); err != nil {
			return nil, err
		}
		if err := c.unseal(ctx, req); err != nil {
			return nil, err
		}
		return c.status(ctx)
	})
}

func (s *Server) unseal(ctx context.Context, req *keyservicev1.UnsealRequest) error {
	if !s.unsealing.TryLock() {
		return errdefs.Errorf(errdefs.ErrConflict, "another unseal is under way")
	}
	defer s.unsealing.Unlock()
	by := s.seal.sum(req)
	if o := s.opened.Load(); o != nil {
		if hmac.Equal(o.by, by) {
			return nil
		}
		return errdefs.Errorf(errdefs.ErrExists, "the key service is unsealed already: restart it to give it another KMS or store")
	}
	if s.cfg.Unseal == nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "this key service cannot be unsealed")
	}
	keys, err := s.cfg.Unseal(ctx, req)
	if err != nil {
		return err
	}
	if _, derives := keys.(Deriver); s.cfg.Constellation && !derives {
		if c, ok := keys.(io.Closer); ok {
			_ = c.Close()
		}
		return errNoDeriver()
	}
	s.opened.Store(&opened{keys: keys, by: by})
	s.cfg.SealChanged(false)
	s.cfg.Logger.Info("the key service was unsealed")
	return nil
}

// CheckGiven says what cannot be opened, or is more than may be given.
func CheckGiven(g Given) error {
	if len(g.GetKmsUris()) == 0 {
		return errdefs.Errorf(errdefs.ErrInvalid, "a KMS URI is needed")
	}
	for _, uris := range [][]string{g.GetKmsUris(), g.GetStorageUris()} {
		if len(uris) > maxURIs {
			return errdefs.Errorf(errdefs.ErrInvalid, "%d URIs of one kind: at most %d", len(uris), maxURIs)
		}
		for _, uri := range uris {
			if len(uri) > maxURI {
				return errdefs.Errorf(errdefs.ErrInvalid, "a URI of %d bytes: at most %d", len(uri), maxURI)
			}
		}
	}
	if len(g.GetFiles()) > maxFiles || len(g.GetRecordAuthSecret()) > maxAuth {
		return errdefs.Errorf(errdefs.ErrInvalid, "at most %d files, and %d bytes of a secret for records", maxFiles, maxAuth)
	}
	for i, f := range g.GetFiles() {
		if len(f) > maxFile {
			return errdefs.Errorf(errdefs.ErrInvalid, "file %d has %d bytes: at most %d", i, len(f), maxFile)
		}
	}
	return nil
}

// WipeGiven wipes what can be wiped; URIs, which should hold no secret, and
// gRPC's own buffers stay until they are collected.
func WipeGiven(g Given) {
	for _, f := range g.GetFiles() {
		clear(f)
	}
	clear(g.GetRecordAuthSecret())
}

// Status says how the service is.
func (a adminAPI) Status(ctx context.Context, _ *keyservicev1.StatusRequest) (*keyservicev1.StatusResponse, error) {
	return administer(ctx, a.Server, "Status", func(ctx context.Context, c *call) (*keyservicev1.StatusResponse, error) {
		if err := c.mayOperate(ctx); err != nil {
			return nil, err
		}
		return c.status(ctx)
	})
}

func (s *Server) status(ctx context.Context) (*keyservicev1.StatusResponse, error) {
	st := &keyservicev1.StatusResponse{Records: -1}
	if sealed := s.Sealed(); sealed || s.cfg.Status == nil {
		st.Sealed = sealed
	} else {
		var err error
		if st, err = s.cfg.Status(ctx); err != nil {
			return nil, err
		}
	}
	st.Version = s.cfg.Version
	return st, nil
}

// requestMAC recognises an UnsealRequest without keeping it.
type requestMAC struct{ key []byte }

func newRequestMAC() requestMAC {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails, see crypto/rand
	return requestMAC{key}
}

func (m requestMAC) sum(req *keyservicev1.UnsealRequest) []byte {
	h := hmac.New(sha256.New, m.key)
	list := func(n int, item func(i int) []byte) {
		_ = binary.Write(h, binary.BigEndian, uint64(n))
		for i := range n {
			b := item(i)
			_ = binary.Write(h, binary.BigEndian, uint64(len(b)))
			h.Write(b)
		}
	}
	list(len(req.GetKmsUris()), func(i int) []byte { return []byte(req.GetKmsUris()[i]) })
	list(len(req.GetStorageUris()), func(i int) []byte { return []byte(req.GetStorageUris()[i]) })
	list(len(req.GetFiles()), func(i int) []byte { return req.GetFiles()[i] })
	list(1, func(int) []byte { return req.GetRecordAuthSecret() })
	return h.Sum(nil)
}
