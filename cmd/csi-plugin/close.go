package main

import (
	"context"
	"io"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
)

// closeDevice closes what open has opened. It needs no key and reads no disk.
func closeDevice(ctx context.Context, args []string, stderr io.Writer) error {
	fs := newFlags("close", stderr)
	name := fs.String("name", "", "name of the mapping (required)")
	worker := workerFlag(fs)
	if err := parse(fs, args); err != nil {
		return err
	}
	if err := chosenName("close", *name); err != nil {
		return err
	}
	m := cryptmapper.New(cryptmapper.Options{Worker: []string{*worker}})
	defer m.Shutdown()
	return m.Close(ctx, *name)
}
