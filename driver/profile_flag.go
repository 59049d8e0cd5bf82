package driver

import (
	"maps"
	"slices"
	"strings"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// ParseProfile reads a profile as an operator gives it: "NAME,FIELD=VALUE,…",
// the known driver NAME's with some fields changed, or with no NAME that of a
// driver that nobody has looked at. A driver that is refused stays refused. The
// fields, with yes or no for VALUE where nothing else is said:
//
//	known            hands out block devices: new volumes need not confirm it
//	create-as-block  CreateVolume is asked for a block volume
//	one-node         no access modes for several nodes
//	single-writer    knows SINGLE_NODE_WRITER alone
//	not-ready        says "not yet" with INVALID_ARGUMENT
//	expand           NodeExpandVolume is best-effort, delegate or skip
//	never-grows      reports growth that does not happen
//	whole-gib        has devices of whole GiB alone
//	hand-over        no, or the entry of the publish context that names the device
//	alias            takes devices named by letters and digits in /dev only
//	refuse, allow    a parameter that is refused, or no longer; may be repeated
//
// The error is ErrInvalid and names the field.
func ParseProfile(text string) (Profile, error) {
	name, fields, _ := strings.Cut(text, ",")
	p, known := ProfileOf(name)
	if name != "" && !known {
		return Profile{}, errdefs.Errorf(errdefs.ErrInvalid, "no driver of the name %q is known", name)
	}
	if fields == "" {
		return p, nil
	}
	p.Refuses = slices.Clone(p.Refuses)
	for field := range strings.SplitSeq(fields, ",") {
		key, value, _ := strings.Cut(field, "=")
		if err := p.set(key, value); err != nil {
			return Profile{}, errdefs.Errorf(errdefs.ErrInvalid, "field %q: %w", field, err)
		}
	}
	return p, nil
}

// set changes one field.
func (p *Profile) set(key, value string) error {
	if value == "" {
		return errdefs.Errorf(errdefs.ErrInvalid, "it has no value")
	}
	flags := map[string]*bool{
		"known": &p.Known, "create-as-block": &p.CreateAsBlock, "one-node": &p.OneNode,
		"single-writer": &p.SingleWriter, "never-grows": &p.NeverGrows, "whole-gib": &p.WholeGiB, "alias": &p.Alias,
	}
	if flag := flags[key]; flag != nil {
		return oneOf(value, map[string]bool{"yes": true, "no": false}, flag)
	}
	switch key {
	case "not-ready":
		return oneOf(value, map[string]error{"yes": errdefs.ErrInvalid, "no": nil}, &p.NotReady)
	case "expand":
		return oneOf(value, map[string]ExpandPolicy{"best-effort": ExpandBestEffort, "delegate": ExpandDelegate, "skip": ExpandSkip}, &p.Expand)
	case "hand-over":
		p.HandOver, p.DeviceKey = true, value
		if value == "no" {
			p.HandOver, p.DeviceKey = false, ""
		}
	case "refuse":
		p.Refuses = append(p.Refuses, Setting{Key: value, Why: "--profile refuses it"})
	case "allow":
		p.Refuses = slices.DeleteFunc(p.Refuses, func(s Setting) bool { return strings.EqualFold(s.Key, value) })
	default:
		return errdefs.Errorf(errdefs.ErrInvalid, "there is no such field")
	}
	return nil
}

// oneOf sets field to what value stands for.
func oneOf[T any](value string, values map[string]T, field *T) error {
	v, ok := values[value]
	if !ok {
		return errdefs.Errorf(errdefs.ErrInvalid, "must be one of %s", strings.Join(slices.Sorted(maps.Keys(values)), ", "))
	}
	*field = v
	return nil
}
