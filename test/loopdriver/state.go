package loopdriver

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

const (
	volumesDir   = "volumes"
	snapshotsDir = "snapshots"
	blankDir     = "blank"
)

// volume is what is known of a volume besides its bytes.
type volume struct {
	ID      string            `json:"id"`
	Name    string            `json:"name"` // from CreateVolume: its key
	Bytes   int64             `json:"bytes"`
	Source  string            `json:"source,omitempty"` // ID of the snapshot or volume it was copied from
	Context map[string]string `json:"context,omitempty"`
	// MountOnly: made as a filesystem, by a driver that decides then.
	MountOnly bool           `json:"mountOnly,omitempty"`
	Node      string         `json:"node,omitempty"`   // controller-published to
	Device    string         `json:"device,omitempty"` // the loop device it got
	Uses      map[string]use `json:"uses,omitempty"`   // by staging or target path
}

// use is one staging or publication. It is written before the kernel is
// touched, so there may be more uses than mounts, never fewer.
type use struct {
	Staged   bool   `json:"staged,omitempty"` // else published
	Block    bool   `json:"block,omitempty"`
	FSType   string `json:"fsType,omitempty"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// snapshot is what is known of a snapshot besides its bytes.
type snapshot struct {
	ID      string    `json:"id"`
	Name    string    `json:"name"`
	Bytes   int64     `json:"bytes"`
	Source  string    `json:"source"` // volume ID
	Created time.Time `json:"created"`
}

func (v volume) clone() volume {
	v.Context, v.Uses = maps.Clone(v.Context), maps.Clone(v.Uses)
	return v
}

// store keeps volumes and snapshots in memory and in state.json. Each change is
// on disk before the method returns. Callers that read, change and put back
// hold the volume's lock.
type store struct {
	mu    sync.Mutex
	path  string
	total int64
	state state
}

type state struct {
	Volumes   map[string]volume   `json:"volumes"`
	Snapshots map[string]snapshot `json:"snapshots"`
}

// openStore reads state.json. It refuses a directory that has images but no
// state: the images would be taken for leftovers and removed.
func openStore(dir string, total int64) (*store, error) {
	s := &store{path: filepath.Join(dir, "state.json"), total: total}
	data, err := os.ReadFile(s.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		for _, sub := range []string{volumesDir, snapshotsDir} {
			if images, _ := filepath.Glob(filepath.Join(dir, sub, "*.img")); len(images) > 0 {
				return nil, errdefs.Errorf(errdefs.ErrState, "%s is missing but there are images such as %s: restore the one or move the other away", s.path, images[0])
			}
		}
	case err != nil:
		return nil, err
	default:
		if err := json.Unmarshal(data, &s.state); err != nil {
			return nil, errdefs.Errorf(errdefs.ErrCorrupt, "%s: %w", s.path, err)
		}
	}
	if s.state.Volumes == nil {
		s.state.Volumes = map[string]volume{}
	}
	if s.state.Snapshots == nil {
		s.state.Snapshots = map[string]snapshot{}
	}
	return s, nil
}

func (s *store) volume(id string) (volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.state.Volumes[id]
	if !ok {
		return volume{}, errdefs.Errorf(errdefs.ErrNotFound, "there is no volume %q", id)
	}
	return v.clone(), nil
}

func (s *store) snapshot(id string) (snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.state.Snapshots[id]
	if !ok {
		return snapshot{}, errdefs.Errorf(errdefs.ErrNotFound, "there is no snapshot %q", id)
	}
	return n, nil
}

// volumes returns all volumes in order of their IDs.
func (s *store) volumes() []volume {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []volume
	for _, v := range s.state.Volumes {
		all = append(all, v.clone())
	}
	slices.SortFunc(all, func(a, b volume) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

// snapshots returns all snapshots in order of their IDs.
func (s *store) snapshots() []snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.SortedFunc(maps.Values(s.state.Snapshots), func(a, b snapshot) int { return cmp.Compare(a.ID, b.ID) })
}

// free is how many bytes can still be promised.
func (s *store) free() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.freeLocked()
}

func (s *store) freeLocked() int64 {
	free := s.total
	for _, v := range s.state.Volumes {
		free -= v.Bytes
	}
	return free
}

// putVolume adds or replaces a volume. RESOURCE_EXHAUSTED, and nothing
// changed, where it grows past what is free.
func (s *store) putVolume(v volume) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, existed := s.state.Volumes[v.ID]
	if free := s.freeLocked(); v.Bytes-old.Bytes > free {
		return exhausted("only %d bytes are left of the %d that may be promised", free, s.total)
	}
	s.state.Volumes[v.ID] = v.clone()
	return s.saveOr(func() {
		if existed {
			s.state.Volumes[v.ID] = old
		} else {
			delete(s.state.Volumes, v.ID)
		}
	})
}

func (s *store) deleteVolume(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.state.Volumes[id]
	delete(s.state.Volumes, id)
	return s.saveOr(func() { s.state.Volumes[id] = old })
}

func (s *store) putSnapshot(n snapshot) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.Snapshots[n.ID] = n
	return s.saveOr(func() { delete(s.state.Snapshots, n.ID) })
}

func (s *store) deleteSnapshot(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.state.Snapshots[id]
	delete(s.state.Snapshots, id)
	return s.saveOr(func() { s.state.Snapshots[id] = old })
}

// saveOr writes the state, or takes the change back in memory.
func (s *store) saveOr(undo func()) error {
	data, err := json.MarshalIndent(s.state, "", "  ")
	if err == nil {
		err = writeFile(s.path, data)
	}
	if err != nil {
		undo()
		return fmt.Errorf("saving the driver's state: %w", err)
	}
	return nil
}

// writeFile replaces path so that a crash leaves the old content or the new.
func writeFile(path string, data []byte) error {
	f, err := os.OpenFile(path+".tmp", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes the names in a directory survive a crash.
func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
