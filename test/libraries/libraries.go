// Package libraries tells what programs load when they start, for tests that put
// programs into container images.
package libraries

import (
	"debug/elf"
	"io"
	"strings"
)

// Needed returns what a program or library names itself: libraries by their
// names, and the loader by its path. Nothing for what is no ELF file, a script
// for example.
func Needed(program string) ([]string, error) {
	f, err := elf.Open(program)
	if err != nil {
		return nil, nil //nolint:nilerr // a script or a text
	}
	defer f.Close()
	needed, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			text, err := io.ReadAll(p.Open())
			if err != nil {
				return nil, err
			}
			needed = append(needed, strings.TrimRight(string(text), "\x00"))
		}
	}
	return needed, nil
}

// Folders are those where the dynamic loader looks by itself.
func Folders() []string {
	var all []string
	for _, triple := range []string{"x86_64-linux-gnu", "aarch64-linux-gnu"} {
		all = append(all, "/lib/"+triple, "/usr/lib/"+triple)
	}
	return all
}
