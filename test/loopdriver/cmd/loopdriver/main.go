// Command loopdriver serves package loopdriver on a unix socket: a CSI driver
// for demos and tests, never for production.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"k8s.io/klog/v2"

	"github.com/cryptcsi/cryptcsi/test/loopdriver"
)

const usage = `loopdriver is a CSI driver for block volumes on sparse files and loop devices.
It is for demos and tests, NEVER FOR PRODUCTION: one machine, one directory, no redundancy.

Usage: loopdriver --data-dir DIR --node-id ID [flags]

Faults are given by --fault, which may be repeated, and at run time by a JSON
array of them in DIR/faults.json (replace that file by a rename: it is read at
each RPC). VOLUME is a volume's ID or name; without it all are hit. With #n
only the n-th call is hit.

  slow:RPC[#n]=2s               wait before the work
  error:RPC[#n]=UNAVAILABLE     fail before doing anything
  error-after:RPC[#n]=INTERNAL  do the work, then fail
  stale-device[:VOLUME]         hand out another volume's device
  blank-device[:VOLUME]         block publish shows a device full of zeros
  stack-publish[:VOLUME]        mount again at each NodePublishVolume
  no-grow[:VOLUME]              report growth that did not happen
  ignore-block[:VOLUME]         publish a directory instead of a device
  late-growth[:VOLUME]          an attached device grows at NodeExpandVolume only
  picky-expand[:VOLUME]         NodeExpandVolume wants all that it can be given
  one-mount[:VOLUME]            publish a device once and never read-only
  forgetful                     NOT_FOUND where nothing is published or staged
  format-early[:VOLUME]         CreateVolume makes the filesystem
  short-name[:VOLUME]           stage /dev/NAME only, of letters and digits
  round-down[:VOLUME]           have whole GiB and answer with what was asked for

Flags:
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stderr))
}

func run(ctx context.Context, args []string, stderr io.Writer) int {
	var cfg loopdriver.Config
	hostname, _ := os.Hostname()
	flags := flag.NewFlagSet("loopdriver", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() { fmt.Fprint(stderr, usage); flags.PrintDefaults() }
	endpoint := flags.String("endpoint", "unix:///csi/csi.sock", "socket to serve on")
	attach := flags.Bool("attach", true, "attach at ControllerPublishVolume; false: on the node, with no such method")
	expansion := flags.String("node-expansion-required", string(loopdriver.ExpandAlways), "what ControllerExpandVolume answers: always, mount (not for block volumes) or never")
	verbose := flags.Bool("verbose", false, "log the methods that are called all the time, too")
	flags.StringVar(&cfg.Name, "driver-name", loopdriver.DefaultName, "name of the driver")
	like := flags.String("like", "", "behave as the driver of this name is known to; its habits come before other flags'")
	flags.StringVar(&cfg.DataDir, "data-dir", "", "directory for volumes and state; required")
	flags.StringVar(&cfg.NodeID, "node-id", hostname, "this node's ID")
	flags.IntVar(&cfg.MaxVolumes, "max-volumes", 128, "how many volumes may be attached at once")
	flags.Int64Var(&cfg.TotalBytes, "total-bytes", 1<<40, "how much all volumes together may promise, in bytes")
	flags.BoolVar(&cfg.NoStage, "no-stage", false, "have no NodeStageVolume: do all at NodePublishVolume")
	flags.BoolVar(&cfg.FixedType, "fixed-type", false, "decide at CreateVolume whether a volume is a block device")
	flags.BoolVar(&cfg.SingleWriter, "single-writer", false, "know the access mode SINGLE_NODE_WRITER alone")
	flags.Func("fault", "a fault to inject; may be repeated", func(s string) error {
		cfg.Faults = append(cfg.Faults, s)
		return nil
	})
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "loopdriver: unexpected argument %s\n", strings.Join(flags.Args(), " "))
		return 2
	}
	cfg.NoAttach, cfg.NodeExpansion = !*attach, loopdriver.NodeExpansion(*expansion)
	if *like != "" {
		var known bool
		if cfg, known = loopdriver.Like(*like, cfg); !known {
			fmt.Fprintf(stderr, "loopdriver: --like %s: nothing is known of it\n", *like)
			return 2
		}
	}
	level := slog.LevelInfo
	if *verbose {
		level = slog.LevelDebug
	}
	cfg.Log = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	klog.SetSlogLogger(cfg.Log) // what mount-utils says

	if err := serve(ctx, cfg, *endpoint); err != nil {
		cfg.Log.Error("loopdriver stops", "error", err)
		return 1
	}
	return 0
}

func serve(ctx context.Context, cfg loopdriver.Config, endpoint string) error {
	d, err := loopdriver.New(cfg)
	if err != nil {
		return err
	}
	defer d.Close()
	l, err := loopdriver.Listen(endpoint)
	if err != nil {
		return err
	}
	cfg.Log.Info("serving; this driver is for demos and tests, never for production", "driver", cfg.Name, "endpoint", endpoint, "data_dir", cfg.DataDir)
	return d.Serve(ctx, l)
}
