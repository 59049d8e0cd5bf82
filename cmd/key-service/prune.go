package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// prune destroys what the grace of deleted DEKs has kept, forgets IDs, and
// deletes the DEKs of volumes that are gone.
func prune(ctx context.Context, c *command) error {
	forget := c.String("forget", "", "remove the tombstone of this DEK ID: the ID can then get a new key")
	volumes := c.String("volumes", "", "file with the volumes that there are, as kubectl get pv -o json prints them (/dev/stdin): delete the DEKs of --driver-name's others")
	driver := c.String("driver-name", "", "with --volumes: the CSI driver that the volumes are of")
	olderThan := c.Duration("older-than", 24*time.Hour, "with --volumes: leave younger DEKs alone, whose volumes may just be made")
	yes := c.Bool("yes", false, "do it; without, only show what would be done")
	k, done, err := c.keyring(ctx, 0, 0)
	if err != nil {
		return err
	}
	defer done()
	switch {
	case *forget != "" && *volumes != "":
		return usageError("prune: --forget excludes --volumes")
	case (*volumes == "") != (*driver == ""):
		return usageError("prune: --volumes and --driver-name go together")
	case *forget != "" && !*yes:
		fmt.Fprintf(c.stdout, "would be forgotten: %s\n", *forget)
		return nil
	case *forget != "":
		if err := k.Forget(ctx, dek.ID(*forget)); err != nil {
			return err
		}
		fmt.Fprintf(c.stdout, "forgotten %s\n", *forget)
		return nil
	case *volumes != "":
		there, err := readVolumes(*volumes, *driver)
		if err != nil {
			return err
		}
		return c.pruneGone(ctx, k, *driver, there, time.Now().Add(-*olderThan), *yes)
	}
	return c.pruneAll(ctx, k, *yes)
}

// pruneAll also looks at tombstones without a key: of those an earlier version
// may be left that could not be erased before.
func (c *command) pruneAll(ctx context.Context, k *envelope.Keyring, yes bool) error {
	due := 0
	var failed []error
	err := each(ctx, k, func(i envelope.Info) error {
		if i.Err != nil || i.State != dek.Deleted || time.Now().Before(i.Expires) {
			return nil
		}
		kept := len(i.Wraps) > 0
		if kept {
			due++
		}
		if !yes {
			if kept {
				fmt.Fprintf(c.stdout, "would be destroyed: the key of %s, deleted, its grace ended %s\n", i.ID, moment(i.Expires))
			}
			return nil
		}
		if _, err := k.Prune(ctx, i.ID); err != nil {
			failed = append(failed, err)
		} else if kept {
			fmt.Fprintf(c.stdout, "destroyed %s\n", i.ID)
		}
		return nil
	})
	fmt.Fprintf(c.stdout, "%d deleted keys are past their grace\n", due)
	return errors.Join(append(failed, err)...)
}

// pruneGone deletes the DEKs of a driver's volumes that are not there, made before
// then. Snapshots are left alone: nothing here knows which of them there are.
func (c *command) pruneGone(ctx context.Context, k *envelope.Keyring, driver string, there map[dek.ID]bool, then time.Time, yes bool) error {
	all := 0
	var gone []envelope.Info
	err := each(ctx, k, func(i envelope.Info) error {
		if i.Err != nil || i.State == dek.Deleted || !strings.HasPrefix(string(i.ID), driver+"/") {
			return nil
		}
		all++
		if !there[i.ID] && i.Created.Before(then) {
			gone = append(gone, i)
		}
		return nil
	})
	if err != nil {
		return err
	}
	var failed []error
	for _, i := range gone {
		if !yes {
			fmt.Fprintf(c.stdout, "would be deleted: %s (%s, made %s), which no PersistentVolume has; everything on the volume is lost with its key\n", i.ID, i.State, moment(i.Created))
		} else if err := k.DeleteDEK(ctx, i.ID); err != nil {
			failed = append(failed, err)
		} else {
			fmt.Fprintf(c.stdout, "deleted   %s\n", i.ID)
		}
	}
	fmt.Fprintf(c.stdout, "%d of %d volumes of %s are gone\n", len(gone), all, driver)
	return errors.Join(failed...)
}

// readVolumes reads which volumes of a driver there are. One at least must be: of
// another cluster's list, or another driver's, all would count as gone.
func readVolumes(file, driver string) (map[dek.ID]bool, error) {
	invalid := func(format string, args ...any) (map[dek.ID]bool, error) {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "--volumes %s: "+format, append([]any{file}, args...)...)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("--volumes: %w", err)
	}
	var list struct {
		Kind  string
		Items []struct {
			Kind string
			Spec struct {
				CSI struct {
					Driver string
					Handle string `json:"volumeHandle"`
				}
			}
		}
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return invalid("not what kubectl get pv -o json prints: %v", err)
	}
	if list.Kind != "List" && list.Kind != "PersistentVolumeList" {
		return invalid("not what kubectl get pv -o json prints: its kind is %q", list.Kind)
	}
	there := map[dek.ID]bool{}
	for _, v := range list.Items {
		if v.Spec.CSI.Driver != driver {
			continue
		}
		id, err := dek.VolumeID(driver, v.Spec.CSI.Handle)
		if err != nil {
			return invalid("%w", err)
		}
		there[id] = true
	}
	if len(there) == 0 {
		return invalid("no volume of %s is in it: is it the right cluster's, and the right driver? The last volumes' keys are deleted one by one, by key-service dek delete", driver)
	}
	return there, nil
}
