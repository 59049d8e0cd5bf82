package driver

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// mkfsFlag is a flag of mkfs that a StorageClass may set, and what it takes.
type mkfsFlag struct {
	value string            // a regular expression for the whole value; or
	list  map[string]string // names of a comma-separated list with what follows "=", "" for nothing
}

// features is a list of names, each perhaps with "^" before it.
func features(names ...string) mkfsFlag {
	f := mkfsFlag{list: map[string]string{}}
	for _, name := range names {
		f.list[name], f.list["^"+name] = "", ""
	}
	return f
}

const (
	aNumber = `[1-9][0-9]{0,9}`
	yesOrNo = `[01]`
)

// label begins so that it can be no flag; xfs has the shortest.
func label(most int) mkfsFlag {
	return mkfsFlag{value: fmt.Sprintf(`[A-Za-z0-9][A-Za-z0-9._-]{0,%d}`, most-1)}
}

// mkfsFlags are what can be set, by filesystem. What is not here names a device
// or a file, forces, discards, tries without doing, gives a UUID that others
// might have, changes the filesystem's size, or turns off what growing, mounting
// after a crash or our own options need.
var mkfsFlags = map[string]map[string]mkfsFlag{
	"ext4": {
		"-b": {value: `4096`}, // sectors have that size
		"-i": {value: `[1-9][0-9]{3,7}`},
		"-I": {value: `128|256|512|1024|2048|4096`},
		"-J": {list: map[string]string{"size": aNumber}},
		"-L": label(16),
		"-m": {value: `50|[0-4]?[0-9](\.[0-9]{1,2})?`},
		"-N": {value: aNumber},
		"-T": {list: map[string]string{"default": "", "small": "", "news": "", "largefile": "", "largefile4": "", "big": "", "huge": ""}},
		"-E": {list: map[string]string{
			"stride": aNumber, "stripe_width": aNumber, "root_owner": `[0-9]{1,10}:[0-9]{1,10}`,
			"packed_meta_blocks": yesOrNo, "lazy_itable_init": yesOrNo, "lazy_journal_init": yesOrNo,
		}},
		"-O": features("casefold", "ea_inode", "encrypt", "fast_commit", "inline_data", "large_dir", "metadata_csum_seed",
			"orphan_file", "project", "quota", "stable_inodes", "verity"),
	},
	"xfs": {
		"-b": {list: map[string]string{"size": `4096`}},
		"-d": {list: map[string]string{"agcount": `[1-9][0-9]{0,4}`}},
		"-i": {list: map[string]string{"size": `512|1024|2048`, "maxpct": `100|[0-9]{1,2}`, "sparse": yesOrNo, "nrext64": yesOrNo}},
		"-l": {list: map[string]string{"size": aNumber + `[kmg]?`}},
		"-L": label(12),
		"-m": {list: map[string]string{"bigtime": yesOrNo, "finobt": yesOrNo, "inobtcount": yesOrNo, "reflink": yesOrNo, "rmapbt": yesOrNo}},
		"-n": {list: map[string]string{"size": `4096|8192|16384|32768|65536`}},
	},
	"btrfs": {
		"--csum": {value: `crc32c|xxhash|sha256|blake2`},
		"-d":     {value: `single|dup`},
		"-L":     label(64),
		"-m":     {value: `single|dup`},
		"-n":     {value: `4096|8192|16384|32768|65536|(4|8|16|32|64)k`},
		"-O":     features("extref", "no-holes", "skinny-metadata"),
		"-R":     {list: map[string]string{"quota": ""}},
	},
}

// maxMkfsOptions bounds them, in bytes: they stand in the volume context.
const maxMkfsOptions = 512

// readMkfsOptions splits options for mkfs into words, flag and value by turns.
// ErrInvalid says what is wrong with which.
func readMkfsOptions(fstype, text string) ([]string, error) {
	invalid := func(format string, args ...any) ([]string, error) {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, keyMkfs+": "+format, args...)
	}
	if len(text) > maxMkfsOptions {
		return invalid("%d bytes, at most %d", len(text), maxMkfsOptions)
	}
	flags := mkfsFlags[fstype]
	words := strings.Fields(text)
	for i := 0; i < len(words); i += 2 {
		flag, known := flags[words[i]]
		switch {
		case !strings.HasPrefix(words[i], "-"):
			return invalid("%q is no flag: flags and their values take turns, with a space in between", words[i])
		case !known:
			return invalid("flag %q is not offered for %s: there are %s", words[i], fstype, strings.Join(slices.Sorted(maps.Keys(flags)), " "))
		case i+1 == len(words):
			return invalid("flag %s has no value: it stands behind the flag, with a space in between", words[i])
		case slices.Contains(words[:i], words[i]):
			return invalid("flag %s is there twice: put the parts of its list behind one, with commas", words[i])
		}
		if err := flag.check(words[i+1]); err != nil {
			return invalid("flag %s of %s: %w", words[i], fstype, err)
		}
	}
	return words, nil
}

// check says what is wrong with a flag's value.
func (f mkfsFlag) check(value string) error {
	if f.list == nil {
		return matches(value, f.value)
	}
	for part := range strings.SplitSeq(value, ",") {
		name, rest, has := strings.Cut(part, "=")
		form, known := f.list[name]
		switch {
		case !known:
			return fmt.Errorf("%q is not offered: there are %s", name, strings.Join(slices.Sorted(maps.Keys(f.list)), " "))
		case form == "" && has:
			return fmt.Errorf("%s takes no value", name)
		case form == "":
		default:
			if err := matches(rest, form); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return nil
}

func matches(value, form string) error {
	if regexp.MustCompile(`^(` + form + `)$`).MatchString(value) {
		return nil
	}
	return fmt.Errorf("the value %q has not the form %s", value, form)
}

// takeFlag returns the words without a flag and its value, and that value.
func takeFlag(words []string, flag string) (rest []string, value string) {
	i := slices.Index(words, flag)
	if i < 0 {
		return words, ""
	}
	return slices.Concat(words[:i], words[i+2:]), words[i+1]
}
