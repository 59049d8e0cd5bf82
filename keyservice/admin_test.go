package keyservice_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyservice"
)

// sealedWorld starts sealed; the right secret is "right".
func sealedWorld(t *testing.T, tries *atomic.Int64, hold chan struct{}, told *atomic.Value) *world {
	return start(t, func(w *world, cfg *keyservice.Config) {
		roles(w, cfg)
		cfg.Keys = nil
		cfg.SealChanged = func(sealed bool) { told.Store(sealed) }
		cfg.Unseal = func(ctx context.Context, req *keyservicev1.UnsealRequest) (keyservice.Keys, error) {
			tries.Add(1)
			if hold != nil {
				select {
				case <-hold:
				case <-ctx.Done():
					return nil, ctx.Err()
				}
			}
			if !bytes.Equal(req.GetFiles()[0], []byte("right")) {
				return nil, errdefs.Errorf(errdefs.ErrDenied, "it does not open the self-check record")
			}
			return w.keys, nil
		}
		cfg.Status = func(context.Context) (*keyservicev1.StatusResponse, error) {
			return &keyservicev1.StatusResponse{Records: 1, Keks: []*keyservicev1.Kek{{Name: "cluster"}}}, nil
		}
	})
}

func unsealRequest(secret string) *keyservicev1.UnsealRequest {
	return &keyservicev1.UnsealRequest{KmsUris: []string{"cluster://{0}"}, StorageUris: []string{"mem://"}, Files: [][]byte{[]byte(secret)}}
}

func TestSealed(t *testing.T) {
	var tries atomic.Int64
	var told atomic.Value
	w := sealedWorld(t, &tries, nil, &told)
	key := w.create(t, vol)
	worker, boss, op := w.as(t, node), w.as(t, controller), w.as(t, operator)
	if !w.srv.Sealed() || told.Load() != true {
		t.Fatal("it is not sealed, or nobody was told")
	}

	allSealed := func() {
		t.Helper()
		uuid := dek.NewUUID()
		_, _, get := worker.get(t.Context(), vol)
		_, claim := worker.ClaimFormat(t.Context(), &keyservicev1.ClaimFormatRequest{Id: string(vol), Claim: &keyservicev1.Claim{Node: nodeName, Uuid: uuid}})
		_, confirm := worker.ConfirmDEK(t.Context(), &keyservicev1.ConfirmDEKRequest{Id: string(vol), Header: &keyservicev1.Header{Uuid: uuid}})
		_, create := boss.CreateDEK(t.Context(), &keyservicev1.CreateDEKRequest{Id: string(vol), Spec: wireSpec()})
		_, del := boss.DeleteDEK(t.Context(), &keyservicev1.DeleteDEKRequest{Id: string(vol)})
		_, rewrap := op.RewrapDEK(t.Context(), &keyservicev1.RewrapDEKRequest{Id: string(vol)})
		for method, err := range map[string]error{"GetDEK": get, "ClaimFormat": claim, "ConfirmDEK": confirm, "CreateDEK": create, "DeleteDEK": del, "RewrapDEK": rewrap} {
			mustCode(t, method+" while sealed", err, codes.Unavailable)
			if err != nil && !strings.Contains(err.Error(), "an operator has to run key-service unseal") {
				t.Errorf("%s does not say what to do: %v", method, err)
			}
		}
		st, err := op.Status(t.Context(), &keyservicev1.StatusRequest{})
		if err != nil || !st.GetSealed() || st.GetVersion() != "v-test" || st.GetRecords() != -1 {
			t.Errorf("Status while sealed: %v, %v", st, err)
		}
	}
	allSealed()

	for _, c := range []*client{worker, boss} {
		_, err := c.Unseal(t.Context(), unsealRequest("right"))
		mustCode(t, "Unseal by no operator", err, codes.PermissionDenied)
	}
	_, err := op.Unseal(t.Context(), &keyservicev1.UnsealRequest{})
	mustCode(t, "Unseal with nothing", err, codes.InvalidArgument)
	if tries.Load() != 0 {
		t.Error("one of them was tried")
	}
	_, err = op.Unseal(t.Context(), unsealRequest("wrong"))
	mustCode(t, "Unseal with a wrong secret", err, codes.PermissionDenied)
	allSealed()

	for range 2 { // its answer may have been lost
		st, err := op.Unseal(t.Context(), unsealRequest("right"))
		must(t, "Unseal", err)
		if st.GetSealed() || st.GetVersion() != "v-test" || st.GetRecords() != 1 || len(st.GetKeks()) != 1 {
			t.Errorf("Unseal says %v", st)
		}
	}
	_, err = op.Unseal(t.Context(), unsealRequest("wrong"))
	mustCode(t, "another Unseal", err, codes.AlreadyExists)
	if tries.Load() != 2 {
		t.Errorf("%d tries, want 2", tries.Load())
	}
	if w.srv.Sealed() || told.Load() != false {
		t.Error("it is still sealed, or nobody was told")
	}
	if _, got, err := worker.get(t.Context(), vol); err != nil || !bytes.Equal(got, key) {
		t.Errorf("GetDEK after the unsealing: %v", err)
	}
	log := w.audit.String() + w.log.String()
	if strings.Contains(log, "right") || strings.Contains(log, "wrong") {
		t.Error("a secret is in the log")
	}
}

