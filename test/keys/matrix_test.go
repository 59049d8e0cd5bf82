package keys

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/envelope/envelopetest"
	"github.com/cryptcsi/cryptcsi/envelope/stores"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/all"
	"github.com/cryptcsi/cryptcsi/kms/kmstest/azurefake"
	"github.com/cryptcsi/cryptcsi/kms/kmstest/gcpfake"
	"github.com/cryptcsi/cryptcsi/secret"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// A kekPeer starts a service and returns the URI of a key in it.
type kekPeer struct {
	name  string
	start func(t *testing.T) (uri string)
}

func kekPeers() []kekPeer {
	return []kekPeer{
		{"cluster", func(t *testing.T) string {
			return "cluster://" + random(t, 32) + "?salt-file=" + random(t, 32)
		}},
		{"awskms", func(t *testing.T) string {
			a := peers.LocalKMS(t)
			return "awskms:///" + a.Key(t) + "?endpoint=" + url.PathEscape(a.Endpoint) + "&credentials-file=" + a.CredentialsFile
		}},
		{"azurekeyvault", func(t *testing.T) string {
			s := azurefake.Start(t, false)
			s.CreateKey(t, "kek")
			return s.URI("kek")
		}},
		{"gcpckms", func(t *testing.T) string { return gcpfake.Start(t).CreateKey("kek") }},
		{"transit", func(t *testing.T) string {
			s := peers.Transit(t)
			s.CreateKey(t, "kek", nil)
			return s.URI("kek")
		}},
		{"kmip", func(t *testing.T) string {
			s := peers.PyKMIP(t)
			return s.URI(s.CreateKey(t, "kek"))
		}},
		{"pkcs11", func(t *testing.T) string {
			s := peers.SoftHSM(t)
			s.CreateKey(t, "kek", "01")
			return s.URI("kek")
		}},
	}
}

// A storePeer starts a service; each call of what it returns gives an empty store.
type storePeer struct {
	name  string
	start func(t *testing.T) (fresh func(*testing.T) opener)
}

// An opener returns a handle on one store; each call another one, if it can.
type opener func(t *testing.T) envelope.Store

