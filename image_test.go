package cryptcsi_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// programs that a node runs: those of this module's own calls, and those that
// k8s.io/mount-utils calls for the filesystems offered.
func programs() []string {
	return []string{
		"blkid", "blockdev", "modprobe", "mount", "umount",
		"dumpe2fs", "e2fsck", "fsck", "fsck.ext4", "mkfs.ext4", "resize2fs",
		"fsck.xfs", "mkfs.xfs", "xfs_growfs", "xfs_io", "xfs_repair",
		"btrfs", "mkfs.btrfs",
	}
}

// TestImageIsComplete holds the package list of the Dockerfile against what
// Debian's package database says on this machine: every program that a node
// runs and every library that crypt-worker needs comes from a package that is
// listed, that a listed one depends on, or that every Debian has.
func TestImageIsComplete(t *testing.T) {
	kernel.Need(t, "exec:dpkg-query", "exec:ldd")
	inImage := dependencies(t, imagePackages(t))
	owned := func(file string) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "dpkg-query", "--search", "*/"+file).Output()
		if err != nil {
			t.Errorf("no package on this machine has %s: %v", file, err)
			return
		}
		for line := range strings.Lines(string(out)) {
			owner, name, _ := strings.Cut(strings.TrimSpace(line), ": ")
			owner, _, _ = strings.Cut(owner, ":") // architecture
			if filepath.Base(name) == file && inImage[owner] {
				return
			}
		}
		t.Errorf("%s is in no package of the image; dpkg says: %s", file, out)
	}
	for _, p := range programs() {
		owned(p)
	}
	for _, lib := range libraries(t, "./cmd/crypt-worker") {
		owned(lib)
	}
}

// imagePackages reads the packages that the stage "node" installs.
func imagePackages(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile("Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	_, stage, ok := strings.Cut(string(text), " AS node\n")
	if !ok {
		t.Fatal("the Dockerfile has no stage called node")
	}
	install := regexp.MustCompile(`apt-get install[^&]*`).FindString(stage)
	words := strings.Fields(strings.ReplaceAll(install, "\\\n", " "))
	packages := slices.DeleteFunc(words, func(w string) bool { return w == "apt-get" || w == "install" || strings.HasPrefix(w, "--") })
	if len(packages) == 0 {
		t.Fatal("the stage node installs no packages")
	}
	if !slices.IsSorted(packages) {
		t.Errorf("packages are not sorted: %v", packages)
	}
	return packages
}

// dependencies returns the packages that are in an image on Debian's base
// after the given ones were installed there without what they recommend.
func dependencies(t *testing.T, packages []string) map[string]bool {
	t.Helper()
	const format = `${Package}\t${Essential}\t${Priority}\t${Pre-Depends}, ${Depends}\n`
	out, err := exec.CommandContext(t.Context(), "dpkg-query", "--show", "--showformat", format).Output()
	if err != nil {
		t.Fatal(err)
	}
	needs := map[string][]string{}
	todo := slices.Clone(packages)
	for line := range strings.Lines(string(out)) {
		field := strings.Split(strings.TrimSpace(line), "\t")
		if len(field) != 4 {
			continue
		}
		// Of alternatives apt takes the first.
		for need := range strings.SplitSeq(field[3], ",") {
			if words := strings.Fields(need); len(words) > 0 {
				name, _, _ := strings.Cut(words[0], ":")
				needs[field[0]] = append(needs[field[0]], name)
			}
		}
		if field[1] == "yes" || field[2] == "required" {
			todo = append(todo, field[0])
		}
	}
	for _, p := range packages {
		if _, ok := needs[p]; !ok {
			t.Errorf("package %s of the image is not installed here, so nothing can be said about it", p)
		}
	}
	all := map[string]bool{}
	for len(todo) > 0 {
		p := todo[0]
		todo = todo[1:]
		if !all[p] {
			all[p] = true
			todo = append(todo, needs[p]...)
		}
	}
	return all
}

// libraries builds a program and returns the file names of the shared
// libraries that it needs, indirectly too.
func libraries(t *testing.T, main string) []string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "program")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, main).CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", main, err, out)
	}
	out, err := exec.CommandContext(t.Context(), "ldd", program).Output()
	if err != nil {
		t.Fatalf("ldd: %v", err)
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		if name, _, ok := strings.Cut(strings.TrimSpace(line), " => "); ok {
			names = append(names, filepath.Base(name))
		}
	}
	if !slices.Contains(names, "libcryptsetup.so.12") {
		t.Errorf("%s needs %v: libcryptsetup is missing there", main, names)
	}
	return names
}
