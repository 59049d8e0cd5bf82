// Package config fills a program's flags from its command line and from a
// YAML file.
package config

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"

	"sigs.k8s.io/yaml"
)

// File is the flags that name the file.
type File struct {
	path string
	// Check says that the configuration is to be checked and nothing else done.
	Check bool
}

// Add adds --config and --check-config.
func (f *File) Add(fs *flag.FlagSet) {
	fs.StringVar(&f.path, "config", "", "YAML file with flags by their names, a list where a flag may be repeated; the command line wins over it")
	fs.BoolVar(&f.Check, "check-config", false, "check flags and file, and end")
}

// Load sets the flags that the file names and the command line does not.
// Call it after fs.Parse. The file is strict: an unknown name, a name given
// twice or a value that the flag does not take is an error that names it, and
// none of the file's values is shown in one.
func (f *File) Load(fs *flag.FlagSet) error {
	if f.path == "" {
		return nil
	}
	data, err := os.ReadFile(f.path)
	if err != nil {
		return fmt.Errorf("--config: %w", err)
	}
	var values map[string]json.RawMessage
	if err := yaml.UnmarshalStrict(data, &values); err != nil {
		return fmt.Errorf("--config %s: not a YAML mapping of flags, or a name comes twice", f.path)
	}
	given := map[string]bool{}
	fs.Visit(func(g *flag.Flag) { given[g.Name] = true })
	for _, name := range slices.Sorted(maps.Keys(values)) {
		switch {
		case fs.Lookup(name) == nil || name == "config" || name == "check-config":
			return fmt.Errorf("--config %s: there is no flag %q here", f.path, name)
		case given[name]:
			continue
		}
		items, err := scalars(values[name])
		if err != nil {
			return fmt.Errorf("--config %s: %s: %w", f.path, name, err)
		}
		if _, list := fs.Lookup(name).Value.(*List); !list && len(items) != 1 {
			return fmt.Errorf("--config %s: %s takes one value", f.path, name)
		}
		for _, item := range items {
			if fs.Set(name, item) != nil {
				return fmt.Errorf("--config %s: %s does not take that value", f.path, name)
			}
		}
	}
	return nil
}

// scalars returns a scalar, or a list of them, as a flag wants it.
func scalars(raw json.RawMessage) ([]string, error) {
	var list []json.RawMessage
	if json.Unmarshal(raw, &list) != nil || list == nil {
		list = []json.RawMessage{raw}
	}
	var items []string
	for _, item := range list {
		var s string
		if json.Unmarshal(item, &s) == nil && string(item) != "null" {
			items = append(items, s)
			continue
		}
		if item[0] == '{' || item[0] == '[' || string(item) == "null" {
			return nil, fmt.Errorf("must be a text, a number, true or false, or a list of those")
		}
		items = append(items, string(item))
	}
	return items, nil
}

// List is a flag that may be repeated. Several flags may share one, and keep
// the order in which they came.
type List struct {
	Items *[]Item
	Kind  string
}

// Item is one value of a List, with the List's Kind.
type Item struct{ Kind, Value string }

// Set is part of flag.Value.
func (l *List) Set(s string) error {
	if s == "" {
		return fmt.Errorf("is empty")
	}
	*l.Items = append(*l.Items, Item{l.Kind, s})
	return nil
}

// String is part of flag.Value. It never shows a value, which may be secret.
func (l *List) String() string { return "" }
