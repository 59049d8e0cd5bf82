package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/cryptcsi/cryptcsi/test/stack"
)

// A volume that was made without a backup gets one when it is staged with
// --header-backup; its header is destroyed, and made again by the verb, with the
// key service as well as with KEK and store.
func TestKernelRestoreHeader(t *testing.T) {
	k := startTakeover(t)
	for name, integrity := range map[string]string{"plain": "", "protected": "hmac-sha256"} {
		entries := map[string]string{}
		if integrity != "" {
			entries["cryptcsi.io/integrity"] = integrity
		}
		k.restoreOne(name, entries)
	}
}

func (k *takeover) restoreOne(name string, entries map[string]string) {
	ctx := context.WithoutCancel(k.Context())
	v, err := k.Create(ctx, name, takenSize, stack.MountCapability("ext4"), entries)
	k.must("Create", err)
	k.Cleanup(func() { _ = errors.Join(v.Down(ctx), v.Delete(ctx)) })
	k.must("up", v.Up(ctx))
	k.must("write", os.WriteFile(filepath.Join(v.Target, "file"), []byte("kept"), 0o600))
	k.must("down", v.Down(ctx))

	service, direct := k.service(""), []string{"--kms-uri=" + k.KEK(), "--storage-uri=" + k.Store()}
	if code, said := k.restore(v, service...); code != 1 || !strings.Contains(said, "holds no header backup") {
		k.Errorf("a record without a backup: %d, %s", code, said)
	}
	k.restart("--header-backup")
	k.up(v, "file", "kept")
	if code, said := k.restore(v, direct...); code != 1 || !strings.Contains(said, "the volume is open") {
		k.Errorf("an open volume: %d, %s", code, said)
	}
	k.must("down", v.Down(ctx))
	if code, said := k.restore(v, direct...); code != 0 || !strings.Contains(said, "nothing to restore") {
		k.Errorf("a whole header: %d, %s", code, said)
	}
	for _, keys := range [][]string{service, direct} {
		k.must("destroying the header", overwrite(v.Device(), make([]byte, 16<<20)))
		k.refused("a destroyed header", v.Stage(ctx), "will not be formatted")
		if code, said := k.restore(v, keys...); code != 0 || !strings.Contains(said, "has its header again") {
			k.Fatalf("restoring: %d, %s", code, said)
		}
		k.up(v, "file", "kept")
		k.must("down", v.Down(ctx))
	}
	k.must("stopping csi-plugin", k.StopPlugin(syscall.SIGTERM))
	k.SetPluginArgs()
	k.must("starting csi-plugin", k.StartPlugin(ctx))
	k.up(v, "file", "kept") // and the record keeps what it has
	k.must("down", v.Down(ctx))
	k.must("destroying the header", overwrite(v.Device(), make([]byte, 16<<20)))
	if code, said := k.restore(v, service...); code != 0 {
		k.Errorf("restoring after a node without backups: %d, %s", code, said)
	}
}

func overwrite(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, 0)
	return errors.Join(err, f.Sync(), f.Close())
}

// restore runs the verb.
func (k *takeover) restore(v *stack.Volume, args ...string) (code int, said string) {
	var out bytes.Buffer
	code = run(k.Context(), append([]string{"restore-header", "--crypt-worker=" + filepath.Join(k.bin, "crypt-worker"),
		"--device=" + v.Device(), "--dek-id=" + k.Name + "/" + v.ID}, args...), &out, &out)
	return code, out.String()
}

func TestRestoreCommandLines(t *testing.T) {
	const volume = "restore-header --device=/dev/null --dek-id=d.example.com/v"
	for _, tt := range []struct {
		args string
		code int
		says string
	}{
		{"restore-header --help", 0, "-block-volume"},
		{"restore-header --help", 0, "-older-backup"},
		{"restore-header", 2, "--device is required"},
		{"restore-header --device=/dev/null --dek-id=v --key-service=unix:///k", 2, "<driver name>/<volume ID>"},
		{volume, 2, "--key-service, or --kms-uri"},
		{volume + " --key-service=unix:///k --kms-uri=cluster:///x", 2, "excludes"},
		{volume + " --kms-uri=cluster:///x", 2, "--storage-uri"},
		{volume + " --key-service=unix:///k --key-service-protocol=constellation", 2, "only cryptcsi's records"},
	} {
		var out bytes.Buffer
		if code := run(context.WithoutCancel(t.Context()), strings.Fields(tt.args), &out, &out); code != tt.code || !strings.Contains(out.String(), tt.says) {
			t.Errorf("csi-plugin %s: exit code %d, want %d; it should say %q:\n%s", tt.args, code, tt.code, tt.says, &out)
		}
	}
}
