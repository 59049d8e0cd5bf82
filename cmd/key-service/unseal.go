package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"text/tabwriter"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/config"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/secret"
)

// maxGiven bounds each file that is sent, in bytes.
const maxGiven = 32 << 10

// clientFlags say how to reach a key service, and how to know it.
type clientFlags struct {
	address, ca, cert, key, token, name string
	pin, verify                         string
}

func (f *clientFlags) add(c *command) {
	c.StringVar(&f.address, "address", "", "the key service: dns:///host:port or unix:///path.sock (required)")
	c.StringVar(&f.ca, "ca-file", "", "authorities that sign its certificate")
	c.StringVar(&f.cert, "cert-file", "", "the operator's certificate")
	c.StringVar(&f.key, "key-file", "", "its key")
	c.StringVar(&f.token, "token-file", "", "token of the operator's service account, for --token-audience of the service; instead of a certificate")
	c.StringVar(&f.name, "server-name", "", "name in the service's certificate, where that is not the address's host")
	c.StringVar(&f.pin, "server-key-sha256", "", "SHA-256 of the service's public key (SubjectPublicKeyInfo), in hex")
	c.StringVar(&f.verify, "verify-command", "", "command that gets the service's certificate (PEM) on standard input, verifies its attestation, and ends with 0 if it is right")
}

// dial returns a client. Where secrets are to be sent the service has to be
// known by more than its name; giveUp is told that it is another one, because
// the client by itself would try to reach the right one for a while.
func (f *clientFlags) dial(ctx context.Context, verb string, secrets bool, giveUp context.CancelCauseFunc) (*keyclient.Client, error) {
	if f.address == "" {
		return nil, usageError(verb + ": --address is required")
	}
	if secrets && f.pin == "" && f.verify == "" && !strings.HasPrefix(f.address, "unix:") {
		return nil, usageError(verb + ": --server-key-sha256 or --verify-command is required: the service has to be known before it is told a secret")
	}
	cfg := keyclient.Config{Address: f.address, CAFile: f.ca, CertFile: f.cert, KeyFile: f.key, TokenFile: f.token, ServerName: f.name, Attempts: 1}
	if f.pin != "" || f.verify != "" {
		cfg.VerifyServer = func(s tls.ConnectionState) error {
			err := f.verifyServer(ctx, s)
			if err != nil {
				giveUp(err)
			}
			return err
		}
	}
	return keyclient.New(cfg)
}

// verifyServer compares the key that is pinned, and asks the command.
func (f *clientFlags) verifyServer(ctx context.Context, s tls.ConnectionState) error {
	leaf := s.PeerCertificates[0]
	if f.pin != "" {
		sum := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
		want, err := hex.DecodeString(f.pin)
		if err != nil || subtle.ConstantTimeCompare(sum[:], want) != 1 {
			return errdefs.Errorf(errdefs.ErrDenied, "the service's public key is %x, not the one of --server-key-sha256: nothing was sent", sum)
		}
	}
	if f.verify != "" {
		cmd := exec.CommandContext(ctx, "/bin/sh", "-c", f.verify)
		cmd.Stdin = bytes.NewReader(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw}))
		if out, err := cmd.CombinedOutput(); err != nil {
			return errdefs.Errorf(errdefs.ErrDenied, "--verify-command refuses the service (%w), nothing was sent: %.300s", err, out)
		}
	}
	return nil
}

// unseal gives a sealed service its KMS and store.
func unseal(ctx context.Context, c *command) error {
	return c.give(ctx, func(ctx context.Context, client *keyclient.Client, g keyclient.Given) error {
		s, err := client.Unseal(ctx, g)
		if err != nil {
			return err
		}
		return c.printStatus(s)
	})
}

// give parses the flags of a verb that sends KMS, store and secrets to a
// service, and lets send do it.
func (c *command) give(ctx context.Context, send func(context.Context, *keyclient.Client, keyclient.Given) error) error {
	var f clientFlags
	f.add(c)
	var paths []config.Item
	c.Var(&config.List{Items: &paths}, "file", `file whose content goes along; the URIs name the first as {0}, the second as {1}, …; "-" is standard input`)
	if err := c.parse(0, 0); err != nil {
		return err
	}
	if kek, store := c.keys.Given(); !kek || !store {
		return usageError(c.Name() + ": --kms-uri and --storage-uri are required (or …-file)")
	}
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	client, err := f.dial(ctx, c.Name(), true, giveUp)
	if err != nil {
		return err
	}
	defer client.Close()
	g, err := c.gather(paths)
	defer g.Wipe()
	if err != nil {
		return err
	}
	if err := send(ctx, client, g); err != nil {
		return cmp.Or(context.Cause(ctx), err)
	}
	return nil
}

// gather reads what is to be sent. The caller wipes it, on an error too.
func (c *command) gather(paths []config.Item) (g keyclient.Given, err error) {
	if g.KMSURIs, g.StorageURIs, g.RecordAuthSecret, err = c.keys.URIs(); err != nil {
		return g, err
	}
	for _, p := range paths {
		content, err := readGiven(p.Value)
		if err != nil {
			return g, fmt.Errorf("--file: %w", err)
		}
		g.Files = append(g.Files, content)
	}
	return g, nil
}

// readGiven reads a file, or standard input.
func readGiven(path string) (secret.Bytes, error) {
	in := os.Stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return secret.Bytes{}, err
		}
		defer f.Close()
		in = f
	}
	content, err := io.ReadAll(io.LimitReader(in, maxGiven+1))
	if err != nil {
		return secret.Bytes{}, err
	}
	if len(content) == 0 || len(content) > maxGiven {
		clear(content)
		return secret.Bytes{}, fmt.Errorf("%s must have 1 to %d bytes", path, maxGiven)
	}
	return secret.Take(content), nil
}

// status shows how a service is.
func status(ctx context.Context, c *command) error {
	var f clientFlags
	f.add(c)
	if err := c.parse(0, 0); err != nil {
		return err
	}
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	client, err := f.dial(ctx, "status", false, giveUp)
	if err != nil {
		return err
	}
	defer client.Close()
	s, err := client.Status(ctx)
	if err != nil {
		return cmp.Or(context.Cause(ctx), err)
	}
	return c.printStatus(s)
}

func (c *command) printStatus(s keyclient.Status) error {
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "version\t%s\nsealed\t%v\n", s.Version, s.Sealed)
	if !s.Sealed {
		records := fmt.Sprint(s.Records)
		if s.RecordsError != "" {
			records = "unknown: " + s.RecordsError
		}
		fmt.Fprintf(w, "records\t%s\n", records)
	}
	for _, k := range s.KEKs {
		state := k.KeyID
		if k.Error != "" {
			state = "unreachable: " + k.Error
		}
		fmt.Fprintf(w, "KEK\t%s\t%s\n", k.Name, state)
	}
	return w.Flush()
}
