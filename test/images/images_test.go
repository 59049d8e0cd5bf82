package images

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// packages are Debian's, as `test/install.sh images` unpacks them.
func packages(t *testing.T) string {
	t.Helper()
	dir := filepath.Join("../..", ".cache/images")
	if _, err := os.Stat(filepath.Join(dir, runtime.GOARCH, "files")); err != nil {
		if os.Getenv("REQUIRE_ALL") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	return dir
}

// build makes the images of this machine's architecture, with this test in the
// place of our programs.
func build(t *testing.T, out string) Builder {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b := Builder{Packages: packages(t), Programs: t.TempDir(), Out: out, Arches: []string{runtime.GOARCH}, At: time.Unix(1700000000, 0).UTC()}
	dir := filepath.Join(b.Programs, runtime.GOARCH)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, i := range Releases(nil) {
		for _, p := range i.programs {
			if err := os.Symlink(self, filepath.Join(dir, p)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := b.All(Releases(map[string]string{"a": "b"}), "registry.example.com/x"); err != nil {
		t.Fatal(err)
	}
	return b
}

func read(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// TestReproducible: made again elsewhere it is the same, digest for digest.
func TestReproducible(t *testing.T) {
	a, b := build(t, t.TempDir()), build(t, t.TempDir())
	for _, name := range []string{"kustomization.yaml", "csi-plugin/index.json", "key-service/index.json", "csi-plugin-" + runtime.GOARCH + ".spdx.json"} {
		if !bytes.Equal(read(t, filepath.Join(a.Out, name)), read(t, filepath.Join(b.Out, name))) {
			t.Errorf("%s is another one the second time", name)
		}
	}
	if !strings.Contains(string(read(t, filepath.Join(a.Out, "kustomization.yaml"))), "newName: registry.example.com/x/key-service\n    digest: sha256:") {
		t.Errorf("%s", read(t, filepath.Join(a.Out, "kustomization.yaml")))
	}
}

// TestUnpacked: another implementation takes the image and unpacks it, what it
// has runs there, and each of its files is somebody's.
func TestUnpacked(t *testing.T) {
	kernel.Need(t, "root", "exec:skopeo")
	b := build(t, t.TempDir())
	dir, root := t.TempDir(), t.TempDir()
	run(t, "skopeo", "copy", "-q", "--insecure-policy", "oci:"+filepath.Join(b.Out, "csi-plugin"), "dir:"+dir)
	var manifest struct{ Layers []descriptor }
	if err := json.Unmarshal(read(t, filepath.Join(dir, "manifest.json")), &manifest); err != nil {
		t.Fatal(err)
	}
	for _, l := range manifest.Layers {
		run(t, "tar", "-xzf", filepath.Join(dir, strings.TrimPrefix(l.Digest, "sha256:")), "-C", root)
	}
	for _, call := range [][]string{
		{"mkfs.ext4", "-V"}, {"mkfs.xfs", "-V"}, {"mkfs.btrfs", "--version"}, {"e2fsck", "-V"}, {"fsck.xfs", "/etc/group"},
		{"modprobe", "--version"}, {"mount", "--version"}, {"blkid", "--version"}, {"xfs_repair", "-V"},
		{"/usr/bin/csi-plugin", "-test.list", "TestUnpacked"},
	} {
		run(t, "chroot", append([]string{root}, call...)...)
	}
	if out, err := exec.CommandContext(t.Context(), "chroot", root, "perl", "-v").CombinedOutput(); err == nil {
		t.Errorf("there is a perl: %s", out)
	}
	text := read(t, filepath.Join(root, "usr/share/sbom/csi-plugin.spdx.json"))
	for _, want := range []string{"pkg:deb/debian/libc6@", "pkg:deb/debian/e2fsprogs@", "pkg:golang/stdlib@go1"} {
		if !bytes.Contains(text, []byte(want)) {
			t.Errorf("the SBOM has no %s", want)
		}
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// TestPushed: a registry takes the images under the digests that kustomize is
// told.
func TestPushed(t *testing.T) {
	kernel.Need(t, "exec:skopeo", "exec:docker-registry")
	b := build(t, t.TempDir())
	addr, config := free(t), filepath.Join(t.TempDir(), "config.yml")
	text := "version: 0.1\nstorage: {filesystem: {rootdirectory: " + t.TempDir() + "}}\nhttp: {addr: \"" + addr + "\"}\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	registry := exec.CommandContext(t.Context(), "docker-registry", "serve", config)
	if err := registry.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = registry.Process.Kill(), registry.Wait() }()
	answers(t, addr)
	for _, i := range Releases(nil) {
		to := "docker://" + addr + "/" + i.name
		run(t, "skopeo", "copy", "-q", "--all", "--insecure-policy", "--dest-tls-verify=false", "oci:"+filepath.Join(b.Out, i.name), to+":dev")
		digest := strings.TrimSpace(run(t, "skopeo", "inspect", "--tls-verify=false", "--format", "{{.Digest}}", to+":dev"))
		if !strings.Contains(string(read(t, filepath.Join(b.Out, "kustomization.yaml"))), "digest: "+digest+"\n") {
			t.Errorf("the registry has %s as %s", i.name, digest)
		}
	}
}

// free is an address that nobody listens on.
func free(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func answers(t *testing.T, addr string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if c, err := net.Dial("tcp", addr); err == nil {
			_ = c.Close()
			return
		}
	}
	t.Fatal("the registry does not answer")
}

// TestOtherArchitecture: what is cross-built is of that architecture, and its
// libraries are among that architecture's packages.
func TestOtherArchitecture(t *testing.T) {
	dir := packages(t)
	if runtime.GOARCH != "amd64" {
		t.Skipf("on %s arm64 is not cross-built", runtime.GOARCH)
	}
	kernel.Need(t, "exec:aarch64-linux-gnu-gcc")
	run(t, "./build.sh", "arm64", "-s -w", "crypt-worker")
	program := filepath.Join("../..", "bin/images/arm64/crypt-worker")
	f, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	needed, err := f.ImportedLibraries()
	if err != nil || f.Machine != elf.EM_AARCH64 || !slices.Contains(needed, "libcryptsetup.so.12") {
		t.Errorf("crypt-worker is for %v and needs %v, %v", f.Machine, needed, err)
	}
	tree, err := openTree(filepath.Join(dir, "arm64"))
	if err != nil {
		t.Fatal(err)
	}
	l := Layer{}
	if err := tree.addNeeded(l, program); err != nil {
		t.Error(err)
	}
	for _, p := range []string{"libc6", "libcryptsetup12", "libssl3", "libdevmapper1.02.1"} {
		if !slices.Contains(tree.packages(l), p) {
			t.Errorf("of %s there is nothing in %v", p, tree.packages(l))
		}
	}
}
