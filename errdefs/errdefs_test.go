package errdefs_test

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

func TestErrorfKeepsWhatItWraps(t *testing.T) {
	err := errdefs.Errorf(errdefs.ErrUnavailable, "reading: %w", io.ErrUnexpectedEOF)
	if !errors.Is(err, io.ErrUnexpectedEOF) || !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("%v lost its class or its cause", err)
	}
	if want := "reading: unexpected EOF"; err.Error() != want {
		t.Errorf("message %q, want %q", err, want)
	}
}

func TestClassIsTheOutermost(t *testing.T) {
	inner := errdefs.Errorf(errdefs.ErrState, "inner")
	outer := fmt.Errorf("x: %w", errdefs.Errorf(errdefs.ErrUnavailable, "outer: %w", inner))
	if got := errdefs.Class(outer); got != errdefs.ErrUnavailable {
		t.Errorf("Class = %v", got)
	}
	if !errors.Is(outer, errdefs.ErrState) {
		t.Error("the inner class is gone")
	}
	if got := errdefs.Class(io.EOF); got != nil {
		t.Errorf("Class of a foreign error = %v", got)
	}
}
