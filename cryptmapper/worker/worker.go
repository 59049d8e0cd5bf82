// Package worker is the inside of a crypt-worker: it takes one request from its
// socket, calls libcryptsetup, answers, and returns. It is linked only into
// cmd/crypt-worker, so that the serving process cannot call libcryptsetup.
package worker

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// Serve runs one operation for the serving process at the other end of conn.
// It returns nil when it has answered, or when conn was closed before anything
// was asked. If conn closes during the operation the process exits at once: the
// serving process is gone, and every operation may be cut anywhere. step, where
// not nil, is called after each change to a disk or a mapping; tests crash there.
func Serve(conn *os.File, step func(string)) error {
	// The kernel keyring that libcryptsetup uses belongs to the thread.
	runtime.LockOSThread()
	if err := secret.Harden(); err != nil {
		return err
	}
	l := newLog()
	if !pending(conn) {
		warmUp(l)
	}
	req, keys, err := cryptmapper.ReadRequest(conn)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the request: %w", err)
	}
	defer keys.Wipe()
	*l = log{}
	go exitWhenClosed(conn)
	if step == nil {
		step = func(string) {}
	}
	var reply cryptmapper.Reply
	o := &operation{Request: req, key: keys.DEK, old: keys.Old, step: step, log: l}
	if err := o.run(&reply); err != nil {
		reply.SetError(err)
	}
	return cryptmapper.WriteReply(conn, reply)
}

// exitWhenClosed ends the process when the other end of conn goes away.
func exitWhenClosed(conn io.Reader) {
	_, _ = conn.Read(make([]byte, 1))
	os.Exit(1)
}

// operation is one request at work.
type operation struct {
	cryptmapper.Request
	key  secret.Bytes
	old  secret.Bytes // Rekey, and the others while State is Rotating
	step func(string)
	log  *log
	// previous tells that key is the one before, under which the header still is.
	previous bool

	headerTook time.Duration // see cryptmapper.Reply
}

func (o *operation) run(reply *cryptmapper.Reply) (err error) {
	if o.Op == cryptmapper.OpPeek {
		reply.Copies, err = o.peek()
		return err
	}
	if err := o.validate(); err != nil {
		return err
	}
	l, err := takeLock(o.LockDir, o.Volume.Name)
	if err != nil {
		return err
	}
	defer l.release()
	if err := o.notOthers(); err != nil {
		return err
	}
	switch o.Op {
	case cryptmapper.OpClose:
		return o.close(l)
	case cryptmapper.OpResume:
		return resumeAll(o.Volume.Name)
	case cryptmapper.OpOpen:
		reply.Mapping, err = o.open(l)
		reply.Mapping.Unfinished = errors.Is(err, errUnfinished)
		reply.HeaderTook = o.headerTook
	case cryptmapper.OpMarkMade:
		reply.Mapping, err = o.markMade(l)
	case cryptmapper.OpResize:
		reply.Mapping, err = o.resize(l)
	case cryptmapper.OpFinish:
		reply.Mapping, err = o.finish(l)
	case cryptmapper.OpRekey:
		reply.Mapping.Header, err = o.rekey()
	case cryptmapper.OpRestore:
		reply.Mapping.Header, reply.Restored, err = o.restore()
	default:
		err = errdefs.Errorf(errdefs.ErrInvalid, "operation %q is not known", o.Op)
	}
	return err
}

func (o *operation) validate() error {
	if err := cryptmapper.CheckName(o.Volume.Name); err != nil {
		return err
	}
	if o.Op == cryptmapper.OpClose || o.Op == cryptmapper.OpResume {
		return nil
	}
	if err := o.validSpec(); err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "spec of %s: %w", o.ID, err)
	}
	if o.Op == cryptmapper.OpRekey {
		if err := o.validRekey(); err != nil {
			return err
		}
	}
	if o.Op == cryptmapper.OpRestore {
		if err := o.validRestore(); err != nil {
			return err
		}
	}
	if len(o.key.Expose()) != 32 || bytes.Equal(o.key.Expose(), make([]byte, 32)) {
		return errdefs.Errorf(errdefs.ErrInvalid, "the DEK of %s is not 32 random bytes", o.ID)
	}
	if o.State == dek.Rotating && o.old.Len() != dek.Size {
		return errdefs.Errorf(errdefs.ErrInvalid, "the previous DEK of %s has %d bytes, not %d", o.ID, o.old.Len(), dek.Size)
	}
	return nil
}

// peek reads the header copies without checking them against a key. Of headers
// that are not ours it tells the UUIDs alone.
func (o *operation) peek() ([]cryptmapper.HeaderCopy, error) {
	dev, err := openDevice(o.Volume.Device, false)
	if err != nil {
		return nil, err
	}
	defer dev.close()
	found, err := luks2.Bare(dev)
	if err != nil {
		return nil, err
	}
	var copies []cryptmapper.HeaderCopy
	for _, h := range found {
		t := h.Token
		copies = append(copies, cryptmapper.HeaderCopy{UUID: h.Copy.UUID(), DEKID: t.DEKID, Sequence: t.Sequence, Made: t.Made, Size: t.Size, Initialised: t.Initialised})
	}
	if len(copies) > 0 {
		return copies, nil
	}
	theirs, err := luks2.ReadConstellation(dev, luks2.Want{})
	for _, uuid := range theirs.UUIDs {
		copies = append(copies, cryptmapper.HeaderCopy{UUID: uuid})
	}
	return copies, err
}

// classify gives a libcryptsetup error the class that its number stands for.
func classify(err error, doing string) error {
	class := errdefs.ErrUnavailable
	if errors.Is(err, unix.EPERM) {
		class = errdefs.ErrDenied
	}
	return errdefs.Errorf(class, "%s: %w", doing, err)
}
