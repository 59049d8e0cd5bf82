package main

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/test/stack"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// takeover is a node with volumes that Constellation made: csi-plugin in front
// of a wrapped driver, and a key service that answers as Constellation's does.
type takeover struct {
	*testing.T
	*stack.Stack
	bin          string
	secret, salt []byte
}

// startTakeover starts the node and its key service, csi-plugin with more flags.
func startTakeover(t *testing.T, pluginArgs ...string) *takeover {
	t.Helper()
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	kernel.Need(t, "root", "dm-crypt", "dm-integrity", "keyring", "loop", "ext4", "exec:cryptsetup", "exec:mkfs.ext4",
		"exec:"+filepath.Join(bin, "csi-plugin"), "exec:"+filepath.Join(bin, "key-service"), "exec:"+filepath.Join(bin, "loopdriver"))
	kernel.NoLeaks(t)
	s, err := stack.Start(t.Context(), stack.Config{Dir: t.TempDir(), Bin: bin, KeyService: true, PluginArgs: pluginArgs})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(s.Logs())
		}
	})
	return &takeover{T: t, Stack: s, bin: bin}
}

func newTakeover(t *testing.T) *takeover {
	k := startTakeover(t, "--key-service-protocol=constellation")
	k.must("restarting the key service", k.StopKeyService(syscall.SIGTERM))
	k.must("restarting the key service", k.StartKeyService(t.Context(), "--kms-uri="+k.KEK(), "--storage-uri="+k.Store(), "--constellation-api"))
	k.secret, k.salt = k.file("master-secret"), k.file("salt")
	return k
}

func (k *takeover) file(name string) []byte {
	k.Helper()
	b, err := os.ReadFile(k.Path(name))
	k.must("reading "+name, err)
	return b
}

func (k *takeover) must(what string, err error) {
	k.Helper()
	if err != nil {
		k.Fatalf("%s: %v", what, err)
	}
}

// key is what Constellation derives.
func (k *takeover) key(uuid string) []byte {
	b, err := hkdf.Key(sha256.New, k.secret, k.salt, "key-"+uuid, 32)
	k.must("deriving", err)
	return b
}

// cryptsetup runs with a key on its standard input.
func cryptsetup(key []byte, args ...string) error {
	cmd := exec.Command("cryptsetup", append(args, "--key-file=-")...)
	cmd.Stdin = bytes.NewReader(key)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cryptsetup %v: %w: %s", args, err, out)
	}
	return nil
}

// takenSize is that of the volumes: enough for an ext4.
const takenSize = 24 << 20

// make makes a volume as Constellation does, without cryptcsi: the device, an
// ext4 and a file in it. It returns the LUKS UUID.
func (k *takeover) make(v *stack.Volume, integrity bool) string {
	k.Helper()
	uuid := dek.NewUUID()
	args := []string{"luksFormat", "--batch-mode", "--type=luks2", "--cipher=aes-xts-plain64", "--key-size=512", "--sector-size=4096",
		"--pbkdf=argon2id", "--pbkdf-memory=65536", "--pbkdf-parallel=4", "--pbkdf-force-iterations=4", "--uuid=" + uuid}
	if integrity {
		args = append(args, "--integrity=hmac-sha256")
	}
	k.must("luksFormat", cryptsetup(k.key(uuid), append(args, v.Device())...))
	k.must("open", cryptsetup(k.key(uuid), "open", v.Device(), "theirs"))
	defer func() { k.must("close", exec.Command("cryptsetup", "close", "theirs").Run()) }()
	k.must("mkfs", exec.Command("mkfs.ext4", "-q", "/dev/mapper/theirs").Run())
	dir := k.TempDir()
	k.must("mount", unix.Mount("/dev/mapper/theirs", dir, "ext4", 0, ""))
	k.must("write", os.WriteFile(filepath.Join(dir, "theirs"), []byte("their words"), 0o600))
	k.must("unmount", unix.Unmount(dir, 0))
	return uuid
}

