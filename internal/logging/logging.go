// Package logging is the log flags of every program, and the log they make.
package logging

import (
	"flag"
	"fmt"
	"io"
	"log/slog"
	"strconv"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Flags are the flags of every verb that logs.
type Flags struct {
	verbosity int
	format    string
}

// Add adds the flags.
func (l *Flags) Add(fs *flag.FlagSet) {
	fs.IntVar(&l.verbosity, "v", 0, "verbosity: 4 adds every probe and change of state, 5 every request (without secrets)")
	fs.StringVar(&l.format, "logging-format", "text", "text (klog's) or json")
}

// Logger returns the process's log. klog is behind it either way: what the
// Kubernetes libraries log comes out in the same place and form. ErrInvalid
// for an unknown format.
func (l *Flags) Logger(w io.Writer) (*slog.Logger, error) {
	switch l.format {
	case "text":
		fs := flag.NewFlagSet("klog", flag.ContinueOnError)
		klog.InitFlags(fs)
		for name, value := range map[string]string{"logtostderr": "false", "one_output": "true", "stderrthreshold": "FATAL", "v": strconv.Itoa(l.verbosity)} {
			if err := fs.Set(name, value); err != nil {
				return nil, fmt.Errorf("setting up klog: %w", err)
			}
		}
		klog.SetOutput(w)
		return slog.New(logr.ToSlogHandler(klog.Background())), nil
	case "json":
		log := slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: slog.Level(-l.verbosity)}))
		klog.SetSlogLogger(log)
		return log, nil
	}
	return nil, errdefs.Errorf(errdefs.ErrInvalid, "--logging-format %q: must be text or json", l.format)
}
