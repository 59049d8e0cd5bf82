package drivertest

import (
	"context"
	"strings"
	"sync"

	"google.golang.org/grpc"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
)

// Faults makes one step of many fail: every call that the driver makes passes
// Step. The zero value lets everything pass and counts.
type Faults struct {
	mu    sync.Mutex
	at    int
	after bool
	how   func() error
	trace []string
}

// Killed is what a step panics with when the process dies there.
type Killed struct{}

// Arm forgets what was counted and makes step n (from 1) call how, before it is
// done or after, and fail with what how returns, which may panic(Killed{}).
func (f *Faults) Arm(n int, after bool, how func() error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.at, f.after, f.how, f.trace = n, after, how, nil
}

// Disarm lets everything pass, and starts to count anew.
func (f *Faults) Disarm() { f.Arm(0, false, nil) }

// Trace returns the steps since the last Arm.
func (f *Faults) Trace() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.trace...)
}

// Step is one step.
func (f *Faults) Step(name string, do func() error) error {
	f.mu.Lock()
	f.trace = append(f.trace, name)
	hit, after, how := len(f.trace) == f.at, f.after, f.how
	f.mu.Unlock()
	if hit && !after {
		return how()
	}
	err := do()
	if hit {
		return how()
	}
	return err
}

// value runs a step that has a result; one that fails has none.
func value[T any](f *Faults, name string, do func() (T, error)) (T, error) {
	var result T
	err := f.Step(name, func() (err error) {
		result, err = do()
		return err
	})
	if err != nil {
		var none T
		return none, err
	}
	return result, nil
}

// Conn puts steps around the calls that go through cc.
func (f *Faults) Conn(cc grpc.ClientConnInterface) grpc.ClientConnInterface {
	return faultyConn{cc, f}
}

type faultyConn struct {
	grpc.ClientConnInterface
	f *Faults
}

func (x faultyConn) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	return x.f.Step("rpc "+method[strings.LastIndex(method, "/")+1:], func() error {
		return x.ClientConnInterface.Invoke(ctx, method, args, reply, opts...)
	})
}

// Keys puts steps around k.
func (f *Faults) Keys(k *Keys) interface {
	driver.Keys
	driver.Creator
} {
	return faultyKeys{f, k}
}

type faultyKeys struct {
	f *Faults
	k *Keys
}

func (x faultyKeys) GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	return value(x.f, "GetDEK", func() (dek.DEK, error) { return x.k.GetDEK(ctx, id) })
}

func (x faultyKeys) CreateDEK(ctx context.Context, id dek.ID, spec dek.Spec) (dek.DEK, error) {
	return value(x.f, "CreateDEK", func() (dek.DEK, error) { return x.k.CreateDEK(ctx, id, spec) })
}

func (x faultyKeys) ClaimFormat(ctx context.Context, id dek.ID, c dek.Claim) (dek.Claim, error) {
	return value(x.f, "ClaimFormat", func() (dek.Claim, error) { return x.k.ClaimFormat(ctx, id, c) })
}

func (x faultyKeys) ConfirmDEK(ctx context.Context, id dek.ID, h dek.HeaderID) error {
	return x.f.Step("ConfirmDEK", func() error { return x.k.ConfirmDEK(ctx, id, h) })
}

// ControllerKeys puts steps around k.
func (f *Faults) ControllerKeys(k driver.ControllerKeys) driver.ControllerKeys {
	return faultyControllerKeys{f, k}
}

type faultyControllerKeys struct {
	f *Faults
	k driver.ControllerKeys
}

func (x faultyControllerKeys) GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	return value(x.f, "GetDEK", func() (dek.DEK, error) { return x.k.GetDEK(ctx, id) })
}

func (x faultyControllerKeys) CreateDEK(ctx context.Context, id dek.ID, spec dek.Spec) (dek.DEK, error) {
	return value(x.f, "CreateDEK", func() (dek.DEK, error) { return x.k.CreateDEK(ctx, id, spec) })
}

func (x faultyControllerKeys) CloneDEK(ctx context.Context, id dek.ID, spec dek.Spec, source dek.ID) (dek.DEK, error) {
	return value(x.f, "CloneDEK", func() (dek.DEK, error) { return x.k.CloneDEK(ctx, id, spec, source) })
}

