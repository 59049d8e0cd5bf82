package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

const (
	stateDisk = "state-disk.example.org/4b1c"
	mappingOf = "state"
)

// logbook is a log that tests wait for lines in.
type logbook struct {
	mu      sync.Mutex
	text    bytes.Buffer
	changed chan struct{}
}

func newLogbook() *logbook { return &logbook{changed: make(chan struct{})} }

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.changed)
	l.changed = make(chan struct{})
	return l.text.Write(p)
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// await waits for what the expression matches and returns its first group.
func (l *logbook) await(t *testing.T, expression string) string {
	t.Helper()
	re, late := regexp.MustCompile(expression), time.After(time.Minute)
	for {
		l.mu.Lock()
		found, changed := re.FindStringSubmatch(l.text.String()), l.changed
		l.mu.Unlock()
		if found != nil {
			return found[len(found)-1]
		}
		select {
		case <-changed:
		case <-late:
			t.Fatalf("the log has no %s:\n%s", expression, l)
		}
	}
}

// fakeDevices are those of a machine in memory.
type fakeDevices struct {
	drivertest.Mapper
	before func(op string) error // called at the beginning of Open and MarkMade, if there is one

	mu     sync.Mutex
	atOnce int
}

func (d *fakeDevices) Present(path string) error {
	if _, err := d.Kernel.Device(path); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	return nil
}

// enter finds out whether two work on the device at once.
func (d *fakeDevices) enter(op string) (leave func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.atOnce++; d.atOnce > 1 {
		d.Kernel.Violate("%s while another operation runs", op)
	}
	return func() { d.mu.Lock(); d.atOnce--; d.mu.Unlock() }, nil
}

func (d *fakeDevices) Open(ctx context.Context, v driver.Volume, key dek.DEK) (driver.Mapping, error) {
	leave, _ := d.enter("Open")
	defer leave()
	if d.before != nil {
		if err := d.before("Open"); err != nil {
			return driver.Mapping{}, err
		}
	}
	return d.Mapper.Open(ctx, v, key)
}

func (d *fakeDevices) MarkMade(ctx context.Context, v driver.Volume, key dek.DEK) (driver.Mapping, error) {
	leave, _ := d.enter("MarkMade")
	defer leave()
	if d.before != nil {
		if err := d.before("MarkMade"); err != nil {
			return driver.Mapping{}, err
		}
	}
	return d.Mapper.MarkMade(ctx, v, key)
}

// fakeKeys are keys in memory that fail as fault says.
type fakeKeys struct {
	*drivertest.Keys
	fault func(op string) error
}

func (k fakeKeys) GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	if err := k.fault("GetDEK"); err != nil {
		return dek.DEK{}, err
	}
	return k.Keys.GetDEK(ctx, id)
}

func (k fakeKeys) ConfirmDEK(ctx context.Context, id dek.ID, h dek.HeaderID) error {
	if err := k.fault("ConfirmDEK"); err != nil {
		return err
	}
	return k.Keys.ConfirmDEK(ctx, id, h)
}

func (k fakeKeys) Close() error { return nil }

// bench is a machine in memory with one disk, and its keys.
type bench struct {
	devices *fakeDevices
	keys    fakeKeys
	disk    string
	log     *logbook
	faults  map[string][]error // of the next calls, by operation
}

func newBench(t *testing.T) *bench {
	t.Helper()
	goleak.VerifyNone(t) // of what was before
	b := &bench{log: newLogbook(), faults: map[string][]error{}}
	b.devices = &fakeDevices{Mapper: drivertest.Mapper{Kernel: drivertest.NewKernel()}}
	b.disk = b.devices.Kernel.AddDisk(64 << 20)
	b.keys = fakeKeys{drivertest.NewKeys(), b.fault}
	t.Cleanup(func() {
		if broken := b.devices.Kernel.Violations(); broken != nil {
			t.Errorf("violations: %q", broken)
		}
		if n := b.keys.Unwiped(); n != 0 {
			t.Errorf("%d keys were not wiped", n)
		}
		goleak.VerifyNone(t)
		if t.Failed() {
			t.Log(b.log)
		}
	})
	return b
}

func (b *bench) fault(op string) error {
	if len(b.faults[op]) == 0 {
		return nil
	}
	err := b.faults[op][0]
	b.faults[op] = b.faults[op][1:]
	return err
}

