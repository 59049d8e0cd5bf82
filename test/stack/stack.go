// Package stack starts what a node with encrypted volumes runs, as an operator
// would: loopdriver as the wrapped driver, csi-plugin node in front of it, both
// as processes of their own, with a cluster KEK and a file store: in direct
// mode, or by way of a key service that the node asks over mutual TLS. The demo,
// csi-sanity and the benchmarks stand on it.
package stack

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/all"
)

// Node1 is the node that all of it runs on.
const Node1 = "node-1"

// startTime bounds how long a process may take until it serves.
const startTime = time.Minute

// Config of a Stack.
type Config struct {
	Dir        string   // empty directory for sockets, keys, volumes and kubelet's paths
	Bin        string   // directory of csi-plugin, crypt-worker and the wrapped driver
	Driver     string   // the wrapped driver's program; "": loopdriver
	PluginArgs []string // more flags of csi-plugin node
	DriverArgs []string // more flags of the wrapped driver
	KeyService bool     // csi-plugin asks a key service instead of KEK and store
	Controller bool     // csi-plugin controller makes the DEKs; else the node does, and forwards the controller's calls
}

// Stack is a running pair. Its clients talk to csi-plugin.
type Stack struct {
	cfg        Config
	Endpoint   string // of csi-plugin node
	Name       string // of the driver
	Controller csi.ControllerClient
	Node       csi.NodeClient

	conn           *grpc.ClientConn
	driver, plugin *process
	keys           *keyService // nil in direct mode

	controllerConn *grpc.ClientConn // nil, as the process, without Controller
	controller     *process
}

// Start starts both and waits until they serve.
func Start(ctx context.Context, cfg Config) (*Stack, error) {
	if cfg.Driver == "" {
		cfg.Driver = "loopdriver"
	}
	s := &Stack{cfg: cfg, Endpoint: "unix://" + filepath.Join(cfg.Dir, "csi.sock")}
	if err := s.makeKeys(); err != nil {
		return nil, err
	}
	if err := s.StartDriver(ctx); err != nil {
		return nil, err
	}
	if cfg.KeyService {
		if err := s.makeKeyService(ctx); err != nil {
			return nil, fmt.Errorf("%w %w", err, s.driver.stop(syscall.SIGKILL))
		}
	}
	if cfg.Controller {
		if err := s.startController(ctx); err != nil {
			return nil, fmt.Errorf("%w %w", err, s.driver.stop(syscall.SIGKILL))
		}
	}
	if err := s.StartPlugin(ctx); err != nil {
		return nil, fmt.Errorf("%w %w", err, s.driver.stop(syscall.SIGKILL))
	}
	return s, nil
}

// Path returns a path below the stack's directory.
func (s *Stack) Path(elem ...string) string {
	return filepath.Join(append([]string{s.cfg.Dir}, elem...)...)
}

// KubeletDir is where staging and target paths lie.
func (s *Stack) KubeletDir() string { return s.Path("kubelet") }

// StoreDir is where the wrapped DEKs lie.
func (s *Stack) StoreDir() string { return s.Path("keys") }

// KEK returns the URI of the KEK.
func (s *Stack) KEK() string {
	return "cluster://" + s.Path("master-secret") + "?salt-file=" + s.Path("salt")
}

// Store returns the URI of the store.
func (s *Stack) Store() string { return "file://" + s.StoreDir() }

// keyring is what an operator with KEK and store has.
func (s *Stack) keyring(ctx context.Context) (*envelope.Keyring, error) {
	kek, err := all.Mux().Open(ctx, s.KEK())
	if err != nil {
		return nil, err
	}
	store, err := envelope.LocalStores().Open(ctx, s.Store())
	if err != nil {
		return nil, err
	}
	return envelope.New([]*kms.KEK{kek}, []envelope.Store{store}, envelope.Options{})
}

// Forget lets the IDs of deleted volumes and snapshots get keys again, as an
// operator does by `key-service prune --forget`.
func (s *Stack) Forget(ctx context.Context) error {
	keys, err := s.keyring(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = keys.Close() }()
	for token := ""; ; {
		infos, next, err := keys.List(ctx, token, 100)
		if err != nil {
			return err
		}
		for _, info := range infos {
			if info.State != dek.Deleted {
				continue
			}
			if err := keys.Forget(ctx, info.ID); err != nil {
				return err
			}
		}
		if token = next; token == "" {
			return nil
		}
	}
}

