// Package cryptmapper turns a block device and a DEK into an encrypted device:
// LUKS2 over dm-crypt, with dm-integrity below where the volume's spec asks for
// authenticated sectors.
//
// libcryptsetup is neither thread-safe nor can its calls be cancelled, and it
// parses what a hostile host wrote on the disk. So every operation runs in a
// process of its own, a crypt-worker (package cryptmapper/worker), which gets
// one request and the DEK over a socket pair, answers, and exits; it is killed
// when its caller's context ends. This package is the serving side: it starts
// workers, talks to them, and asks the kernel for what needs no disk and no key.
// It is pure Go and links no libcryptsetup.
package cryptmapper

import (
	"context"
	"sync"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// Volume tells which device to map under which name.
type Volume struct {
	Name     string // of the mapping, see CheckName
	Device   string // path of the block device's node
	ReadOnly bool   // nothing can be written through the mapping
	// Performance is a comma list of dm-crypt's options that change how it works
	// and not what it does, see PerformanceOptions. Open obeys it where it makes
	// the mapping; one that is there keeps its own.
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

	// How far dm-clone has come while the volume hydrates: both 0 where there
	// is nothing to hydrate.
	Hydrated, Regions uint64
	Hydrating         bool // it goes on by itself, see Hydrate
	// Failed: dm-clone could not write its metadata and has given up, perhaps so
	// that it does not even say how far it came. What was not hydrated gives I/O
	// errors until the volume is closed and opened.
	Failed bool
	// Unfinished comes with an error of Open: a new volume is not initialised yet,
	// ctx's deadline came first, and the next call goes on from there.
	Unfinished bool

	// Known from the checked header: set by Open, MarkMade, Resize and Finish only.
	Made   bool
	Header dek.HeaderID
}

// Options of a Mapper.
type Options struct {
	// Worker is the command that becomes a crypt-worker: program and arguments.
	Worker []string
	// Warm is how many workers are kept started ahead; 0 starts each on demand.
	Warm int
	// LockDir holds one lock file per mapping, on a file system that forgets
	// at reboot: /run/cryptcsi where empty.
	LockDir string
	// HeaderBackup lets Open, MarkMade, Resize and Finish return a backup of a
	// finished volume's header, in Header.Backup, where its DEK's Header has none.
	// Where that has another one than the header now would give, they return one
	// without being asked. Restore takes it.
	HeaderBackup bool
	// WithoutClone makes volumes as on a kernel that has no dm-clone.
	WithoutClone bool
	// Observe, where not nil, is told of every operation when it ends.
	Observe func(op Op, name string, err error)
	// ObserveHeader, where not nil, is told how much of each Open went into the
	// header; what is left is the worker's start and the activation.
	ObserveHeader func(took time.Duration)
}

// Mapper opens and closes crypt devices. A DEK whose spec has the layout
// dek.LayoutConstellation, always Formatted, opens a volume that Constellation
// made as it is: it counts as made, is never formatted, and nothing of its
// header is ever written; Resize grows the mapping alone. Methods are safe for concurrent use.
// A second operation on a name while one runs, or while the worker of one that
// was given up has still not died, is ErrConflict; other names are not delayed.
// Every operation converges when called again after a crash or a cancelled
// context at any instant.
type Mapper struct {
	opts Options
	pool *pool

	mu   sync.Mutex
	busy map[string]bool
}

// New returns a Mapper. Close it with Shutdown.
func New(o Options) *Mapper {
	if o.LockDir == "" {
		o.LockDir = "/run/cryptcsi"
	}
	return &Mapper{opts: o, pool: newPool(o.Worker, o.Warm), busy: map[string]bool{}}
}

// Shutdown ends the workers that wait for work; those at work finish.
func (m *Mapper) Shutdown() { m.pool.close() }

// Open maps v and returns the mapping. It formats only where d is Prepared,
// d.Claim names the UUID to format with, and the device is blank or carries the
// remains of exactly that claim. A device whose header does not verify under d
// is ErrState, and so is a blank one whose DEK is Formatted. An existing
// mapping counts only if it is this header on this device; one that is on
// another device is replaced if its name starts with Prefix and nobody uses it,
// else ErrState. While the returned
// Made is false the first and last MiB of the mapping are zeros.
//
// A volume with the layout dek.LayoutClone is ready at once where the kernel has
// dm-clone, with hydration off, see Hydrate: what was never written reads as
// zeros. Once it is made a node without dm-clone is ErrState until it is
// finished, and so is a disk whose metadata says that nothing was ever written.
// Any other integrity volume, and without dm-clone a new one of that layout too,
// is wiped first: one that is not done before ctx's deadline is ErrUnavailable
// with a percentage, and the next call goes on from there.
//
// Where d is Rotating a header that verifies under d.Previous counts as well,
// whatever volume it names, and unless v is ReadOnly is replaced by one under
// d.Key before anything is mapped: same UUID and volume key, next sequence
// number. Header.Fingerprint then says which of the two keys the header opens
// with.
func (m *Mapper) Open(ctx context.Context, v Volume, d dek.DEK) (Mapping, error) {
	r, err := m.run(ctx, request(OpOpen, v, d), keysOf(d))
	return r.Mapping, err
}

// MarkMade flushes the open mapping v and then notes in its header that the
// volume is finished: from then on it is never formatted again.
func (m *Mapper) MarkMade(ctx context.Context, v Volume, d dek.DEK) (Mapping, error) {
	r, err := m.run(ctx, request(OpMarkMade, v, d), keysOf(d))
	return r.Mapping, err
}

// Resize grows the open mapping v, while it is in use, to what its device now
// has; nothing happens where it has that size. A volume with integrity first
// needs tags on its new space: with the layout clone and a kernel that has
// dm-clone it then hydrates, else the space is wiped before it is seen, and
// ErrUnavailable with a percentage says that ctx's deadline came first; the next
// call goes on from there. ErrUnavailable with a percentage too while the volume
// hydrates, and ErrState where it is read-only. One that is not made yet keeps
// its size. ErrInvalid for what Constellation made with integrity.
func (m *Mapper) Resize(ctx context.Context, v Volume, d dek.DEK) (Mapping, error) {
	r, err := m.run(ctx, request(OpResize, v, d), keysOf(d))
	return r.Mapping, err
}

// Hydrate lets the open mapping name hydrate in the background, or stops that;
// what is written hydrates what it covers at any time. It asks the kernel alone
// and can be repeated. nil where nothing is to hydrate, or nothing is open.
func (m *Mapper) Hydrate(name string, on bool) error { return hydrate(name, on) }

// Finish takes dm-clone out of the open mapping v once all of it is hydrated,
// while it is in use, and notes in the header that nothing may ever bring
// dm-clone back. ErrUnavailable with a percentage while regions are missing. The
// mapping's Header is what ConfirmDEK is to be told. Where nothing is to hydrate
// it does nothing but return the mapping.
func (m *Mapper) Finish(ctx context.Context, v Volume, d dek.DEK) (Mapping, error) {
	r, err := m.run(ctx, request(OpFinish, v, d), Keys{DEK: d.Key})
	return r.Mapping, err
}

// Close removes the mapping and its layers: nil where there is none,
// ErrUnavailable while something holds it open, ErrState where libcryptsetup
// did not make it. It reads no disk.
func (m *Mapper) Close(ctx context.Context, name string) error {
	_, err := m.run(ctx, Request{Op: OpClose, Volume: Volume{Name: name}}, Keys{})
	return err
}

// Resume lets I/O go on to a mapping and its layers, where something left them
// suspended: whoever asks anything of them waits until then. nil where nothing is
// suspended, or nothing is open. It reads no header and needs no key.
func (m *Mapper) Resume(ctx context.Context, name string) error {
	_, err := m.run(ctx, Request{Op: OpResume, Volume: Volume{Name: name}}, Keys{})
	return err
}

// Rekey gives a volume that Constellation made, whose LUKS UUID is from and
// whose key is old, to the DEK d: a new header of ours, with the UUID that
// d.Claim names and the same volume key. The volume must not be open.
//
// It is called twice. With d Prepared it makes the header, checks it, and puts
// it aside within the header area; the volume still opens as before. It returns
// what ConfirmDEK is to be told. With d Formatted, so that nobody may format
// the device any more, the header put aside takes its place, the old key
// material is overwritten, and what was put aside is wiped; old is not needed.
// Cut anywhere, the same call again finishes it; after that it does nothing.
// ErrState where neither header on the device is the one to expect.
func (m *Mapper) Rekey(ctx context.Context, v Volume, d dek.DEK, from dek.ID, old secret.Bytes) (dek.HeaderID, error) {
	req := request(OpRekey, v, d)
	req.From = from
	r, err := m.run(ctx, req, Keys{DEK: d.Key, Old: old})
	return r.Mapping.Header, err
}

// RestoreOptions are what only a person can say.
type RestoreOptions struct {
	// BlockVolume: there is no filesystem in the volume, so that none has to be found.
	BlockVolume bool
	// OlderBackup: the volume did not grow since the backup was made, or what it
	// has behind its size of then may be lost.
	OlderBackup bool
}

// Restore gives a device on which no header verifies under d a header again,
// made from d.Header.Backup, at the sequence of d.Header. The volume must not be
// open. It returns false, and has written nothing, where a header
// verifies: Open repairs a damaged copy.
//
// Before it writes it has read the device through the header that it made: a
// sector that is authentic, without integrity a filesystem. ErrState where there
// is none, for a device with anything on it that is not of this header, and for
// an integrity volume that may have grown since the backup was made; it then was
// not written to. Cut anywhere, the same call again finishes it.
func (m *Mapper) Restore(ctx context.Context, v Volume, d dek.DEK, opts RestoreOptions) (dek.HeaderID, bool, error) {
	req := request(OpRestore, v, d)
	req.BlockVolume, req.OlderBackup = opts.BlockVolume, opts.OlderBackup
	r, err := m.run(ctx, req, Keys{DEK: d.Key})
	return r.Mapping.Header, r.Restored, err
}

// Peek returns the metadata copies on a device as they stand there, for
// showing: nothing in them is checked against a key. Of a header that is not
// ours it returns the UUIDs alone.
func (m *Mapper) Peek(ctx context.Context, device string) ([]HeaderCopy, error) {
	r, err := m.run(ctx, Request{Op: OpPeek, Volume: Volume{Device: device}}, Keys{})
	return r.Copies, err
}

// List returns the mappings whose name starts with Prefix. One that is
// half-made has a name and a number only. It asks the kernel alone.
func (m *Mapper) List() ([]Mapping, error) { return list() }

func request(op Op, v Volume, d dek.DEK) Request {
	return Request{Op: op, Volume: v, ID: d.ID, State: d.State, Spec: d.Spec, Claim: d.Claim, Header: d.Header}
}

// keysOf are the keys that may open the volume of d.
func keysOf(d dek.DEK) Keys { return Keys{DEK: d.Key, Old: d.Previous} }

// run does one operation in a worker, under the volume's lock. The lock is let
// go when the worker has answered or is gone, which for one that hangs in the
// kernel may be long after run has returned.
func (m *Mapper) run(ctx context.Context, req Request, keys Keys) (Reply, error) {
	name := req.Volume.Name
	if !m.lock(name) {
		return Reply{}, errdefs.Errorf(errdefs.ErrConflict, "another operation on mapping %s has not ended", name)
	}
	req.LockDir, req.Backup, req.WithoutClone = m.opts.LockDir, m.opts.HeaderBackup, m.opts.WithoutClone
	req.Deadline, _ = ctx.Deadline()
	reply, err := m.pool.do(ctx, req, keys, func() { m.unlock(name) })
	if err == nil {
		err = reply.Err()
	}
	if m.opts.ObserveHeader != nil && req.Op == OpOpen && err == nil {
		m.opts.ObserveHeader(reply.HeaderTook)
	}
	if m.opts.Observe != nil {
		m.opts.Observe(req.Op, name, err)
	}
	return reply, err
}

// lock takes the lock of a name; Peek has none.
func (m *Mapper) lock(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if name != "" && m.busy[name] {
		return false
	}
	m.busy[name] = name != ""
	return true
}

func (m *Mapper) unlock(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.busy, name)
}

// Stuck returns the names whose worker still runs; a worker that survives
// SIGKILL, because its device hangs, stays in this list.
func (m *Mapper) Stuck() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	for name := range m.busy {
		if name != "" {
			names = append(names, name)
		}
	}
	return names
}
