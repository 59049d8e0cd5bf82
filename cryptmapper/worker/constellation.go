package worker

import (
	"fmt"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
)

// A volume that Constellation made is opened as it is. Its header has a strict
// form and nothing that vouches for it; whether the DEK belongs to it shows when
// the keyslot opens. It is never formatted and its header never written: update
// and format are the only writers, the one does nothing for such a volume, and
// the other is out of reach because its DEK is never Prepared (see validSpec).

func (o *operation) constellation() bool { return o.Spec.Layout == dek.LayoutConstellation }

// read reads the header in the form that the volume must have.
func (o *operation) read(dev *device) (luks2.Found, error) {
	if !o.constellation() {
		return luks2.Read(dev.file, o.want(dev), o.key)
	}
	found, err := luks2.ReadConstellation(dev.file, o.want(dev))
	if found.Header != nil {
		found.Header.Token.Made = true // there is nothing left to make
	}
	return found, err
}

// validSpec says what is wrong with the spec and what belongs to it.
func (o *operation) validSpec() error {
	spec := o.Spec
	if o.constellation() {
		if o.State != dek.Formatted || o.Claim != (dek.Claim{}) {
			return fmt.Errorf("state %s and claim %+v: a volume that Constellation made is never formatted", o.State, o.Claim)
		}
		spec.Layout = ""
	}
	return spec.Validate()
}

// tagSize is what HMAC-SHA-256 gives for each sector.
const tagSize = 32

// possible tells whether the geometry of a Constellation volume's integrity
// layer can be that of a device of this size. It comes from a superblock that
// nothing authenticates and that no token describes, so a smaller volume than
// was formatted cannot be told apart.
func possible(i *cryptmapper.IntegrityTable, deviceSize int64) bool {
	area := (deviceSize - luks2.DataOffset) / 512
	tags := i.Provided / 8 * tagSize / 512
	return i.TagSize == tagSize && i.Provided > 0 && i.Provided <= area && i.Provided%8 == 0 && i.JournalSectors > 0 && i.Provided+tags+i.JournalSectors <= area
}
