package images

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cryptcsi/cryptcsi/test/libraries"
)

// tree is Debian's packages for one architecture, unpacked by test/install.sh.
type tree struct {
	dir   string
	owner map[string]string // path → package
}

func openTree(dir string) (*tree, error) {
	f, err := os.Open(filepath.Join(dir, "files"))
	if err != nil {
		return nil, fmt.Errorf("test/install.sh images makes it: %w", err)
	}
	defer f.Close()
	t := &tree{dir: dir, owner: map[string]string{}}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if name, file, ok := strings.Cut(lines.Text(), "\t"); ok && !strings.HasSuffix(file, "/") {
			t.owner[file] = name
		}
	}
	return t, lines.Err()
}

// on returns where a file of the image is on this machine.
func (t *tree) on(name string) string { return filepath.Join(t.dir, "root", name) }

// find returns a file's path, in the first of the folders that has it.
func (t *tree) find(name string, folders []string) (string, error) {
	if path.IsAbs(name) {
		folders, name = []string{path.Dir(name)}, path.Base(name)
	}
	for _, dir := range folders {
		if _, err := os.Lstat(t.on(path.Join(dir, name))); err == nil {
			return path.Join(dir, name), nil
		}
	}
	return "", fmt.Errorf("%s is in no package under %s", name, t.dir)
}

func programFolders() []string { return []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"} }

// add puts a file of the tree into a layer, with what a link leads to and with
// the libraries that a program needs.
func (t *tree) add(l Layer, name string) error {
	if _, ok := l[name]; ok {
		return nil
	}
	info, err := os.Lstat(t.on(name))
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSymlink == 0 {
		l[name] = File{From: t.on(name)}
		return t.addNeeded(l, t.on(name))
	}
	target, err := os.Readlink(t.on(name))
	if err != nil {
		return err
	}
	l[name] = File{Link: target}
	if !path.IsAbs(target) {
		target = path.Join(path.Dir(name), target)
	}
	return t.add(l, target)
}

// addNeeded puts the libraries and the loader of a program, which may be none of
// the tree's, into a layer.
func (t *tree) addNeeded(l Layer, program string) error {
	needed, err := libraries.Needed(program)
	if err != nil {
		return err
	}
	for _, lib := range needed {
		name, err := t.find(lib, libraries.Folders())
		if err != nil {
			return fmt.Errorf("%s: %w", program, err)
		}
		if err := t.add(l, name); err != nil {
			return err
		}
	}
	return nil
}

// packages are those whose files are in a layer, sorted.
func (t *tree) packages(l Layer) []string {
	names := map[string]bool{}
	for name := range l {
		if p, ok := t.owner[name]; ok {
			names[p] = true
		}
	}
	return slices.Sorted(maps.Keys(names))
}

// addPapers puts what belongs to the packages of a layer into it: licences, and
// what scanners read of packages in images without dpkg.
func (t *tree) addPapers(l Layer) error {
	for _, p := range t.packages(l) {
		l["/var/lib/dpkg/status.d/"+p] = File{From: filepath.Join(t.dir, "control", p)}
		copyright := "/usr/share/doc/" + p + "/copyright"
		real, err := filepath.EvalSymlinks(t.on(copyright))
		if errors.Is(err, fs.ErrNotExist) {
			continue // of a package built from the same source
		}
		if err != nil {
			return err
		}
		l[copyright] = File{From: real}
	}
	return nil
}

// authorities joins Debian's certificates, as update-ca-certificates does.
func (t *tree) authorities() ([]byte, error) {
	files, err := filepath.Glob(t.on("/usr/share/ca-certificates/mozilla/*.crt"))
	if err != nil || len(files) == 0 {
		return nil, fmt.Errorf("no authorities in %s: %w", t.dir, err)
	}
	var all []byte
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		all = append(all, text...)
	}
	return all, nil
}

// control is the value of a field of a package's control file.
func (t *tree) control(name, field string) (string, error) {
	text, err := os.ReadFile(filepath.Join(t.dir, "control", name))
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, field+": "); ok {
			return strings.TrimSpace(value), nil
		}
	}
	return "", err
}
