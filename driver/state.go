package driver

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// stateVersion is the version of the state file's format.
const stateVersion = 1

// state is what a node remembers of a volume that is staged or about to be,
// because no kernel table tells it. It is written before the wrapped driver is
// called, so that whatever a crash leaves is explained by a file, and again
// when everything stands. It holds no key and no secret of a request.
type state struct {
	Version  int    `json:"version"`
	Driver   string `json:"driver"`
	VolumeID string `json:"volume_id"`
	DEK      dek.ID `json:"dek_id"`
	// BootID is the boot during which the file was written: after another one
	// nothing of what it says about the kernel holds.
	BootID string `json:"boot_id"`
	intent
	// InnerStaged: the wrapped driver has NodeStageVolume, and was called.
	InnerStaged bool `json:"inner_staged"`

	// Which device was borrowed, noted before anything is done with it: whoever
	// finds it later can tell it from another one that got its number.
	Device    string `json:"device,omitempty"`
	DeviceSeq uint64 `json:"device_seq,omitempty"`

	// Known when the volume is staged.
	Staged     bool         `json:"staged"`
	StagedAt   time.Time    `json:"staged_at,omitzero"` // tells this staging from the next one
	Filesystem string       `json:"filesystem,omitempty"`
	Spec       dek.Spec     `json:"spec,omitzero"`
	Header     dek.HeaderID `json:"header,omitzero"`

	// Finishing: a hydrated volume was about to be finished, and that may not be
	// confirmed yet.
	Finishing bool `json:"finishing,omitempty"`

	Damage Damage `json:"damage,omitzero"`
	Users  []user `json:"users,omitempty"` // as far as kubelet says who they are
}

// The access types, as the state file spells them.
const (
	accessMount = "mount"
	accessBlock = "block"
)

// newFSType is what a volume that is asked for so is formatted with.
func (i intent) newFSType() string { return cmp.Or(i.FSType, FSTypes()[0]) }

// intent is how a volume is asked to be staged.
type intent struct {
	StagingPath string   `json:"staging_path"`
	AccessType  string   `json:"access_type"`
	AccessMode  string   `json:"access_mode"`
	FSType      string   `json:"fs_type,omitempty"` // as asked; empty for any
	MountFlags  []string `json:"mount_flags,omitempty"`
	ReadOnly    bool     `json:"read_only,omitempty"`
	HandedOver  bool     `json:"handed_over,omitempty"`
}

// equal compares everything.
func (i intent) equal(other intent) bool {
	return i.HandedOver == other.HandedOver && i.StagingPath == other.StagingPath && i.difference(other) == ""
}

// difference says in what two capabilities differ, or "".
func (i intent) difference(other intent) string {
	differ := func(what string, a, b any) string { return fmt.Sprintf("%s %v instead of %v", what, b, a) }
	switch {
	case i.AccessType != other.AccessType:
		return differ("access type", i.AccessType, other.AccessType)
	case !sameMode(i.AccessMode, other.AccessMode):
		return differ("access mode", i.AccessMode, other.AccessMode)
	case i.FSType != other.FSType:
		return differ("filesystem", i.FSType, other.FSType)
	case !slices.Equal(i.MountFlags, other.MountFlags):
		return differ("mount flags", i.MountFlags, other.MountFlags)
	case i.ReadOnly != other.ReadOnly:
		return differ("read-only", i.ReadOnly, other.ReadOnly)
	}
	return ""
}

// sameMode compares access modes. SINGLE_NODE_WRITER does not say how many
// writers: kubelet asks for it, or for the one or the other of those that do, as
// the wrapped driver has the capability or not, and that changes with its version.
func sameMode(a, b string) bool {
	vague := csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER.String()
	exact := []string{csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER.String(), csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER.String()}
	return a == b || a == vague && slices.Contains(exact, b) || b == vague && slices.Contains(exact, a)
}

// borrowed tells whether dev is the device that was noted.
func (st *state) borrowed(dev Device) bool {
	return st.Device == dev.Number && (st.DeviceSeq == dev.Seq || st.DeviceSeq == 0)
}

// load returns the volume's state, nil where there is none.
func (d *Driver) load(v volume) (*state, error) {
	st, err := readState(v.stateFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return st, err
}

func readState(path string) (*state, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	st := &state{}
	if err := json.Unmarshal(data, st); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrState, "state file %s is damaged (%v): unmount and close the volume by hand, then remove it", path, err)
	}
	if st.Version != stateVersion {
		return nil, errdefs.Errorf(errdefs.ErrState, "state file %s has version %d, this program knows %d: run the newer one again", path, st.Version, stateVersion)
	}
	return st, nil
}

// save writes the volume's state so that a crash leaves the old or the new one.
func (d *Driver) save(v volume, st state) error {
	st.Version = stateVersion
	data, err := json.MarshalIndent(st, "", "\t")
	if err != nil {
		return err
	}
	return d.writeState(func() error { return replaceFile(v.stateFile(), append(data, '\n')) })
}

// forget removes the volume's state and private directory. It is not an error
// if the wrapped driver left something in there.
func (d *Driver) forget(v volume) error {
	return d.writeState(func() error {
		if err := os.Remove(v.stateFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		_ = os.Remove(v.stateFile() + ".new")
		_ = os.Remove(v.stageDir())
		_ = os.Remove(v.dir)
		return nil
	})
}

// replaceFile writes data to a file beside path, syncs it, renames it to path
// and syncs the directory.
func replaceFile(path string, data []byte) error {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(path+".new"))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