func (x faultyControllerKeys) DeleteDEK(ctx context.Context, id dek.ID) error {
	return x.f.Step("DeleteDEK", func() error { return x.k.DeleteDEK(ctx, id) })
}

// Mapper puts steps around m.
func (f *Faults) Mapper(m driver.Mapper) driver.Mapper { return faultyMapper{f, m} }

type faultyMapper struct {
	f *Faults
	m driver.Mapper
}

func (x faultyMapper) Open(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	return value(x.f, "Open", func() (driver.Mapping, error) { return x.m.Open(ctx, v, d) })
}

func (x faultyMapper) MarkMade(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	return value(x.f, "MarkMade", func() (driver.Mapping, error) { return x.m.MarkMade(ctx, v, d) })
}

func (x faultyMapper) Resize(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	return value(x.f, "Resize", func() (driver.Mapping, error) { return x.m.Resize(ctx, v, d) })
}

func (x faultyMapper) Close(ctx context.Context, name string) error {
	return x.f.Step("Close", func() error { return x.m.Close(ctx, name) })
}

func (x faultyMapper) List() ([]driver.Mapping, error) {
	return value(x.f, "List mappings", x.m.List)
}

// Hydration puts steps around m.
func (f *Faults) Hydration(m driver.Hydration) driver.Hydration { return faultyHydration{f, m} }

type faultyHydration struct {
	f *Faults
	m driver.Hydration
}

func (x faultyHydration) List() ([]driver.Mapping, error) {
	return value(x.f, "List mappings", x.m.List)
}

func (x faultyHydration) Hydrate(name string, on bool) error {
	return x.f.Step("Hydrate", func() error { return x.m.Hydrate(name, on) })
}

func (x faultyHydration) Finish(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	return value(x.f, "Finish", func() (driver.Mapping, error) { return x.m.Finish(ctx, v, d) })
}

// Host is what a driver needs of a kernel.
type Host interface {
	driver.Mounts
	driver.Filesystems
	driver.Devices
}

// Host puts steps around h.
func (f *Faults) Host(h Host) Host { return faultyHost{f, h} }

type faultyHost struct {
	f *Faults
	h Host
}

func (x faultyHost) List() ([]driver.Mount, error) { return value(x.f, "List mounts", x.h.List) }

func (x faultyHost) Mount(ctx context.Context, source, target, fstype string, options []string) error {
	return x.f.Step("Mount", func() error { return x.h.Mount(ctx, source, target, fstype, options) })
}

func (x faultyHost) Unmount(ctx context.Context, target string) error {
	return x.f.Step("Unmount", func() error { return x.h.Unmount(ctx, target) })
}

func (x faultyHost) Make(ctx context.Context, device, fstype string, options []string, shifted bool) error {
	return x.f.Step("Make", func() error { return x.h.Make(ctx, device, fstype, options, shifted) })
}

func (x faultyHost) Probe(ctx context.Context, device string) (driver.FSInfo, error) {
	return value(x.f, "Probe", func() (driver.FSInfo, error) { return x.h.Probe(ctx, device) })
}

func (x faultyHost) Check(ctx context.Context, device, fstype string) error {
	return x.f.Step("Check", func() error { return x.h.Check(ctx, device, fstype) })
}

func (x faultyHost) Grow(ctx context.Context, device, mountpoint, fstype string) error {
	return x.f.Step("Grow", func() error { return x.h.Grow(ctx, device, mountpoint, fstype) })
}

func (x faultyHost) Usage(path string) (driver.Usage, error) {
	return value(x.f, "Usage", func() (driver.Usage, error) { return x.h.Usage(path) })
}

func (x faultyHost) Device(path string) (driver.Device, error) {
	return value(x.f, "Device", func() (driver.Device, error) { return x.h.Device(path) })
}

func (x faultyHost) Rescan(ctx context.Context, path string) error {
	return x.f.Step("Rescan", func() error { return x.h.Rescan(ctx, path) })
}

func (x faultyHost) Activity(number string) (driver.Activity, error) {
	return value(x.f, "Activity", func() (driver.Activity, error) { return x.h.Activity(number) })
}

func (x faultyHost) Alias(path, number string) error {
	return x.f.Step("Alias", func() error { return x.h.Alias(path, number) })
}

func (x faultyHost) LUKS(path string) (bool, error) {
	return value(x.f, "LUKS", func() (bool, error) { return x.h.LUKS(path) })
}
