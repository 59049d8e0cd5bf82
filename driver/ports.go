package driver

import (
	"context"
	"fmt"

	"github.com/cryptcsi/cryptcsi/dek"
)

// Keys is where DEKs come from: the key service's client, or envelope.Keyring
// in direct mode. All methods are idempotent and safe for concurrent use;
// errors are of errdefs' classes.
type Keys interface {
	// GetDEK returns the key and what the record says of it. ErrNotFound
	// where there is no record; it never creates one. The caller wipes Key.
	GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error)
	// ClaimFormat announces that this node is about to format with the given
	// LUKS UUID, or while the record is Rotating to give the volume a header
	// under its own key, and returns the claim that holds: where this node had
	// claimed before, that is the earlier one, UUID included; while Rotating
	// the UUID is the header's. ErrConflict while another node holds the claim;
	// ErrState where the record is Formatted.
	ClaimFormat(ctx context.Context, id dek.ID, claim dek.Claim) (dek.Claim, error)
	// ConfirmDEK records that the volume is formatted and raises the header
	// floor to h (it never lowers it). While the record is Rotating, the
	// Fingerprint of the volume's own key ends that. ErrState where the record
	// names another header UUID.
	ConfirmDEK(ctx context.Context, id dek.ID, h dek.HeaderID) error
}

// Creator makes DEKs. A node has one only with --create-keys.
type Creator interface {
	// CreateDEK returns the DEK, made now or before. ErrExists where it
	// exists with another spec.
	CreateDEK(ctx context.Context, id dek.ID, spec dek.Spec) (dek.DEK, error)
}

// ControllerKeys is what a controller does to DEKs: the key service's client,
// or envelope.Keyring in direct mode. All methods are idempotent and safe for
// concurrent use; errors are of errdefs' classes. A DEK that is returned may
// come without its keys, which a controller has no use for; it wipes them.
type ControllerKeys interface {
	Creator
	// GetDEK returns what the record says. ErrNotFound where there is none.
	GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error)
	// CloneDEK is CreateDEK for a volume or snapshot whose disk is a copy of
	// source's. ErrExists where a DEK exists that is no clone of source under
	// that name; ErrConflict while source's key is being replaced.
	CloneDEK(ctx context.Context, id dek.ID, spec dek.Spec, source dek.ID) (dek.DEK, error)
	// DeleteDEK destroys the DEK; nil where that was done before, ErrNotFound
	// where there never was one. The ID never gets another.
	DeleteDEK(ctx context.Context, id dek.ID) error
}

// Volume tells a Mapper which device to map under which name.
type Volume struct {
	Name     string // of the mapping: MappingName
	Device   string // path of the block device's node
	ReadOnly bool   // map so that nothing can be written through it
	// Performance is a comma list of dm-crypt's options, see performanceOptions.
	// Open obeys it where it makes the mapping; one that is there keeps its own.
	Performance string
}

// Mapping is an open crypt device, as the kernel shows it.
type Mapping struct {
	Name      string
	Path      string // of its device node
	Number    string // "major:minor" of the mapping itself
	Backing   string // "major:minor" of the raw device at the bottom
	Size      int64  // usable bytes
	ReadOnly  bool
	Cipher    string        // dm-crypt's notation
	Integrity dek.Integrity // what the layer below authenticates
	Discard   bool          // discards reach the device, if that takes them
	Direct    bool          // dm-integrity uses no journal, see dek.ModeDirect
	// Performance is what Volume's asked for when the mapping was made, sorted.
	Performance string
	Suspended   bool

	// How far a volume that came up at once has got its tags; both 0 where
	// there is nothing to hydrate.
	Hydrated, Regions uint64
	Hydrating         bool // it goes on by itself
	// Failed: that came to an end by a fault of the device, and perhaps nobody
	// knows how far it is. What was not hydrated gives I/O errors until the volume
	// is closed and opened.
	Failed bool
	// Unfinished comes with an error of Open: a new volume is not initialised yet,
	// ctx's deadline came first, and the next call goes on from there.
	Unfinished bool

	// Known from the checked header, so set by Open, MarkMade and Resize only.
	Made   bool         // the filesystem (or the raw volume) was finished once
	Header dek.HeaderID // which header, its sequence number, and while Rotating the fingerprint of the key that it opens with
}

// Progress says in words how far a volume is hydrated, or that it failed; ""
// where there is nothing to hydrate.
func (m Mapping) Progress() string {
	if m.Failed {
		return "failed"
	}
	if m.Regions == 0 {
		return ""
	}
	word := "paused"
	if m.Hydrating {
		word = "running"
	}
	// Rounded down: 100 is all.
	return fmt.Sprintf("%d %% (%s)", 100*m.Hydrated/m.Regions, word)
}

// Mapper turns a device and a DEK into a crypt device. All methods are
// idempotent, safe for concurrent use, and converge when called again after a
// crash or a cancelled context at any instant. A second operation on the same
// name while one runs is ErrConflict; other names are never delayed.
type Mapper interface {
	// Open maps v. It formats only where d is Prepared, d.Claim is this
	// node's, and the device is blank or carries the remains of exactly that
	// claim; everything else that does not verify under d is ErrState. An
	// existing mapping of that name is returned if it is this header on this
	// device, else ErrState. While Made is false the first and last MiB of
	// the mapping read as zeros right after Open. ErrUnavailable with a
	// percentage, and Unfinished, where ctx's deadline is too early for a new
	// volume to be initialised: call again.
	// A ReadOnly volume is never formatted: ErrState.
	//
	// Where d is Rotating, a header that verifies under d.Previous counts too,
	// whatever volume it names, and is replaced by one under d.Key before Open
	// returns: same UUID, next sequence number. A ReadOnly volume is opened
	// with either key, and nothing is written.
	Open(ctx context.Context, v Volume, d dek.DEK) (Mapping, error)
	// MarkMade flushes the open mapping and then writes into the header that
	// the volume is finished. From then on it is never formatted again.
	MarkMade(ctx context.Context, v Volume, d dek.DEK) (Mapping, error)
	// Resize grows the open mapping to what the device now has. Nothing
	// happens where it has that size. ErrUnavailable with a percentage while a
	// volume with integrity hydrates, or its new space is initialised: call
	// again. ErrInvalid where it cannot grow.
	Resize(ctx context.Context, v Volume, d dek.DEK) (Mapping, error)
	// Close removes the mapping: nil where there is none, ErrUnavailable
	// while something holds it open. It reads no disk and needs no key.
	Close(ctx context.Context, name string) error
	// List returns all mappings whose name has our prefix. It asks the
	// kernel alone and touches no disk.
	List() ([]Mapping, error)
}
