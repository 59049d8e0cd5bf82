package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/keyconfig"
	"github.com/cryptcsi/cryptcsi/internal/logging"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/secret"
)

// rekeyFlags is the configuration of `csi-plugin rekey`.
type rekeyFlags struct {
	log                 logging.Flags
	device, id, uuid    string
	integrity, nodeName string
	worker              *string
	keys, from          keyFlags // of the new key, and of the old one
}

func parseRekeyFlags(args []string, stderr io.Writer) (*rekeyFlags, error) {
	f := &rekeyFlags{}
	fs := newFlags("rekey", stderr)
	hostname, _ := os.Hostname()
	f.log.Add(fs)
	fs.StringVar(&f.device, "device", "", "block device that Constellation has encrypted; not open (required)")
	fs.StringVar(&f.id, "dek-id", "", "what its new key is named: <driver name>/<volume ID> (required)")
	fs.StringVar(&f.uuid, "luks-uuid", "", "LUKS UUID that the device must have; empty takes what the device says")
	fs.StringVar(&f.integrity, "integrity", "", `"hmac-sha256" for a volume that was made with integrity`)
	fs.StringVar(&f.nodeName, "node-name", cmp.Or(os.Getenv("NODE_NAME"), hostname), "name of this node in the claim; default from $NODE_NAME, then the host name")
	f.worker = workerFlag(fs)
	f.keys.direct.Add(fs)
	f.keys.service.add(fs)
	f.keys.create = true // its record
	addFrom(fs, f.from.direct.Add, "kms-uri", "kms-uri-file", "kms-timeout")
	addFrom(fs, f.from.service.add, "key-service", "key-service-ca-file", "key-service-cert-file", "key-service-key-file",
		"key-service-token-file", "key-service-name", "key-service-timeout", "key-service-insecure-plaintext")
	if err := parse(fs, args); err != nil {
		return nil, err
	}
	if f.from.service.address != "" {
		f.from.service.protocol = string(keyclient.ProtocolConstellation)
	}
	return f, f.check()
}

// addFrom adds some of the flags that add adds, for the old key: "from-" before
// their names.
func addFrom(fs *flag.FlagSet, add func(*flag.FlagSet), names ...string) {
	all := flag.NewFlagSet("", flag.ContinueOnError)
	add(all)
	for _, name := range names {
		fs.Var(all.Lookup(name).Value, "from-"+name, "of the old key: see --"+name)
	}
}

// check finds what can be found without touching anything.
func (f *rekeyFlags) check() error {
	fromKEK, _ := f.from.direct.Given()
	wrong := func(format string, args ...any) error { return usageError("rekey: " + fmt.Sprintf(format, args...)) }
	switch {
	case f.device == "":
		return wrong("--device is required")
	case dek.Integrity(f.integrity) != dek.IntegrityNone && dek.Integrity(f.integrity) != dek.IntegrityHMAC:
		return wrong("--integrity %q: must be empty or %s", f.integrity, dek.IntegrityHMAC)
	case f.keys.service.protocol != "":
		return wrong("--key-service-protocol: the new key comes from a key service of cryptcsi; Constellation's is --from-key-service")
	case (f.from.service.address != "") == fromKEK:
		return wrong("where the old key comes from: give either --from-key-service, or --from-kms-uri")
	}
	if _, err := mappingOfDEK(f.id); err != nil {
		return wrong("%v", err)
	}
	if f.uuid != "" {
		if err := dek.CheckUUID(f.uuid); err != nil {
			return wrong("--luks-uuid: %v", err)
		}
	}
	return f.keys.check("rekey")
}

// mappingOfDEK is the mapping's name of the CSI volume that a --dek-id names.
func mappingOfDEK(id string) (string, error) {
	driverName, volumeID, _ := strings.Cut(id, "/")
	if _, err := dek.VolumeID(driverName, volumeID); err != nil {
		return "", fmt.Errorf("--dek-id %q: must be <driver name>/<volume ID>: %w", id, err)
	}
	return driver.MappingName(driverName, volumeID), nil
}

// rekey gives a volume that Constellation made to a DEK of its own.
func rekey(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f, err := parseRekeyFlags(args, stderr)
	if err != nil {
		return err
	}
	log, err := f.log.Logger(stderr)
	if err != nil {
		return usageError("rekey: " + err.Error())
	}
	if err := secret.Harden(); err != nil {
		return err
	}
	ours, closeOurs, err := f.keys.open(ctx, log, keyOptions{})
	if err != nil {
		return err
	}
	defer closeOurs()
	theirs, closeTheirs, err := f.openOld(ctx, log)
	if err != nil {
		return err
	}
	defer closeTheirs()
	cm := cryptmapper.New(cryptmapper.Options{Worker: []string{*f.worker}})
	defer cm.Shutdown()
	r := rekeying{rekeyFlags: f, ours: ours, theirs: theirs, mapper: mapper{cm}, out: stdout}
	return r.run(ctx)
}

