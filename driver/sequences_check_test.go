package driver_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// check is what holds after every step.
func (w *world) check(o op) error {
	var errs []error
	switch o.Kind {
	case opAttach, opDetach, opPublish, opUnpublish, opWrite, opRead: // ask for no key
	default:
		errs = append(errs, w.checkKeys())
	}
	for _, broken := range w.cloud.Violations() {
		errs = append(errs, fmt.Errorf("RULE: %s", broken))
	}
	for i, n := range w.nodes {
		for _, broken := range n.kernel.Violations() {
			errs = append(errs, fmt.Errorf("RULE: %s: %s", n.name, broken))
		}
		errs = append(errs, w.checkMounts(i))
	}
	return errors.Join(errs...)
}

// checkMounts: outside the private directories there is nothing but each
// volume's own mapping, which lies on its own disk.
func (w *world) checkMounts(node int) error {
	n := w.nodes[node]
	mounts, err := n.kernel.List()
	if err != nil {
		return err
	}
	mappings, err := drivertest.Mapper{Kernel: n.kernel}.List()
	if err != nil {
		return err
	}
	owner := map[string]driver.Mapping{}
	for _, m := range mappings {
		owner[m.Number] = m
	}
	for _, l := range mounts {
		if strings.HasPrefix(l.Target, n.private()+"/") {
			continue
		}
		m, ok := owner[l.Device]
		if !ok {
			return fmt.Errorf("RAW: device %s, which is no mapping of ours, is at %s", l.Device, l.Target)
		}
		v := w.named(filepath.Base(l.Target))
		if v == nil || m.Name != driver.MappingName(driverName, v.id) {
			return fmt.Errorf("MIXED: mapping %s is at %s", m.Name, l.Target)
		}
		if v.replugged[node] {
			continue // what is there is to be taken down
		}
		dev, err := n.kernel.Device(w.cloud.Attached(v.id)[n.name])
		if err != nil || dev.Number != m.Backing {
			return fmt.Errorf("MIXED: mapping %s of volume %s is on device %s, its disk is %s (%s)", m.Name, v.name, m.Backing, dev.Number, fmt.Sprint(err))
		}
	}
	return nil
}

func (w *world) named(name string) *volumeModel {
	for _, v := range w.model.volumes {
		if v != nil && v.name == name {
			return v
		}
	}
	return nil
}

// checkKeys: the disk of a volume that was opened has a header of its own key,
// and no other volume's or snapshot's own key opens it. Those that are deleted
// stay deleted.
func (w *world) checkKeys() error {
	ctx := context.Background()
	for id := range w.gone {
		d, err := w.ring.GetDEK(ctx, id)
		d.Wipe()
		if !errors.Is(err, errdefs.ErrNotFound) {
			return fmt.Errorf("DELETE: the key of %s is back (%s)", id, fmt.Sprint(err))
		}
	}
	keys := map[string]dek.DEK{}
	defer func() {
		for _, d := range keys {
			d.Wipe()
		}
	}()
	get := func(id dek.ID, name string) error {
		d, err := w.ring.GetDEK(ctx, id)
		if err == nil {
			keys[name] = d
		}
		return err
	}
	for _, v := range w.model.volumes {
		if v.ready() {
			if err := get(volumeDEK(v.id), v.name); err != nil {
				return fmt.Errorf("DATA: volume %s has no key: %w", v.name, err)
			}
		}
	}
	for _, s := range w.model.snapshots {
		if s != nil && s.there == yes && !s.going {
			if err := get(snapshotDEK(s.id), s.name); err != nil {
				return fmt.Errorf("DATA: snapshot %s has no key: %w", s.name, err)
			}
		}
	}
	for _, v := range w.model.volumes {
		if !v.ready() || v.filled != yes {
			continue
		}
		kernel, disk := w.cloud.Disk(v.id)
		for name, d := range keys {
			switch opens := kernel.OpensWith(disk, d.Key); {
			case name == v.name && !opens:
				return fmt.Errorf("KEY: volume %s does not open with its own key", v.name)
			case name != v.name && opens:
				return fmt.Errorf("KEY: volume %s opens with the key of %s", v.name, name)
			}
		}
		if d := keys[v.name]; d.State != dek.Formatted {
			return fmt.Errorf("KEY: volume %s is in use, and its record is %s", v.name, d.State)
		}
		if d := keys[v.name]; d.Previous.Len() > 0 && kernel.OpensWith(disk, d.Previous) {
			return fmt.Errorf("KEY: volume %s is in use and opens with its previous key", v.name)
		}
	}
	return nil
}

