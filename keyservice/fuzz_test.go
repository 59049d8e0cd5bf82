package keyservice_test

import (
	"context"
	"log/slog"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/keyservice"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
)

// registrar keeps what a Server registers, so that it can be called without a
// network.
type registrar struct{ services map[string]any }

func (r registrar) RegisterService(d *grpc.ServiceDesc, impl any) {
	for _, m := range d.Methods {
		r.services[m.MethodName] = func(ctx context.Context, dec func(any) error) (any, error) {
			return m.Handler(impl, ctx, dec, nil)
		}
	}
}

type nobody struct{}

func (nobody) Identify(context.Context) (keyservice.Identity, error) {
	return keyservice.Identity{Name: "fuzzer", Node: nodeName}, nil
}

// FuzzRequests: no bytes make a method panic or answer with a code that the
// API does not name, and none of them changes another DEK.
func FuzzRequests(f *testing.F) {
	ring := newRing(f)
	audit := &lines{}
	srv, err := keyservice.New(keyservice.Config{
		Keys: deriving{ring, deriver(f, make([]byte, 32), make([]byte, 32))}, Constellation: true,
		Authenticators: []keyservice.Authenticator{nobody{}}, Policy: keyservice.Policy{Any: true},
		Audit: slog.New(slog.NewJSONHandler(audit, nil)),
	})
	must(f, "New", err)
	reg := registrar{map[string]any{}}
	srv.Register(reg)
	methods := []string{"GetDEK", "CreateDEK", "ClaimFormat", "ConfirmDEK", "RewrapDEK", "DeleteDEK", "Unseal", "Status", "GetDataKey"}
	const witness = dek.ID("witness/of-the-fuzzer")
	d, err := ring.CreateDEK(f.Context(), witness, spec())
	must(f, "CreateDEK", err)
	f.Cleanup(d.Wipe)

	for n, m := range []proto.Message{
		&keyservicev1.GetDEKRequest{Id: string(vol), Recipient: publicKey(f)},
		&keyservicev1.CreateDEKRequest{Id: string(vol), Spec: wireSpec(), Recipient: publicKey(f)},
		&keyservicev1.ClaimFormatRequest{Id: string(vol), Claim: &keyservicev1.Claim{Node: nodeName, Uuid: dek.NewUUID()}},
		&keyservicev1.ConfirmDEKRequest{Id: string(vol), Header: &keyservicev1.Header{Uuid: dek.NewUUID(), Sequence: 1}},
		&keyservicev1.RewrapDEKRequest{Id: string(vol)},
		&keyservicev1.DeleteDEKRequest{Id: string(vol)},
		unsealRequest("x"),
		&keyservicev1.StatusRequest{},
	} {
		raw, err := proto.Marshal(m)
		must(f, "Marshal", err)
		f.Add(byte(n), raw)
	}
	f.Add(byte(8), []byte("\x0a\x01x\x10\x20"))
	f.Fuzz(func(t *testing.T, n byte, raw []byte) {
		method := methods[int(n)%len(methods)]
		call := reg.services[method].(func(context.Context, func(any) error) (any, error))
		undecodable := false
		_, err := call(t.Context(), func(req any) error {
			err := proto.Unmarshal(raw, req.(proto.Message))
			undecodable = err != nil
			return err
		})
		if undecodable {
			return
		}
		switch status.Code(err) {
		case codes.OK, codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.Aborted, codes.FailedPrecondition:
		default:
			t.Errorf("%s: %v", method, err)
		}
		if audit.take(t) == nil {
			t.Errorf("%s left no audit line", method)
		}
		var touched interface{ GetId() string }
		if m, ok := messageOf(method, raw).(interface{ GetId() string }); ok {
			touched = m
		}
		if touched != nil && touched.GetId() == string(witness) {
			return
		}
		got, err := ring.GetDEK(t.Context(), witness)
		if err != nil || !got.Key.Equal(d.Key) || got.State != dek.Prepared {
			t.Errorf("%s changed another DEK: %v", method, err)
		}
		got.Wipe()
	})
}

func messageOf(method string, raw []byte) proto.Message {
	var m proto.Message
	switch method {
	case "ClaimFormat":
		m = &keyservicev1.ClaimFormatRequest{}
	case "ConfirmDEK":
		m = &keyservicev1.ConfirmDEKRequest{}
	case "DeleteDEK":
		m = &keyservicev1.DeleteDEKRequest{}
	default:
		return nil
	}
	_ = proto.Unmarshal(raw, m)
	return m
}
