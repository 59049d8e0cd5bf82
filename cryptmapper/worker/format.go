package worker

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	cryptsetup "github.com/martinjungblut/go-cryptsetup"
	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// What dm-crypt's table says of an integrity volume: AES-XTS with a 512-bit
// key, authenticated by HMAC-SHA-256 with a 256-bit key.
const (
	integrityCipher = "capi:authenc(hmac(sha256),xts(aes))-plain64"
	integrityOption = "integrity:32:aead"
	// Of the layer below: what the superblock asks for without being asked.
	integrityLayerOptions = "fix_padding"
)

// minimumSize of a device: the header area and room for something.
const minimumSize = luks2.DataOffset + 4<<20

// sectorSize is 4096 where the device allows it, else 512. Constellation's
// volumes have 4096.
func (o *operation) sectorSize(dev *device) int {
	if o.constellation() || dev.sector <= 4096 && dev.size%4096 == 0 {
		return 4096
	}
	return 512
}

// format makes a new header in memory and then writes it to the device.
// Until Header.Write begins, the device's first 16 MiB are untouched.
func (o *operation) format(dev *device) (*luks2.Header, error) {
	least := int64(minimumSize)
	if o.cloned() {
		_, reserved := cryptmapper.CloneArea(minimumSize)
		least += reserved
	}
	if dev.size < least {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "device %s has %d bytes: such an encrypted volume needs at least %d", dev.number, dev.size, least)
	}
	file, err := memory("new-header")
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	if err := file.Truncate(luks2.DataOffset); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "memory for the header: %w", err)
	}
	integrity, keySize := "", 64
	if o.Spec.Integrity != dek.IntegrityNone {
		integrity, keySize = "hmac(sha256)", 96
	}
	token := luks2.NewToken(o.ID)
	token.Version = luks2.TokenVersion(o.Spec)
	if integrity == "" {
		sector := int64(o.sectorSize(dev))
		token.Size = (dev.size - luks2.DataOffset) / sector * sector
	}
	d, err := openLUKS(fdPath(file), dev.path(), o.log)
	if err != nil {
		return nil, classify(err, "preparing to format")
	}
	defer d.free()
	if err := d.format(o.Claim.UUID, dev.path(), integrity, o.sectorSize(dev), keySize, luks2.DataOffset); err != nil {
		return nil, classify(err, "formatting")
	}
	if err := d.addKeyslot(o.key); err != nil {
		return nil, classify(err, "adding the keyslot")
	}
	if err := d.setToken(token.Unsealed()); err != nil {
		return nil, classify(err, "adding the token")
	}
	o.step("header made in memory")
	h, err := luks2.Seal(file, o.want(dev), o.key)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "sealing the new header: %w", err)
	}
	return h, h.Write(dev, o.step)
}

// update writes the header with a changed token to the device. A header that
// Constellation made has no token and is not ours to write.
func (o *operation) update(dev *device, h *luks2.Header, change func(*luks2.Token)) (*luks2.Header, error) {
	if o.constellation() {
		return h, nil
	}
	t := h.Token
	change(&t)
	next, err := h.With(t, o.key)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrState, "changing the header's token: %w", err)
	}
	return next, next.WriteCopies(dev, o.step)
}

// initialise writes every sector of an integrity volume once, so that all have
// tags, without the journal, which would double the work. It notes in the
// token how far it came; given up at the deadline, it goes on there next time.
func (o *operation) initialise(l *lock, dev *device, h *luks2.Header) (*luks2.Header, error) {
	if err := o.activate(l, dev, h, flagNoJournal); err != nil {
		return nil, err
	}
	defer func() { _ = o.remove(o.Volume.Name) }()
	h, err := o.plan(dev, h, false)
	if err != nil {
		return nil, err
	}
	if o.cloned() && h.Token.Initialised == 0 {
		if err := o.zeroArea(h.Token); err != nil {
			return nil, err
		}
	}
	err = o.inPieces(h.Token.Initialised, h.Token.Size, "initialising the integrity tags", func(from, to int64) error {
		if err := wipe(dm.Path(o.lower()), from, to-from); err != nil {
			return err
		}
		o.step("chunk initialised")
		h, err = o.update(dev, h, func(t *luks2.Token) { t.Initialised = to })
		return err
	})
	return h, err
}

