package keyservice

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"

	"sigs.k8s.io/yaml"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// maxPolicy bounds a policy file, in bytes.
const maxPolicy = 4 << 20

// Prefix is the policy of a file, in YAML or JSON: identities by their names,
// each with a list of DEK IDs, exact or, with a star at the end, by what they
// begin with.
//
//	spiffe://example.org/node/worker-1: ["hostpath.example.org/*"]
//	joinservice: [measurementSecret, clusterID]
//
// The IDs measurementSecret and clusterID, of which a whole Constellation
// cluster hangs, are given only to who has them by their exact names, never by
// a star. An unknown identity has nothing.
//
// The file is read again when it changes. One that is broken then changes
// nothing, and the log says so.
type Prefix struct {
	path string
	log  *slog.Logger

	mu    sync.Mutex
	file  watched
	rules map[string]patterns
}

// patterns is what one identity may have.
type patterns struct {
	exact    map[dek.ID]bool
	prefixes []string
}

// OpenPrefix reads the file. ErrInvalid says what is wrong with it.
func OpenPrefix(path string, log *slog.Logger) (*Prefix, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	p := &Prefix{path: path, log: log, file: watched{paths: []string{path}, most: maxPolicy}}
	content, _, err := p.file.changed()
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the policy file: %w", err)
	}
	if p.rules, err = parsePrefixes(content[0]); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the policy file %s: %w", path, err)
	}
	return p, nil
}

// Allowed is Volumes'.
func (p *Prefix) Allowed(_ context.Context, who Identity, id dek.ID) error {
	rules, known := p.current()[who.Name]
	switch {
	case !known:
		return errdefs.Errorf(errdefs.ErrDenied, "the policy file does not name the identity")
	case rules.exact[id]:
		return nil
	case !reserved(id) && slices.ContainsFunc(rules.prefixes, func(prefix string) bool { return strings.HasPrefix(string(id), prefix) }):
		return nil
	}
	return errdefs.Errorf(errdefs.ErrDenied, "the policy file does not give the identity this DEK")
}

// reserved says whether an ID has a meaning for a whole Constellation cluster.
func reserved(id dek.ID) bool { return id == "measurementSecret" || id == "clusterID" }

// current returns the rules, those of the changed file if it is good.
func (p *Prefix) current() map[string]patterns {
	p.mu.Lock()
	defer p.mu.Unlock()
	content, changed, err := p.file.changed()
	if !changed {
		return p.rules
	}
	var rules map[string]patterns
	if err == nil {
		rules, err = parsePrefixes(content[0])
	}
	if err != nil {
		p.log.Error("the changed policy file is not used, the one before it stays in force", "path", p.path, "error", err)
		return p.rules
	}
	p.log.Info("the policy file was read again", "path", p.path, "identities", len(rules))
	p.rules = rules
	return rules
}

func parsePrefixes(data []byte) (map[string]patterns, error) {
	if bytes.Contains(data, []byte("\n---")) {
		return nil, errors.New("it holds more than one YAML document")
	}
	var file map[string][]string
	text, err := yaml.YAMLToJSONStrict(data)
	if err == nil {
		// By way of JSON, so that what YAML takes for a number or a truth
		// value is refused instead of being spelled in another way.
		err = json.Unmarshal(text, &file)
	}
	if err != nil {
		return nil, fmt.Errorf("it must be a mapping of identities, each once, to lists of DEK IDs (quote what looks like a number): %w", err)
	}
	rules := make(map[string]patterns, len(file))
	for name, list := range file {
		if !validName(name) {
			return nil, fmt.Errorf("%.300q cannot be an identity's name", name)
		}
		r := patterns{exact: map[dek.ID]bool{}}
		for _, text := range list {
			if err := r.add(text); err != nil {
				return nil, fmt.Errorf("identity %s: %w", name, err)
			}
		}
		rules[name] = r
	}
	return rules, nil
}

func (r *patterns) add(text string) error {
	prefix, star := strings.CutSuffix(text, "*")
	if strings.Contains(prefix, "*") {
		return fmt.Errorf("pattern %.300q: a star can only be at the end", text)
	}
	if prefix == "" && star {
		r.prefixes = append(r.prefixes, "")
		return nil
	}
	id, err := dek.ParseID(prefix)
	if err != nil {
		return fmt.Errorf("pattern %.300q: %w", text, err)
	}
	if star {
		r.prefixes = append(r.prefixes, prefix)
	} else {
		r.exact[id] = true
	}
	return nil
}