func byURI(uri string) opener {
	return func(t *testing.T) envelope.Store {
		t.Helper()
		s, err := stores.Mux().Open(t.Context(), uri)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
}

func storePeers() []storePeer {
	return []storePeer{
		{"file", func(t *testing.T) func(*testing.T) opener {
			return func(t *testing.T) opener { return byURI("file://" + t.TempDir()) }
		}},
		{"mem", func(t *testing.T) func(*testing.T) opener {
			return func(t *testing.T) opener {
				s := byURI("mem://")(t)
				return func(*testing.T) envelope.Store { return shared{s} }
			}
		}},
		{"s3", func(t *testing.T) func(*testing.T) opener {
			s := peers.VersityGW(t)
			return func(t *testing.T) opener { return byURI(s.URI(s.Bucket(t))) }
		}},
		{"gs", func(t *testing.T) func(*testing.T) opener {
			s := peers.FakeGCS(t)
			return func(t *testing.T) opener { return byURI(s.URI(s.Bucket(t))) }
		}},
		{"azblob", func(t *testing.T) func(*testing.T) opener {
			s := peers.Azurite(t)
			return func(t *testing.T) opener { return byURI(s.URI(s.Container(t))) }
		}},
		{"k8s", func(t *testing.T) func(*testing.T) opener {
			s := peers.Kube(t)
			config := s.Kubeconfig(t, peers.KubeAdmin)
			return func(t *testing.T) opener { return byURI("k8s://" + s.Namespace(t) + "?kubeconfig=" + config) }
		}},
	}
}

// shared is a store that several keyrings use, so none of them closes it.
type shared struct{ envelope.Store }

// checks are the columns of the table.
func checks() []struct {
	name string
	run  func(t *testing.T, c cell)
} {
	return []struct {
		name string
		run  func(t *testing.T, c cell)
	}{
		{"probe", probe},
		{"life cycle", lifeCycle},
		{"race", race},
		{"lost answers", lostAnswers},
	}
}

// A cell is one KEK with one store.
type cell struct {
	kekURI string
	store  opener
	auth   string // of every keyring: some KEKs need it
}

// keyring opens another process's view of the cell.
func (c cell) keyring(t *testing.T, s envelope.Store) *envelope.Keyring {
	t.Helper()
	kek, err := all.Mux().Open(t.Context(), c.kekURI)
	if err != nil {
		t.Fatal(err)
	}
	k, err := envelope.New([]*kms.KEK{kek}, []envelope.Store{s}, envelope.Options{
		RecordAuth: secret.Take([]byte(c.auth)), Backoff: 5 * time.Millisecond, Attempts: 8,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })
	return k
}

func probe(t *testing.T, c cell) {
	if err := envelope.ProbeStore(t.Context(), c.store(t)); err != nil {
		t.Error(err)
	}
	kek, err := all.Mux().Open(t.Context(), c.kekURI)
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	if _, err := kek.CurrentKeyID(t.Context()); err != nil {
		t.Error(err)
	}
}

// lifeCycle: what one process does, another sees, of the longest ID too.
func lifeCycle(t *testing.T, c cell) {
	ctx, a, b := t.Context(), c.keyring(t, c.store(t)), c.keyring(t, c.store(t))
	id, spec := dek.ID("driver.example.com/"+rand.Text()), dek.Spec{Name: "pvc-1", Cipher: dek.CipherXTS}
	id += dek.ID(strings.Repeat(`/"\<%&+~`, dek.MaxID)[:dek.MaxID-len(id)])
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	_, err := b.GetDEK(ctx, id)
	if !errors.Is(err, errdefs.ErrNotFound) {
		t.Fatalf("GetDEK of nothing: %v", err)
	}
	made, err := a.CreateDEK(ctx, id, spec)
	must("CreateDEK", err)
	defer made.Wipe()
	same := func(state dek.State) {
		t.Helper()
		got, err := b.GetDEK(ctx, id)
		must("GetDEK", err)
		defer got.Wipe()
		if !got.Key.Equal(made.Key) || got.State != state || got.Spec != spec {
			t.Errorf("GetDEK: another key, or %s with %+v", got.State, got.Spec)
		}
	}
	same(dek.Prepared)
	uuid := dek.NewUUID()
	_, err = a.ClaimFormat(ctx, id, dek.Claim{Node: "a", UUID: uuid})
	must("ClaimFormat", err)
	if _, err = b.ClaimFormat(ctx, id, dek.Claim{Node: "b", UUID: dek.NewUUID()}); !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("ClaimFormat by another node: %v", err)
	}
	must("ConfirmDEK", a.ConfirmDEK(ctx, id, dek.HeaderID{UUID: uuid, Sequence: 1}))
	same(dek.Formatted)
	must("RewrapDEK", b.RewrapDEKAlways(ctx, id))
	same(dek.Formatted)
	infos, _, err := a.List(ctx, "", 1000)
	if err != nil || len(infos) != 1 || infos[0].ID != id || infos[0].Err != nil {
		t.Errorf("List: %+v, %v", infos, err)
	}
	must("DeleteDEK", b.DeleteDEK(ctx, id))
	if _, err = a.GetDEK(ctx, id); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("GetDEK after DeleteDEK: %v", err)
	}
	if _, err = a.CreateDEK(ctx, id, spec); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("CreateDEK after DeleteDEK: %v", err)
	}
	must("Forget", b.Forget(ctx, id))
}

// racers create one DEK at a time, in so many rounds for each pair.
const (
	racers = 64
	rounds = 2
)

// race: one racer's key is stored, and all have it.
func race(t *testing.T, c cell) {
	rings := make([]*envelope.Keyring, 4)
	for i := range rings {
		rings[i] = c.keyring(t, c.store(t))
	}
	for range rounds {
		id := dek.ID("driver.example.com/" + rand.Text())
		got := make([]dek.DEK, racers)
		start := make(chan struct{})
		var wg sync.WaitGroup
		for n := range racers {
			wg.Go(func() {
				<-start
				d, err := rings[n%len(rings)].CreateDEK(t.Context(), id, dek.Spec{Cipher: dek.CipherXTS})
				if err != nil {
					t.Errorf("CreateDEK: %v", err)
				}
				got[n] = d
			})
		}
		close(start)
		wg.Wait()
		for _, d := range got {
			if !d.Key.Equal(got[0].Key) {
				t.Error("two racers have different keys")
			}
		}
		for _, d := range got {
			d.Wipe()
		}
		if t.Failed() {
			return
		}
	}
}

