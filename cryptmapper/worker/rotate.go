package worker

import (
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// A volume whose DEK is Rotating has a header under the DEK's previous key: its
// own earlier one, or, where its disk began as a copy of another volume's, that
// one's. It gets a header under its own key before it is mapped, by way of a
// header put aside (see rekey.go), because the keyslot area has one place. The
// record accepts either key until the new header is confirmed, so nothing has
// to be confirmed in between, and whatever a cut leaves, one of three is whole:
// the header under the previous key, the one aside, the one in its place.
//
// Everything but key, token and keyslot stays: the volume key, the UUID, which
// the record knows the header by, and what the token says of the volume.

// rotated returns the header to open the device with: under the volume's own
// key, made now if need be. A read-only volume is not written to, and opens with
// whichever header there is.
func (o *operation) rotated(dev *device, d disk) (*luks2.Header, error) {
	if o.Volume.ReadOnly {
		found, err := o.readEither(dev, d)
		if err != nil {
			return nil, err
		}
		if found.Header == nil {
			return nil, o.notRotated(dev, found.Reason)
		}
		return found.Header, o.acceptable(dev, found.Header)
	}
	h, _, err := o.finishAside(dev, d)
	if err != nil || h != nil {
		return h, err
	}
	old, err := luks2.Read(d, o.wantPrevious(dev), o.old)
	if err != nil {
		return nil, err
	}
	if old.Header == nil {
		return nil, o.notRotated(dev, old.Reason)
	}
	if err := o.acceptable(dev, old.Header); err != nil {
		return nil, err
	}
	token := old.Header.Token
	token.DEKID, token.Sequence = string(o.ID), token.Sequence+1
	next, err := o.newHeader(dev, old.Header, old.Header.Copy.UUID(), token)
	if err != nil {
		return nil, err
	}
	o.step("header made in memory")
	if err := o.putAside(dev, d, next); err != nil {
		return nil, err
	}
	h, reason, err := o.finishAside(dev, d)
	if err == nil && h == nil {
		err = errdefs.Errorf(errdefs.ErrUnavailable, "device %s does not show the header that was just put aside (%s)", dev.number, oneLine(reason))
	}
	return h, err
}

// readEither reads the header under the volume's own key, in its place or still
// aside, or else under the previous one, with which the operation goes on then.
func (o *operation) readEither(dev *device, d disk) (luks2.Found, error) {
	found, err := luks2.Read(d, o.want(dev), o.key)
	if err != nil || found.Header != nil {
		return found, err
	}
	waiting, err := luks2.Read(aside{d}, o.want(dev), o.key)
	if err != nil || waiting.Header != nil {
		return waiting, err
	}
	old, err := luks2.Read(d, o.wantPrevious(dev), o.old)
	if err == nil && old.Header != nil {
		o.key, o.previous = o.old, true
	}
	return old, err
}

// wantPrevious is what the header under the previous key must say. It may name
// any DEK: a key is one volume's alone, so its MAC says whose it was.
func (o *operation) wantPrevious(dev *device) luks2.Want {
	want := o.want(dev)
	want.ID = ""
	return want
}

func (o *operation) notRotated(dev *device, reason error) error {
	return errdefs.Errorf(errdefs.ErrState, "the volume is to be given its own key, but no header on device %s verifies under that or the one before (%s): it is another disk than the copy or volume that was recorded, or it was blanked or damaged, or it is a copy from before its source was first used or given another key; nothing was changed; of a copy make another one", dev.number, oneLine(reason))
}
