package kmip

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

const (
	// maxConns bounds the connections to a server: each carries one request
	// at a time.
	maxConns = 4
	// maxMessage bounds an answer, in bytes.
	maxMessage = 1 << 20
	// maxFile bounds each file with certificates, in bytes.
	maxFile = 1 << 20
)

// pool keeps connections to one server. Nobody waits for one longer than ctx.
type pool struct {
	addr    string
	files   tlsFiles
	version *kmip.ProtocolVersion // nil: negotiated with the server

	slots chan struct{} // one is taken while a request is under way
	mu    sync.Mutex
	idle  []*conn
}

// conn is a connection, used by one request at a time.
type conn struct {
	net     net.Conn
	version kmip.ProtocolVersion
	digest  [sha256.Size]byte // of the TLS files that it was made with
}

// do sends the requests in one message and returns an answer for each. A
// request that the server refused is an answer, see failed. On any error the
// connection is given up, so that no late answer meets a later request; what
// changes nothing in the server is repeated once where the connection was an
// old one, which the server may have closed meanwhile.
func (p *pool) do(ctx context.Context, requests ...kmip.OperationPayload) ([]kmip.ResponseBatchItem, error) {
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for one of %d connections to %s: %w", maxConns, p.addr, ctx.Err())
	}
	cfg, digest, err := p.files.load()
	if err != nil {
		return nil, err
	}
	if c := p.take(digest); c != nil {
		items, err := p.roundtrip(ctx, c, requests)
		if _, refused := errors.AsType[*failure](err); err == nil || refused || ctx.Err() != nil || !repeatable(requests) {
			return items, err
		}
	}
	c, err := p.dial(ctx, cfg, digest)
	if err != nil {
		return nil, err
	}
	return p.roundtrip(ctx, c, requests)
}

// take returns an idle connection that was made with the same files, and
// closes those that were not.
func (p *pool) take(digest [sha256.Size]byte) *conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.idle) > 0 {
		c := p.idle[len(p.idle)-1]
		p.idle = p.idle[:len(p.idle)-1]
		if c.digest == digest {
			return c
		}
		_ = c.net.Close()
	}
	return nil
}

// dial connects and agrees on a protocol version.
func (p *pool) dial(ctx context.Context, cfg *tls.Config, digest [sha256.Size]byte) (*conn, error) {
	leaf := cfg.Certificates[0].Leaf
	if now := time.Now(); now.After(leaf.NotAfter) {
		return nil, errdefs.Errorf(errdefs.ErrDenied, "the client certificate in %s expired on %s: renew it", p.files.cert, leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	n, err := (&tls.Dialer{Config: cfg}).DialContext(ctx, "tcp", p.addr)
	if err != nil {
		return nil, p.lost(ctx, "connecting to", err)
	}
	c := &conn{net: n, digest: digest}
	if p.version != nil {
		c.version = *p.version
		return c, nil
	}
	c.version = kmip.V1_0
	ours := []kmip.ProtocolVersion{kmip.V1_4, kmip.V1_3, kmip.V1_2, kmip.V1_1, kmip.V1_0}
	msg := kmip.NewRequestMessage(kmip.V1_1, &payloads.DiscoverVersionsRequestPayload{ProtocolVersion: ours})
	items, err := c.exchange(ctx, &msg)
	if err != nil {
		_ = n.Close()
		return nil, p.lost(ctx, "agreeing on a protocol version with", err)
	}
	if f := failed(&items[0]); f != nil {
		if f.reason == kmip.ResultReasonOperationNotSupported || f.reason == kmip.ResultReasonInvalidMessage {
			return c, nil // a server of KMIP 1.0 knows no such question
		}
		_ = n.Close()
		return nil, f
	}
	if answer, ok := items[0].ResponsePayload.(*payloads.DiscoverVersionsResponsePayload); ok {
		for _, v := range ours {
			if slices.Contains(answer.ProtocolVersion, v) {
				c.version = v
				return c, nil
			}
		}
	}
	_ = n.Close()
	return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s speaks none of KMIP 1.0 to 1.4", p.addr)
}

// roundtrip sends one message over c and gives c back if all went well.
func (p *pool) roundtrip(ctx context.Context, c *conn, requests []kmip.OperationPayload) ([]kmip.ResponseBatchItem, error) {
	if f := c.cannot(requests); f != nil {
		p.put(c)
		return nil, f
	}
	msg := kmip.NewRequestMessage(c.version, requests...)
	if len(requests) > 1 {
		msg.Header.BatchErrorContinuationOption = kmip.BatchErrorContinuationOptionContinue
	}
	items, err := c.exchange(ctx, &msg)
	if err != nil {
		_ = c.net.Close()
		return nil, p.lost(ctx, "waiting for an answer of", err)
	}
	p.put(c)
	if len(items) != len(requests) { // the message as a whole was refused
		if f := failed(&items[0]); f != nil {
			return nil, f
		}
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "%s gave %d answers to %d requests", p.addr, len(items), len(requests))
	}
	return items, nil
}

func (p *pool) put(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.idle = append(p.idle, c)
}

// close closes what is idle; nothing else is left when all calls have ended.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.idle {
		_ = c.net.Close()
	}
	p.idle = nil
}

