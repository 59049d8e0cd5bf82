package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// marker is what pods write and no disk must show.
const marker = "TOP SECRET: the cloud must not read this"

// The claims of the scenarios.
func filesystem() want { return want{name: "files", class: "encrypted", size: "128Mi"} }
func block() want      { return want{name: "block", class: "encrypted", size: "64Mi", block: true} }
func integrity() want {
	return want{name: "integrity", class: "encrypted-integrity", size: "64Mi"}
}

// The texts of scenarios for which more than themselves is made ready.
const (
	upgradeText   = "upgrade from the build before, with volumes in use"
	downgradeText = "downgrade to the build before and back, with volumes in use: what that build does not know it refuses in words"
	suiteText     = "Kubernetes' own storage tests"
)

// scenarios are told in this order; a later one may use what an earlier one has
// left. What does not need the other's quiet is done beside it, because most of
// a scenario is waiting.
func (t *tester) scenarios(ctx context.Context, s *story) {
	if s.o.full {
		_ = s.that(suiteText+", all of them", func() (string, error) { return t.all(ctx, s.o.only.String()) })
		return
	}
	if t.node.taint != "" {
		s.scenario("the node joined with a taint: pods waited for the plugin, and the node says that it is ready", func() (string, error) { return t.taintAway(ctx) })
	}
	_ = together(
		func() error {
			return s.that("a claim and a pod: a filesystem, encrypted, with what the pod writes", func() (string, error) { return t.firstVolume(ctx) })
		},
		func() error {
			return s.that("a block volume", func() (string, error) { return "", t.blockVolume(ctx) })
		},
		func() error {
			return s.that("a volume with integrity", func() (string, error) { return "", t.integrityVolume(ctx) })
		},
	)
	s.thorough(upgradeText, func() (string, error) { return t.upgrade(ctx) })
	s.thorough(downgradeText, func() (string, error) { return t.downgrade(ctx) })
	// By itself, and before others leave something to clean up.
	s.thorough("from claim to running pod, encrypted and not", func() (string, error) { return t.latency(ctx) })
	beside(
		func() { t.data(ctx, s) },
		func() {
			s.scenario("a node to which the volume is not attached gets no key", func() (string, error) { return t.otherNode(ctx) })
			s.scenario("an operator asks the key service's pod whether KMS and store do all that is needed", func() (string, error) { return t.check(ctx) })
			s.scenario("a wrong parameter in a StorageClass: the claim says so", func() (string, error) { return t.wrongParameter(ctx) })
			s.thorough(fmt.Sprintf("a pod with %d volumes", many), func() (string, error) { return t.manyVolumes(ctx) })
		},
		func() {
			s.scenario(suiteText+", a selection", func() (string, error) { return t.selected(ctx) })
		},
	)
	beside(
		func() {
			s.scenario("the plugin is killed while it stages: the next one goes on", func() (string, error) { return "", t.pluginKilled(ctx) })
		},
		func() {
			s.thorough("a volume with integrity loses its pod and its plugin while it initialises in the background", func() (string, error) { return t.initialises(ctx) })
		},
	)
	beside(
		func() {
			s.scenario("the key service is away: the pod waits and says why; back again: the pod starts by itself", func() (string, error) { return t.keyServiceAway(ctx) })
		},
		func() {
			s.thorough("drop-in under the vendor's name: an unencrypted volume stays, a new one is encrypted, keys are outside of the cluster", func() (string, error) { return t.dropIn(ctx) })
		},
	)
	s.scenario("kubelet is killed with volumes in use: pods go on, and volumes come and go", func() (string, error) { return t.kubeletRestarted(ctx) })
	s.scenario("the whole cluster loses its power: every pod has its volume again, no hand touched it", func() (string, error) { return t.powerCut(ctx) })
	beside(
		func() {
			s.thorough("what was cut off while it initialised goes on", func() (string, error) { return t.initialised(ctx) })
		},
		func() {
			s.scenario("a claim is deleted: the volume is gone, and its key with it", func() (string, error) { return t.deleted(ctx) })
		},
	)
	s.thorough("uninstalling is refused while there are volumes, and leaves nothing when there are none", func() (string, error) { return t.uninstall(ctx, s.o) })
}

