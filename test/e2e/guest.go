package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// guest is the node's machine.
type guest struct {
	plane *controlPlane
	taint string // what the node joins with, or nothing
	vm    *process
}

// boot starts the machine.
func (g *guest) boot() error {
	s := g.plane.site
	vm, err := start(s.logs(), "guest", filepath.Join(s.bin, "vm"), "-mem=4G", "-timeout=0", "-tap="+tapDevice, "-rw="+s.dir, "-disk="+s.path(diskFile),
		"--", filepath.Join(s.bin, "e2e"), "node", s.dir, g.taint)
	if err != nil {
		return err
	}
	g.vm = vm
	return nil
}

// ready waits until the node is Ready and has said so since a moment.
func (g *guest) ready(ctx context.Context, since time.Time) error {
	c := g.plane
	return c.await(ctx, 3*time.Minute, "the node", func(ctx context.Context) error {
		if err := g.vm.failed(); err != nil {
			return err
		}
		n, err := c.client.CoreV1().Nodes().Get(ctx, nodeName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, condition := range n.Status.Conditions {
			if condition.Type != corev1.NodeReady {
				continue
			}
			if condition.Status == corev1.ConditionTrue && !condition.LastHeartbeatTime.Time.Before(since.Truncate(time.Second)) {
				return nil
			}
			return fmt.Errorf("%s since %v: %s", condition.Status, condition.LastHeartbeatTime, condition.Message)
		}
		return errors.New("no condition Ready")
	})
}

// crash ends the machine as a power cut does. What its kernel had not written
// is lost; the Node object stays.
func (g *guest) crash() { g.vm.stop() }
