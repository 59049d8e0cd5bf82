// Package errgrpc translates errors of errdefs' classes into gRPC statuses and
// back. It is the only place where classes and codes meet, and a package of its
// own so that a program without gRPC (crypt-worker) does not pay for it.
package errgrpc

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// codesOf pairs each class with its gRPC code, in the order in which ToGRPC
// looks: where an error belongs to several classes the first one counts.
var codesOf = []struct {
	class error
	code  codes.Code
}{
	{errdefs.ErrInvalid, codes.InvalidArgument},
	{errdefs.ErrNotFound, codes.NotFound},
	{errdefs.ErrExists, codes.AlreadyExists},
	{errdefs.ErrDenied, codes.PermissionDenied},
	{errdefs.ErrConflict, codes.Aborted},
	{errdefs.ErrState, codes.FailedPrecondition},
	{errdefs.ErrCorrupt, codes.DataLoss},
	{errdefs.ErrUnavailable, codes.Unavailable},
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
}

// ToGRPC translates err at a server's edge. An error that carries a gRPC
// status (one of the wrapped driver's answers) keeps its code, and its message
// too unless it was wrapped in words of our own. Unclassified errors become
// Internal. Status details are always empty, as the CSI specification asks.
func ToGRPC(err error) error {
	if err == nil {
		return nil
	}
	// A class of ours wins over a status further down the chain: whoever put
	// the class there had looked at the status.
	if class := errdefs.Class(err); class != nil {
		for _, e := range codesOf {
			if class == e.class {
				return status.Error(e.code, err.Error())
			}
		}
	}
	var st interface{ GRPCStatus() *status.Status }
	if errors.As(err, &st) {
		msg := err.Error()
		if bare, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
			msg = bare.GRPCStatus().Message()
		}
		return status.Error(st.GRPCStatus().Code(), msg)
	}
	for _, e := range codesOf {
		if errors.Is(err, e.class) {
			return status.Error(e.code, err.Error())
		}
	}
	return status.Error(codes.Internal, err.Error())
}

// FromGRPC translates an answer at a client's edge, so that errors.Is means the
// same on both sides of a socket. A code without a class comes back as it is.
func FromGRPC(err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	for _, e := range codesOf {
		if st.Code() == e.code {
			return errdefs.Errorf(e.class, "%s", st.Message())
		}
	}
	return err
}