// lost is the error of a connection that failed.
func (p *pool) lost(ctx context.Context, doing string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s %s: %w", doing, p.addr, ctx.Err())
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "remote error" && strings.Contains(op.Error(), "certificate") {
		return errdefs.Errorf(errdefs.ErrDenied, "%s does not accept the client certificate in %s: %w", p.addr, p.files.cert, err)
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "%s %s: %w", doing, p.addr, err)
}

// cannot is the answer to requests that c's protocol version cannot express:
// authenticated encryption came with KMIP 1.4, and the library would silently
// leave the tag and the associated data out below that.
func (c *conn) cannot(requests []kmip.OperationPayload) *failure {
	for _, r := range requests {
		if op := r.Operation(); (op == kmip.OperationEncrypt || op == kmip.OperationDecrypt) && ttlv.CompareVersions(c.version, kmip.V1_4) < 0 {
			return &failure{op: op, reason: kmip.ResultReasonOperationNotSupported,
				message: fmt.Sprintf("authenticated encryption needs KMIP 1.4, and the server speaks %d.%d", c.version.ProtocolVersionMajor, c.version.ProtocolVersionMinor)}
		}
	}
	return nil
}

// repeatable says whether the requests change nothing in the server.
func repeatable(requests []kmip.OperationPayload) bool {
	return !slices.ContainsFunc(requests, func(r kmip.OperationPayload) bool {
		switch r.Operation() {
		case kmip.OperationEncrypt, kmip.OperationDecrypt, kmip.OperationGet, kmip.OperationLocate, kmip.OperationGetAttributes:
			return false
		}
		return true
	})
}

// exchange sends a message and reads one with at least one item. After an
// error c is of no use. Both messages may hold keys: their bytes are wiped.
func (c *conn) exchange(ctx context.Context, msg *kmip.RequestMessage) (items []kmip.ResponseBatchItem, err error) {
	stop := context.AfterFunc(ctx, func() { _ = c.net.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err() // the deadline may still strike: c is of no use
		}
	}()
	request := ttlv.MarshalTTLV(msg)
	defer clear(request)
	if _, err := c.net.Write(request); err != nil {
		return nil, err
	}
	var header [8]byte // tag, type, length
	if _, err := io.ReadFull(c.net, header[:]); err != nil {
		return nil, err
	}
	length := binary.BigEndian.Uint32(header[4:])
	if length > maxMessage {
		return nil, fmt.Errorf("an answer of %d bytes, must be at most %d", length, maxMessage)
	}
	answer := make([]byte, len(header)+int(length))
	defer clear(answer)
	copy(answer, header[:])
	if _, err := io.ReadFull(c.net, answer[len(header):]); err != nil {
		return nil, err
	}
	return parse(answer)
}

// parse decodes an answer. The library panics on some that are malformed.
func parse(answer []byte) (items []kmip.ResponseBatchItem, err error) {
	defer func() {
		if recover() != nil {
			items, err = nil, errors.New("the answer is no KMIP message")
		}
	}()
	var m kmip.ResponseMessage
	if err := ttlv.UnmarshalTTLV(answer, &m); err != nil {
		return nil, fmt.Errorf("the answer is no KMIP message: %w", err)
	}
	if len(m.BatchItem) == 0 {
		return nil, errors.New("the answer is empty")
	}
	return m.BatchItem, nil
}

// tlsFiles are the paths of what authenticates both sides, read anew for every
// request: they are renewed while we run.
type tlsFiles struct {
	ca, cert, key string // ca may be "": the system's authorities
	serverName    string
}

// load reads the files. ErrDenied where they are not there or do not fit.
func (f tlsFiles) load() (*tls.Config, [sha256.Size]byte, error) {
	cfg, digest, err := f.loadOnce()
	if err != nil {
		cfg, digest, err = f.loadOnce() // they may just have been replaced
	}
	return cfg, digest, err
}

