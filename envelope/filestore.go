package envelope

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

// fileStore is a directory with one file per object, as gocloud.dev's fileblob
// lays it out (without its metadata files), which can read it. Writing is our
// own, because fileblob's create-only write is not atomic:
//
//   - every object is written to a temporary file and synced first, so no name
//     ever stands for half an object;
//   - creating is link(2), which the kernel refuses where the name exists;
//   - replacing and deleting compare under a lock on the file ".lock", which
//     all processes take, and then rename or unlink;
//   - the directory is synced before a change is reported.
//
// The directory stays open: what is mounted over it later does not change it.
type fileStore struct {
	root *os.Root
}

const (
	lockFile   = ".lock"
	tempPrefix = ".new-"
	// tempAge is when a temporary file is the remains of a crash for sure.
	tempAge = time.Hour
)

func openFileStore(u *url.URL) (*fileStore, error) {
	params, err := kms.Params(u, "create_dir")
	if err != nil {
		return nil, err
	}
	if u.Opaque != "" || u.Host != "" || u.Path == "" {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "it must name a directory by its absolute path: file:///path/of/directory")
	}
	switch params["create_dir"] {
	case "", "false":
	case "true":
		if err := os.MkdirAll(u.Path, 0o700); err != nil {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "making the store's directory: %w", err)
		}
	default:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, `parameter "create_dir" must be true or false`)
	}
	root, err := os.OpenRoot(u.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no directory %s: is it mounted? create_dir=true makes a new, empty store", u.Path)
	}
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "opening the store's directory: %w", err)
	}
	s := &fileStore{root: root}
	s.sweep(time.Now())
	return s, nil
}

func (s *fileStore) Create(ctx context.Context, name string, data []byte) error {
	if err := checkWrite(name, data); err != nil {
		return err
	}
	temp, err := s.temp(ctx, data)
	if err != nil {
		return err
	}
	defer func() { _ = s.root.Remove(temp) }()
	linked := s.root.Link(temp, name)
	if linked != nil && !errors.Is(linked, fs.ErrExist) {
		return fileError(linked)
	}
	// Also where another process won: its object counts from now on, so it
	// must not be lost in a crash.
	if err := s.sync(); err != nil {
		return err
	}
	if linked != nil {
		return errdefs.Errorf(errdefs.ErrExists, "the store has that object already")
	}
	return nil
}

func (s *fileStore) Read(ctx context.Context, name string) ([]byte, string, error) {
	if err := errors.Join(checkName(name), ctx.Err()); err != nil {
		return nil, "", err
	}
	f, err := s.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", errdefs.Errorf(errdefs.ErrNotFound, "the store has no such object")
	}
	if err != nil {
		return nil, "", fileError(err)
	}
	defer f.Close()
	data, err := readAll(f)
	if err != nil {
		return nil, "", fileError(err)
	}
	return data, version(data), nil
}

func (s *fileStore) Replace(ctx context.Context, name string, data []byte, version string) error {
	if err := checkWrite(name, data); err != nil {
		return err
	}
	return s.change(ctx, name, version, func() error {
		temp, err := s.temp(ctx, data)
		if err != nil {
			return err
		}
		if err := s.root.Rename(temp, name); err != nil {
			_ = s.root.Remove(temp)
			return fileError(err)
		}
		return nil
	})
}

func (s *fileStore) Delete(ctx context.Context, name, version string) error {
	return s.change(ctx, name, version, func() error { return fileError(s.root.Remove(name)) })
}

func (s *fileStore) List(ctx context.Context, token string, limit int) (names []string, next string, err error) {
	if err := ctx.Err(); err != nil {
		return nil, "", err
	}
	dir, err := s.root.Open(".")
	if err != nil {
		return nil, "", fileError(err)
	}
	defer dir.Close()
	all, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, "", fileError(err)
	}
	all = slices.DeleteFunc(all, func(name string) bool { return checkName(name) != nil || name <= token })
	slices.Sort(all)
	if limit = max(limit, 1); len(all) > limit {
		return all[:limit], all[limit-1], nil
	}
	return all, "", nil
}

func (s *fileStore) Close() error { return s.root.Close() }

// change calls apply, which changes the object, if it is of that version.
func (s *fileStore) change(ctx context.Context, name, version string, apply func() error) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	_, current, err := s.Read(ctx, name)
	if errors.Is(err, errdefs.ErrNotFound) || err == nil && current != version {
		return errChanged()
	}
	if err != nil {
		return err
	}
	if err := apply(); err != nil {
		return err
	}
	return s.sync()
}

// lock takes the lock of all processes. The kernel gives it back when its
// holder dies.
func (s *fileStore) lock(ctx context.Context) (unlock func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := s.root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fileError(err)
	}
	var flockErr error
	locked := make(chan struct{})
	go func() { // ends when the lock's holder lets go, if ctx does not wait
		defer close(locked)
		flockErr = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		for errors.Is(flockErr, unix.EINTR) {
			flockErr = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
	}()
	select {
	case <-locked:
		if flockErr != nil {
			_ = f.Close()
			return nil, errdefs.Errorf(errdefs.ErrUnavailable, "locking the store: %w", flockErr)
		}
		return func() { _ = f.Close() }, nil
	case <-ctx.Done():
		go func() {
			<-locked
			_ = f.Close() // gives the lock back
		}()
		return nil, ctx.Err()
	}
}

// temp writes data to a temporary file, synced, and returns its name.
func (s *fileStore) temp(ctx context.Context, data []byte) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	name := tempPrefix + rand.Text()
	f, err := s.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", fileError(err)
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = s.root.Remove(name)
		return "", fileError(err)
	}
	return name, nil
}

// sync makes the directory's entries survive a crash.
func (s *fileStore) sync() error {
	dir, err := s.root.Open(".")
	if err != nil {
		return fileError(err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fileError(err)
	}
	return nil
}

// sweep removes what crashed processes left. Failing is harmless: the files
// have names that no object has.
func (s *fileStore) sweep(now time.Time) {
	entries, err := fs.ReadDir(s.root.FS(), ".")
	if err != nil {
		return
	}
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && strings.HasPrefix(e.Name(), tempPrefix) && now.Sub(info.ModTime()) > tempAge {
			_ = s.root.Remove(e.Name())
		}
	}
}

// fileError translates an error of the file system. A missing file is no
// ErrNotFound here: Read alone says that an object is missing.
func fileError(err error) error {
	switch {
	case err == nil || errors.Is(err, errdefs.ErrCorrupt):
		return err
	case errors.Is(err, fs.ErrPermission):
		return errdefs.Errorf(errdefs.ErrDenied, "the store refuses: %w", err)
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "store: %w", err)
}
