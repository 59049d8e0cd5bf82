package loopdriver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// The kinds of fault. The first three hit RPCs, the others volumes.
const (
	faultSlow       = "slow"
	faultError      = "error"
	faultErrorAfter = "error-after"

	faultStale       = "stale-device"
	faultBlank       = "blank-device"
	faultStack       = "stack-publish"
	faultNoGrow      = "no-grow"
	faultIgnoreBlock = "ignore-block"

	faultLateGrowth  = "late-growth"
	faultPickyExpand = "picky-expand"
	faultOneMount    = "one-mount"
	faultForgetful   = "forgetful"
	faultFormatEarly = "format-early"
	faultShortName   = "short-name"
	faultRoundDown   = "round-down"
)

// fault is one parsed fault and how often its RPC was called.
type fault struct {
	text  string // as it was given
	kind  string
	arg   string // RPC, or volume ID or name ("" for all)
	nth   int    // 0 for every call
	delay time.Duration
	code  codes.Code
	calls int
}

// parseFault reads one fault in the syntax that Config.Faults documents.
func parseFault(text string) (*fault, error) {
	bad := func(format string, args ...any) (*fault, error) {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "fault %q: %s", text, fmt.Sprintf(format, args...))
	}
	head, value, hasValue := strings.Cut(text, "=")
	kind, arg, hasArg := strings.Cut(head, ":")
	f := &fault{text: text, kind: kind, arg: arg}
	switch kind {
	case faultStale, faultBlank, faultStack, faultNoGrow, faultIgnoreBlock,
		faultLateGrowth, faultPickyExpand, faultOneMount, faultForgetful, faultFormatEarly, faultShortName, faultRoundDown:
		if hasValue || hasArg && arg == "" {
			return bad("want %s or %s:VOLUME", kind, kind)
		}
		return f, nil
	case faultSlow, faultError, faultErrorAfter:
	default:
		return bad("unknown kind %q", kind)
	}

	if rpc, n, counted := strings.Cut(arg, "#"); counted {
		var err error
		if f.nth, err = strconv.Atoi(n); err != nil || f.nth < 1 {
			return bad("#%s is not a call's number, which starts at 1", n)
		}
		f.arg = rpc
	}
	if !slices.Contains(rpcs(), f.arg) {
		return bad("there is no RPC %q", f.arg)
	}
	var err error
	if kind == faultSlow {
		f.delay, err = time.ParseDuration(value)
		if err != nil || f.delay <= 0 {
			return bad("%q is not a positive duration such as 2s", value)
		}
		return f, nil
	}
	if err := f.code.UnmarshalJSON([]byte(strconv.Quote(value))); err != nil || f.code == codes.OK {
		return bad("%q is not a gRPC error code such as UNAVAILABLE", value)
	}
	return f, nil
}

// rpcs are the methods that the driver serves.
func rpcs() []string {
	var names []string
	for _, d := range []grpc.ServiceDesc{csi.Identity_ServiceDesc, csi.Controller_ServiceDesc, csi.Node_ServiceDesc} {
		for _, m := range d.Methods {
			names = append(names, m.MethodName)
		}
	}
	return names
}

// parseFaults parses all specs; one that old has too is kept with its count.
func parseFaults(specs []string, old []*fault) ([]*fault, error) {
	var all []*fault
	for _, spec := range specs {
		f, err := parseFault(spec)
		if err != nil {
			return nil, err
		}
		if i := slices.IndexFunc(old, func(o *fault) bool { return o.text == spec }); i >= 0 {
			f = old[i]
		}
		all = append(all, f)
	}
	return all, nil
}

// faults holds the faults that are on. Safe for concurrent use.
type faults struct {
	mu       sync.Mutex
	given    []*fault // Config.Faults, SetFaults
	path     string   // of faults.json
	raw      []byte   // its content when it was last parsed
	fromFile []*fault
}

func newFaults(path string, specs []string) (*faults, error) {
	f := &faults{path: path}
	return f, f.set(specs)
}

func (f *faults) set(specs []string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	given, err := parseFaults(specs, f.given)
	if err != nil {
		return err
	}
	f.given = given
	return nil
}

// effect is what the faults do to one call.
type effect struct {
	delay         time.Duration
	before, after error
}

// next reads faults.json again, counts a call of method and says what happens
// to it.
func (f *faults) next(method string) (effect, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.reread(); err != nil {
		return effect{}, err
	}
	var e effect
	for _, r := range f.all() {
		if r.arg != method {
			continue
		}
		r.calls++
		if r.nth != 0 && r.nth != r.calls {
			continue
		}
		injected := status.Errorf(r.code, "injected fault %q", r.text)
		switch r.kind {
		case faultSlow:
			e.delay += r.delay
		case faultError:
			e.before = injected
		case faultErrorAfter:
			e.after = injected
		}
	}
	return e, nil
}

// on reports whether a fault of this kind is set for v.
func (f *faults) on(kind string, v volume) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.ContainsFunc(f.all(), func(r *fault) bool {
		return r.kind == kind && (r.arg == "" || r.arg == v.ID || r.arg == v.Name)
	})
}

func (f *faults) all() []*fault { return slices.Concat(f.given, f.fromFile) }

func (f *faults) reread() error {
	raw, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		f.raw, f.fromFile = nil, nil
		return nil
	}
	if err != nil {
		return err
	}
	if string(raw) == string(f.raw) {
		return nil
	}
	var specs []string
	if err := json.Unmarshal(raw, &specs); err != nil {
		return errdefs.Errorf(errdefs.ErrState, "%s: want a JSON array of faults: %w", f.path, err)
	}
	parsed, err := parseFaults(specs, f.fromFile)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrState, "%s: %w", f.path, err)
	}
	f.raw, f.fromFile = raw, parsed
	return nil
}
