package cryptmapper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// workerProcess is a crypt-worker that waits for its one request.
type workerProcess struct {
	cmd    *exec.Cmd
	conn   net.Conn
	stderr *tail
	exited chan struct{} // closed when the process is gone
}

// pool keeps a few workers started ahead, because starting one costs more than
// what it then does. No worker in the pool has seen a key.
type pool struct {
	command []string
	warm    chan *workerProcess
	wg      sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	working int // operations under way
}

func newPool(command []string, warm int) *pool {
	p := &pool{command: command, warm: make(chan *workerProcess, warm)}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refill()
	return p
}

// refill starts workers in the background until the pool is full. A failure is
// not reported here: the next get tries again and reports it. p.mu is held.
func (p *pool) refill() {
	for range cap(p.warm) - len(p.warm) {
		if p.closed {
			return
		}
		p.wg.Go(func() {
			w, err := startWorker(p.command)
			if err != nil {
				return
			}
			select {
			case p.warm <- w:
			default:
				_ = w.conn.Close()
			}
		})
	}
}

// get returns a worker: a warm one if there is one that still lives. done is
// called when its operation is over.
func (p *pool) get() (w *workerProcess, done func(), err error) {
	p.mu.Lock()
	p.working++
	p.mu.Unlock()
	for {
		select {
		case w = <-p.warm:
			select {
			case <-w.exited:
				continue
			default:
				return w, p.done, nil
			}
		default:
			if w, err = startWorker(p.command); err != nil {
				p.done()
			}
			return w, p.done, err
		}
	}
}

// do does one operation in a worker and calls gone when no worker is at it any
// more. A worker that was gone before it had read the request is replaced once.
func (p *pool) do(ctx context.Context, req Request, keys Keys, gone func()) (reply Reply, err error) {
	for range 2 {
		w, done, startErr := p.get()
		if startErr != nil {
			gone()
			return Reply{}, errdefs.Errorf(errdefs.ErrUnavailable, "starting a crypt-worker: %w", startErr)
		}
		reply, err = w.do(ctx, req, keys, gone)
		done()
		if !errors.Is(err, errUnread) {
			return reply, err
		}
	}
	gone()
	return Reply{}, errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
}

// done counts an operation as over. The pool is filled up only when nothing is
// under way: starting workers must not take the processor from one that works.
func (p *pool) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.working--; p.working == 0 {
		p.refill()
	}
}

// close lets the waiting workers go: each ends when its socket closes.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.wg.Wait()
	for {
		select {
		case w := <-p.warm:
			_ = w.conn.Close()
			<-w.exited
		default:
			return
		}
	}
}

func startWorker(command []string) (*workerProcess, error) {
	if len(command) == 0 {
		return nil, errors.New("no worker command is configured")
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "crypt-worker"), os.NewFile(uintptr(fds[1]), "crypt-worker")
	defer func() { _ = theirs.Close() }()
	conn, err := net.FileConn(ours) // keeps a duplicate
	_ = ours.Close()
	if err != nil {
		return nil, err
	}
	w := &workerProcess{cmd: exec.Command(command[0], command[1:]...), conn: conn, stderr: &tail{}, exited: make(chan struct{})}
	w.cmd.ExtraFiles = []*os.File{theirs} // WorkerFD
	w.cmd.Stderr = w.stderr
	w.cmd.Env = workerEnv()
	if err := w.cmd.Start(); err != nil {
		_ = conn.Close()
		return nil, err
	}
	go func() {
		_ = w.cmd.Wait()
		close(w.exited)
	}()
	return w, nil
}

// workerEnv is what a worker gets of the environment: where to find programs,
// whether there is a udev, and in tests where coverage goes.
func workerEnv() []string {
	var env []string
	for _, name := range []string{"PATH", "DM_DISABLE_UDEV", "GOCOVERDIR"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return append(env, "GOTRACEBACK=none")
}

// errUnread is a worker that was gone before it had read its request, so that
// nothing was begun.
var errUnread = errors.New("it was gone before it had read the request")

// do hands the request over and waits for the answer, or for ctx, in which case
// the worker is killed. gone is called when it has answered or has ended, but
// not with errUnread.
func (w *workerProcess) do(ctx context.Context, req Request, keys Keys, gone func()) (Reply, error) {
	defer func() { _ = w.conn.Close() }()
	stop := context.AfterFunc(ctx, func() {
		_ = w.cmd.Process.Kill()
		_ = w.conn.SetDeadline(time.Unix(1, 0)) // wakes the read below
	})
	defer stop()

	err := WriteRequest(w.conn, req, keys)
	if err != nil && ctx.Err() == nil {
		_ = w.cmd.Process.Kill()
		<-w.exited // it has closed its socket: it is on its way out, or killed while it waited
		return Reply{}, fmt.Errorf("the crypt-worker for %s of mapping %s (%v): %w %s", req.Op, req.Volume.Name, w.cmd.ProcessState, errUnread, w.stderr)
	}
	var reply Reply
	if err == nil {
		reply, err = readReply(w.conn)
	}
	if err == nil {
		// A worker that has answered holds no lock and only has to exit.
		gone()
		return reply, nil
	}
	_ = w.cmd.Process.Kill()
	w.reap(gone)
	if ctx.Err() != nil {
		return Reply{}, fmt.Errorf("%s of mapping %s was given up: %w", req.Op, req.Volume.Name, context.Cause(ctx))
	}
	return Reply{}, errdefs.Errorf(errdefs.ErrUnavailable, "the crypt-worker died during %s of mapping %s: %w %s", req.Op, req.Volume.Name, err, w.stderr)
}

// reap waits for a killed process to end, so that the next call finds the volume
// unlocked, but not for long: a process that hangs in the kernel may stay for
// ever, and then the volume stays locked with it.
func (w *workerProcess) reap(gone func()) {
	limit := time.NewTimer(time.Second)
	defer limit.Stop()
	select {
	case <-w.exited:
		gone()
	case <-limit.C:
		go func() {
			<-w.exited
			gone()
		}()
	}
}

// tail keeps the last of what a worker wrote to its standard error. Workers
// write there only when they crash.
type tail struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf.Write(p)
	if over := t.buf.Len() - 1000; over > 0 {
		t.buf.Next(over)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.buf.Len() == 0 {
		return ""
	}
	return "(" + strings.TrimSpace(t.buf.String()) + ")"
}
