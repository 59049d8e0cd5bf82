package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// process is a program that runs until it is killed, with its log in a file.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // why, then
}

// start starts a program; logs is the folder for its output. It dies with this
// process.
func start(logs, name string, args ...string) (*process, error) {
	log, err := os.OpenFile(filepath.Join(logs, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p := &process{name: name, cmd: exec.Command(args[0], args[1:]...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	go func() {
		p.err = errors.Join(errors.New("it ended"), p.cmd.Wait())
		close(p.done)
	}()
	return p, nil
}

// stop asks it to end, and waits for that.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(unix.SIGTERM)
	<-p.done
}

// failed is why it ended, nil while it runs.
func (p *process) failed() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s: %w", p.name, p.err)
	default:
		return nil
	}
}

// command runs a program to its end and returns its output.
func command(ctx context.Context, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// commands runs lines of words one after the other.
func commands(ctx context.Context, lines ...string) error {
	for _, line := range lines {
		if _, err := command(ctx, strings.Fields(line)...); err != nil {
			return err
		}
	}
	return nil
}