// flags are those of `csi-plugin open` for the bench's disk.
func (b *bench) flags(t *testing.T, args ...string) *openFlags {
	t.Helper()
	f, err := parseOpenFlags(append([]string{"--dek-id=" + stateDisk, "--name=" + mappingOf, "--device=" + b.disk, "--node-name=n"}, args...), b.log)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// run does what `csi-plugin open` does once it has keys and mapper.
func (b *bench) run(t *testing.T, f *openFlags, way *ordinary) (string, error) {
	o := newOpener(f, b.devices, slog.New(slog.NewTextHandler(b.log, nil)))
	o.pause = time.Millisecond
	return o.run(t.Context(), f, way)
}

// open opens with the bench's own keys.
func (b *bench) open(t *testing.T, args ...string) (string, error) {
	f := b.flags(t, append(args, "--key-service=unix:///not-asked")...)
	return b.run(t, f, &ordinary{keys: b.keys, create: f.keys.create, node: f.node})
}

// opens is open that has to work.
func (b *bench) opens(t *testing.T, args ...string) {
	t.Helper()
	if path, err := b.open(t, args...); err != nil || path != "/dev/mapper/"+mappingOf {
		t.Fatalf("open %q = %q, %v", args, path, err)
	}
}

// refused is open that has to fail with the class and the words, and to leave
// no mapping and an unchanged disk.
func (b *bench) refused(t *testing.T, class error, words string, args ...string) {
	t.Helper()
	before := b.content(t)
	if path, err := b.open(t, args...); !errors.Is(err, class) || !strings.Contains(err.Error(), words) {
		t.Errorf("open %q = %q, %v; want %v with %q", args, path, err, class, words)
	}
	b.closed(t)
	if b.content(t) != before {
		t.Error("the disk was written")
	}
}

func (b *bench) closed(t *testing.T) {
	t.Helper()
	if err := b.devices.Kernel.ReadAt("/dev/mapper/"+mappingOf, make([]byte, 1), 0); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the mapping is there: %v", err)
	}
}

func (b *bench) content(t *testing.T) string {
	t.Helper()
	content := make([]byte, 64<<20)
	if err := b.devices.Kernel.ReadAt(b.disk, content, 0); err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func (b *bench) close(t *testing.T) {
	t.Helper()
	if err := b.devices.Close(t.Context(), mappingOf); err != nil {
		t.Fatal(err)
	}
}

func TestOpen(t *testing.T) {
	b := newBench(t)
	b.refused(t, errdefs.ErrNotFound, stateDisk)
	b.opens(t, "--create-keys", "--integrity=hmac-sha256")
	r, _ := b.keys.Record(stateDisk)
	if r.State != dek.Formatted || r.Spec != (dek.Spec{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC}) || r.Claim.Node != "n" || r.Header.UUID != r.Claim.UUID {
		t.Errorf("the record is %+v", r)
	}
	if err := b.devices.Kernel.WriteAt("/dev/mapper/"+mappingOf, []byte("data"), 4<<20); err != nil {
		t.Fatal(err)
	}
	b.opens(t) // again, while it is open
	b.close(t)
	b.close(t)
	b.opens(t, "--read-only")
	got := make([]byte, 4)
	if err := b.devices.Kernel.ReadAt("/dev/mapper/"+mappingOf, got, 4<<20); err != nil || string(got) != "data" {
		t.Errorf("it has %q, %v", got, err)
	}
	if _, err := b.open(t); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("writable while it is open read-only: %v", err)
	}
	b.close(t)

	// Another disk, a lost key, a blanked disk.
	other, own := b.devices.Kernel.AddDisk(64<<20), b.disk
	b.disk = other
	b.refused(t, errdefs.ErrState, "")
	b.disk = own
	b.devices.Kernel.BlankDisk(own)
	b.refused(t, errdefs.ErrState, "")
	b.keys.Lose(stateDisk)
	b.refused(t, errdefs.ErrNotFound, "")
}

