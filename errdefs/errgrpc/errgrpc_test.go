package errgrpc_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/errdefs/errgrpc"
)

var classes = map[error]codes.Code{
	errdefs.ErrInvalid:     codes.InvalidArgument,
	errdefs.ErrNotFound:    codes.NotFound,
	errdefs.ErrExists:      codes.AlreadyExists,
	errdefs.ErrDenied:      codes.PermissionDenied,
	errdefs.ErrConflict:    codes.Aborted,
	errdefs.ErrState:       codes.FailedPrecondition,
	errdefs.ErrCorrupt:     codes.DataLoss,
	errdefs.ErrUnavailable: codes.Unavailable,

	context.Canceled:         codes.Canceled,
	context.DeadlineExceeded: codes.DeadlineExceeded,
}

func TestClassesSurviveTheWire(t *testing.T) {
	for class, code := range classes {
		sent := fmt.Errorf("volume v-1: %w", errdefs.Errorf(class, "what is wrong with %q", "x"))
		wire := errgrpc.ToGRPC(sent)
		if got := status.Code(wire); got != code {
			t.Errorf("ToGRPC(%v) has code %v, want %v", class, got, code)
		}
		got := errgrpc.FromGRPC(wire)
		if !errors.Is(got, class) {
			t.Errorf("FromGRPC(ToGRPC(%v)) = %v, lost its class", class, got)
		}
		if got.Error() != sent.Error() {
			t.Errorf("message %q came back as %q", sent, got)
		}
		for other := range classes {
			if other != class && errors.Is(got, other) {
				t.Errorf("%v came back as %v too", class, other)
			}
		}
	}
}

func TestBareClassAndContextErrors(t *testing.T) {
	for class, code := range classes {
		if got := status.Code(errgrpc.ToGRPC(fmt.Errorf("x: %w", class))); got != code {
			t.Errorf("ToGRPC(wrapped %v) has code %v, want %v", class, got, code)
		}
	}
}

func TestAForeignStatusPasses(t *testing.T) {
	inner := status.Error(codes.ResourceExhausted, "too many volumes")
	if got := errgrpc.ToGRPC(inner); status.Code(got) != codes.ResourceExhausted || status.Convert(got).Message() != "too many volumes" {
		t.Errorf("bare status became %v", got)
	}
	wrapped := errgrpc.ToGRPC(fmt.Errorf("wrapped driver: %w", inner))
	if status.Code(wrapped) != codes.ResourceExhausted {
		t.Errorf("wrapped status became %v", wrapped)
	}
	translated := errgrpc.ToGRPC(errdefs.Errorf(errdefs.ErrUnavailable, "driver: %w", inner))
	if status.Code(translated) != codes.Unavailable {
		t.Errorf("a class put over a status must win, got %v", translated)
	}
	if got := errgrpc.FromGRPC(inner); status.Code(got) != codes.ResourceExhausted {
		t.Errorf("FromGRPC changed a code without a class: %v", got)
	}
}

func TestNilAndUnknown(t *testing.T) {
	if errgrpc.ToGRPC(nil) != nil || errgrpc.FromGRPC(nil) != nil {
		t.Error("nil must stay nil")
	}
	if got := status.Code(errgrpc.ToGRPC(io.EOF)); got != codes.Internal {
		t.Errorf("unclassified error has code %v", got)
	}
}

// Every class has a section in the book for operators, under the code's name.
func TestClassesAreExplained(t *testing.T) {
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("../errdefs.go")
	if err != nil {
		t.Fatal(err)
	}
	if n := len(regexp.MustCompile(`(?m)^\tErr\w+ += errors.New`).FindAll(source, -1)); n != len(classes)-2 {
		t.Errorf("errdefs has %d classes, this test knows %d", n, len(classes)-2)
	}
	for class, code := range classes {
		if !regexp.MustCompile(`(?m)^### .*\b` + code.String() + `\b.*\n\n[^#\s].{40}`).Match(text) {
			t.Errorf("docs/operations.md has no section for %v, %v", code, class)
		}
	}
}