func (s *Stack) makeKeys() error {
	for _, dir := range []string{s.StoreDir(), s.KubeletDir(), s.Path("volumes")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	for _, name := range []string{"master-secret", "salt"} {
		if _, err := os.Stat(s.Path(name)); err == nil {
			continue
		}
		b := make([]byte, 32)
		_, _ = rand.Read(b)
		if err := os.WriteFile(s.Path(name), b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// StartDriver starts the wrapped driver.
func (s *Stack) StartDriver(ctx context.Context) (err error) {
	endpoint := "unix://" + s.Path("wrapped.sock")
	s.driver, err = startProcess(filepath.Join(s.cfg.Bin, s.cfg.Driver), append([]string{
		"--endpoint=" + endpoint, "--data-dir=" + s.Path("volumes"), "--node-id=" + Node1,
	}, s.cfg.DriverArgs...))
	if err != nil {
		return err
	}
	_, conn, err := s.driver.wait(ctx, endpoint)
	if err != nil {
		return err
	}
	return conn.Close()
}

// ControllerEndpoint is where the controller's calls go.
func (s *Stack) ControllerEndpoint() string {
	if !s.cfg.Controller {
		return s.Endpoint
	}
	return "unix://" + s.Path("controller.sock")
}

// keyArgs say where the keys of csi-plugin come from, as one of the identities.
func (s *Stack) keyArgs(identity string) []string {
	if s.keys != nil {
		return s.KeyServiceArgs(identity)
	}
	return []string{"--kms-uri=" + s.KEK(), "--storage-uri=" + s.Store()}
}

func (s *Stack) startController(ctx context.Context) (err error) {
	args := []string{"controller", "--endpoint=" + s.ControllerEndpoint(), "--wrapped-endpoint=unix://" + s.Path("wrapped.sock")}
	s.controller, err = startProcess(filepath.Join(s.cfg.Bin, "csi-plugin"), append(args, s.keyArgs(ControllerIdentity)...))
	if err != nil {
		return err
	}
	_, s.controllerConn, err = s.controller.wait(ctx, s.ControllerEndpoint())
	return err
}

// StartPlugin starts csi-plugin node, at first or after StopPlugin.
func (s *Stack) StartPlugin(ctx context.Context) (err error) {
	args := append([]string{"node",
		"--endpoint=" + s.Endpoint, "--wrapped-endpoint=unix://" + s.Path("wrapped.sock"),
		"--kubelet-dir=" + s.KubeletDir(), "--node-name=" + Node1,
	}, s.keyArgs(NodeIdentity)...)
	if s.keys == nil && !s.cfg.Controller {
		args = append(args, "--create-keys")
	}
	s.plugin, err = startProcess(filepath.Join(s.cfg.Bin, "csi-plugin"), append(args, s.cfg.PluginArgs...))
	if err != nil {
		return err
	}
	s.Name, s.conn, err = s.plugin.wait(ctx, s.Endpoint)
	if err != nil {
		return err
	}
	s.Controller, s.Node = csi.NewControllerClient(s.conn), csi.NewNodeClient(s.conn)
	if s.cfg.Controller {
		s.Controller = csi.NewControllerClient(s.controllerConn)
	}
	return nil
}

// StopPlugin ends csi-plugin with a signal and waits for it.
func (s *Stack) StopPlugin(sig syscall.Signal) error {
	_ = s.conn.Close()
	return s.plugin.stop(sig)
}

// SetPluginArgs changes the flags that the next StartPlugin adds.
func (s *Stack) SetPluginArgs(args ...string) { s.cfg.PluginArgs = args }

// PluginPID returns csi-plugin's process ID.
func (s *Stack) PluginPID() int { return s.plugin.cmd.Process.Pid }

// Logs returns what all have logged so far.
func (s *Stack) Logs() string {
	logs := "--- " + s.cfg.Driver + "\n" + s.driver.log.String() + "--- csi-plugin\n" + s.plugin.log.String()
	if s.controller != nil {
		logs += "--- csi-plugin controller\n" + s.controller.log.String()
	}
	if s.keys != nil {
		logs += "--- key-service\n" + s.keys.process.log.String()
	}
	return logs
}

// Stop ends all in good order.
func (s *Stack) Stop() error {
	if err := s.StopPlugin(syscall.SIGTERM); err != nil {
		return fmt.Errorf("csi-plugin: %w", err)
	}
	if s.controller != nil {
		_ = s.controllerConn.Close()
		if err := s.controller.stop(syscall.SIGTERM); err != nil {
			return fmt.Errorf("csi-plugin controller: %w", err)
		}
	}
	if err := s.driver.stop(syscall.SIGTERM); err != nil {
		return fmt.Errorf("%s: %w", s.cfg.Driver, err)
	}
	if s.keys != nil {
		_ = s.keys.controller.Close()
		if err := s.StopKeyService(syscall.SIGTERM); err != nil {
			return fmt.Errorf("key-service: %w", err)
		}
	}
	return nil
}

// process is a program of ours and what it logs.
type process struct {
	cmd  *exec.Cmd
	log  *logBuffer
	done chan struct{}
	err  error // after done
}

func startProcess(path string, args []string) (*process, error) {
	p := &process{cmd: exec.Command(path, args...), log: &logBuffer{}, done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// wait returns once the process answers on its socket, with the driver's name.
func (p *process) wait(ctx context.Context, endpoint string) (name string, conn *grpc.ClientConn, err error) {
	conn, err = grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		return "", nil, err
	}
	err = p.serves(ctx, func(ctx context.Context) error {
		info, err := csi.NewIdentityClient(conn).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true))
		name = info.GetName()
		return err
	})
	if err != nil {
		_ = conn.Close()
		return "", nil, err
	}
	return name, conn, nil
}

// serves calls ask, which waits for an answer, for as long as the process runs.
func (p *process) serves(ctx context.Context, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	go func() {
		select {
		case <-p.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	if err := ask(ctx); err != nil {
		return fmt.Errorf("%s does not serve: %w\n%s", p.cmd.Path, err, p.log)
	}
	return nil
}

// stop ends the process; one that does not end in good order is an error,
// unless it was killed.
func (p *process) stop(sig syscall.Signal) error {
	_ = p.cmd.Process.Signal(sig)
	select {
	case <-p.done:
	case <-time.After(startTime):
		_ = p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("did not end within %v", startTime)
	}
	if sig == syscall.SIGKILL {
		return nil
	}
	return p.err
}

type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}
