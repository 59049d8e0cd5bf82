package cryptmapper_test

import (
	"bytes"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// quick is a worker that is done and gone as soon as it has all of a request.
type quick struct {
	got  []byte
	gone bool
}

func (q *quick) Write(b []byte) (int, error) {
	if q.gone {
		return 0, unix.EPIPE // as the kernel answers a write of nothing, too
	}
	q.got = append(q.got, b...)
	_, keys, err := cryptmapper.ReadRequest(bytes.NewReader(q.got))
	keys.Wipe()
	q.gone = err == nil
	return len(b), nil
}

// TestWriteRequestToAQuickWorker: a request that was read to its end was
// written, however fast the reader went away.
func TestWriteRequestToAQuickWorker(t *testing.T) {
	key := func() secret.Bytes { return secret.Take(bytes.Repeat([]byte("k"), 32)) }
	for what, keys := range map[string]cryptmapper.Keys{
		"close": {}, "open": {DEK: key()}, "rekey": {DEK: key(), Old: key()},
	} {
		q := &quick{}
		if err := cryptmapper.WriteRequest(q, cryptmapper.Request{Op: cryptmapper.OpClose}, keys); err != nil || !q.gone {
			t.Errorf("%s: %v; read to its end: %v", what, err, q.gone)
		}
		keys.Wipe()
	}
}

// TestReplyClass: of an error that wraps one of another class the outer class
// arrives, every time.
func TestReplyClass(t *testing.T) {
	err := errdefs.Errorf(errdefs.ErrState, "hydrating, and %w", errdefs.Errorf(errdefs.ErrUnavailable, "no dm-clone"))
	for range 100 {
		var r cryptmapper.Reply
		r.SetError(err)
		if got := r.Err(); !errors.Is(errdefs.Class(got), errdefs.ErrState) || got.Error() != err.Error() {
			t.Fatalf("%v of class %v", got, errdefs.Class(got))
		}
	}
}