// data are the scenarios about what a volume's data and copies of it become.
func (t *tester) data(ctx context.Context, s *story) {
	s.scenario("the three pods are deleted and come back: the data is there", func() (string, error) {
		return "", together(
			func() error { return t.returns(ctx, filesystem()) },
			func() error { return t.returns(ctx, block()) },
			func() error { return t.returns(ctx, integrity()) })
	})
	s.scenario("the filesystem grows under its pod", func() (string, error) { return t.expand(ctx) })
	s.scenario("a snapshot is taken, with a record of its own", func() (string, error) { return t.snapshot(ctx) })
	s.scenario("snapshot and volume are made into new volumes: the data is there, under keys of their own", func() (string, error) { return t.copies(ctx) })
}

func (t *tester) firstVolume(ctx context.Context) (string, error) {
	begin := time.Now()
	if err := t.up(ctx, filesystem()); err != nil {
		return "", err
	}
	took := time.Since(begin)
	mounted, err := t.sh(ctx, "files", "echo '"+marker+"' > /data/file && sync && grep ' /data ' /proc/mounts")
	if err != nil {
		return "", err
	}
	if !strings.HasPrefix(mounted, "/dev/mapper/cryptcsi-") {
		return "", fmt.Errorf("the pod has no crypt device: %s", mounted)
	}
	return fmt.Sprintf("running %.1f s after apply", took.Seconds()), t.noPlaintext(ctx, "files")
}

// noPlaintext looks for the marker in the driver's file of the volume.
func (t *tester) noPlaintext(ctx context.Context, claim string) error {
	v, err := t.volume(ctx, claim)
	if err != nil {
		return err
	}
	file := "/disks/volumes/" + v.Spec.CSI.VolumeHandle + ".img"
	out, err := t.kubectl(ctx, "exec", "-n", "kube-system", "disks", "--", "sh", "-ec", "[ -s "+file+" ]; tr -d '\\000' < "+file+" | grep -qF '"+marker+"' && echo FOUND || echo none")
	if err != nil {
		return err
	}
	if strings.TrimSpace(out) != "none" {
		return fmt.Errorf("the disk has what the pod wrote, in plain: %s", out)
	}
	return nil
}

// returns deletes a pod, makes it anew and looks for its data.
func (t *tester) returns(ctx context.Context, w want) error {
	if err := t.again(ctx, w); err != nil {
		return err
	}
	return t.reads(ctx, w)
}

// reads looks for what a pod, or one before it, has written.
func (t *tester) reads(ctx context.Context, w want) error {
	read := "cat /data/file"
	if w.block {
		read = fmt.Sprintf("head -c %d /dev/data", len(marker))
	}
	got, err := t.sh(ctx, w.name, read)
	if err == nil && got != marker {
		err = fmt.Errorf("the pod reads %.80q", got)
	}
	return err
}

func (t *tester) blockVolume(ctx context.Context) error {
	if err := t.up(ctx, block()); err != nil {
		return err
	}
	if _, err := t.sh(ctx, "block", "printf '"+marker+"' | dd of=/dev/data conv=notrunc,fsync"); err != nil {
		return err
	}
	return t.noPlaintext(ctx, "block")
}

func (t *tester) integrityVolume(ctx context.Context) error {
	if err := t.up(ctx, integrity()); err != nil {
		return err
	}
	_, err := t.sh(ctx, "integrity", "echo '"+marker+"' > /data/file && sync")
	return err
}

