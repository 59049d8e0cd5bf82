package main

import (
	"flag"
	"fmt"
	"io"
	"log/slog"
	"strconv"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"
)

// logFlags are the flags of every verb that logs.
type logFlags struct {
	verbosity int
	format    string
}

func (l *logFlags) add(fs *flag.FlagSet) {
	fs.IntVar(&l.verbosity, "v", 0, "verbosity: 4 adds every probe and change of state, 5 every request (without secrets)")
	fs.StringVar(&l.format, "logging-format", "text", "text (klog's) or json")
}

// logger returns the process's log. klog is behind it either way: what the
// Kubernetes libraries log comes out in the same place and form.
func (l *logFlags) logger(w io.Writer) (*slog.Logger, error) {
	switch l.format {
	case "text":
		fs := flag.NewFlagSet("klog", flag.ContinueOnError)
		klog.InitFlags(fs)
		for name, value := range map[string]string{"logtostderr": "false", "stderrthreshold": "FATAL", "v": strconv.Itoa(l.verbosity)} {
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
	return nil, usageError(fmt.Sprintf("--logging-format %q: must be text or json", l.format))
}
