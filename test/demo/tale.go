package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/test/stack"
)

const mib = 1 << 20

// marker is what pods write and no disk must show.
const marker = "TOP SECRET: the cloud must not read this. "

// otherMarker has no byte in common with marker.
const otherMarker = "=========================================="

// wrongMaster is a master secret, but another one.
const wrongMaster = "not the secret, not the secret, "

// tale is the demo's story over one stack.
type tale struct {
	*story
	ctx    context.Context
	config stack.Config
	stack  *stack.Stack

	plain, sealed, block, handed *stack.Volume
}

// tell is the whole story, in order.
func (t *tale) tell() {
	t.that("csi-plugin starts in front of an unmodified CSI driver", t.start)
	t.withKeyService(t.tellWhoAsks)
	t.that("two volumes are made by the wrapped driver, staged and published: xfs, and ext4 with integrity", t.firstVolumes)
	t.that("a pod writes to both, and reads back", t.write)
	t.that("csi-plugin inspect shows the mappings", t.inspect)
	t.that("the plaintext is nowhere on the raw devices", t.noPlaintext)
	t.that("the keys are nowhere but wrapped in the store", t.noKeys)
	t.withKeyService(t.tellWhoGets)
	t.that("both are unstaged: no mapping and no mount is left; staged again, the data is there", t.restage)
	t.that("a third volume in block mode: the pod gets the mapped device, the disk sees ciphertext", t.blockVolume)
	t.that("the xfs volume grows under the pod from 400 to 600 MiB", t.expand)
	t.that("--stage-with=wrapped: the wrapped driver formats and mounts the mapped device, not the raw one", t.handOver)
	t.that("another volume's disk is refused", t.wrongDisk)
	t.that("a wrong master secret is refused", t.wrongSecret)
	t.withKeyService(t.tellAway)
	t.that("a bit flipped on the integrity volume is an I/O error, not wrong data", t.flippedBit)
	t.that("a blank disk in place of a formatted volume is refused, not formatted", t.blankDisk)
	t.that("everything is taken down and deleted; nothing of it is left on the node", t.takeDown)
}

func (t *tale) start() (string, error) {
	s, err := stack.Start(t.ctx, t.config)
	if err != nil {
		return "", err
	}
	t.stack = s
	out, err := exec.CommandContext(t.ctx, filepath.Join(t.config.Bin, "csi-plugin"), "version").Output()
	return fmt.Sprintf("driver %s, %s", s.Name, bytes.TrimSpace(out)), err
}