func (f tlsFiles) loadOnce() (*tls.Config, [sha256.Size]byte, error) {
	var none [sha256.Size]byte
	var pem [3][]byte
	defer func() { clear(pem[2]) }()
	sums := sha256.New()
	for i, path := range []string{f.ca, f.cert, f.key} {
		if path == "" {
			continue
		}
		var err error
		if pem[i], err = readFile(path); err != nil {
			return nil, none, err
		}
		sum := sha256.Sum256(pem[i])
		sums.Write(sum[:])
	}
	cert, err := tls.X509KeyPair(pem[1], pem[2])
	if err != nil {
		return nil, none, errdefs.Errorf(errdefs.ErrDenied, "the client certificate in %s with the key in %s: %w", f.cert, f.key, err)
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: f.serverName, Certificates: []tls.Certificate{cert}}
	if f.ca != "" {
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem[0]) {
			return nil, none, errdefs.Errorf(errdefs.ErrDenied, "%s holds no certificate in PEM", f.ca)
		}
	}
	return cfg, [sha256.Size]byte(sums.Sum(nil)), nil
}

// readFile reads a regular file.
func readFile(path string) ([]byte, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe must not hang us
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrDenied, "the KMIP credentials: %w", err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, errdefs.Errorf(errdefs.ErrDenied, "%s must be a regular file of at most %d bytes", path, maxFile)
	}
	b := bytes.NewBuffer(make([]byte, 0, info.Size()+bytes.MinRead)) // does not grow, so that the key is in one place
	if _, err := b.ReadFrom(io.LimitReader(file, maxFile)); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrDenied, "the KMIP credentials: %w", err)
	}
	return b.Bytes(), nil
}

// failure is a request that the server refused.
type failure struct {
	op      kmip.Operation
	reason  kmip.ResultReason
	message string
}

// failed returns the refusal in an answer, nil where it is none.
func failed(item *kmip.ResponseBatchItem) *failure {
	switch {
	case item.ResultStatus == kmip.ResultStatusSuccess:
		return nil
	case item.ResultStatus == kmip.ResultStatusOperationPending:
		return &failure{item.Operation, kmip.ResultReasonGeneralFailure, "the server wants to answer later, which is not supported"}
	}
	return &failure{item.Operation, item.ResultReason, item.ResultMessage}
}

func (f *failure) Error() string {
	op := "the request"
	if f.op != 0 {
		op = ttlv.EnumStr(f.op)
	}
	return fmt.Sprintf("%s was refused: %s (%.200q)", op, ttlv.EnumStr(f.reason), f.message)
}

// Unwrap returns the class that the reason stands for.
func (f *failure) Unwrap() error {
	switch f.reason {
	case kmip.ResultReasonItemNotFound, kmip.ResultReasonObjectArchived, kmip.ResultReasonKeyValueNotPresent:
		return errdefs.ErrNotFound
	case kmip.ResultReasonPermissionDenied, kmip.ResultReasonAuthenticationNotSuccessful, kmip.ResultReasonIllegalOperation,
		kmip.ResultReasonAttestationRequired, kmip.ResultReasonAttestationFailed, kmip.ResultReasonSensitive, kmip.ResultReasonNotExtractable:
		return errdefs.ErrDenied
	case kmip.ResultReasonObjectAlreadyExists:
		return errdefs.ErrExists
	case kmip.ResultReasonCryptographicFailure:
		if f.op == kmip.OperationDecrypt {
			return errdefs.ErrCorrupt
		}
		return errdefs.ErrUnavailable
	case kmip.ResultReasonGeneralFailure, kmip.ResultReasonOperationCanceledByRequester, 0:
		return errdefs.ErrUnavailable
	}
	return errdefs.ErrInvalid
}

// ask sends one request and returns its answer, of the type that belongs to it.
func ask[T kmip.OperationPayload](ctx context.Context, p *pool, request kmip.OperationPayload) (T, error) {
	var none T
	items, err := p.do(ctx, request)
	if err != nil {
		return none, err
	}
	return answer[T](&items[0])
}

func answer[T kmip.OperationPayload](item *kmip.ResponseBatchItem) (T, error) {
	var none T
	if f := failed(item); f != nil {
		return none, f
	}
	a, ok := item.ResponsePayload.(T)
	if !ok {
		return none, errdefs.Errorf(errdefs.ErrUnavailable, "the server answered %s with something else", ttlv.EnumStr(none.Operation()))
	}
	return a, nil
}
