package keyclient

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	"google.golang.org/grpc/credentials"
)

const (
	maxFile  = 1 << 20  // of a file with certificates, in bytes
	maxToken = 16 << 10 // of a token, which travels in a header
)

// watched is a file as it was when it was read.
type watched struct {
	path string
	info os.FileInfo
}

// readWatched reads a regular file. It looks at the file before it reads, so
// that what changes meanwhile counts as changed.
func readWatched(path string) (watched, []byte, error) {
	w := watched{path: path}
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return w, nil, err
	case !info.Mode().IsRegular():
		return w, nil, fmt.Errorf("%s is no regular file", path)
	}
	w.info = info
	f, err := os.Open(path)
	if err != nil {
		return w, nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("%s has more than %d bytes", path, maxFile)
	}
	return w, data, err
}

// changed says whether the file is another one now, or has other content.
// Kubernetes replaces files in volumes by way of a symbolic link.
func (w watched) changed() bool {
	now, err := os.Stat(w.path)
	return err != nil || w.info == nil || !os.SameFile(now, w.info) || !now.ModTime().Equal(w.info.ModTime()) || now.Size() != w.info.Size()
}

func changed(files []watched) bool { return slices.ContainsFunc(files, watched.changed) }

// tokenFile is a bearer token in a file that others replace before the token
// expires, as gRPC's credentials.
type tokenFile struct {
	mu   sync.Mutex
	file watched
	last string // the last good one
	err  error  // why the file is not in use as it is now
}

var _ credentials.PerRPCCredentials = (*tokenFile)(nil)

func newTokenFile(path string) (*tokenFile, error) {
	t := &tokenFile{file: watched{path: path}}
	t.refresh()
	return t, t.problem()
}

// refresh reads the file if it has changed.
func (t *tokenFile) refresh() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.file.changed() {
		t.err = nil
		return
	}
	w, data, err := readWatched(t.file.path)
	if err == nil {
		data = bytes.TrimSpace(data)
		err = validToken(data)
	}
	if err != nil {
		t.err = fmt.Errorf("token file %s: %w", t.file.path, err)
		return
	}
	t.file, t.last, t.err = w, string(data), nil
}

func (t *tokenFile) problem() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// GetRequestMetadata gives the header that carries the token.
func (t *tokenFile) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	t.refresh()
	t.mu.Lock()
	defer t.mu.Unlock()
	return map[string]string{"authorization": "Bearer " + t.last}, nil
}

// RequireTransportSecurity keeps gRPC from sending it in plaintext.
func (t *tokenFile) RequireTransportSecurity() bool { return true }

// validToken checks what can stand in a header. It tells nothing of the token.
func validToken(b []byte) error {
	if len(b) == 0 || len(b) > maxToken {
		return fmt.Errorf("a token of %d bytes: must be 1 to %d", len(b), maxToken)
	}
	for i, c := range b {
		if c <= ' ' || c > '~' {
			return fmt.Errorf("byte %d of the token is not printable ASCII", i)
		}
	}
	return nil
}
