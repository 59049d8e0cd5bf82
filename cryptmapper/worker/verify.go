package worker

import (
	"fmt"
	"slices"
	"strings"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// comparison collects in what the kernel's mapping is not what it must be.
type comparison struct{ wrong []string }

func (c *comparison) is(what string, got, want any) {
	if got != want {
		c.wrong = append(c.wrong, fmt.Sprintf("%s is %v and must be %v", what, got, want))
	}
}

// verify compares what the kernel maps with what the volume must be.
func (o *operation) verify(dev *device, h *luks2.Header) error {
	s, err := cryptmapper.ReadStack(o.Volume.Name)
	if err != nil {
		return err
	}
	var c comparison
	if o.Spec.Integrity != dek.IntegrityNone {
		err = o.verifyIntegrity(&c, dev, h.Token, s)
	} else {
		c.is("integrity layer", s.Integrity != nil, false)
		c.is("size at least", s.Crypt.Length*512 >= h.Token.Size, true)
	}
	if err != nil {
		return err
	}
	o.verifyCrypt(&c, dev, h, s)
	c.is("read-only", s.Top.ReadOnly, o.Volume.ReadOnly)
	if len(c.wrong) > 0 {
		slices.Sort(c.wrong)
		return errdefs.Errorf(errdefs.ErrState, "the kernel's mapping %s is not what the volume must be: %s", o.Volume.Name, strings.Join(c.wrong, "; "))
	}
	return nil
}

// verifyCrypt compares dm-crypt, on the disk or on dm-integrity, with what h says.
func (o *operation) verifyCrypt(c *comparison, dev *device, h *luks2.Header, s cryptmapper.Stack) {
	want := cryptmapper.CryptTable{Cipher: o.Spec.Cipher, Device: dev.number, Offset: luks2.DataOffset / 512}
	keySize := 64
	if o.Spec.Integrity != dek.IntegrityNone {
		want = cryptmapper.CryptTable{Cipher: integrityCipher, Device: s.Integrity.Info.Number, Options: []string{integrityOption}}
		keySize = 96
	}
	want.Options = append(want.Options, o.cryptOptions(h)...)
	slices.Sort(want.Options)
	c.is("cipher", s.Crypt.Cipher, want.Cipher)
	c.is("key", s.Crypt.Key, fmt.Sprintf(":%d:logon:cryptsetup:%s-d0", keySize, h.Copy.UUID()))
	c.is("IV offset", s.Crypt.IVOffset, want.IVOffset)
	c.is("device", s.Crypt.Device, want.Device)
	c.is("offset", s.Crypt.Offset, want.Offset)
	c.is("options", strings.Join(s.Crypt.Options, " "), strings.Join(want.Options, " "))
}

// verifyIntegrity compares dm-integrity below dm-crypt, the size of both and what
// lies above them with what t says.
func (o *operation) verifyIntegrity(c *comparison, dev *device, t luks2.Token, s cryptmapper.Stack) error {
	if s.Integrity == nil || t.Integrity == nil && !o.constellation() {
		return errdefs.Errorf(errdefs.ErrState, "mapping %s has no integrity layer, its record asks for one", o.Volume.Name)
	}
	c.is("integrity device", s.Integrity.Device, dev.number)
	c.is("integrity offset", s.Integrity.Offset, int64(luks2.DataOffset/512))
	mode := cryptmapper.ModeJournal
	if o.direct() {
		mode = cryptmapper.ModeDirect
	}
	c.is("integrity mode", s.Integrity.Mode, mode)
	c.is("integrity sectors enough", s.Integrity.Provided >= s.Integrity.Length, true)
	c.is("integrity options", strings.Join(s.Integrity.Options, " "), integrityLayerOptions)
	if o.constellation() {
		c.is("integrity geometry possible", possible(s.Integrity, dev.size), true)
		c.is("size", s.Crypt.Length, s.Integrity.Provided)
	} else {
		if got := geometry(s.Integrity); t.Growing == nil || got != grown(t) {
			c.is("integrity geometry", got, *t.Integrity)
		}
		if !o.cloned() {
			c.is("size", s.Crypt.Length*512, t.Size)
		}
	}
	return o.verifyTop(c, t, s)
}

// verifyTop compares what lies above dm-crypt with what t says.
func (o *operation) verifyTop(c *comparison, t luks2.Token, s cryptmapper.Stack) error {
	c.is("linear", s.Lines != nil, o.cloned())
	if !o.cloned() || s.Lines == nil {
		return nil
	}
	lines, err := o.topLines(t)
	if err != nil {
		return err
	}
	c.is("table", fmt.Sprint(s.Lines), fmt.Sprint(lines))
	if t.Growing == nil || s.Crypt.Length != t.Growing.Sectors {
		c.is("authenticated size", s.Crypt.Length*512, t.Size+t.Reserved)
	}
	c.is("discard", discards(s.Top.Number), "0")
	c.is("dm-clone", s.Clone != nil, t.Hydration != nil)
	if s.Clone == nil || t.Hydration == nil {
		return nil
	}
	length, region := (t.Size-t.Hydration.Start)/512, int64(t.Hydration.Region/512)
	c.is("dm-clone's metadata", s.Clone.Meta, cryptmapper.Line{Length: t.Reserved / 512, Device: s.Lower.Number, Offset: t.Size / 512})
	c.is("dm-clone's destination", s.Clone.Data, cryptmapper.Line{Length: length, Device: s.Lower.Number, Offset: t.Hydration.Start / 512})
	c.is("dm-clone's length", s.Clone.Length, length)
	c.is("dm-clone's region", s.Clone.Region, region)
	c.is("dm-clone's regions", int64(s.Clone.Regions), (length+region-1)/region)
	c.is("dm-clone's metadata can be written", s.Clone.Sound, true)
	c.is("dm-clone's discard", discards(s.Clone.Info.Number), "0")
	return nil
}

// geometry is what the table shows. What the layer could provide beyond that is
// not the volume's.
func geometry(i *cryptmapper.IntegrityTable) luks2.Geometry {
	return luks2.Geometry{Sectors: i.Length, TagSize: i.TagSize, JournalSectors: i.JournalSectors, Interleave: i.Interleave}
}