// settle ends a sequence: without any more faults everything that was begun is
// finished, every volume that exists is used once more and has what it must
// have, and then everything is deleted, and nothing is left anywhere.
func (w *world) settle() error {
	for slot, v := range w.model.volumes {
		if v == nil {
			continue
		}
		if err := w.settleVolume(slot, v); err != nil {
			return fmt.Errorf("at the end: %w", err)
		}
	}
	for slot, s := range w.model.snapshots {
		if s == nil {
			continue
		}
		if err := w.finish(op{Kind: opSnapshotAgain, Snapshot: slot}, op{Kind: opDeleteSnapshot, Snapshot: slot}); err != nil {
			return fmt.Errorf("at the end: %w", err)
		}
	}
	for slot := range w.model.volumes {
		if err := w.finish(op{Kind: opDelete, Volume: slot}); err != nil {
			return fmt.Errorf("at the end: %w", err)
		}
	}
	return w.empty()
}

// finish makes those of the steps that are legal when their turn comes.
func (w *world) finish(ops ...op) error {
	for _, o := range ops {
		if !w.model.legal(o) {
			continue
		}
		if err := w.do(o); err != nil {
			return err
		}
	}
	return nil
}

// settleVolume takes a volume away from all nodes, and uses it once more.
func (w *world) settleVolume(slot int, v *volumeModel) error {
	away := []op{{Kind: opCreateAgain, Volume: slot}}
	for node := range sequenceNodes {
		for pod := range sequencePods {
			away = append(away, op{Kind: opUnpublish, Volume: slot, Node: node, Pod: pod})
		}
		away = append(away, op{Kind: opUnstage, Volume: slot, Node: node}, op{Kind: opDetach, Volume: slot, Node: node})
	}
	if err := w.finish(away...); err != nil {
		return err
	}
	if !w.model.volumes[slot].ready() {
		return nil
	}
	node := slot % sequenceNodes
	use := []op{{Kind: opAttach}, {Kind: opStage}, {Kind: opNodeExpand}, {Kind: opPublish}, {Kind: opRead}, {Kind: opWrite}, {Kind: opUnpublish}, {Kind: opUnstage}, {Kind: opDetach}}
	for i := range use {
		use[i].Volume, use[i].Node = slot, node
	}
	for i := range use {
		if !w.model.legal(use[i]) {
			return fmt.Errorf("CONVERGE: volume %s cannot be used: %s is not possible", v.name, use[i].Kind)
		}
		if err := w.do(use[i]); err != nil {
			return err
		}
		if use[i].Kind == opStage && v.staged[node] == no { // refused, as it may be
			return w.do(use[len(use)-1])
		}
	}
	return nil
}

// empty: nothing is left in the cloud, in the store or on the nodes. A volume
// that was given up before anybody knew its ID is the cloud's to find.
func (w *world) empty() error {
	for _, n := range w.nodes {
		mounts, _ := n.kernel.List()
		mappings, _ := drivertest.Mapper{Kernel: n.kernel}.List()
		private, _ := os.ReadDir(n.private())
		aliases, _ := filepath.Glob(filepath.Join(n.dir, "cryptcsi*"))
		if use := n.wrapped.InUse(); len(mounts)+len(mappings)+len(private)+len(aliases)+len(use) > 0 {
			return fmt.Errorf("LEAK: %s has mounts %v, mappings %v, directories %v, nodes %v, and the wrapped driver %v", n.name, mounts, mappings, private, aliases, use)
		}
	}
	if left := append(w.cloud.Volumes(), w.cloud.Snapshots()...); len(left) > 0 && !w.givenUp {
		return fmt.Errorf("LEAK: the cloud has %v", left)
	}
	return w.emptyStore()
}

// emptyStore: every record that there ever was is a tombstone.
func (w *world) emptyStore() error {
	ctx := context.Background()
	for token, more := "", true; more && !w.givenUp; more = token != "" {
		list, next, err := w.ring.List(ctx, token, 100)
		if err != nil {
			return err
		}
		for _, d := range list {
			if d.State != dek.Deleted || len(d.Wraps) > 0 {
				return fmt.Errorf("LEAK: the key of %s is there (%s)", d.ID, d.State)
			}
		}
		token = next
	}
	return nil
}