// derive returns the key that Constellation gives to a LUKS UUID; the caller
// wipes it.
type derive func(ctx context.Context, uuid string) (secret.Bytes, error)

// openOld opens where the old key comes from.
func (f *rekeyFlags) openOld(ctx context.Context, log *slog.Logger) (derive, func(), error) {
	if f.from.service.address != "" {
		service, closeService, err := f.from.open(ctx, log, keyOptions{})
		if err != nil {
			return nil, nil, fmt.Errorf("--from-key-service: %w", err)
		}
		return func(ctx context.Context, uuid string) (secret.Bytes, error) {
			d, err := service.GetDEK(ctx, dek.ID(uuid))
			return d.Key, err
		}, closeService, nil
	}
	opened, err := f.from.direct.Open(ctx, keyconfig.Options{}, log)
	if err != nil {
		return nil, nil, err
	}
	if err := opened.Err(); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("--from-kms-uri: %w", err), opened.Close())
	}
	if len(opened.KEKs) != 1 || !opened.KEKs[0].It.CanDerive() {
		return nil, nil, errors.Join(usageError("rekey: --from-kms-uri: give one KEK that derives keys, such as Constellation's kms://cluster-kms"), opened.Close())
	}
	return opened.KEKs[0].It.Derive, func() { _ = opened.Close() }, nil
}

// rekeying is one volume on its way. Every step can be repeated, and the whole.
type rekeying struct {
	*rekeyFlags
	ours   keys
	theirs derive
	mapper mapper
	out    io.Writer
}

func (r *rekeying) run(ctx context.Context) error {
	d, err := r.record(ctx)
	if err != nil {
		return err
	}
	defer d.Wipe()
	name, err := mappingOfDEK(r.id)
	if err != nil {
		return err
	}
	v := cryptmapper.Volume{Name: name, Device: r.device}
	if d.State == dek.Prepared {
		if err := r.prepare(ctx, v, &d); err != nil {
			return err
		}
	}
	// From here on the record says that the volume is formatted: nothing
	// formats it, and the old key is needed no more.
	h, err := r.mapper.Rekey(ctx, v, d, "", secret.Bytes{})
	if err != nil {
		return err
	}
	fmt.Fprintf(r.out, "%s is re-keyed: %s, LUKS UUID %s, integrity %s\n", r.device, d.ID, h.UUID, cmp.Or(string(d.Spec.Integrity), "none"))
	return nil
}

// record returns the new DEK, made now where there is none.
func (r *rekeying) record(ctx context.Context) (dek.DEK, error) {
	spec := dek.Spec{Cipher: dek.CipherXTS, Integrity: dek.Integrity(r.integrity)}
	d, err := r.ours.GetDEK(ctx, dek.ID(r.id))
	if errors.Is(err, errdefs.ErrNotFound) {
		d, err = r.ours.CreateDEK(ctx, dek.ID(r.id), spec)
	}
	switch {
	case errors.Is(err, errdefs.ErrDenied):
		return dek.DEK{}, fmt.Errorf("%w (has it a record? key-service dek create makes one; and the identity of this command must be allowed to have it)", err)
	case err != nil:
		return dek.DEK{}, err
	case d.Spec.Cipher != spec.Cipher || d.Spec.Integrity != spec.Integrity:
		d.Wipe()
		return dek.DEK{}, errdefs.Errorf(errdefs.ErrExists, "the record of %s says integrity %q, asked for is %q", r.id, d.Spec.Integrity, r.integrity)
	}
	return d, nil
}

// prepare puts the new header aside on the device and confirms it.
func (r *rekeying) prepare(ctx context.Context, v cryptmapper.Volume, d *dek.DEK) error {
	uuid, err := r.mapper.HeaderUUID(ctx, r.device)
	switch {
	case err != nil:
		return err
	case r.uuid != "" && r.uuid != uuid:
		return errdefs.Errorf(errdefs.ErrState, "%s has the LUKS UUID %s, not %s: it is another volume", r.device, uuid, r.uuid)
	}
	old, err := r.theirs(ctx, uuid)
	if err != nil {
		return fmt.Errorf("the old key: %w", err)
	}
	defer old.Wipe()
	if d.Claim, err = r.ours.ClaimFormat(ctx, d.ID, dek.Claim{Node: r.nodeName, UUID: dek.NewUUID()}); err != nil {
		return err
	}
	h, err := r.mapper.Rekey(ctx, v, *d, dek.ID(uuid), old)
	if err != nil {
		return err
	}
	fmt.Fprintf(r.out, "%s with LUKS UUID %s opens with its old key; its new header is put aside\n", r.device, uuid)
	if err := r.ours.ConfirmDEK(ctx, d.ID, h); err != nil {
		return err
	}
	d.State, d.Header = dek.Formatted, h
	return nil
}