func TestTwoUnsealAtATime(t *testing.T) {
	var tries atomic.Int64
	var told atomic.Value
	hold := make(chan struct{})
	w := sealedWorld(t, &tries, hold, &told)
	op := w.as(t, operator)
	first := make(chan error, 1)
	go func() { _, err := op.Unseal(t.Context(), unsealRequest("right")); first <- err }()
	until(t, "the first try", func() bool { return tries.Load() == 1 })
	_, err := op.Unseal(t.Context(), unsealRequest("right"))
	mustCode(t, "the second at a time", err, codes.Aborted)
	close(hold)
	must(t, "the first", <-first)
}

func TestAnUnsealThatIsGivenUp(t *testing.T) {
	var tries atomic.Int64
	var told atomic.Value
	hold := make(chan struct{})
	w := sealedWorld(t, &tries, hold, &told)
	op := w.as(t, operator)
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() { _, err := op.Unseal(ctx, unsealRequest("right")); first <- err }()
	until(t, "the first try", func() bool { return tries.Load() == 1 })
	cancel()
	mustCode(t, "the one that was given up", <-first, codes.Canceled)
	close(hold)
	until(t, "an unseal that works", func() bool {
		_, err := op.Unseal(t.Context(), unsealRequest("right"))
		return err == nil
	})
}

func TestUnsealIsBounded(t *testing.T) {
	var tries atomic.Int64
	var told atomic.Value
	w := sealedWorld(t, &tries, nil, &told)
	op := w.as(t, operator)
	long := strings.Repeat("x", 5000)
	for what, req := range map[string]*keyservicev1.UnsealRequest{
		"many URIs":    {KmsUris: make([]string, 17)},
		"a long URI":   {KmsUris: []string{"a"}, StorageUris: []string{long}},
		"many files":   {KmsUris: []string{"a"}, Files: make([][]byte, 33)},
		"a large file": {KmsUris: []string{"a"}, Files: [][]byte{make([]byte, 65<<10)}},
		"a long auth":  {KmsUris: []string{"a"}, RecordAuthSecret: []byte(long)},
	} {
		_, err := op.Unseal(t.Context(), req)
		mustCode(t, what, err, codes.InvalidArgument)
	}
}

// notes is Notes in memory.
type notes struct {
	at         map[dek.ID]dek.HeaderID
	readErr    error
	confirmErr error
	onConfirm  func()
}

func (n *notes) Note(_ context.Context, id dek.ID) (dek.HeaderID, bool, error) {
	h, ok := n.at[id]
	return h, ok, n.readErr
}

func (n *notes) Confirm(_ context.Context, id dek.ID, h dek.HeaderID) error {
	if n.onConfirm != nil {
		n.onConfirm()
	}
	if n.confirmErr != nil {
		return n.confirmErr
	}
	n.at[id] = h
	return nil
}

// TestRolledBack: what is behind the note is refused by all that a node does,
// and a record that is missing is not made again.
func TestRolledBack(t *testing.T) {
	n := &notes{at: map[dek.ID]dek.HeaderID{}}
	w := start(t, func(w *world, cfg *keyservice.Config) { roles(w, cfg); cfg.Notes = n })
	c, boss := w.as(t, node), w.as(t, controller)
	try := func(what string, want codes.Code) {
		t.Helper()
		h := n.at[vol]
		_, _, get := c.get(t.Context(), vol)
		_, confirm := c.ConfirmDEK(t.Context(), &keyservicev1.ConfirmDEKRequest{Id: string(vol), Header: &keyservicev1.Header{Uuid: h.UUID, Sequence: h.Sequence}})
		_, create := boss.CreateDEK(t.Context(), &keyservicev1.CreateDEKRequest{Id: string(vol), Spec: wireSpec()})
		for method, err := range map[string]error{"GetDEK": get, "ConfirmDEK": confirm, "CreateDEK": create} {
			mustCode(t, method+": "+what, err, want)
			if want == codes.FailedPrecondition && err != nil && !strings.Contains(err.Error(), "rolled back") {
				t.Errorf("%s: %s: %v", method, what, err)
			}
		}
		_, claim := c.ClaimFormat(t.Context(), &keyservicev1.ClaimFormatRequest{Id: string(vol), Claim: &keyservicev1.Claim{Node: nodeName, Uuid: dek.NewUUID()}})
		mustCode(t, "ClaimFormat: "+what, claim, codes.FailedPrecondition) // also of a formatted one
	}
	n.at[vol] = dek.HeaderID{UUID: dek.NewUUID(), Sequence: 5}
	try("a record that is missing", codes.FailedPrecondition)
	if _, err := w.ring.GetDEK(t.Context(), vol); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("a lost record was made again: %v", err)
	}
	h := w.format(t, vol)
	n.at[vol] = dek.HeaderID{UUID: dek.NewUUID(), Sequence: 5}
	try("another header", codes.FailedPrecondition)
	n.at[vol] = dek.HeaderID{UUID: h.UUID, Sequence: 6}
	try("a lower sequence", codes.FailedPrecondition)
	n.at[vol] = h
	try("what is noted", codes.OK)
	n.at[vol] = dek.HeaderID{UUID: h.UUID, Sequence: 4}
	try("a note that lags", codes.OK)

	const fresh = vol + "-prepared"
	w.create(t, fresh)
	n.at[fresh] = h
	all := start(t, func(_ *world, cfg *keyservice.Config) { cfg.Keys, cfg.Notes, cfg.Policy.Any = w.ring, n, true })
	_, _, err := all.as(t, "x").get(t.Context(), fresh)
	mustCode(t, "a prepared record that is noted as formatted", err, codes.FailedPrecondition)
	n.at[fresh] = dek.HeaderID{}
	_, _, err = all.as(t, "x").get(t.Context(), fresh)
	mustCode(t, "a prepared record that is noted as formatted, without header", err, codes.FailedPrecondition)
}

