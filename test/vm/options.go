package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// defaultTimeout bounds a command that brings no -test.timeout of its own.
const defaultTimeout = 10 * time.Minute

// maxDisks is how many user-mode Linux takes.
const maxDisks = 16

// options is what the command line and the environment ask for.
type options struct {
	mode    string        // native, uml, qemu, or empty: not chosen
	mem     string        // memory of the guest, such as 2G
	timeout time.Duration // 0: none
	rw      []string      // absolute directories to share writable
	disks   []string      // absolute files to attach as block devices
	tap     string        // tap device of the host that is the guest's eth0; empty: none
	killOn  string        // kill the guest when its output has this; empty: never
	args    []string      // the command, at least one
	outputs testOutputs
}

// testOutputs are the places that a test binary was told to write to.
type testOutputs struct {
	files []string // profiles and logs, absolute where the flags are
	dirs  []string // -test.gocoverdir
}

// errUsage says that the flag package has already told what is wrong.
var errUsage = errors.New("usage")

// paths is a flag that may be repeated.
type paths []string

func (p *paths) String() string { return strings.Join(*p, ":") }

func (p *paths) Set(s string) error {
	if s == "" {
		return errors.New("empty path")
	}
	abs, err := filepath.Abs(s)
	*p = append(*p, abs)
	return err
}

// parse reads the command line; getenv gives the defaults of the flags, because
// `go test -exec` is not always the place to write them.
func parse(args []string, getenv func(string) string, stderr io.Writer) (*options, error) {
	o := &options{mode: getenv("VM")}
	var rw, disks paths
	fs := flag.NewFlagSet("vm", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprintln(stderr, "usage: [VM=native|uml|qemu] vm [flags] [--] command [argument…]")
		fs.PrintDefaults()
	}
	fs.StringVar(&o.mem, "mem", "2G", "memory of the guest, `size` in M or G (VM_MEM)")
	fs.DurationVar(&o.timeout, "timeout", 0, "stop the guest after this time, 0: never\n(VM_TIMEOUT; default -test.timeout and a little, else 10m)")
	fs.Var(&rw, "rw", "share this `directory` of the host writable, at the same path; may be repeated\n(VM_RW, separated by colons)")
	fs.Var(&disks, "disk", "attach this `file` as the next of /dev/ubda, /dev/ubdb, …; may be repeated\n(VM_DISK, separated by colons)")
	fs.StringVar(&o.tap, "tap", "", "give the guest an eth0 at the other end of this tap `device`; user-mode Linux only")
	fs.StringVar(&o.killOn, "kill-on", "", "kill the guest, as a power cut would, when its standard output contains this `string`")
	for name, variable := range map[string]string{"mem": "VM_MEM", "timeout": "VM_TIMEOUT", "rw": "VM_RW", "disk": "VM_DISK"} {
		for value := range strings.SplitSeq(getenv(variable), ":") {
			if value == "" {
				continue
			}
			if err := fs.Set(name, value); err != nil {
				return nil, fmt.Errorf("%s=%q: %w", variable, value, err)
			}
		}
	}
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil, err
	} else if err != nil {
		return nil, errUsage
	}
	o.rw, o.disks, o.args = rw, disks, slices.Clone(fs.Args())
	if err := o.check(); err != nil {
		return nil, err
	}
	test := parseTestFlags(o.args[1:])
	o.outputs = test.outputs()
	given := getenv("VM_TIMEOUT") != ""
	fs.Visit(func(f *flag.Flag) { given = given || f.Name == "timeout" })
	if !given {
		o.timeout = test.timeout()
	}
	return o, nil
}

// check refuses what no guest can do.
func (o *options) check() error {
	switch {
	case len(o.args) == 0:
		return errors.New("no command given; vm -help tells how")
	case !slices.Contains([]string{"", "native", "uml", "qemu"}, o.mode):
		return fmt.Errorf("VM=%q: want native, uml or qemu", o.mode)
	case !regexp.MustCompile(`^[1-9][0-9]*[MG]$`).MatchString(o.mem):
		return fmt.Errorf("-mem %q: want a number with M or G", o.mem)
	case o.timeout < 0:
		return fmt.Errorf("-timeout %v: must not be negative", o.timeout)
	case len(o.disks) > maxDisks:
		return fmt.Errorf("%d disks: a guest takes %d", len(o.disks), maxDisks)
	case o.mode == "native" && (len(o.disks) > 0 || o.killOn != ""):
		return errors.New("-disk and -kill-on need a guest, and VM=native asks for none")
	case o.tap != "" && (o.mode == "native" || o.mode == "qemu"):
		return fmt.Errorf("-tap needs user-mode Linux, and VM=%s asks for another", o.mode)
	case !regexp.MustCompile(`^[a-z0-9]{0,15}$`).MatchString(o.tap):
		return fmt.Errorf("-tap %q: want the name of a tap device", o.tap)
	}
	return nil
}

// testFlags are the -test. flags of a test binary by their name.
type testFlags map[string]string

func parseTestFlags(args []string) testFlags {
	flags := testFlags{}
	for i, arg := range args {
		name, ok := strings.CutPrefix(arg, "-test.")
		if !ok {
			name, ok = strings.CutPrefix(arg, "--test.")
		}
		if !ok {
			continue
		}
		name, value, ok := strings.Cut(name, "=")
		if !ok && i+1 < len(args) {
			value = args[i+1]
		}
		flags[name] = value
	}
	return flags
}

// timeout is the time after which the guest is taken for hung: the test binary
// has then had time to notice and to print its stacks, and the go command,
// which waits for one more minute, has not yet lost patience.
func (t testFlags) timeout() time.Duration {
	d, err := time.ParseDuration(t["timeout"])
	switch {
	case err != nil:
		return defaultTimeout
	case d == 0:
		return 0
	}
	return d + 45*time.Second
}

// outputs are the files and directories that the test binary will write.
func (t testFlags) outputs() testOutputs {
	var out testOutputs
	for _, name := range []string{"coverprofile", "cpuprofile", "memprofile", "blockprofile", "mutexprofile", "trace", "testlogfile"} {
		path := t[name]
		if path == "" {
			continue
		}
		if dir := t["outputdir"]; dir != "" && !filepath.IsAbs(path) && name != "testlogfile" {
			path = filepath.Join(dir, path)
		}
		out.files = append(out.files, path)
	}
	if dir := t["gocoverdir"]; dir != "" {
		out.dirs = append(out.dirs, dir)
	}
	return out
}
