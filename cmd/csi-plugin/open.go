package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/config"
	"github.com/cryptcsi/cryptcsi/internal/logging"
)

const (
	// The pauses between tries: the longest first one, and the longest of all.
	firstPause   = time.Second
	longestPause = 15 * time.Second
	// undoTime bounds the closing of a mapping that must not stay.
	undoTime = 30 * time.Second
)

// openFlags is the configuration of `csi-plugin open`.
type openFlags struct {
	log                    logging.Flags
	file                   config.File
	keys                   keyFlags
	recovery               recoveryFlags
	id, device, name, node string
	integrity              string
	readOnly, backup       bool
	wait                   time.Duration
	worker                 *string
}

func parseOpenFlags(args []string, stderr io.Writer) (*openFlags, error) {
	f := &openFlags{}
	fs := newFlags("open", stderr)
	f.log.Add(fs)
	f.file.Add(fs)
	f.keys.add(fs)
	f.recovery.add(fs)
	hostname, _ := os.Hostname()
	fs.StringVar(&f.id, "dek-id", "", "ID of the device's DEK (required)")
	fs.StringVar(&f.device, "device", "", "path of the block device (required)")
	fs.StringVar(&f.name, "name", "", "name of the mapping, not starting with "+cryptmapper.Prefix+" (required)")
	fs.StringVar(&f.node, "node-name", cmp.Or(os.Getenv("NODE_NAME"), hostname), "name of this node in claims; default from $NODE_NAME, then the host name")
	fs.StringVar(&f.integrity, "integrity", "", `"hmac-sha256" refuses a device without authenticated sectors, and makes new ones with them`)
	fs.BoolVar(&f.readOnly, "read-only", false, "map so that nothing can be written")
	fs.BoolVar(&f.backup, "header-backup", false, "keep in the record, under the DEK, what restore-header makes a destroyed header from")
	fs.DurationVar(&f.wait, "wait", 0, "how long to try again while key or device are out of reach; 0 tries once, or with --recovery-listen for ever")
	f.worker = workerFlag(fs)
	if err := parse(fs, args); err != nil {
		return nil, err
	}
	if err := f.file.Load(fs); err != nil {
		return nil, usageError("open: " + err.Error())
	}
	return f, f.check()
}

// check finds what can be found without touching anything.
func (f *openFlags) check() error {
	if _, err := dek.ParseID(f.id); err != nil {
		return usageError("open: --dek-id: " + err.Error())
	}
	if err := chosenName("open", f.name); err != nil {
		return err
	}
	switch {
	case !filepath.IsAbs(f.device):
		return usageError(fmt.Sprintf("open: --device %q: must be an absolute path", f.device))
	case f.integrity != "" && f.integrity != string(dek.IntegrityHMAC):
		return usageError(fmt.Sprintf("open: --integrity %q: must be %s, or not be there", f.integrity, dek.IntegrityHMAC))
	case f.readOnly && f.keys.create:
		return usageError("open: --create-keys excludes --read-only: a new device has to be written")
	case f.wait < 0:
		return usageError("open: --wait must not be negative")
	}
	if err := f.recovery.check(); err != nil {
		return err
	}
	if f.recovery.on() && !f.keys.given() {
		return nil // an operator brings the key, nobody else
	}
	return f.keys.check("open")
}

// chosenName checks the name of a mapping that is none of the driver's.
func chosenName(verb, name string) error {
	if strings.HasPrefix(name, cryptmapper.Prefix) {
		return usageError(fmt.Sprintf("%s: --name %q: names that start with %s are the driver's own", verb, name, cryptmapper.Prefix))
	}
	if err := cryptmapper.CheckName(name); err != nil {
		return usageError(verb + ": --name: " + err.Error())
	}
	return nil
}

// openDevice opens one device that is no CSI volume and prints its mapping's path.
func openDevice(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f, err := parseOpenFlags(args, stderr)
	if err != nil {
		return err
	}
	log, err := f.log.Logger(stderr)
	if err != nil {
		return usageError("open: " + err.Error())
	}
	if f.file.Check {
		return f.try(ctx, log, stderr)
	}
	if _, err := libcryptsetup(ctx, *f.worker); err != nil {
		return err
	}
	if err := checkSystem(f.integrity != "", log); err != nil {
		return err
	}
	way, closeKeys, err := f.way(ctx, log)
	if err != nil {
		return err
	}
	defer closeKeys()
	m := cryptmapper.New(cryptmapper.Options{Worker: []string{*f.worker}, HeaderBackup: f.backup})
	defer m.Shutdown()
	path, err := newOpener(f, localDevices{mapper{m}}, log).run(ctx, f, way)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(stdout, path)
	return err
}

