package envelope

import (
	"bytes"
	"context"
	"errors"
	"net/url"
	"sync"

	"gocloud.dev/blob"
	"gocloud.dev/blob/memblob"
	"gocloud.dev/gcerrors"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

// memStore is a bucket that only this value writes to: its lock makes the
// bucket's writes conditional. The bucket itself does not look at contexts.
type memStore struct {
	bucket *blob.Bucket
	mu     sync.Mutex
}

func openMemStore(u *url.URL) (*memStore, error) {
	if _, err := kms.Params(u); err != nil {
		return nil, err
	}
	if u.Host != "" || u.Path != "" || u.Opaque != "" {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "mem:// takes no host and no path")
	}
	return &memStore{bucket: memblob.OpenBucket(nil)}, nil
}

func (s *memStore) Create(ctx context.Context, name string, data []byte) error {
	if err := errors.Join(checkWrite(name, data), ctx.Err()); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.upload(ctx, name, data, true)
}

func (s *memStore) Read(ctx context.Context, name string) ([]byte, string, error) {
	if err := errors.Join(checkName(name), ctx.Err()); err != nil {
		return nil, "", err
	}
	r, err := s.bucket.NewReader(ctx, name, nil)
	if err != nil {
		return nil, "", blobError(err)
	}
	defer r.Close()
	data, err := readAll(r)
	if err != nil {
		return nil, "", blobError(err)
	}
	return data, version(data), nil
}

func (s *memStore) Replace(ctx context.Context, name string, data []byte, version string) error {
	if err := checkWrite(name, data); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.is(ctx, name, version); err != nil {
		return err
	}
	return s.upload(ctx, name, data, false)
}

func (s *memStore) Delete(ctx context.Context, name, version string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.is(ctx, name, version); err != nil {
		return err
	}
	return blobError(s.bucket.Delete(ctx, name))
}

func (s *memStore) List(ctx context.Context, token string, limit int) (names []string, next string, err error) {
	if err := ctx.Err(); err != nil {
		return nil, "", err
	}
	page := blob.FirstPageToken
	if token != "" {
		page = []byte(token)
	}
	objects, after, err := s.bucket.ListPage(ctx, page, max(limit, 1), nil)
	if err != nil {
		return nil, "", blobError(err)
	}
	for _, o := range objects {
		names = append(names, o.Key)
	}
	return names, string(after), nil
}

func (s *memStore) Close() error { return blobError(s.bucket.Close()) }

// is returns nil if the object is of that version. The caller holds the lock.
func (s *memStore) is(ctx context.Context, name, version string) error {
	_, current, err := s.Read(ctx, name)
	if errors.Is(err, errdefs.ErrNotFound) || err == nil && current != version {
		return errChanged()
	}
	return err
}

// upload does not use the bucket's Writer, which in some releases of the
// library panics where a conditional write is refused.
func (s *memStore) upload(ctx context.Context, name string, data []byte, create bool) error {
	return blobError(s.bucket.Upload(ctx, name, bytes.NewReader(data), &blob.WriterOptions{
		ContentType: "application/json",
		IfNotExist:  create,
	}))
}

// blobError translates a bucket's error.
func blobError(err error) error {
	if err == nil || errors.Is(err, errdefs.ErrCorrupt) {
		return err
	}
	switch gcerrors.Code(err) {
	case gcerrors.NotFound:
		return errdefs.Errorf(errdefs.ErrNotFound, "the store has no such object")
	case gcerrors.FailedPrecondition:
		return errdefs.Errorf(errdefs.ErrExists, "the store has that object already")
	case gcerrors.PermissionDenied:
		return errdefs.Errorf(errdefs.ErrDenied, "the store refuses: %w", err)
	case gcerrors.Canceled, gcerrors.DeadlineExceeded:
		return err
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "store: %w", err)
}
