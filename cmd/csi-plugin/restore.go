package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/logging"
	"github.com/cryptcsi/cryptcsi/secret"
)

// restoreFlags is the configuration of `csi-plugin restore-header`.
type restoreFlags struct {
	log        logging.Flags
	device, id string
	options    cryptmapper.RestoreOptions
	worker     *string
	keys       keyFlags
}

func parseRestoreFlags(args []string, stderr io.Writer) (*restoreFlags, error) {
	f := &restoreFlags{}
	fs := newFlags("restore-header", stderr)
	f.log.Add(fs)
	fs.StringVar(&f.device, "device", "", "block device whose header is destroyed; not open (required)")
	fs.StringVar(&f.id, "dek-id", "", "whose volume it is: <driver name>/<volume ID> (required)")
	fs.BoolVar(&f.options.BlockVolume, "block-volume", false, "the volume has no filesystem, so that none must be found before a header is written: without integrity nothing else then tells the right disk from a wrong one")
	fs.BoolVar(&f.options.OlderBackup, "older-backup", false, "take a header backup that is older than the volume, or may be: what a volume with integrity has behind its size of then is wiped when it grows again")
	f.worker = workerFlag(fs)
	f.keys.direct.Add(fs)
	f.keys.service.add(fs)
	if err := parse(fs, args); err != nil {
		return nil, err
	}
	return f, f.check()
}

// check finds what can be found without touching anything.
func (f *restoreFlags) check() error {
	wrong := func(format string, args ...any) error {
		return usageError("restore-header: " + fmt.Sprintf(format, args...))
	}
	switch {
	case f.device == "":
		return wrong("--device is required")
	case f.keys.service.protocol != "":
		return wrong("--key-service-protocol: only cryptcsi's records hold a header backup")
	}
	if _, err := mappingOfDEK(f.id); err != nil {
		return wrong("%v", err)
	}
	return f.keys.check("restore-header")
}

// restoreHeader makes a volume's header again from the backup in its record.
func restoreHeader(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f, err := parseRestoreFlags(args, stderr)
	if err != nil {
		return err
	}
	log, err := f.log.Logger(stderr)
	if err != nil {
		return usageError("restore-header: " + err.Error())
	}
	if err := secret.Harden(); err != nil {
		return err
	}
	keys, closeKeys, err := f.keys.open(ctx, log, keyOptions{})
	if err != nil {
		return err
	}
	defer closeKeys()
	d, err := keys.GetDEK(ctx, dek.ID(f.id))
	if errors.Is(err, errdefs.ErrDenied) {
		return fmt.Errorf("%w (the identity of this command must be allowed to have it)", err)
	}
	if err != nil {
		return err
	}
	defer d.Wipe()
	name, err := mappingOfDEK(f.id)
	if err != nil {
		return err
	}
	cm := cryptmapper.New(cryptmapper.Options{Worker: []string{*f.worker}})
	defer cm.Shutdown()
	v := cryptmapper.Volume{Name: name, Device: f.device}
	h, restored, err := cm.Restore(ctx, v, d, f.options)
	switch {
	case err != nil:
		return err
	case !restored:
		fmt.Fprintf(stdout, "%s: nothing to restore, the header %s verifies; opening the volume repairs a damaged copy\n", f.device, h.UUID)
	default:
		fmt.Fprintf(stdout, "%s has its header again: %s, LUKS UUID %s, sequence %d\n", f.device, d.ID, h.UUID, h.Sequence)
	}
	return nil
}