// way opens what the ordinary way goes by; nil where there is none.
func (f *openFlags) way(ctx context.Context, log *slog.Logger) (*ordinary, func(), error) {
	if !f.keys.given() {
		return nil, func() {}, nil
	}
	// Tries follow each other here, so the key service's client makes one at a time.
	k, closeKeys, err := f.keys.open(ctx, log, keyOptions{attempts: 1, checkOnly: f.file.Check})
	return &ordinary{keys: k, create: f.keys.create, node: f.node}, closeKeys, err
}

// try tells whether the configuration is right.
func (f *openFlags) try(ctx context.Context, log *slog.Logger, stderr io.Writer) error {
	if _, err := f.recovery.options(log); err != nil {
		return err
	}
	_, closeKeys, err := f.way(ctx, log)
	if err != nil {
		return err
	}
	closeKeys()
	fmt.Fprintln(stderr, "the configuration is right")
	return nil
}

// devices is what opening needs of this machine. The last three are
// driver.Mapper's.
type devices interface {
	// Present is ErrUnavailable where no device is at that path yet.
	Present(path string) error
	Open(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error)
	MarkMade(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error)
	Close(ctx context.Context, name string) error
}

// localDevices are those of this machine.
type localDevices struct{ mapper }

// Present follows symbolic links: udev's names are some.
func (localDevices) Present(path string) error {
	if _, err := os.Stat(path); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "the device is not there: %w", err)
	}
	return nil
}

// opener opens one device with the first key that is right.
type opener struct {
	id        dek.ID
	volume    driver.Volume
	integrity dek.Integrity // at least this
	devices   devices
	log       *slog.Logger
	patient   bool // a failure that waiting does not cure is waited out too
	pause     time.Duration

	turn   chan struct{}      // held while the device is worked on, and for what is below
	opened *driver.Mapping    // done, nothing follows
	half   bool               // it was mapped, and is not what it must be yet
	done   context.CancelFunc // ends run's context when it is opened
}

func newOpener(f *openFlags, m devices, log *slog.Logger) *opener {
	return &opener{
		id: dek.ID(f.id), integrity: dek.Integrity(f.integrity), devices: m, log: log,
		volume:  driver.Volume{Name: f.name, Device: f.device, ReadOnly: f.readOnly},
		patient: f.recovery.on(), pause: firstPause, turn: make(chan struct{}, 1),
	}
}

// run opens the device and returns its mapping's path: in the ordinary way, if
// there is one, and by an operator, if one may come, until one of them has or
// the time is up.
func (o *opener) run(ctx context.Context, f *openFlags, way *ordinary) (string, error) {
	ctx, o.done = context.WithCancel(ctx)
	defer o.done()
	bounded := ctx
	if f.wait > 0 {
		var cancel context.CancelFunc
		bounded, cancel = context.WithTimeout(ctx, f.wait)
		defer cancel()
	}
	g, bounded := errgroup.WithContext(bounded)
	if f.recovery.on() {
		serve, err := f.recovery.listen(ctx, o, &f.keys.direct)
		if err != nil {
			return "", err
		}
		g.Go(func() error { return serve(bounded) })
	}
	if way != nil {
		g.Go(func() error { return o.keepTrying(bounded, way, f.wait > 0) })
	}
	err := g.Wait()
	return o.result(err)
}

// result says what came of it. A device that was mapped and could not be
// finished does not stay.
func (o *opener) result(err error) (string, error) {
	o.turn <- struct{}{}
	defer func() { <-o.turn }()
	if o.opened != nil {
		if err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, errOpened) {
			o.log.Warn("the device is open; what went on besides ended badly", "error", err)
		}
		return o.opened.Path, nil
	}
	if err == nil {
		err = errdefs.Errorf(errdefs.ErrUnavailable, "nobody has brought the key of %s", o.id)
	}
	if o.half {
		ctx, cancel := context.WithTimeout(context.Background(), undoTime)
		defer cancel()
		if undo := o.devices.Close(ctx, o.volume.Name); undo != nil {
			err = errors.Join(err, fmt.Errorf("closing what could not be finished: %w", undo))
		}
	}
	return "", err
}

// errOpened ends what comes too late.
var errOpened = errdefs.Errorf(errdefs.ErrExists, "the device is open already")

// alone lets do work on the device while nobody else does, and not once it is open.
func (o *opener) alone(ctx context.Context, do func() error) error {
	select {
	case o.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-o.turn }()
	if o.opened != nil {
		return errOpened
	}
	return do()
}

