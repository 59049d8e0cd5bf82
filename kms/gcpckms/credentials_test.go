package gcpckms_test

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest/gcpfake"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

func mask(paths ...string) *fieldmaskpb.FieldMask { return &fieldmaskpb.FieldMask{Paths: paths} }

func write(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// secure is a service over TLS, with the URI of a key in it but for its
// credentials, and what it is sent as authorization.
type secure struct {
	*gcpfake.Server
	uri string

	mu   sync.Mutex
	sent []metadata.MD
}

func startSecure(t *testing.T) *secure {
	t.Helper()
	ca := peers.NewCA(t)
	cert, certKey := ca.Issue(t, "localhost")
	s := &secure{Server: gcpfake.StartTLS(t, cert, certKey)}
	s.CreateKey("one")
	s.uri = "gcpckms://" + s.KeyName("one") + "?endpoint=" + s.Endpoint + "&ca-file=" + url.PathEscape(ca.File)
	s.Intercept(func(ctx context.Context, _ string, _ proto.Message, serve func() (proto.Message, error)) (proto.Message, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		s.mu.Lock()
		s.sent = append(s.sent, md)
		s.mu.Unlock()
		return serve()
	})
	return s
}

// last returns a header of the last call.
func (s *secure) last(t *testing.T, name string) string {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.sent) == 0 {
		t.Fatal("no call came through")
	}
	return strings.Join(s.sent[len(s.sent)-1].Get(name), "")
}

// TestServiceAccount: a JWT signed by the account's key is the token; nobody
// is called for it, and a new key in the file is used when the old is refused.
func TestServiceAccount(t *testing.T) {
	s := startSecure(t)
	file := write(t, gcpfake.ServiceAccount(t, "https://nobody.invalid/token"))
	kek := opened(t, s.uri+"&credentials-file="+file)
	mustUnwrap(t, kek, mustWrap(t, kek))
	token := s.last(t, "authorization")
	parts := strings.Split(strings.TrimPrefix(token, "Bearer "), ".")
	if len(parts) != 3 {
		t.Fatalf("authorization with %d parts", len(parts))
	}
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || !strings.Contains(string(claims), gcpfake.Account) || !strings.Contains(string(claims), "auth/cloudkms") {
		t.Errorf("claims %s, %v", claims, err)
	}
	mustWrap(t, kek)
	if again := s.last(t, "authorization"); again != token {
		t.Error("the token is not kept")
	}

	if err := os.WriteFile(file, []byte(gcpfake.ServiceAccount(t, "https://nobody.invalid/token")), 0o600); err != nil {
		t.Fatal(err)
	}
	stop := s.Intercept(func(ctx context.Context, _ string, _ proto.Message, serve func() (proto.Message, error)) (proto.Message, error) {
		if md, _ := metadata.FromIncomingContext(ctx); md.Get("authorization")[0] == token {
			return nil, status.Error(codes.Unauthenticated, "the key was deleted")
		}
		return serve()
	})
	defer stop()
	if _, err := kek.Wrap(t.Context(), id, random(t)); !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), file) {
		t.Errorf("a token that is refused: %v, want ErrDenied that names the file", err)
	}
	mustWrap(t, kek)
}

// TestQuotaProject: what a credentials file says about it goes with every call.
func TestQuotaProject(t *testing.T) {
	s, sts := startSecure(t), gcpfake.StartTokens(t)
	kek := opened(t, s.uri+"&credentials-file="+write(t, sts.Federated(write(t, "SUBJ3CT"), "payer")))
	if len(sts.Asked) != 0 {
		t.Error("opening asked for a token")
	}
	mustWrap(t, kek)
	if got, payer := s.last(t, "authorization"), s.last(t, "x-goog-user-project"); got != "Bearer token-1" || payer != "payer" {
		t.Errorf("authorization %q, quota project %q", got, payer)
	}
}

// TestNoToken: who refuses is told from who is not there, and no token shows.
func TestNoToken(t *testing.T) {
	gcpfake.NoAccount(t)
	s, sts := startSecure(t), gcpfake.StartTokens(t)
	subject := write(t, "S3CR3T")
	account := write(t, sts.Federated(subject, ""))
	for _, tt := range []struct {
		name, file string
		status     int
		want       error
		text       string
	}{
		{"refused", account, 400, errdefs.ErrDenied, "the service's words"},
		{"overloaded", account, 429, errdefs.ErrUnavailable, "429"},
		{"broken", account, 500, errdefs.ErrUnavailable, "500"},
		{"redirected", account, 307, errdefs.ErrDenied, "307"},
		{"silent", write(t, gcpfake.Federated("http://"+peers.Silent(t), subject, "")), 0, errdefs.ErrUnavailable, "no answer within"},
		{"no metadata server", "", 0, errdefs.ErrUnavailable, "GOOGLE_APPLICATION_CREDENTIALS"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sts.Status.Store(int32(tt.status))
			uri := s.uri
			if tt.file != "" {
				uri += "&credentials-file=" + tt.file
			}
			kek := openWith(t, uri, kms.Options{Timeout: 500 * time.Millisecond})
			defer kek.Close()
			_, err := kek.Wrap(t.Context(), id, random(t))
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("Wrap: %v, want %v with %q", err, tt.want, tt.text)
			}
			if err != nil && (strings.Contains(err.Error(), "S3CR3T") || strings.Count(err.Error(), account) > 1) {
				t.Errorf("shows a token, or names the file twice: %v", err)
			}
		})
	}
}

// TestApplicationDefault: without a parameter, from the environment to the
// metadata server.
func TestApplicationDefault(t *testing.T) {
	gcpfake.NoAccount(t)
	s, server := startSecure(t), gcpfake.StartTokens(t)
	t.Setenv("GCE_METADATA_HOST", server.MetadataHost())
	mustWrap(t, opened(t, s.uri))
	if got := s.last(t, "authorization"); got != "Bearer token-1" {
		t.Errorf("authorization %q", got)
	}
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", write(t, gcpfake.ServiceAccount(t, "https://nobody.invalid/token")))
	mustWrap(t, opened(t, s.uri))
	if got := s.last(t, "authorization"); strings.Count(got, ".") != 2 {
		t.Errorf("authorization %q is no JWT", got)
	}
}

// TestWrongCA: a server that the CA file does not vouch for gets no token.
func TestWrongCA(t *testing.T) {
	s := startSecure(t)
	uri := "gcpckms://" + s.KeyName("one") + "?endpoint=" + s.Endpoint + "&credentials-file=" + write(t, gcpfake.ServiceAccount(t, "https://nobody.invalid/token"))
	for _, ca := range []string{"", "&ca-file=" + peers.NewCA(t).File} {
		kek := opened(t, uri+ca)
		if _, err := kek.Wrap(t.Context(), id, random(t)); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("%q: %v, want ErrUnavailable for the certificate", ca, err)
		}
	}
	if len(s.sent) != 0 {
		t.Errorf("%d calls came through", len(s.sent))
	}
}

// forward serves an address by passing connections on to another.
func forward(t *testing.T, from, to string) {
	t.Helper()
	l, err := net.Listen("tcp", from)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", to)
			if err != nil {
				a.Close()
				return
			}
			context.AfterFunc(ctx, func() { a.Close(); b.Close() })
			wg.Go(func() { _, _ = io.Copy(a, b) })
			wg.Go(func() { _, _ = io.Copy(b, a) })
		}
	})
}
