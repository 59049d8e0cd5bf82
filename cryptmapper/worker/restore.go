package worker

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// backup returns what the record is to keep of the header of a finished volume,
// "" where it has that already, or has nothing and nobody asked. What it has is
// renewed by every node, asked or not: an older one would make a header of an
// older size.
func (o *operation) backup(dev *device, h *luks2.Header) (string, error) {
	wanted := o.Backup || o.Header.Backup != ""
	if !wanted || !h.Token.Made || o.constellation() || o.previous || o.backedUp(dev, h) {
		return "", nil
	}
	vk, err := o.volumeKey(dev, h, o.key)
	if err != nil {
		return "", err
	}
	defer vk.Wipe()
	text, err := h.SealBackup(vk, o.key)
	if err != nil {
		return "", errdefs.Errorf(errdefs.ErrState, "making the header backup: %w", err)
	}
	return text, nil
}

// backedUp tells whether the backup in the record is of h. The record's sequence
// does not say: it rises without a backup too. One that cannot be read is as none.
func (o *operation) backedUp(dev *device, h *luks2.Header) bool {
	b, err := luks2.OpenBackup(o.Header.Backup, h.Copy.UUID(), o.want(dev), o.key)
	if err != nil {
		return false
	}
	defer b.VolumeKey.Wipe()
	return b.Of(h)
}

// validRestore checks what only Restore is told.
func (o *operation) validRestore() error {
	switch {
	case o.State != dek.Formatted, o.constellation():
		return errdefs.Errorf(errdefs.ErrState, "DEK %s is in state %s: only the header of a finished volume of ours, whose key is not being rotated, can be restored", o.ID, o.State)
	case o.Header.Backup == "":
		return errdefs.Errorf(errdefs.ErrState, "the record of %s holds no header backup: --header-backup on the node puts one there, while the header is whole", o.ID)
	}
	if err := dek.CheckUUID(o.Header.UUID); err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "the header to restore: %w", err)
	}
	return nil
}

// restore is Mapper.Restore.
func (o *operation) restore() (dek.HeaderID, bool, error) {
	var none dek.HeaderID
	dev, err := openDevice(o.Volume.Device, true)
	if err != nil {
		return none, false, err
	}
	defer dev.close()
	if err := o.notOpen(dev); err != nil {
		return none, false, err
	}
	found, err := luks2.Read(dev, o.want(dev), o.key)
	if err != nil {
		return none, false, err
	}
	if found.Header != nil {
		return found.Header.ID(), false, o.acceptable(dev, found.Header)
	}
	if err := o.mayRestore(dev, found); err != nil {
		return none, false, err
	}
	b, err := luks2.OpenBackup(o.Header.Backup, o.Header.UUID, o.want(dev), o.key)
	if err != nil {
		return none, false, err
	}
	defer b.VolumeKey.Wipe()
	h, err := o.again(dev, b)
	if err != nil {
		return none, false, err
	}
	if err := o.latest(dev, b, h); err != nil {
		return none, false, err
	}
	o.step("header made in memory")
	if err := o.fits(dev, h); err != nil {
		return none, false, err
	}
	return h.ID(), true, h.Write(dev, o.step)
}

// mayRestore fails where the device holds anything that is not the remains of
// this volume's own header.
func (o *operation) mayRestore(dev *device, found luks2.Found) error {
	for _, uuid := range found.UUIDs {
		if uuid != o.Header.UUID {
			return errdefs.Errorf(errdefs.ErrState, "device %s carries the LUKS header %.40q, the volume's was %s: it is another volume's disk; nothing was changed", dev.number, uuid, o.Header.UUID)
		}
	}
	what, err := dev.signature()
	switch {
	case err != nil:
		return err
	case what != "" && (what != `"crypto_LUKS"` || len(found.UUIDs) == 0):
		return errdefs.Errorf(errdefs.ErrState, "device %s holds %s where the volume's header was: is it the right disk? nothing was changed", dev.number, what)
	}
	return nil
}

// latest fails where the volume may have grown since the backup was made: what
// it has behind its size of then would be wiped when it grows again. A backup of
// the confirmed sequence is of the last header that anybody knows of. One of
// version 1 or 2 does not say when it was made; where the device gives the volume
// no more than it had then, nothing is behind. Without integrity growing wipes
// nothing, and no other part of a backup ever changes.
func (o *operation) latest(dev *device, b luks2.Backup, h *luks2.Header) error {
	const consequence = "what the volume may have behind %d bytes would be wiped when it grows to that again; nothing was changed. If the volume never grew since, or that may be lost, restore with --older-backup, after a snapshot of the disk"
	switch {
	case o.OlderBackup, b.Integrity == nil, b.Sequence != 0 && b.Sequence >= o.Header.Sequence:
		return nil
	case b.Sequence != 0:
		return errdefs.Errorf(errdefs.ErrState, "the header backup of %s is of sequence %d, and %d was confirmed later without a backup: "+consequence, o.ID, b.Sequence, o.Header.Sequence, b.Size)
	case target(dev, h).Size > b.Size:
		return errdefs.Errorf(errdefs.ErrState, "the header backup of %s was made by an earlier release and does not tell whether it is the last one, and device %s has room for more than it says: "+consequence, o.ID, dev.number, b.Size)
	}
	return nil
}