// TestOpenRotated: a device whose key was replaced gets a header under the new
// one, by the node that has claimed it.
func TestOpenRotated(t *testing.T) {
	b := newBench(t)
	b.opens(t, "--create-keys")
	b.close(t)
	b.keys.Rotate(stateDisk)
	b.opens(t, "--read-only")
	b.close(t)
	b.keys.Seize(stateDisk, dek.Claim{Node: "m"})
	b.refused(t, errdefs.ErrConflict, "")
	b.keys.Seize(stateDisk, dek.Claim{})
	for range 2 {
		b.opens(t)
		if r, _ := b.keys.Record(stateDisk); r.State != dek.Formatted || r.Header.Sequence != 3 {
			t.Errorf("the record is %s at %+v", r.State, r.Header)
		}
		b.close(t)
	}
}

// TestOpenDemands: what is asked for at least is asked of the record, before
// anything is claimed or touched.
func TestOpenDemands(t *testing.T) {
	b := newBench(t)
	d, err := b.keys.CreateDEK(t.Context(), stateDisk, dek.Spec{Cipher: dek.CipherXTS})
	if err != nil {
		t.Fatal(err)
	}
	d.Wipe()
	b.refused(t, errdefs.ErrState, "--integrity demands it", "--integrity=hmac-sha256")
	b.refused(t, errdefs.ErrState, "", "--read-only")
	if r, _ := b.keys.Record(stateDisk); r.Claim != (dek.Claim{}) {
		t.Errorf("it was claimed: %+v", r.Claim)
	}
	b.keys.Seize(stateDisk, dek.Claim{Node: "m", UUID: dek.NewUUID()})
	b.refused(t, errdefs.ErrConflict, "")
}

func away() error { return errdefs.Errorf(errdefs.ErrUnavailable, "it is away") }

// TestOpenWaits: for what comes by itself, and for nothing else.
func TestOpenWaits(t *testing.T) {
	b := newBench(t)
	b.faults["GetDEK"] = []error{away()}
	b.refused(t, errdefs.ErrUnavailable, "it is away", "--create-keys")
	if log := b.log.String(); strings.Contains(log, "not open yet") {
		t.Error("without --wait it tries again")
	}
	busy := errdefs.Errorf(errdefs.ErrConflict, "a worker still works")
	for _, op := range []string{"GetDEK", "ConfirmDEK"} {
		b.faults[op] = []error{away(), busy, context.DeadlineExceeded, away()}
	}
	b.opens(t, "--create-keys", "--wait=10m")
	if n := strings.Count(b.log.String(), "not open yet"); n != 8 {
		t.Errorf("%d lines of progress, want 8", n)
	}
	b.log.await(t, `msg="not open yet" dek=`+stateDisk+` device=\S+ error="it is away" again_in=\S+ gives_up_in=(10m0s|9m5\ds)`)
	b.close(t)

	b.faults["GetDEK"] = []error{away(), errdefs.Errorf(errdefs.ErrDenied, "no")}
	b.refused(t, errdefs.ErrDenied, "no", "--wait=10m")
	if len(b.faults["GetDEK"]) != 0 {
		t.Error("it did not wait before it was denied")
	}

	// A deadline ends it, with what was wrong at last.
	number := b.disk
	b.disk = "/dev/none"
	_, err := b.open(t, "--wait=20ms")
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "/dev/none") {
		t.Errorf("waiting for a device that does not come: %v", err)
	}
	b.disk = number
}

// TestOpenWaitsForTheDevice: no key is asked for before the device is there.
func TestOpenWaitsForTheDevice(t *testing.T) {
	b := newBench(t)
	b.opens(t, "--create-keys")
	b.close(t)
	asked := 0
	b.keys.fault = func(string) error { asked++; return nil }
	path := filepath.Join(t.TempDir(), "by-id")
	disk := b.disk
	b.disk = path
	result := make(chan error, 1)
	go func() { _, err := b.open(t, "--wait=10m"); result <- err }()
	b.log.await(t, "not open yet")
	d, err := b.devices.Kernel.Device(disk)
	if err == nil {
		err = b.devices.Kernel.Alias(path, d.Number)
	}
	if err = errors.Join(err, <-result); err != nil || asked != 1 {
		t.Errorf("once the device is there: %v, the key was asked for %d times", err, asked)
	}
}

// TestWhatIsHalfOpenDoesNotStay: where the record cannot have it, nobody gets it.
func TestWhatIsHalfOpenDoesNotStay(t *testing.T) {
	for _, op := range []string{"MarkMade", "ConfirmDEK"} {
		b := newBench(t)
		b.devices.before = b.fault
		b.faults[op] = []error{errdefs.Errorf(errdefs.ErrDenied, "no")}
		if path, err := b.open(t, "--create-keys", "--wait=10m"); !errors.Is(err, errdefs.ErrDenied) {
			t.Errorf("%s is denied: %q, %v", op, path, err)
		}
		b.closed(t)
		b.opens(t) // and the next one goes on
		b.close(t)
	}
}