// finish notes that the device is open. It is called alone.
func (o *opener) finish(m driver.Mapping, how string) {
	o.opened = &m
	o.log.Info("opened", "dek", o.id, "device", o.volume.Device, "mapping", m.Name, "key", how)
	o.done()
}

// demand compares what the record says with what this device must be.
func (o *opener) demand(d dek.DEK) error {
	if o.integrity != dek.IntegrityNone && d.Spec.Integrity != o.integrity {
		return errdefs.Errorf(errdefs.ErrState, "the record of %s says that the device has no integrity, and --integrity demands it: copy the data to a new device that has it", o.id)
	}
	return nil
}

// keepTrying tries the ordinary way, once or until it works.
func (o *opener) keepTrying(ctx context.Context, way *ordinary, wait bool) error {
	for longest := o.pause; ; longest = min(2*longest, longestPause) {
		err := way.open(ctx, o)
		again := o.patient || wait && temporary(err)
		if err == nil || !again || errors.Is(err, errOpened) {
			return err
		}
		if ctx.Err() == nil {
			pause := longest/2 + rand.N(longest/2+1)
			o.log.Warn("not open yet", "dek", o.id, "device", o.volume.Device, "error", err, "again_in", pause.Round(time.Millisecond).String(), "gives_up_in", left(ctx))
			sleep(ctx, pause)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("gave up (%w), at last: %w", ctx.Err(), err)
		}
	}
}

// left says how long ctx goes on.
func left(ctx context.Context) string {
	deadline, ok := ctx.Deadline()
	if !ok {
		return "never"
	}
	return time.Until(deadline).Round(time.Second).String()
}

// sleep waits, until ctx ends at most.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// temporary tells whether another try may succeed though nobody does anything:
// the network, the key service, KMS, store or device are not there yet, or a
// worker still is. A refusal is an answer: it stands until a person changes
// something, and each one is an alarm in the key service's audit log.
func temporary(err error) bool {
	is := func(classes ...error) bool {
		return slices.ContainsFunc(classes, func(class error) bool { return errors.Is(err, class) })
	}
	return is(errdefs.ErrUnavailable, errdefs.ErrConflict, context.DeadlineExceeded) &&
		!is(errdefs.ErrInvalid, errdefs.ErrNotFound, errdefs.ErrExists, errdefs.ErrDenied, errdefs.ErrState, errdefs.ErrCorrupt)
}

// ordinary is the way by the key service, or by KMS and store.
type ordinary struct {
	keys   keys
	create bool
	node   string
}

// open does, once, what the driver does for a block volume.
func (w *ordinary) open(ctx context.Context, o *opener) error {
	if err := o.devices.Present(o.volume.Device); err != nil {
		return err
	}
	d, err := w.fetch(ctx, o)
	defer d.Wipe()
	if err != nil {
		return err
	}
	var m driver.Mapping
	err = o.alone(ctx, func() error {
		if m, err = o.devices.Open(ctx, o.volume, d); err != nil {
			return err
		}
		o.half = true
		if m.Integrity != d.Spec.Integrity {
			return errdefs.Errorf(errdefs.ErrState, "mapping %s has integrity %q, the record of %s says %q", m.Name, m.Integrity, o.id, d.Spec.Integrity)
		}
		if !m.Made {
			m, err = o.devices.MarkMade(ctx, o.volume, d)
		}
		return err
	})
	if err != nil {
		return err
	}
	// Nobody works with the device before the record has this.
	if driver.Unconfirmed(d, m.Header) {
		if err := w.keys.ConfirmDEK(ctx, o.id, m.Header); err != nil {
			return err
		}
	}
	return o.alone(ctx, func() error { o.finish(m, "by the ordinary way"); return nil })
}

// fetch returns the DEK, with a claim where the device may have to be
// formatted, or given a header under its own key. The caller wipes it, on an error too.
func (w *ordinary) fetch(ctx context.Context, o *opener) (dek.DEK, error) {
	d, err := w.keys.GetDEK(ctx, o.id)
	if errors.Is(err, errdefs.ErrNotFound) && w.create {
		d, err = w.keys.CreateDEK(ctx, o.id, dek.Spec{Cipher: dek.CipherXTS, Integrity: o.integrity})
	}
	if err != nil {
		return d, err
	}
	if d.Spec.Layout == dek.LayoutConstellation {
		d.Spec.Integrity = o.integrity // there is no record that could say it
	}
	if err := o.demand(d); err != nil {
		return d, err
	}
	if d.State != dek.Formatted && !o.volume.ReadOnly {
		d.Claim, err = w.keys.ClaimFormat(ctx, o.id, dek.Claim{Node: w.node, UUID: dek.NewUUID()})
	}
	return d, err
}