// lostAnswers: the answer to each call to the store is lost once; the same key
// comes out, and it is stored.
func lostAnswers(t *testing.T, c cell) {
	for lost := range 4 {
		s := envelopetest.NewFaultStore(c.store(t), func(call int, _ string) envelopetest.Fault {
			if call == lost {
				return envelopetest.Lose
			}
			return envelopetest.None
		})
		k, witness := c.keyring(t, s), c.keyring(t, c.store(t))
		id, uuid := dek.ID("driver.example.com/"+rand.Text()), dek.NewUUID()
		d, err := k.CreateDEK(t.Context(), id, dek.Spec{Cipher: dek.CipherXTS})
		if err != nil {
			t.Fatalf("CreateDEK, answer %d lost: %v", lost, err)
		}
		if _, err := k.ClaimFormat(t.Context(), id, dek.Claim{Node: "a", UUID: uuid}); err != nil {
			t.Fatalf("ClaimFormat, answer %d lost: %v", lost, err)
		}
		got, err := witness.GetDEK(t.Context(), id)
		if err != nil || !got.Key.Equal(d.Key) || got.Claim.UUID != uuid {
			t.Errorf("answer %d lost: another key, another claim, or %v", lost, err)
		}
		got.Wipe()
		d.Wipe()
	}
}

// TestRace: 64 racers on one DEK over each store, with a KEK that costs
// nothing; KEYS_ROUNDS says how often (2).
func TestRace(t *testing.T) {
	n := rounds
	if s := os.Getenv("KEYS_ROUNDS"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatalf("KEYS_ROUNDS: %v", err)
		}
	}
	for _, p := range storePeers() {
		t.Run(p.name, func(t *testing.T) {
			open := p.start(t)(t)
			began := time.Now()
			envelopetest.RunRace(t, func(t *testing.T) []envelope.Store {
				return []envelope.Store{open(t), open(t), open(t), open(t)}
			}, n)
			fmt.Printf("%s: %d rounds, %.0f s\n", p.name, n, time.Since(began).Seconds())
		})
	}
}

// TestMatrix: every KEK with every store.
func TestMatrix(t *testing.T) {
	keks := map[string]string{}
	for _, p := range kekPeers() {
		keks[p.name] = p.start(t)
	}
	fresh := map[string]func(*testing.T) opener{}
	for _, p := range storePeers() {
		fresh[p.name] = p.start(t)
	}
	table := newTable()
	for _, kek := range kekPeers() {
		for _, store := range storePeers() {
			for _, check := range checks() {
				ok := t.Run(strings.Join([]string{kek.name, store.name, check.name}, "/"), func(t *testing.T) {
					check.run(t, cell{keks[kek.name], fresh[store.name](t), strings.Repeat("s", 32)})
				})
				table.add(kek.name, store.name, ok)
			}
		}
	}
	table.print(t)
}

// table is the result, a row for each pair.
type table struct {
	rows  []string
	cells map[string][]string
	began time.Time
}

func newTable() *table { return &table{cells: map[string][]string{}, began: time.Now()} }

func (tab *table) add(kek, store string, ok bool) {
	row := kek + "\t" + store
	if tab.cells[row] == nil {
		tab.rows = append(tab.rows, row)
	}
	tab.cells[row] = append(tab.cells[row], map[bool]string{true: "ok", false: "FAILED"}[ok])
}

func (tab *table) print(t *testing.T) {
	t.Helper()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "\nKEK\tSTORE")
	for _, c := range checks() {
		fmt.Fprint(w, "\t", strings.ToUpper(c.name))
	}
	fmt.Fprintln(w)
	for _, row := range tab.rows {
		fmt.Fprintf(w, "%s\t%s\n", row, strings.Join(tab.cells[row], "\t"))
	}
	fmt.Fprintf(w, "\n%d pairs, %d racers, %d rounds, %.0f s\n", len(tab.rows), racers, rounds, time.Since(tab.began).Seconds())
	if err := w.Flush(); err != nil {
		t.Error(err)
	}
}

// random returns a file with so many random bytes.
func random(t *testing.T, n int) string {
	t.Helper()
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails, see crypto/rand
	path := filepath.Join(t.TempDir(), "random")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