func (t *tale) firstVolumes() (string, error) {
	var err error
	if t.plain, err = t.stack.Create(t.ctx, "plain", 400*mib, stack.MountCapability("xfs"), nil); err != nil {
		return "", err
	}
	integrity := map[string]string{"cryptcsi.io/integrity": "hmac-sha256"}
	if t.sealed, err = t.stack.Create(t.ctx, "sealed", 64*mib, stack.MountCapability("ext4"), integrity); err != nil {
		return "", err
	}
	for _, v := range []*stack.Volume{t.plain, t.sealed} {
		if err := v.Up(t.ctx); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("raw devices %s and %s", t.plain.Device(), t.sealed.Device()), nil
}

func (t *tale) write() (string, error) {
	secret := []byte(strings.Repeat(marker, 64<<10/len(marker)))
	for _, v := range []*stack.Volume{t.plain, t.sealed} {
		if err := writeFile(podFile(v), secret); err != nil {
			return "", err
		}
		if err := contains(podFile(v), marker); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%d bytes each, synced", len(secret)), nil
}

func (t *tale) inspect() (string, error) {
	out, err := exec.CommandContext(t.ctx, filepath.Join(t.config.Bin, "csi-plugin"), "inspect", "--kubelet-dir="+t.stack.KubeletDir()).CombinedOutput()
	if err == nil && (strings.Count(string(out), "staged") != 2 || !strings.Contains(string(out), "hmac-sha256")) {
		err = errors.New("two staged volumes, one with integrity, should be listed")
	}
	return string(out), err
}

func (t *tale) noPlaintext() (string, error) {
	unix.Sync()
	var evidence []string
	for _, v := range []*stack.Volume{t.plain, t.sealed} {
		n, err := scan(v.Device(), []byte(marker[:24]))
		if err != nil {
			return "", err
		}
		evidence = append(evidence, fmt.Sprintf("%s: %d MiB read, 0 times found", v.Device(), n/mib))
	}
	return strings.Join(evidence, "\n"), nil
}

func (t *tale) noKeys() (string, error) {
	var forms [][]byte
	for _, v := range []*stack.Volume{t.plain, t.sealed} {
		f, err := t.keyForms(v)
		if err != nil {
			return "", err
		}
		forms = append(forms, f...)
	}
	for _, v := range []*stack.Volume{t.plain, t.sealed} {
		if _, err := scan(v.Device(), forms...); err != nil {
			return "", err
		}
	}
	for _, form := range forms {
		if strings.Contains(t.stack.Logs(), string(form)) {
			return "", errors.New("a key is in the log")
		}
	}
	files, err := scanTree(t.config.Dir, forms...)
	if err != nil {
		return "", err
	}
	record, err := firstRecord(t.stack.StoreDir())
	return fmt.Sprintf("searched for as bytes, hexadecimal and base64: both devices, the logs, %d files of the node\na record: %s", files, record), err
}

func (t *tale) restage() (string, error) {
	for _, v := range []*stack.Volume{t.plain, t.sealed} {
		if err := v.Down(t.ctx); err != nil {
			return "", err
		}
	}
	if left, err := t.leftovers(); err != nil || left != "" {
		return "", errors.Join(err, fmt.Errorf("left after unstage: %s", cmp.Or(left, "nothing")))
	}
	for _, v := range []*stack.Volume{t.plain, t.sealed} {
		if err := v.Up(t.ctx); err != nil {
			return "", err
		}
		if err := contains(podFile(v), marker); err != nil {
			return "", err
		}
	}
	return "", nil
}

func (t *tale) blockVolume() (string, error) {
	var err error
	if t.block, err = t.stack.Create(t.ctx, "block", 64*mib, stack.BlockCapability(), nil); err != nil {
		return "", err
	}
	if err := t.block.Up(t.ctx); err != nil {
		return "", err
	}
	if err := writeFile(t.block.Target, []byte(strings.Repeat(marker, 1000))); err != nil {
		return "", err
	}
	if err := contains(t.block.Target, marker); err != nil {
		return "", err
	}
	n, err := scan(t.block.Device(), []byte(marker[:24]))
	return fmt.Sprintf("%s: %d MiB read, 0 times found", t.block.Device(), n/mib), err
}

func (t *tale) expand() (string, error) {
	before, err := space(t.plain.Target)
	if err != nil {
		return "", err
	}
	if err := t.plain.Expand(t.ctx, 600*mib); err != nil {
		return "", err
	}
	after, err := space(t.plain.Target)
	if err == nil && after < before+190*mib {
		err = fmt.Errorf("the filesystem had %d MiB and has %d", before/mib, after/mib)
	}
	return fmt.Sprintf("filesystem: %d MiB, then %d MiB; data unchanged", before/mib, after/mib), errors.Join(err, contains(podFile(t.plain), marker))
}

func (t *tale) handOver() (string, error) {
	if err := t.restart("--stage-with=wrapped"); err != nil {
		return "", err
	}
	var err error
	if t.handed, err = t.stack.Create(t.ctx, "handed", 64*mib, stack.MountCapability("ext4"), nil); err != nil {
		return "", err
	}
	if err := t.handed.Up(t.ctx); err != nil {
		return "", err
	}
	if err := writeFile(podFile(t.handed), []byte(strings.Repeat(marker, 1000))); err != nil {
		return "", err
	}
	source, err := mountSource(t.handed.Staging)
	if err != nil || !strings.Contains(source, "/cryptcsi-") {
		return "", errors.Join(err, fmt.Errorf("what is mounted is %q", source))
	}
	unix.Sync()
	_, err = scan(t.handed.Device(), []byte(marker[:24]))
	return fmt.Sprintf("mounted by the wrapped driver: %s", source), err
}

func (t *tale) wrongDisk() (string, error) {
	if err := t.restart(); err != nil {
		return "", err
	}
	for _, v := range []*stack.Volume{t.plain, t.sealed, t.block, t.handed} {
		if err := v.Down(t.ctx); err != nil {
			return "", err
		}
	}
	return t.refusedWith(t.block, "belongs to", "stale-device:"+t.block.ID)
}

func (t *tale) wrongSecret() (string, error) {
	if err := t.block.Down(t.ctx); err != nil {
		return "", err
	}
	right, wrong := t.stack.Path("master-secret"), t.stack.Path("master-secret.right")
	if err := os.Rename(right, wrong); err != nil {
		return "", err
	}
	if err := os.WriteFile(right, []byte(wrongMaster), 0o600); err != nil {
		return "", err
	}
	if err := t.restartKeys(); err != nil {
		return "", err
	}
	message, err := refused(t.block.Stage(t.ctx), "")
	return message, errors.Join(err, os.Rename(wrong, right), t.restartKeys(), t.block.Up(t.ctx), contains(t.block.Target, marker))
}

func (t *tale) flippedBit() (string, error) {
	at, err := t.dataSector()
	if err != nil {
		return "", err
	}
	if err := flip(t.sealed.Device(), at); err != nil {
		return "", err
	}
	if err := t.sealed.Up(t.ctx); err != nil {
		return "", err
	}
	b, err := os.ReadFile(podFile(t.sealed))
	if !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.EILSEQ) {
		return "", fmt.Errorf("reading gave %d bytes and %w", len(b), err)
	}
	if err := t.sealed.Down(t.ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("bit 2 of byte %d of %s flipped; the pod's read: %v", at, t.sealed.Device(), err), errors.Join(flip(t.sealed.Device(), at), t.sealed.Up(t.ctx), contains(podFile(t.sealed), otherMarker))
}

func (t *tale) blankDisk() (string, error) {
	if err := t.block.Down(t.ctx); err != nil {
		return "", err
	}
	return t.refusedWith(t.block, "will not be formatted", "blank-device:"+t.block.ID)
}

func (t *tale) takeDown() (string, error) {
	for _, v := range []*stack.Volume{t.plain, t.sealed, t.block, t.handed} {
		if err := v.Down(t.ctx); err != nil {
			return "", err
		}
		if err := v.Delete(t.ctx); err != nil {
			return "", err
		}
	}
	left, err := t.leftovers()
	if err == nil && left != "" {
		err = fmt.Errorf("left: %s", left)
	}
	return "no mapping, no mount, no loop device", err
}

// restart stops csi-plugin in good order and starts it with other flags.
// Volumes that are staged stay in use.
func (t *tale) restart(args ...string) error {
	if err := t.stack.StopPlugin(syscall.SIGTERM); err != nil {
		return err
	}
	t.stack.SetPluginArgs(args...)
	return t.stack.StartPlugin(t.ctx)
}

// restartKeys starts again whoever has the master secret.
func (t *tale) restartKeys() error {
	if t.config.KeyService {
		return t.restartKeyService("--kms-uri="+t.stack.KEK(), "--storage-uri="+t.stack.Store())
	}
	return t.restart()
}

// refusedWith stages v while loopdriver has a fault, expects a refusal with the
// words, and shows that without the fault the volume and its data are there.
func (t *tale) refusedWith(v *stack.Volume, words, fault string) (string, error) {
	if err := t.faults(fault); err != nil {
		return "", err
	}
	if err := v.Attach(t.ctx); err != nil {
		return "", err
	}
	message, err := refused(v.Stage(t.ctx), words)
	return message, errors.Join(err, t.faults(), v.Attach(t.ctx), v.Up(t.ctx), contains(v.Target, marker))
}