// up stages and publishes, and looks for what the file holds.
func (k *takeover) up(v *stack.Volume, file, want string) {
	k.Helper()
	k.must("up", v.Up(k.Context()))
	if b, err := os.ReadFile(filepath.Join(v.Target, file)); err != nil || string(b) != want {
		k.Fatalf("%s holds %q, %v", file, b, err)
	}
}

func (k *takeover) refused(what string, err error, words ...string) {
	k.Helper()
	if status.Code(err) != codes.FailedPrecondition {
		k.Errorf("%s: %v, want FailedPrecondition", what, err)
	}
	for _, w := range words {
		if !strings.Contains(fmt.Sprint(err), w) {
			k.Errorf("%s: %v does not say %q", what, err, w)
		}
	}
}

// rekey runs the verb.
func (k *takeover) rekey(v *stack.Volume, args ...string) (code int, said string) {
	var out bytes.Buffer
	code = run(k.Context(), append([]string{"rekey", "--crypt-worker=" + filepath.Join(k.bin, "crypt-worker"), "--node-name=" + stack.Node1,
		"--device=" + v.Device(), "--dek-id=" + k.Name + "/" + v.ID}, args...), &out, &out)
	return code, out.String()
}

// fromKMS is Constellation's own form of the cluster's master secret, in a file.
func (k *takeover) fromKMS() string {
	k.Helper()
	path := filepath.Join(k.TempDir(), "uri")
	uri := "kms://cluster-kms?key=" + base64.URLEncoding.EncodeToString(k.secret) + "&salt=" + base64.URLEncoding.EncodeToString(k.salt)
	k.must("writing the URI", os.WriteFile(path, []byte(uri), 0o600))
	return "--from-kms-uri-file=" + path
}

// service are the flags that lead to the key service, as this node.
func (k *takeover) service(prefix string) []string {
	c := k.KeyClient(stack.NodeIdentity)
	return []string{"--" + prefix + "key-service=" + c.Address, "--" + prefix + "key-service-ca-file=" + c.CAFile,
		"--" + prefix + "key-service-cert-file=" + c.CertFile, "--" + prefix + "key-service-key-file=" + c.KeyFile}
}

// allow lets the node have the keys of these UUIDs, besides those of its volumes.
func (k *takeover) allow(uuids ...string) {
	k.Helper()
	policy := fmt.Sprintf("%s: %q\n", stack.NodeIdentity, append([]string{"loop.cryptcsi.io/*"}, uuids...))
	k.must("writing the policy", os.WriteFile(k.Path("policy.yaml"), []byte(strings.ReplaceAll(policy, `" "`, `", "`)), 0o600))
}

// restart starts csi-plugin with other flags.
func (k *takeover) restart(args ...string) {
	k.Helper()
	k.must("stopping csi-plugin", k.StopPlugin(syscall.SIGTERM))
	k.SetPluginArgs(args...)
	k.must("starting csi-plugin", k.StartPlugin(k.Context()))
}

// A volume of Constellation's from end to end: opened as it is, by its UUID or
// by its header; re-keyed; opened as one of ours; and then nothing but it.
func TestKernelTakeover(t *testing.T) {
	for _, tt := range []struct {
		name      string
		integrity bool
	}{{"plain", false}, {"integrity", true}} {
		t.Run(tt.name, func(t *testing.T) { newTakeover(t).tell(tt.name, tt.integrity) })
	}
}