// TestOpenIsStopped: SIGTERM ends the waiting.
func TestOpenIsStopped(t *testing.T) {
	b := newBench(t)
	b.keys.fault = func(string) error { return away() }
	ctx, stop := context.WithCancel(t.Context())
	f := b.flags(t, "--key-service=unix:///not-asked", "--wait=10m")
	o := newOpener(f, b.devices, slog.New(slog.NewTextHandler(b.log, nil)))
	result := make(chan error, 1)
	go func() {
		_, err := o.run(ctx, f, &ordinary{keys: b.keys})
		result <- err
	}()
	b.log.await(t, "not open yet")
	stop()
	if err := <-result; !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "it is away") {
		t.Errorf("stopped: %v", err)
	}
}

// Command lines of open and close that cannot work.
func TestOpenCommandLines(t *testing.T) {
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	if err := os.WriteFile(key, []byte(strings.Repeat("k", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	direct := " --kms-uri=static://" + key + " --storage-uri=mem://"
	open := "open --dek-id=d/x --device=/dev/x --name=state"
	files := writeFiles(t, newAuthority(t), "node")
	recovery := " --recovery-listen=127.0.0.1:0" + files
	for _, tt := range []struct {
		args string
		code int
		says string
	}{
		{"help", 0, "csi-plugin open"},
		{"open --help", 0, "-recovery-listen"},
		{"close --help", 0, "-name"},
		{"open", 2, "--dek-id"},
		{"open --dek-id=d/x --name=state --device=/dev/x", 2, "where keys come from is missing"},
		{"open --dek-id=d/x --name=state --device=x" + direct, 2, "absolute"},
		{"open --dek-id=d/x --device=/dev/x" + direct, 2, "--name"},
		{"open --dek-id=d/x --device=/dev/x --name=cryptcsi-x" + direct, 2, "the driver's own"},
		{"open --dek-id=d/x --device=/dev/x --name=a/b" + direct, 2, "only letters"},
		{open + direct + " --key-service=unix:///k", 2, "excludes"},
		{open + direct + " --integrity=crc32", 2, "must be hmac-sha256"},
		{open + direct + " --wait=-1s", 2, "--wait"},
		{open + direct + " --create-keys --read-only", 2, "excludes --read-only"},
		{open + direct + files, 2, "--recovery-listen is missing"},
		{open + direct + " --recovery-listen=127.0.0.1:0", 2, "--recovery-listen needs"},
		{open + direct + recovery, 2, "--recovery-operator-identity"},
		{open + direct + recovery + " --recovery-operator-identity=operator --check-config", 0, "the configuration is right"},
		{open + recovery + " --recovery-operator-identity=operator --check-config", 0, "the configuration is right"},
		{open + direct + " --recovery-operator-identity=operator", 2, "--recovery-listen is missing"},
		{open + direct + recovery + " --recovery-operator-identity=operator --recovery-key-file=/nowhere --check-config", 1, "/nowhere"},
		{open + direct + " --check-config", 0, "the configuration is right"},
		{open + " --kms-uri=static:///nowhere --storage-uri=mem:// --check-config", 1, "/nowhere"},
		{open + direct + " --crypt-worker=/nowhere", 1, "crypt-worker /nowhere does not run"},
		{"close", 2, "--name"},
		{"close --name=cryptcsi-x", 2, "the driver's own"},
		{"close --name=control", 2, "uses such names itself"},
		{"close --name=state --crypt-worker=/nowhere", 1, "/nowhere"},
	} {
		var out, err bytes.Buffer
		code := run(t.Context(), strings.Fields(tt.args), &out, &err)
		if code != tt.code || !strings.Contains(out.String()+err.String(), tt.says) {
			t.Errorf("csi-plugin %s: exit code %d, want %d; it should say %q:\n%s%s", tt.args, code, tt.code, tt.says, &out, &err)
		}
		if strings.HasPrefix(tt.args, "open --") && out.Len() > 0 {
			t.Errorf("csi-plugin %s prints %q where only a path may stand", tt.args, &out)
		}
	}
}
