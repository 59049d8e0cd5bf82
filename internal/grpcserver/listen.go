package grpcserver

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// maxPath is the longest path that fits into a socket address.
const maxPath = len(unix.RawSockaddrUnix{}.Path) - 1

// Listen listens on a unix socket named as CSI sidecars name them:
// "unix:///path.sock", "unix:/path.sock" or the absolute path alone. A socket
// that a dead process left is removed, one that answers is not: that is
// ErrExists. Only root and the group of this process may connect: whoever can,
// can have volumes. The listener removes the socket when it is closed, unless
// another one is in its place by then.
func Listen(endpoint string) (net.Listener, error) {
	path, err := socketPath(endpoint)
	if err != nil {
		return nil, err
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	lis, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return nil, errors.Join(err, lis.Close())
	}
	made, err := os.Lstat(path)
	if err != nil {
		return nil, errors.Join(err, lis.Close())
	}
	if u, ok := lis.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false) // by its name, whoever has that
	}
	return &listener{Listener: lis, path: path, made: made}, nil
}

// listener removes its own socket when it is closed.
type listener struct {
	net.Listener
	path string
	made fs.FileInfo
}

func (l *listener) Close() error {
	if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.made) {
		_ = os.Remove(l.path)
	}
	return l.Listener.Close()
}

func socketPath(endpoint string) (string, error) {
	path := endpoint
	if rest, ok := strings.CutPrefix(endpoint, "unix:"); ok {
		path = rest
		if after, ok := strings.CutPrefix(rest, "//"); ok {
			path = after
		}
	}
	switch {
	case !filepath.IsAbs(path) || strings.HasSuffix(path, "/"):
		return "", errdefs.Errorf(errdefs.ErrInvalid, "endpoint %q: must be unix:///absolute/path.sock", endpoint)
	case len(path) > maxPath:
		return "", errdefs.Errorf(errdefs.ErrInvalid, "endpoint %q: a socket's path has at most %d bytes, this one has %d", endpoint, maxPath, len(path))
	}
	return filepath.Clean(path), nil
}

// removeStale removes the socket at path if nobody serves on it.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return errdefs.Errorf(errdefs.ErrExists, "%s exists and is not a socket; remove it or choose another endpoint", path)
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		_ = conn.Close()
		return errdefs.Errorf(errdefs.ErrExists, "another process serves on %s; stop it or choose another endpoint", path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("finding out whether anybody serves on %s: %w", path, err)
	}
	return os.Remove(path)
}