func (k *takeover) tell(name string, integrity bool) {
	ctx := context.WithoutCancel(k.Context())
	fstype, entries, rekey := "ext4", map[string]string{}, append(k.service(""), k.fromKMS())
	if integrity {
		fstype, entries["cryptcsi.io/integrity"] = "ext4-integrity", "hmac-sha256"
		rekey = append(k.service("from-"), "--kms-uri="+k.KEK(), "--storage-uri="+k.Store(), "--integrity=hmac-sha256")
	}
	v, err := k.Create(ctx, name, takenSize, stack.MountCapability("ext4"), entries)
	k.must("Create", err)
	k.Cleanup(func() { _ = errors.Join(v.Down(ctx), v.Delete(ctx)) })
	delete(v.Context, "cryptcsi.io/integrity") // the filesystem's name says it
	v.Capability = stack.MountCapability(fstype)
	k.refused("a blank disk", v.Stage(ctx), "no LUKS header")
	uuid := k.make(v, integrity)
	if err := v.Stage(ctx); status.Code(err) != codes.PermissionDenied {
		k.Errorf("a volume whose key the node may not have: %v", err)
	}
	k.allow(uuid)

	k.up(v, "theirs", "their words") // by its header
	k.must("write", os.WriteFile(filepath.Join(v.Target, "ours"), []byte("our words"), 0o600))
	if code, said := k.rekey(v, rekey...); code != 1 || !strings.Contains(said, "the volume is open") {
		k.Errorf("re-keying an open volume: %d, %s", code, said)
	}
	k.must("down", v.Down(ctx))
	v.Context["cryptcsi.io/dek-id"] = dek.NewUUID()
	k.allow(uuid, v.Context["cryptcsi.io/dek-id"])
	k.refused("another UUID", v.Stage(ctx), "will not be formatted")
	v.Context["cryptcsi.io/dek-id"] = uuid
	k.up(v, "ours", "our words")
	k.must("down", v.Down(ctx))
	k.outsideCSI(v, uuid, integrity)

	if code, said := k.rekey(v, append(rekey, "--luks-uuid="+dek.NewUUID())...); code != 1 || !strings.Contains(said, "another volume") {
		k.Errorf("re-keying another UUID: %d, %s", code, said)
	}
	for range 2 {
		if code, said := k.rekey(v, rekey...); code != 0 || !strings.Contains(said, "is re-keyed") {
			k.Fatalf("re-keying: %d, %s", code, said)
		}
	}
	if cryptsetup(k.key(uuid), "open", "--test-passphrase", v.Device()) == nil {
		k.Error("the old key still opens the volume")
	}
	delete(v.Context, "cryptcsi.io/dek-id")
	k.refused("still in Constellation mode", v.Stage(ctx), "not as Constellation made it")

	k.restart()
	v.Capability = stack.MountCapability("ext4")
	if integrity {
		v.Context["cryptcsi.io/integrity"] = "hmac-sha256"
	}
	k.up(v, "theirs", "their words")
	k.up(v, "ours", "our words")
	k.must("down", v.Down(ctx))

	// The host swaps: this disk in the place of another volume's.
	other, err := k.Create(ctx, name+"-other", takenSize, v.Capability, entries)
	k.must("Create", err)
	k.Cleanup(func() { _ = other.Delete(ctx) })
	otherUUID := k.make(other, integrity)
	k.allow(otherUUID)
	if code, said := k.rekey(other, rekey...); code != 0 {
		k.Fatalf("re-keying: %d, %s", code, said)
	}
	k.must("copying", copyDevice(other.Device(), v.Device()))
	k.refused("a swapped disk", other.Stage(ctx), "belongs to")
	if code, said := k.rekey(other, rekey...); code != 1 || !strings.Contains(said, "another disk, or an older state") {
		k.Errorf("re-keying a swapped disk: %d, %s", code, said)
	}
	// And a disk as it was before: Constellation's header again.
	k.must("luksFormat", cryptsetup(k.key(otherUUID), "luksFormat", "--batch-mode", "--type=luks2", "--pbkdf=pbkdf2", "--uuid="+otherUUID, other.Device()))
	k.refused("a rolled-back disk", other.Stage(ctx), "will not be formatted")
	k.must("blanking", copyDevice(other.Device(), ""))
	k.refused("a blanked disk", other.Stage(ctx), "will not be formatted")
}

