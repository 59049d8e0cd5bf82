package envelope

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Step is one thing that CheckStore tried.
type Step struct {
	Op      string // the operation behind it, one of the Op constants
	What    string // in words
	Err     error  // nil where the store did what it must
	Skipped bool   // not tried, because a step that it needs failed; Err is nil
}

// cleanUp bounds how long a check takes to remove its object after ctx ended.
const cleanUp = 10 * time.Second

// CheckStore tries with an object of its own, "probe-" and random letters,
// everything that a Keyring needs of a store, above all that no condition on a
// write is ignored, and returns every step, the same ones each time. It leaves
// nothing behind; where it cannot remove its object a further step says so.
func CheckStore(ctx context.Context, s Store) []Step {
	c := &check{ctx: ctx, store: s, name: "probe-" + strings.ToLower(rand.Text())}
	first, second, other := []byte("first"), []byte("second"), []byte("other")

	created := c.step(true, OpCreate, "create an object", func() error { return s.Create(ctx, c.name, first) })
	c.step(created, OpCreate, "create refuses an existing object", func() error {
		return refused(s.Create(ctx, c.name, other), errdefs.ErrExists, "If-None-Match or its like, the condition that an object must be new")
	})
	read := c.step(created, OpRead, "read it back", func() error { return c.read(first) })
	stale := c.version
	replaced := c.step(read, OpReplace, "replace it", func() error { return s.Replace(ctx, c.name, second, stale) })
	c.step(replaced, OpReplace, "replace refuses a version that is gone", func() error {
		return refused(s.Replace(ctx, c.name, other, stale), errdefs.ErrConflict, "If-Match or its like, the condition that an object must be unchanged")
	})
	read = c.step(replaced, OpRead, "read the change", func() error { return c.read(second) }) || read && !replaced
	c.step(created, OpList, "list it", c.list)
	c.step(read && replaced, OpDelete, "delete refuses a version that is gone", func() error {
		return refused(s.Delete(ctx, c.name, stale), errdefs.ErrConflict, "the condition on a delete that the object must be unchanged")
	})
	deleted := c.step(read, OpDelete, "delete it", func() error { return s.Delete(ctx, c.name, c.version) })
	gone := c.step(deleted, OpRead, "read that it is gone", func() error {
		_, _, err := s.Read(ctx, c.name)
		return refused(err, errdefs.ErrNotFound, "a delete, or answers with old data")
	})
	if e, ok := s.(Eraser); ok {
		c.step(deleted, OpErase, "erase its earlier versions", func() error { _, err := e.EraseHistory(ctx, c.name); return err })
	}
	if err := c.steps[0].Err; !gone && !errors.Is(err, errdefs.ErrDenied) && !errors.Is(err, errdefs.ErrInvalid) {
		c.tidy()
	}
	return c.steps
}

// ProbeStore is CheckStore as one error, nil for a store that can be used. A
// store that ignores a condition is ErrState, whatever else went wrong.
func ProbeStore(ctx context.Context, s Store) error {
	var errs []error
	for _, step := range CheckStore(ctx, s) {
		if step.Err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", step.What, step.Err))
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("the store cannot be used: %w", errors.Join(errs...))
}

type check struct {
	ctx     context.Context
	store   Store
	name    string
	version string // that was read last
	steps   []Step
}

// step does one thing, if what it needs was done, and says whether it worked.
func (c *check) step(needs bool, op, what string, do func() error) bool {
	s := Step{Op: op, What: what, Skipped: !needs}
	if needs {
		s.Err = do()
	}
	c.steps = append(c.steps, s)
	return needs && s.Err == nil
}

// refused checks the answer to what a store must not do.
func refused(err, class error, condition string) error {
	switch {
	case errors.Is(err, class):
		return nil
	case err == nil:
		return errdefs.Errorf(errdefs.ErrState, "the store ignores %s: two nodes could get different keys for one volume, so it cannot be used", condition)
	}
	return err
}

func (c *check) read(want []byte) error {
	data, version, err := c.store.Read(c.ctx, c.name)
	if err != nil {
		return err
	}
	c.version = version
	if !bytes.Equal(data, want) {
		return errdefs.Errorf(errdefs.ErrState, "the store gave back %.40q for %q, which was written last: it answers with old data, or did what it had refused", data, want)
	}
	return nil
}

// maxProbePages bounds how far list looks for the object, which comes after
// all records.
const maxProbePages = 10

func (c *check) list() error {
	token := ""
	for range maxProbePages {
		names, next, err := c.store.List(c.ctx, token, 1000)
		if err != nil || slices.Contains(names, c.name) {
			return err
		}
		if next == "" {
			return errdefs.Errorf(errdefs.ErrState, "the list does not have an object that is there")
		}
		token = next
	}
	return nil // a full store: listing works at least
}

// tidy removes what a failed step left.
func (c *check) tidy() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.ctx), cleanUp)
	defer cancel()
	_, version, err := c.store.Read(ctx, c.name)
	if err == nil {
		err = c.store.Delete(ctx, c.name, version)
	}
	if e, ok := c.store.(Eraser); ok && (err == nil || errors.Is(err, errdefs.ErrNotFound)) {
		_, err = e.EraseHistory(ctx, c.name)
	}
	if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		c.steps = append(c.steps, Step{Op: OpDelete, What: "remove the probe " + c.name, Err: err})
	}
}
