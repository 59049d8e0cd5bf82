package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// deviceMapperModules are loaded into every guest, in this order: the ciphers
// come first, because dm-crypt and dm-integrity ask for them by name and not as
// dependencies. What is built into a kernel is not in its modules.dep.
func deviceMapperModules() []string {
	return []string{
		"cbc", "ecb", "aes_generic", "sha256_generic", "sha512_generic", "crc32c_generic", "encrypted-keys",
		"dm-mod", "dm-crypt", "dm-integrity", "dm-clone", "dm-zero", "loop",
		"algif_skcipher", "algif_aead", "algif_hash", "xts", "gcm", "hmac", "authenc", "aegis128",
	}
}

// moduleTree is a directory of modules with what modules.dep says of them.
type moduleTree struct {
	dir    string
	file   map[string]string   // path below dir by the module's name, with underscores
	needs  map[string][]string // by path; the ones to be loaded first come last
	loaded map[string]bool     // by path
}

// readModuleTree reads the modules.dep of a directory.
func readModuleTree(dir string) (*moduleTree, error) {
	f, err := os.Open(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	t := &moduleTree{dir: dir, file: map[string]string{}, needs: map[string][]string{}, loaded: map[string]bool{}}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		path, needs, ok := strings.Cut(lines.Text(), ":")
		if !ok {
			continue
		}
		t.file[moduleName(path)] = path
		t.needs[path] = strings.Fields(needs)
	}
	return t, lines.Err()
}

// moduleName is the kernel's name of the module in a file.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".")
	return strings.ReplaceAll(name, "-", "_")
}

// order returns the files to load for a module, itself last. A module that the
// tree has not is taken for built in: none are.
func (t *moduleTree) order(name string) []string {
	path, ok := t.file[moduleName(name)]
	if !ok {
		return nil
	}
	var files []string
	needs := t.needs[path]
	for _, need := range slices.Backward(needs) {
		files = append(files, need)
	}
	return append(files, path)
}

// loadModules loads modules of a directory, in this order.
func loadModules(dir string, names []string) error {
	tree, err := readModuleTree(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := tree.load(name); err != nil {
			return err
		}
	}
	return nil
}

// load loads a module and what it needs, in this process: starting modprobe
// costs more than all of it.
func (t *moduleTree) load(name string) error {
	for _, path := range t.order(name) {
		if t.loaded[path] {
			continue
		}
		if err := t.insert(path); err != nil {
			return fmt.Errorf("module %s: %w", path, err)
		}
		t.loaded[path] = true
	}
	return nil
}

func (t *moduleTree) insert(path string) error {
	f, err := os.Open(filepath.Join(t.dir, path))
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if !strings.HasSuffix(path, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	if err := unix.FinitModule(int(f.Fd()), "", flags); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}