func (t *tester) expand(ctx context.Context) (string, error) {
	const size = `df -kP /data | awk 'END { print $2 }'`
	before, err := t.sh(ctx, "files", size)
	if err != nil {
		return "", err
	}
	if _, err := t.kubectl(ctx, "patch", "pvc", "-n", user, "files", "-p", `{"spec":{"resources":{"requests":{"storage":"256Mi"}}}}`); err != nil {
		return "", err
	}
	err = t.await(ctx, patience, "growth", func(ctx context.Context) error {
		c, err := t.client.CoreV1().PersistentVolumeClaims(user).Get(ctx, "files", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if got := c.Status.Capacity[corev1.ResourceStorage]; got.Cmp(resource.MustParse("256Mi")) != 0 {
			return fmt.Errorf("the claim has %s: %v\n%s", got.String(), c.Status.Conditions, t.events(ctx, "files"))
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	after, err := t.sh(ctx, "files", size)
	if err == nil && after == before {
		err = errors.New("the pod sees no growth")
	}
	return fmt.Sprintf("the pod sees %s KiB, before %s KiB", after, before), errors.Join(err, t.reads(ctx, filesystem()))
}

// pluginKilled lets a volume with integrity, which is written in full before it
// is handed out, lose its plugin meanwhile.
func (t *tester) pluginKilled(ctx context.Context) error {
	w := want{name: "killed", class: "encrypted-integrity", size: "256Mi"}
	if err := errors.Join(t.claim(ctx, w), t.pod(ctx, w)); err != nil {
		return err
	}
	err := t.await(ctx, patience, "staging", func(ctx context.Context) error {
		v, err := t.volume(ctx, w.name)
		if err != nil {
			return err
		}
		if record, err := t.record(ctx, v.Spec.CSI.VolumeHandle); err != nil || !strings.Contains(record, `"claim"`) {
			return fmt.Errorf("the volume's format is not claimed yet, %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := errors.Join(t.killPlugin(ctx), t.installed(ctx, namespace, 3), t.running(ctx, w.name)); err != nil {
		return err
	}
	return t.discard(ctx, w.name)
}

// killPlugin lets the node's plugin end at once; another is started by itself.
func (t *tester) killPlugin(ctx context.Context) error {
	_, err := t.kubectl(ctx, "delete", "pod", "-n", namespace, "-l", "app.kubernetes.io/component=node", "--force", "--grace-period=0")
	return err
}

func (t *tester) keyServiceAway(ctx context.Context) (string, error) {
	w := integrity()
	if err := errors.Join(t.down(ctx, w.name), t.scale(ctx, "key-service", 0), t.pod(ctx, w)); err != nil {
		return "", err
	}
	said, err := t.says(ctx, w.name, "FailedMount", "key service")
	if err != nil {
		return "", errors.Join(err, t.scale(ctx, "key-service", 1))
	}
	return said, errors.Join(t.scale(ctx, "key-service", 1), t.running(ctx, w.name), t.reads(ctx, w))
}

// check is what docs/operations.md tells an operator to begin with.
func (t *tester) check(ctx context.Context) (string, error) {
	out, err := t.kubectl(ctx, "exec", "-n", namespace, "deployment/key-service", "--", "key-service", "check", "--like-process", "1")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if last := lines[len(lines)-1]; err == nil && !strings.Contains(last, "steps are right") {
		err = fmt.Errorf("key-service check: %s", out)
	}
	return lines[len(lines)-1], err
}

func (t *tester) wrongParameter(ctx context.Context) (string, error) {
	_, err := t.client.StorageV1().StorageClasses().Create(ctx, &storagev1.StorageClass{
		ObjectMeta: metav1.ObjectMeta{Name: "wrong"}, Provisioner: driverName, Parameters: map[string]string{"cryptcsi.io/integrty": "hmac-sha256"},
	}, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	if err := t.claim(ctx, want{name: "wrong", class: "wrong", size: "64Mi"}); err != nil {
		return "", err
	}
	return t.says(ctx, "wrong", "ProvisioningFailed", "cryptcsi.io/integrty")
}

func (t *tester) deleted(ctx context.Context) (string, error) {
	v, err := t.volume(ctx, "block")
	if err != nil {
		return "", err
	}
	id := v.Spec.CSI.VolumeHandle
	if record, err := t.record(ctx, id); err != nil || record == "" {
		return "", fmt.Errorf("there should be a record of %s before: %w", id, err)
	}
	if err := t.down(ctx, "block"); err != nil {
		return "", err
	}
	if err := t.client.CoreV1().PersistentVolumeClaims(user).Delete(ctx, "block", metav1.DeleteOptions{}); err != nil {
		return "", err
	}
	var record string
	err = t.await(ctx, patience, "the end of the volume", func(ctx context.Context) error {
		if _, err := t.client.CoreV1().PersistentVolumes().Get(ctx, v.Name, metav1.GetOptions{}); err == nil {
			return errors.New("the PersistentVolume is still there")
		}
		record, err = t.record(ctx, id)
		if err == nil && (!strings.Contains(record, `"deleted"`) || strings.Contains(record, `"wrapped"`)) {
			err = fmt.Errorf("the record is %s", record)
		}
		return err
	})
	return "what is left of its record says that it is deleted, and has no key in it", err
}
