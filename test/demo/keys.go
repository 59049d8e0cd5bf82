package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/test/stack"
)

// withKeyService runs a part of the tale that direct mode does not have.
func (t *tale) withKeyService(tell func()) {
	if t.config.KeyService {
		tell()
	}
}

func (t *tale) tellWhoAsks() {
	t.that("the node has no key and no way to the KMS: it asks a key service, both known by certificates", t.mutualTLS)
}

func (t *tale) tellWhoGets() {
	t.that("another node, with a good certificate, is refused this node's key", t.otherNode)
	t.that("the audit log shows who got what", t.auditLog)
}

func (t *tale) tellAway() {
	t.that("the key service is stopped: staging says that it is unavailable; started again, the same call succeeds", t.stopped)
	t.that("the key service is started sealed: staging says that it is sealed", t.startSealed)
	t.that("unsealing with a wrong master secret changes nothing", t.unsealWrong)
	t.that("an operator, who has pinned the service's key, unseals it: the volume and its data are there", t.unseal)
}

func (t *tale) mutualTLS() (string, error) {
	rules, err := os.ReadFile(t.stack.Path("policy.yaml"))
	if err != nil {
		return "", err
	}
	message, err := refused(t.stack.Impostor(t.ctx), "certificate authority")
	return fmt.Sprintf("key service: %s, TLS 1.3, who may have what:\n%san impostor with a certificate of his own: %s", t.stack.KeyAddress(), indent(string(rules)), message), err
}

func (t *tale) otherNode() (string, error) {
	client, err := keyclient.New(t.stack.KeyClient(stack.OtherNode))
	if err != nil {
		return "", err
	}
	d, err := client.GetDEK(t.ctx, t.plain.DEK())
	d.Wipe()
	message, err := refused(err, "may not call GetDEK")
	return message, errors.Join(err, client.Close())
}

// line is what we show of the audit log's.
type line struct {
	Method   string `json:"method"`
	Identity string `json:"identity"`
	DEK      string `json:"dek_id"`
	Allowed  bool   `json:"allowed"`
	Code     string `json:"code"`
	Reason   string `json:"reason"`
}

// auditLog shows what became of the first volume's key: made, got, and refused.
func (t *tale) auditLog() (string, error) {
	file, err := os.Open(t.stack.AuditLog())
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }()
	var shown []string
	want := map[string]bool{
		"CreateDEK " + stack.ControllerIdentity + " true": true, "GetDEK " + stack.NodeIdentity + " true": true,
		"ClaimFormat " + stack.NodeIdentity + " true": true, "ConfirmDEK " + stack.NodeIdentity + " true": true,
		"GetDEK " + stack.OtherNode + " false": true,
	}
	for lines := bufio.NewScanner(file); lines.Scan(); {
		var l line
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			return "", err
		}
		if l.DEK != string(t.plain.DEK()) {
			continue
		}
		delete(want, fmt.Sprintf("%s %s %v", l.Method, l.Identity, l.Allowed))
		shown = append(shown, strings.TrimSpace(fmt.Sprintf("%-11s %-18s %s allowed=%v %s %s", l.Method, l.Identity, l.DEK, l.Allowed, l.Code, l.Reason)))
	}
	if len(want) > 0 {
		return "", fmt.Errorf("the audit log lacks %v", want)
	}
	return strings.Join(shown, "\n"), nil
}

func (t *tale) stopped() (string, error) {
	if err := errors.Join(t.block.Down(t.ctx), t.stack.StopKeyService(syscall.SIGTERM)); err != nil {
		return "", err
	}
	message, err := refused(t.block.Stage(t.ctx), "Unavailable")
	return message, errors.Join(err, t.stack.StartKeyService(t.ctx, "--kms-uri="+t.stack.KEK(), "--storage-uri="+t.stack.Store()),
		t.block.Up(t.ctx), contains(t.block.Target, marker))
}

func (t *tale) startSealed() (string, error) {
	if err := errors.Join(t.block.Down(t.ctx), t.restartKeyService("--sealed")); err != nil {
		return "", err
	}
	return t.sealedNow()
}

// sealedNow stages the block volume and wants to hear that the service is sealed.
func (t *tale) sealedNow() (string, error) {
	err := t.block.Stage(t.ctx)
	_, code := refused(err, "Unavailable")
	message, words := refused(err, "sealed")
	return message, errors.Join(code, words)
}

func (t *tale) unsealWrong() (string, error) {
	path := t.stack.Path("master-secret.wrong")
	if err := os.WriteFile(path, []byte(wrongMaster), 0o600); err != nil {
		return "", err
	}
	out, err := t.stack.Unseal(t.ctx, path)
	if err == nil {
		return "", fmt.Errorf("it was accepted: %s", out)
	}
	if !strings.Contains(out, "nothing has changed") {
		return "", fmt.Errorf("refused in other words: %w: %s", err, out)
	}
	_, err = t.sealedNow()
	return out, err
}

func (t *tale) unseal() (string, error) {
	out, err := t.stack.Unseal(t.ctx, t.stack.Path("master-secret"))
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return out, errors.Join(t.block.Up(t.ctx), contains(t.block.Target, marker))
}

// restartKeyService stops the key service in good order and starts it with
// other flags.
func (t *tale) restartKeyService(args ...string) error {
	return errors.Join(t.stack.StopKeyService(syscall.SIGTERM), t.stack.StartKeyService(t.ctx, args...))
}

func indent(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString("  " + line)
	}
	return b.String()
}
