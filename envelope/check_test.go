package envelope_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// strange is a store that is right but for what a test puts in.
type strange struct {
	envelope.Store
	create  func(name string, data []byte) error
	read    func(name string) ([]byte, string, error)
	replace func(name string, data []byte, version string) error
	remove  func(name, version string) error
	list    func() ([]string, string, error)
}

func (s strange) Create(ctx context.Context, name string, data []byte) error {
	if s.create != nil {
		return s.create(name, data)
	}
	return s.Store.Create(ctx, name, data)
}

func (s strange) Read(ctx context.Context, name string) ([]byte, string, error) {
	if s.read != nil {
		return s.read(name)
	}
	return s.Store.Read(ctx, name)
}

func (s strange) Replace(ctx context.Context, name string, data []byte, version string) error {
	if s.replace != nil {
		return s.replace(name, data, version)
	}
	return s.Store.Replace(ctx, name, data, version)
}

func (s strange) Delete(ctx context.Context, name, version string) error {
	if s.remove != nil {
		return s.remove(name, version)
	}
	return s.Store.Delete(ctx, name, version)
}

func (s strange) List(ctx context.Context, token string, limit int) ([]string, string, error) {
	if s.list != nil {
		return s.list()
	}
	return s.Store.List(ctx, token, limit)
}

func TestCheckStore(t *testing.T) {
	denied := errdefs.Errorf(errdefs.ErrDenied, "AccessDenied")
	for _, tt := range []struct {
		name   string
		break_ func(s *strange, good envelope.Store)
		failed string // the step that says what is wrong; "" for none
		class  error
		words  string
	}{
		{name: "good", break_: func(*strange, envelope.Store) {}},
		{"If-None-Match ignored", func(s *strange, good envelope.Store) {
			s.create = func(name string, data []byte) error {
				_, v, err := good.Read(t.Context(), name)
				if err != nil {
					return good.Create(t.Context(), name, data)
				}
				return good.Replace(t.Context(), name, data, v)
			}
		}, "create refuses an existing object", errdefs.ErrState, "two nodes could get different keys"},
		{"ErrExists answered and written all the same", func(s *strange, good envelope.Store) {
			s.create = func(name string, data []byte) error {
				_, v, err := good.Read(t.Context(), name)
				if err != nil {
					return good.Create(t.Context(), name, data)
				}
				return errors.Join(errdefs.ErrExists, good.Replace(t.Context(), name, data, v))
			}
		}, "read it back", errdefs.ErrState, `"other"`},
		{"If-Match ignored", func(s *strange, good envelope.Store) {
			s.replace = func(name string, data []byte, _ string) error {
				_, v, err := good.Read(t.Context(), name)
				return errors.Join(err, good.Replace(t.Context(), name, data, v))
			}
		}, "replace refuses a version that is gone", errdefs.ErrState, "If-Match"},
		{"If-Match ignored on delete", func(s *strange, good envelope.Store) {
			s.remove = func(name, _ string) error {
				_, v, err := good.Read(t.Context(), name)
				return errors.Join(err, good.Delete(t.Context(), name, v))
			}
		}, "delete refuses a version that is gone", errdefs.ErrState, "condition on a delete"},
		{"delete does nothing", func(s *strange, good envelope.Store) {
			n := 0
			s.remove = func(name, version string) error {
				if n++; n == 2 {
					return nil
				}
				return good.Delete(t.Context(), name, version)
			}
		}, "read that it is gone", errdefs.ErrState, "a delete"},
		{"lists nothing", func(s *strange, _ envelope.Store) {
			s.list = func() ([]string, string, error) { return nil, "", nil }
		}, "list it", errdefs.ErrState, "does not have"},
		{"may not create", func(s *strange, _ envelope.Store) {
			s.create = func(string, []byte) error { return denied }
		}, "create an object", errdefs.ErrDenied, "AccessDenied"},
		{"may not read", func(s *strange, _ envelope.Store) {
			s.read = func(string) ([]byte, string, error) { return nil, "", denied }
		}, "read it back", errdefs.ErrDenied, "AccessDenied"},
		{"may not replace", func(s *strange, _ envelope.Store) {
			s.replace = func(string, []byte, string) error { return denied }
		}, "replace it", errdefs.ErrDenied, "AccessDenied"},
		{"may not list", func(s *strange, _ envelope.Store) {
			s.list = func() ([]string, string, error) { return nil, "", denied }
		}, "list it", errdefs.ErrDenied, "AccessDenied"},
		{"may not delete", func(s *strange, _ envelope.Store) {
			s.remove = func(string, string) error { return denied }
		}, "delete it", errdefs.ErrDenied, "AccessDenied"},
		{"out of reach", func(s *strange, _ envelope.Store) {
			s.create = func(string, []byte) error { return errdefs.Errorf(errdefs.ErrUnavailable, "no route") }
		}, "create an object", errdefs.ErrUnavailable, "no route"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			good := openStore(t, "mem://")
			s := strange{Store: good}
			tt.break_(&s, good)
			steps := envelope.CheckStore(t.Context(), s)
			calm := envelope.CheckStore(t.Context(), openStore(t, "mem://"))
			for i, step := range steps {
				if i < len(calm) && (step.Op != calm[i].Op || step.What != calm[i].What) {
					t.Errorf("step %d is %s %q, want %s %q", i, step.Op, step.What, calm[i].Op, calm[i].What)
				}
				if step.Err != nil && step.Skipped {
					t.Errorf("%q failed and was skipped", step.What)
				}
			}
			i := slices.IndexFunc(steps, func(s envelope.Step) bool { return s.What == tt.failed })
			if tt.failed != "" && (i < 0 || !errors.Is(steps[i].Err, tt.class) || !strings.Contains(steps[i].Err.Error(), tt.words)) {
				t.Errorf("%q did not fail as it should: %+v", tt.failed, steps)
			}
			if left, _, err := good.List(t.Context(), "", 10); err != nil || len(left) != 0 && tt.name != "may not delete" && tt.name != "may not read" {
				t.Errorf("left behind: %q, %v", left, err)
			}
			tt.break_(&s, good)
			err := envelope.ProbeStore(t.Context(), s)
			if (err == nil) != (tt.failed == "") || err != nil && !errors.Is(err, tt.class) {
				t.Errorf("ProbeStore: %v, want class %v", err, tt.class)
			}
		})
	}
}

// TestCheckStoreAfterItsContext: what was made is removed nevertheless.
func TestCheckStoreAfterItsContext(t *testing.T) {
	good := openStore(t, "mem://")
	ctx, cancel := context.WithCancel(t.Context())
	s := strange{Store: good}
	s.replace = func(string, []byte, string) error { cancel(); return ctx.Err() }
	if err := envelope.ProbeStore(ctx, s); !errors.Is(err, context.Canceled) {
		t.Errorf("ProbeStore: %v", err)
	}
	if left, _, err := good.List(t.Context(), "", 10); err != nil || len(left) != 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

func TestCheckStoreErases(t *testing.T) {
	s := &historic{Store: openStore(t, "mem://")}
	if err := envelope.ProbeStore(t.Context(), s); err != nil || s.erased != 1 {
		t.Errorf("ProbeStore: %v, %d times erased", err, s.erased)
	}
	s.err = errdefs.Errorf(errdefs.ErrDenied, "no s3:DeleteObjectVersion")
	steps := envelope.CheckStore(t.Context(), s)
	if last := steps[len(steps)-1]; last.Op != envelope.OpErase || !errors.Is(last.Err, errdefs.ErrDenied) {
		t.Errorf("the last step is %+v", last)
	}
}