// TestNotesAreWrittenAfterTheRecord, and until they are the node comes again.
func TestNotesAreWrittenAfterTheRecord(t *testing.T) {
	n := &notes{at: map[dek.ID]dek.HeaderID{}}
	w := start(t, func(w *world, cfg *keyservice.Config) { roles(w, cfg); cfg.Notes = n })
	w.create(t, vol)
	uuid := dek.NewUUID()
	_, err := w.ring.ClaimFormat(t.Context(), vol, dek.Claim{Node: nodeName, UUID: uuid})
	must(t, "ClaimFormat", err)
	n.onConfirm = func() {
		d, err := w.ring.GetDEK(t.Context(), vol)
		defer d.Wipe()
		if err != nil || d.State != dek.Formatted {
			t.Errorf("when the note was written the record was %s, %v", d.State, err)
		}
	}
	c := w.as(t, node)
	req := &keyservicev1.ConfirmDEKRequest{Id: string(vol), Header: &keyservicev1.Header{Uuid: uuid, Sequence: 3, Fingerprint: "f"}}
	// Whatever is wrong with the note, the node has to come again.
	for _, fail := range []error{errdefs.Errorf(errdefs.ErrDenied, "the API server says no"), errors.New("whatever"), errdefs.ErrNotFound} {
		n.confirmErr = fail
		_, err = c.ConfirmDEK(t.Context(), req)
		mustCode(t, "ConfirmDEK without its note", err, codes.Unavailable)
	}
	n.confirmErr = nil
	_, err = c.ConfirmDEK(t.Context(), req)
	must(t, "ConfirmDEK", err)
	if n.at[vol] != (dek.HeaderID{UUID: uuid, Sequence: 3}) {
		t.Errorf("the note is %+v", n.at[vol])
	}
	n.readErr = errors.New("no API server")
	_, _, err = c.get(t.Context(), vol)
	mustCode(t, "GetDEK without notes", err, codes.Unavailable)
}

// TestUnsealWipesWhatItWasGiven, whatever came of it.
func TestUnsealWipesWhatItWasGiven(t *testing.T) {
	ring := newRing(t)
	srv, err := keyservice.New(keyservice.Config{
		Unseal: func(_ context.Context, req *keyservicev1.UnsealRequest) (keyservice.Keys, error) {
			if string(req.GetFiles()[0]) != "right" || string(req.GetRecordAuthSecret()) != "auth" {
				return nil, errdefs.Errorf(errdefs.ErrDenied, "wrong")
			}
			return ring, nil
		},
		Authenticators: []keyservice.Authenticator{nobody{}}, Policy: keyservice.Policy{Any: true}, Audit: slog.New(slog.DiscardHandler),
	})
	must(t, "New", err)
	reg := registrar{map[string]any{}}
	srv.Register(reg)
	unseal := reg.services["Unseal"].(func(context.Context, func(any) error) (any, error))
	for _, secret := range []string{"wrong", "right"} {
		req := unsealRequest(secret)
		req.RecordAuthSecret = []byte("auth")
		files, auth := req.GetFiles()[0], req.GetRecordAuthSecret()
		_, err := unseal(t.Context(), func(into any) error {
			m := into.(*keyservicev1.UnsealRequest)
			m.KmsUris, m.StorageUris, m.Files, m.RecordAuthSecret = req.KmsUris, req.StorageUris, req.Files, req.RecordAuthSecret
			return nil
		})
		if (err == nil) != (secret == "right") {
			t.Errorf("%s: %v", secret, err)
		}
		if !bytes.Equal(files, make([]byte, len(files))) || !bytes.Equal(auth, make([]byte, 4)) {
			t.Errorf("%s: the secrets are still in memory", secret)
		}
	}
}