// again makes the header anew, in memory, and checks it as if it came from a disk.
func (o *operation) again(dev *device, b luks2.Backup) (*luks2.Header, error) {
	h, err := o.underKey(dev, b)
	if err != nil {
		return nil, err
	}
	file, err := memory("new-header")
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	if err := h.Materialise(file); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "memory for the header: %w", err)
	}
	if err := o.expect(file, dev, "the restored header"); err != nil {
		return nil, err
	}
	is, err := o.volumeKey(dev, h, o.key)
	if err != nil {
		return nil, err
	}
	defer is.Wipe()
	if !is.Equal(b.VolumeKey) {
		return nil, errdefs.Errorf(errdefs.ErrState, "the restored header of %s gives another volume key than its backup; nothing was changed", o.ID)
	}
	return h, nil
}

func (o *operation) underKey(dev *device, b luks2.Backup) (*luks2.Header, error) {
	file, err := memory("new-header")
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	if err := b.Blank(file, o.Header.UUID, o.want(dev)); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "memory for the header: %w", err)
	}
	d, err := openLUKS(fdPath(file), dev.path(), o.log)
	if err != nil {
		return nil, classify(err, "preparing the header")
	}
	defer d.free()
	if err := d.load(); err != nil {
		return nil, classify(err, "loading the header without a keyslot")
	}
	if err := d.putKey(b.VolumeKey, o.key); err != nil {
		return nil, classify(err, "putting the volume key under the DEK")
	}
	// The record's word, not the backup's: an older header is made as the one
	// that was confirmed.
	if err := d.setToken(b.Token(o.want(dev), max(1, o.Header.Sequence)).Unsealed()); err != nil {
		return nil, classify(err, "adding the token")
	}
	h, err := luks2.Seal(file, o.want(dev), o.key)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrState, "sealing the restored header: %w", err)
	}
	return h, nil
}

// fits opens the device with h, read-only in all layers and without replaying a
// journal, and fails unless the volume key gives sense to what lies there.
func (o *operation) fits(dev *device, h *luks2.Header) error {
	if g := h.Token.Integrity; g != nil {
		if err := checkSuperblock(dev, *g); err != nil {
			return err
		}
	}
	d, done, err := o.load(dev, h)
	if err != nil {
		return err
	}
	defer done()
	name := o.trialName()
	defer func() { _ = o.remove(name) }()
	flags := uint32(flagReadOnly | flagPrivate | flagKeyring | flagIgnorePersistent)
	if h.Token.Integrity != nil {
		flags |= flagRecovery
	}
	if err := d.activate(name, o.key, flags); err != nil {
		return classify(err, fmt.Sprintf("trying the backup's key on device %s", dev.number))
	}
	o.step("volume key tried")
	info, err := dm.Status(name)
	if err == nil {
		err = dm.MakeNode(name, info.Number)
	}
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	if h.Token.Integrity != nil {
		err = authentic(dev, dm.Path(name), h.Token.Size)
	} else if !o.BlockVolume {
		err = hasFilesystem(dev, dm.Path(name))
	}
	if err != nil {
		return err
	}
	return o.remove(name)
}

// samples of an integrity volume are tried: sectors that are in its journal
// alone may not be readable without it.
const samples = 64

// authentic fails unless the tag of some sector is right, which only the
// volume's own key makes it.
func authentic(dev *device, path string, size int64) error {
	file, err := os.Open(path)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "reading through the backup's key: %w", err)
	}
	defer func() { _ = file.Close() }()
	b := make([]byte, 4096)
	for i := range int64(samples) {
		if _, err = file.ReadAt(b, (size/samples*i)&^4095); err == nil {
			return nil
		}
	}
	return errdefs.Errorf(errdefs.ErrState, "nothing on device %s is authentic under the volume key in the backup (%w): it is another disk, or the data is damaged too; nothing was changed", dev.number, err)
}

// hasFilesystem fails unless blkid finds a filesystem in the mapping.
func hasFilesystem(dev *device, path string) error {
	out, err := exec.Command("blkid", "--probe", "--usages", "filesystem", "--output", "export", path).Output()
	var exit *exec.ExitError
	if err != nil && !(errors.As(err, &exit) && (exit.ExitCode() == 2 || exit.ExitCode() == 8)) {
		return errdefs.Errorf(errdefs.ErrUnavailable, "looking for a filesystem: blkid: %w", err)
	}
	if err != nil || len(out) == 0 {
		return errdefs.Errorf(errdefs.ErrState, "the volume key in the backup shows no filesystem on device %s: it is another disk, or the data is damaged too; nothing was changed. A volume without a filesystem is restored with --block-volume", dev.number)
	}
	return nil
}