// errUnfinished ends what was given up because of a deadline.
var errUnfinished = errors.New("the next try goes on from there")

// inPieces does something to the bytes from done to size: in pieces that are
// small enough at first for the slowest device to finish one within a deadline,
// and larger as long as they are quick.
func (o *operation) inPieces(done, size int64, doing string, piece func(from, to int64) error) error {
	for chunk := int64(8 << 20); done < size; {
		began, to := time.Now(), min(done+chunk, size)
		if err := piece(done, to); err != nil {
			return err
		}
		done = to
		took := time.Since(began)
		if done < size && !o.Deadline.IsZero() && time.Until(o.Deadline) < 3*took+time.Second {
			return errdefs.Errorf(errdefs.ErrUnavailable, "%s, %d %% done; %w", doing, 100*done/size, errUnfinished)
		}
		if took < 2*time.Second {
			chunk *= 2
		}
	}
	return nil
}

// wipe writes zeros through a mapping and makes them durable.
func wipe(path string, offset, length int64) error {
	d, err := cryptsetup.Init(path)
	if err != nil {
		return classify(err, "initialising")
	}
	defer d.Free()
	err = d.Wipe(path, cryptsetup.CRYPT_WIPE_ZERO, uint64(offset), uint64(length), 1<<20, 0, func(_, _ uint64) int { return 0 })
	if err != nil {
		return classify(err, "initialising")
	}
	return flush(path)
}

// flush makes everything written through a mapping durable.
func flush(path string) error {
	file, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "flushing: %w", err)
	}
	defer func() { _ = file.Close() }()
	if err := file.Sync(); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "flushing: %w", err)
	}
	return nil
}

// Where blkid looks on a device: VMFS lies farthest from the beginning, at 2 MiB,
// and ZFS from the end, at 512 KiB.
const (
	signaturesHead = 2<<20 + 64<<10
	signaturesTail = 1 << 20
)

// probe fails where the device carries any signature, or where one would lie that
// cannot be read: to blkid that is as good as blank.
func (d *device) probe() error {
	if err := d.readable(); err != nil {
		return err
	}
	what, err := d.signature()
	if err == nil && what != "" {
		err = errdefs.Errorf(errdefs.ErrState, "device %s is to be formatted, but holds %s; it will not be touched: wipe it by hand if it is the right one and holds nothing", d.number, what)
	}
	return err
}

// readable fails unless blkid can read from the device what it looks at.
func (d *device) readable() error {
	_, err := d.ReadAt(make([]byte, min(signaturesHead, d.size)), 0)
	if tail := min(signaturesTail, d.size); err == nil {
		_, err = d.ReadAt(make([]byte, tail), d.size-tail)
	}
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "device %s is to be formatted, but it cannot be seen whether it holds anything: %w; it will not be touched", d.number, err)
	}
	return nil
}

// signature names what the device carries of that which blkid knows: a
// filesystem, a partition table, RAID, LVM, another encryption; "" for nothing.
func (d *device) signature() (string, error) {
	cmd := exec.Command("blkid", "--probe", "--output", "export", "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{d.file}
	out, err := cmd.Output()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return signature(out), nil
	case !errors.As(err, &exit):
		return "", errdefs.Errorf(errdefs.ErrUnavailable, "looking for signatures on device %s: %w", d.number, err)
	case exit.ExitCode() == 2: // nothing found, or nothing that could be read
		return "", nil
	case exit.ExitCode() == 8:
		return "several signatures", nil
	default:
		return "", errdefs.Errorf(errdefs.ErrUnavailable, "looking for signatures on device %s: blkid: %w: %s", d.number, err, bytes.TrimSpace(exit.Stderr))
	}
}

// signature picks the type out of blkid's answer.
func signature(out []byte) string {
	for line := range bytes.Lines(out) {
		for _, key := range []string{"TYPE=", "PTTYPE="} {
			if value, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte(key)); ok {
				return fmt.Sprintf("%q", value)
			}
		}
	}
	return "a signature"
}

// memory returns a file that only this process has.
func memory(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "memory for the header: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func fdPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }
