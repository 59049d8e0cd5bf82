package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/driver"
)

// background is a volume with integrity that is in use long before all of it was
// written once.
func background() want {
	return want{name: "background", class: "encrypted-integrity", size: "2Gi", busy: true}
}

// initialises lets a volume lose its pod, and its plugin, while it is written in
// the background. A pod that writes keeps that from ending soon.
func (t *tester) initialises(ctx context.Context) (string, error) {
	if err := t.up(ctx, background()); err != nil {
		return "", err
	}
	if _, err := t.sh(ctx, "background", "echo '"+marker+"' > /data/file && sync"); err != nil {
		return "", err
	}
	var seen []string
	look := func(when string) error {
		far, err := t.hydrated(ctx, "background")
		seen = append(seen, when+" "+far)
		if err == nil && (far == "-") {
			err = fmt.Errorf("%s: it is not initialised in the background", when)
		}
		return err
	}
	err := errors.Join(look("at first"), t.returns(ctx, background()), look("after the pod's end"), t.killPlugin(ctx))
	if err == nil {
		err = errors.Join(t.installed(ctx, namespace, 3), t.reads(ctx, background()), look("after the plugin's end"))
	}
	return strings.Join(seen, ", "), err
}

// initialised waits until that has come to its end, and csi-plugin has said so.
func (t *tester) initialised(ctx context.Context) (string, error) {
	far, err := t.hydrated(ctx, "background")
	if err != nil {
		return "", err
	}
	if _, err := t.sh(ctx, "background", "touch /data/idle"); err != nil {
		return "", err
	}
	begin := time.Now()
	err = t.await(ctx, patience, "the end of initialising", func(ctx context.Context) error {
		far, err := t.hydrated(ctx, "background")
		if err == nil && far != "-" {
			err = errors.New("it is at " + far)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	took := time.Since(begin)
	said, err := t.says(ctx, "background", driver.ReasonInitialised, "all of the volume is initialised")
	return fmt.Sprintf("it was at %s, and at its end %.0f s later: %s", far, took.Seconds(), said), errors.Join(err, t.returns(ctx, background()))
}

// hydrated is how far the volume of a claim is initialised, as csi-plugin
// inspect shows it: "-" where nothing is left to do.
func (t *tester) hydrated(ctx context.Context, claim string) (string, error) {
	v, err := t.volume(ctx, claim)
	if err != nil {
		return "", err
	}
	table, err := t.kubectl(ctx, "exec", "-n", namespace, "daemonset/cryptcsi-node", "--", "csi-plugin", "inspect", "--headers=false")
	if err != nil {
		return "", err
	}
	column := -1
	for line := range strings.Lines(table) {
		fields := strings.Fields(line)
		for i, f := range fields {
			if f == "HYDRATED" {
				column = i
			}
		}
		if len(fields) > column && column >= 0 && fields[0] == v.Spec.CSI.VolumeHandle {
			if fields[column] == "-" {
				return "-", nil
			}
			return fields[column] + " %", nil
		}
	}
	return "", fmt.Errorf("csi-plugin inspect does not show %s:\n%s", v.Spec.CSI.VolumeHandle, table)
}