// outsideCSI opens the device by the verb, as an administrator would.
func (k *takeover) outsideCSI(v *stack.Volume, uuid string, integrity bool) {
	k.Helper()
	args := append([]string{"open", "--device=" + v.Device(), "--dek-id=" + uuid, "--name=theirs", "--read-only",
		"--key-service-protocol=constellation"}, k.service("")...)
	if integrity {
		args = append(args, "--integrity=hmac-sha256")
	}
	plugin := filepath.Join(k.bin, "csi-plugin")
	var errs bytes.Buffer
	cmd := exec.CommandContext(k.Context(), plugin, args...)
	cmd.Stderr = &errs
	if out, err := cmd.Output(); err != nil || string(out) != "/dev/mapper/theirs\n" {
		k.Errorf("open: %v, %q, %s", err, out, errs.String())
	}
	if out, err := exec.CommandContext(k.Context(), plugin, "close", "--name=theirs").CombinedOutput(); err != nil {
		k.Errorf("close: %v, %s", err, out)
	}
}

// copyDevice copies the start of a device, or zeros for "", to another one.
func copyDevice(to, from string) error {
	src := io.LimitReader(zeros{}, 20<<20)
	if from != "" {
		f, err := os.Open(from)
		if err != nil {
			return err
		}
		defer f.Close()
		src = io.LimitReader(f, 20<<20)
	}
	dst, err := os.OpenFile(to, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{dst}, src, make([]byte, 256<<10))
	return errors.Join(err, dst.Sync(), dst.Close())
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// An operator's mistakes end before anything is touched.
func TestRekeyCommandLines(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key")
	b := make([]byte, 32)
	_, _ = rand.Read(b)
	if err := os.WriteFile(key, b, 0o600); err != nil {
		t.Fatal(err)
	}
	const ours, theirs = " --key-service=unix:///k", " --from-key-service=unix:///f"
	const volume = "rekey --device=/dev/null --dek-id=d.example.com/v"
	for _, tt := range []struct {
		args string
		code int
		says string
	}{
		{"rekey --help", 0, "-from-key-service-ca-file"},
		{"rekey", 2, "--device is required"},
		{"rekey --device=/dev/null" + ours + theirs, 2, "--dek-id"},
		{"rekey --device=/dev/null --dek-id=v" + ours + theirs, 2, "<driver name>/<volume ID>"},
		{volume + theirs, 2, "--key-service, or --kms-uri"},
		{volume + ours + theirs + " --kms-uri=cluster:///x", 2, "excludes"},
		{volume + theirs + " --kms-uri=cluster:///x", 2, "--storage-uri"},
		{volume + ours, 2, "the old key comes from"},
		{volume + ours + theirs + " --from-kms-uri=cluster:///x", 2, "the old key comes from"},
		{volume + ours + theirs + " --key-service-protocol=constellation", 2, "--from-key-service"},
		{volume + ours + theirs + " --integrity=crc32c", 2, "--integrity"},
		{volume + ours + theirs + " --luks-uuid=x", 2, "--luks-uuid"},
		{volume + ours + " --from-kms-uri=static://" + key, 2, "derives keys"},
		{volume + ours + " --from-kms-uri=cluster:///nowhere?salt-file=/nowhere", 1, "--from-kms-uri"},
	} {
		var out bytes.Buffer
		if code := run(context.WithoutCancel(t.Context()), strings.Fields(tt.args), &out, &out); code != tt.code || !strings.Contains(out.String(), tt.says) {
			t.Errorf("csi-plugin %s: exit code %d, want %d; it should say %q:\n%s", tt.args, code, tt.code, tt.says, &out)
		}
	}
}

// closer makes a fake of keys complete.
type closer struct{ *drivertest.Keys }

func (closer) Close() error { return nil }

// The record of the new key is made where there is none, and has to be what the
// volume is where there is one.
func TestRekeyRecord(t *testing.T) {
	k := closer{drivertest.NewKeys()}
	r := &rekeying{rekeyFlags: &rekeyFlags{id: "d.example.com/v", integrity: "hmac-sha256"}, ours: k}
	for range 2 {
		d, err := r.record(t.Context())
		if err != nil || d.State != dek.Prepared || d.Spec != (dek.Spec{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC}) {
			t.Fatalf("record = %+v, %v", d, err)
		}
		d.Wipe()
	}
	r.integrity = ""
	if _, err := r.record(t.Context()); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("the record of a volume with integrity: %v", err)
	}
	if n := k.Unwiped(); n != 0 {
		t.Errorf("%d keys were not wiped", n)
	}
}
