package cryptmapper

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// The protocol between this package and a crypt-worker, over an inherited
// socket pair (WorkerFD in the worker): one request (a frame of JSON, then the
// DEK and the old key, where there is one, as raw frames), one answer (a frame of JSON), end. A frame is a length
// of 4 bytes, big endian, and that many bytes. Both ends come from one build,
// so there is no version.

// WorkerFD is the worker's end of the socket pair.
const WorkerFD = 3

// maxFrame bounds a frame; requests and answers are a few hundred bytes.
const maxFrame = 64 << 10

// Op names what a worker is asked to do.
type Op string

// The operations: those of Mapper, and Peek for showing a header's state.
const (
	OpOpen     Op = "open"
	OpMarkMade Op = "mark-made"
	OpResize   Op = "resize"
	OpFinish   Op = "finish"
	OpClose    Op = "close"
	OpResume   Op = "resume"
	OpPeek     Op = "peek"
	OpRekey    Op = "rekey"
	OpRestore  Op = "restore"
)

// Request is what a worker is told. Keys follow apart and are never JSON.
type Request struct {
	Op       Op
	Volume   Volume
	LockDir  string
	Deadline time.Time // zero for none
	ID       dek.ID
	State    dek.State
	Spec     dek.Spec
	Claim    dek.Claim
	Header   dek.HeaderID // the floor
	From     dek.ID       // Rekey: what the old key is the key of
	// Backup asks for a header backup where Header has none. One that it has is
	// renewed in any case.
	Backup bool
	// BlockVolume tells Restore that there is no filesystem to look for.
	BlockVolume bool
	// OlderBackup lets Restore take a backup that may not be the last one.
	OlderBackup bool
	// WithoutClone makes Open behave as on a kernel that has no dm-clone.
	WithoutClone bool
}

// Keys are the keys of a request. Who made them wipes them.
type Keys struct {
	DEK secret.Bytes
	Old secret.Bytes // Rekey, and the others while State is Rotating
}

// Wipe wipes both.
func (k Keys) Wipe() {
	k.DEK.Wipe()
	k.Old.Wipe()
}

// Reply is what a worker answers.
type Reply struct {
	Mapping  Mapping
	Copies   []HeaderCopy // Peek
	Restored bool         // Restore: a header was written
	// HeaderTook is how long Open worked until it had a header: read, checked,
	// and made where there was none.
	HeaderTook time.Duration `json:",omitempty"`
	Class      string        `json:",omitempty"` // of the error
	Error      string        `json:",omitempty"`
}

// HeaderCopy is one metadata copy as it stands on a device, not checked
// against any key.
type HeaderCopy struct {
	UUID        string
	DEKID       string
	Sequence    uint64
	Made        bool
	Size        int64
	Initialised int64
}

// classes gives the errors that cross the socket their names.
var classes = map[string]error{
	"invalid":     errdefs.ErrInvalid,
	"denied":      errdefs.ErrDenied,
	"conflict":    errdefs.ErrConflict,
	"state":       errdefs.ErrState,
	"corrupt":     errdefs.ErrCorrupt,
	"unavailable": errdefs.ErrUnavailable,
}

// SetError puts err into the reply, with its class.
func (r *Reply) SetError(err error) {
	r.Error = err.Error()
	for name, class := range classes {
		if errors.Is(errdefs.Class(err), class) {
			r.Class = name
		}
	}
}

// Err returns the reply's error, of the class that the worker gave it.
func (r *Reply) Err() error {
	if r.Error == "" {
		return nil
	}
	if class, ok := classes[r.Class]; ok {
		return errdefs.Errorf(class, "%s", r.Error)
	}
	return errors.New(r.Error)
}

// WriteRequest sends a request and its keys.
func WriteRequest(w io.Writer, r Request, keys Keys) error {
	if err := writeJSON(w, r); err != nil {
		return err
	}
	if err := writeFrame(w, keys.DEK.Expose()); err != nil {
		return err
	}
	return writeFrame(w, keys.Old.Expose())
}

// ReadRequest reads a request; keys go straight into locked memory. io.EOF
// means that nothing was asked: the serving process is gone or needs no worker.
func ReadRequest(r io.Reader) (Request, Keys, error) {
	var req Request
	var keys Keys
	if err := readJSON(r, &req); err != nil {
		return req, keys, err
	}
	for _, key := range []*secret.Bytes{&keys.DEK, &keys.Old} {
		n, err := readLength(r)
		if err == nil {
			*key, err = secret.Read(r, n)
		}
		if err != nil {
			keys.Wipe()
			return req, Keys{}, err
		}
	}
	return req, keys, nil
}

// WriteReply sends the answer.
func WriteReply(w io.Writer, r Reply) error { return writeJSON(w, r) }

// readReply reads the answer.
func readReply(r io.Reader) (Reply, error) {
	var reply Reply
	err := readJSON(r, &reply)
	return reply, err
}

func writeJSON(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return writeFrame(w, b)
}

func readJSON(r io.Reader, v any) error {
	n, err := readLength(r)
	if err != nil {
		return err
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

func writeFrame(w io.Writer, b []byte) error {
	if _, err := w.Write(binary.BigEndian.AppendUint32(nil, uint32(len(b)))); err != nil {
		return err
	}
	if len(b) == 0 {
		// The reader may have all that it needs, and be done and gone: even
		// a write of nothing would then fail.
		return nil
	}
	_, err := w.Write(b)
	return err
}

func readLength(r io.Reader) (int, error) {
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return 0, err
	}
	length := binary.BigEndian.Uint32(n[:])
	if length > maxFrame {
		return 0, fmt.Errorf("frame of %d bytes: at most %d", length, maxFrame)
	}
	return int(length), nil
}
