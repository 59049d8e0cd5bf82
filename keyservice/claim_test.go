package keyservice_test

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyservice"
)

// staleFunc tells which claims are stale.
type staleFunc func(node string, id dek.ID) (bool, error)

func (f staleFunc) StaleClaim(_ context.Context, node string, id dek.ID) (bool, error) {
	return f(node, id)
}

// TestClaimIsTakenOver: by a node with the volume, from one that cannot use it
// any more, with the UUID that was claimed, and in no other case.
func TestClaimIsTakenOver(t *testing.T) {
	const other, lone, otherName = "system:node:worker-2", "system:node:worker-3", "worker-2"
	unknown := errdefs.Errorf(errdefs.ErrUnavailable, "nobody knows")
	var stale staleFunc
	w := start(t, func(w *world, cfg *keyservice.Config) {
		cfg.Policy = keyservice.Policy{
			Attached: attachments(nodeName, string(vol), otherName, string(vol)),
			Prefixes: volumesFunc(func(who keyservice.Identity, _ dek.ID) error {
				if who.Name == lone {
					return nil
				}
				return errdefs.Errorf(errdefs.ErrDenied, "not named")
			}),
		}
		cfg.Claims = staleFunc(func(node string, id dek.ID) (bool, error) { return stale(node, id) })
	})
	w.create(t, vol)
	first := w.as(t, node)
	uuid := dek.NewUUID()
	claim := func(c *client, name string) (*keyservicev1.Claim, error) {
		w.audit.take(t)
		return c.ClaimFormat(t.Context(), &keyservicev1.ClaimFormatRequest{Id: string(vol), Claim: &keyservicev1.Claim{Node: name, Uuid: dek.NewUUID()}})
	}
	_, err := first.ClaimFormat(t.Context(), &keyservicev1.ClaimFormatRequest{Id: string(vol), Claim: &keyservicev1.Claim{Node: nodeName, Uuid: uuid}})
	must(t, "the first claim", err)

	second := w.as(t, other)
	for what, tt := range map[string]struct {
		stale staleFunc
		want  codes.Code
	}{
		"a node that still has it": {func(string, dek.ID) (bool, error) { return false, nil }, codes.Aborted},
		"nobody knows":             {func(string, dek.ID) (bool, error) { return false, unknown }, codes.Unavailable},
		"released and claimed by a third meanwhile": {func(string, dek.ID) (bool, error) {
			must(t, "ReleaseClaim", w.ring.ReleaseClaim(t.Context(), vol, nodeName))
			_, err := w.ring.ClaimFormat(t.Context(), vol, dek.Claim{Node: "worker-9", UUID: uuid})
			must(t, "the third's claim", err)
			return true, nil
		}, codes.Aborted},
	} {
		stale = tt.stale
		_, err := claim(second, otherName)
		mustCode(t, what, err, tt.want)
		if err := w.ring.ReleaseClaim(t.Context(), vol, "worker-9"); err == nil { // put back what the third did
			_, err = w.ring.ClaimFormat(t.Context(), vol, dek.Claim{Node: nodeName, UUID: uuid})
			must(t, "the first's claim again", err)
		}
		if d := w.read(t); d.Claim != (dek.Claim{Node: nodeName, UUID: uuid}) {
			t.Fatalf("%s: the claim is %v", what, d.Claim)
		}
	}

	stale = func(node string, id dek.ID) (bool, error) { return node == nodeName && id == vol, nil }
	_, err = claim(w.as(t, lone), "worker-3")
	mustCode(t, "a node that may have the key, but to which the volume is not attached", err, codes.Aborted)
	got, err := claim(second, otherName)
	must(t, "taking over", err)
	if got.GetNode() != otherName || got.GetUuid() != uuid {
		t.Errorf("the claim is %v, want %s with UUID %s", got, otherName, uuid)
	}
	if line := w.audit.take(t); len(line) != 1 || line[0]["allowed"] != true || !strings.Contains(line[0]["reason"].(string), "took over the claim of node "+nodeName) {
		t.Errorf("audit: %v", line)
	}
	_, err = claim(first, nodeName)
	mustCode(t, "the first node comes back", err, codes.Aborted)
	if d := w.read(t); d.Claim != (dek.Claim{Node: otherName, UUID: uuid}) {
		t.Errorf("the record's claim is %v", d.Claim)
	}

	must(t, "ConfirmDEK", w.ring.ConfirmDEK(t.Context(), vol, dek.HeaderID{UUID: uuid, Sequence: 1}))
	stale = func(string, dek.ID) (bool, error) { return true, nil }
	_, err = claim(first, nodeName)
	mustCode(t, "a formatted volume", err, codes.FailedPrecondition)
}

// read returns what the record says.
func (w *world) read(t *testing.T) dek.DEK {
	t.Helper()
	d, err := w.ring.GetDEK(t.Context(), vol)
	must(t, "GetDEK", err)
	d.Wipe()
	return d
}
