package keyservice_test

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	constellationv1 "github.com/cryptcsi/cryptcsi/api/constellation/v1"
	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/keyservice"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/cluster"
	"github.com/cryptcsi/cryptcsi/secret"
)

// deriving is Keys with the KEK of scheme cluster.
type deriving struct {
	keyservice.Keys
	keyservice.Deriver
}

// run returns n bytes that count upwards from first.
func run(first byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

func deriver(t testing.TB, master, salt []byte) keyservice.Deriver {
	t.Helper()
	backend, err := cluster.New(secret.Take(bytes.Clone(master)), secret.Take(bytes.Clone(salt)))
	must(t, "cluster.New", err)
	kek := kms.New(cluster.Scheme, backend, kms.Options{})
	t.Cleanup(func() { _ = kek.Close() })
	return kek
}

func startConstellation(t *testing.T, master, salt []byte, policy string) *world {
	return start(t, func(w *world, cfg *keyservice.Config) {
		cfg.Constellation = true
		cfg.Keys = deriving{w.ring, deriver(t, master, salt)}
		// What is attached counts for nothing here.
		cfg.Policy = keyservice.Policy{Attached: attachments(nodeName, "uuid-1"), Controllers: []string{controller}, Operators: []string{operator}}
		if policy != "" {
			cfg.Policy.Prefixes = openPrefix(t, filepath.Join(t.TempDir(), "policy.yaml"), policy, w.log)
		}
	})
}

func (c *client) derive(ctx context.Context, id string, length uint32) ([]byte, error) {
	a, err := constellationv1.NewAPIClient(c.conn).GetDataKey(ctx, &constellationv1.GetDataKeyRequest{DataKeyId: id, Length: length})
	return a.GetDataKey(), err
}

// TestConstellationsVectors: the bytes that Constellation's own tests publish.
func TestConstellationsVectors(t *testing.T) {
	for _, v := range []struct {
		master, salt []byte
		id, want     string
	}{
		{make([]byte, 32), make([]byte, 32), "00000000-0000-0000-0000-000000000000", "2b5c829f691bfd4232f8aac464bccc07e605c7c8e82cbca09837e86d0b6d0665"},
		{bytes.Repeat([]byte{255}, 32), bytes.Repeat([]byte{255}, 32), "ffffffff-ffff-ffff-ffff-ffffffffffff", "1484aa39d3415e906e07940ff215d8b1eee705d3027dba93306af4abff4f70be"},
		{run(0, 32), run(32, 32), "clusterID", "128c164378fe8767f998fbdfe4b4d6463ec5ae1b664ea5999bc27417607ae9b6"},
		{run(64, 32), run(96, 32), "measurementSecret", "4790578891f3fe6cc22cb661ecdc1b7e33121b1287546a52ba33a9136719c213"},
	} {
		c := startConstellation(t, v.master, v.salt, "joinservice: ['"+v.id+"']").as(t, "joinservice")
		got, err := c.derive(t.Context(), v.id, 32)
		must(t, v.id, err)
		if hex.EncodeToString(got) != v.want {
			t.Errorf("%s: %x, want %s", v.id, got, v.want)
		}
		// A shorter key is what HKDF gives at that length, too.
		for n := 1; n <= 32; n++ {
			want, err := hkdf.Key(sha256.New, v.master, v.salt, "key-"+v.id, n)
			must(t, "hkdf", err)
			if got, err := c.derive(t.Context(), v.id, uint32(n)); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%s with %d bytes: %x, %v; want %x", v.id, n, got, err, want)
			}
		}
	}
}

func TestWhoMayDerive(t *testing.T) {
	w := startConstellation(t, make([]byte, 32), make([]byte, 32), `
joinservice: [measurementSecret]
system:node:worker-1: ["*"]
`)
	for _, tt := range []struct {
		who, id string
		length  uint32
		want    codes.Code
	}{
		{"joinservice", "measurementSecret", 32, codes.OK},
		{"joinservice", "clusterID", 32, codes.PermissionDenied},
		{"joinservice", "uuid-1", 32, codes.PermissionDenied},
		{node, "uuid-1", 32, codes.OK},
		{node, "uuid-2", 32, codes.OK},
		{node, "measurementSecret", 32, codes.PermissionDenied},
		{node, "clusterID", 32, codes.PermissionDenied},
		{"system:node:worker-2", "uuid-1", 32, codes.PermissionDenied},
		{controller, "uuid-1", 32, codes.PermissionDenied},
		{operator, "uuid-1", 32, codes.PermissionDenied},
		{node, "uuid-1", 0, codes.InvalidArgument},
		{node, "uuid-1", 33, codes.InvalidArgument},
		{node, "uuid-1", 1 << 31, codes.InvalidArgument},
		{node, "", 32, codes.InvalidArgument},
		{node, strings.Repeat("x", dek.MaxID+1), 32, codes.InvalidArgument},
	} {
		w.audit.take(t)
		key, err := w.as(t, tt.who).derive(t.Context(), tt.id, tt.length)
		mustCode(t, tt.who+" "+tt.id, err, tt.want)
		if (len(key) != 0) != (tt.want == codes.OK) {
			t.Errorf("%s %s: a key of %d bytes", tt.who, tt.id, len(key))
		}
		if l := w.audit.take(t); len(l) != 1 || l[0]["method"] != "GetDataKey" || l[0]["allowed"] != (tt.want == codes.OK) {
			t.Errorf("%s %s: audit %v", tt.who, tt.id, l)
		}
	}
	// Attached is not asked: a UUID is no volume's ID.
	w = startConstellation(t, make([]byte, 32), make([]byte, 32), "")
	_, err := w.as(t, node).derive(t.Context(), "uuid-1", 32)
	mustCode(t, "without prefixes", err, codes.PermissionDenied)
}

func TestConstellationIsOffByDefault(t *testing.T) {
	w := start(t, func(w *world, cfg *keyservice.Config) {
		cfg.Policy.Any = true
		cfg.Keys = deriving{w.ring, deriver(t, make([]byte, 32), make([]byte, 32))}
	})
	_, err := w.as(t, node).derive(t.Context(), "uuid-1", 32)
	mustCode(t, "GetDataKey", err, codes.Unimplemented)
}

// TestConstellationSealed: an unsealing that could not derive is refused, and
// what it opened is closed.
func TestConstellationSealed(t *testing.T) {
	w := start(t, func(w *world, cfg *keyservice.Config) {
		cfg.Policy.Any, cfg.Constellation, cfg.Keys = true, true, nil
		cfg.Unseal = func(_ context.Context, req *keyservicev1.UnsealRequest) (keyservice.Keys, error) {
			if req.GetKmsUris()[0] == "cluster" {
				return deriving{w.ring, deriver(t, make([]byte, 32), make([]byte, 32))}, nil
			}
			return w.ring, nil
		}
	})
	c := w.as(t, operator)
	_, err := c.derive(t.Context(), "uuid-1", 32)
	mustCode(t, "while sealed", err, codes.Unavailable)
	_, err = c.Unseal(t.Context(), &keyservicev1.UnsealRequest{KmsUris: []string{"other"}})
	mustCode(t, "with a KEK that cannot derive", err, codes.InvalidArgument)
	if !w.srv.Sealed() {
		t.Error("it is unsealed all the same")
	}
	_, err = c.Unseal(t.Context(), &keyservicev1.UnsealRequest{KmsUris: []string{"cluster"}})
	must(t, "Unseal", err)
	_, err = c.derive(t.Context(), "uuid-1", 32)
	must(t, "once unsealed", err)
}
