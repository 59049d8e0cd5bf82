package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/kube"
)

// kubernetesFlags are what a node tells the API server; nothing where all are off.
type kubernetesFlags struct {
	events, condition bool
	taint, config     string
}

func (f *kubernetesFlags) add(fs *flag.FlagSet) {
	fs.BoolVar(&f.events, "kubernetes-events", false, "make events on PersistentVolumeClaims and pods: volumes that are refused, damaged or being initialised, keys that are out of reach")
	fs.StringVar(&f.taint, "startup-taint", "", "key of a taint that is removed from this node as soon as kubelet has registered the plugin, e.g. cryptcsi.io/agent-not-ready; needs --kubelet-registration-path")
	fs.BoolVar(&f.condition, "node-condition", false, "keep the condition "+string(kube.ConditionReady)+" of this node; needs --kubelet-registration-path")
	fs.StringVar(&f.config, "kubernetes-config", "", "kubeconfig file for the three before; empty for the pod's own service account")
}

// check finds what can be found without touching anything.
func (f *kubernetesFlags) check(registers bool) error {
	if (f.taint != "" || f.condition) && !registers {
		return usageError("node: --startup-taint and --node-condition need --kubelet-registration-path: only then it is known whether kubelet knows the plugin")
	}
	return nil
}

// A node that cannot be changed is tried again, for as long as the plugin runs.
const (
	nodeRetry   = 10 * time.Second
	nodeRefresh = 10 * time.Minute // of the condition, which others may have removed
	farewell    = 10 * time.Second // for the condition of a node that cannot serve
)

// cluster is what a node tells the API server.
type cluster struct {
	kubernetesFlags
	log    *slog.Logger
	shown  *kube.Events  // nil without --kubernetes-events
	node   *kube.Node    // nil without the others
	joined chan struct{} // closed when kubelet has registered the plugin
	join   sync.Once
}

func (f *kubernetesFlags) open(nodeName string, log *slog.Logger) (*cluster, error) {
	c := &cluster{kubernetesFlags: *f, log: log, joined: make(chan struct{})}
	if !f.events && !f.condition && f.taint == "" {
		return c, nil
	}
	config, err := kube.Config(f.config, "")
	if err != nil {
		return nil, err
	}
	if f.events {
		if c.shown, err = kube.NewEvents(config, nodeName, log); err != nil {
			return nil, err
		}
	}
	if f.condition || f.taint != "" {
		c.node, err = kube.NewNode(config, nodeName)
	}
	return c, err
}

// driverEvents returns what the driver tells, nil for nobody.
func (c *cluster) driverEvents() driver.Events {
	if c.shown == nil {
		return nil
	}
	return events{c.shown}
}

// events lets a driver tell kube.Events. The two packages do not know each other.
type events struct{ *kube.Events }

func (e events) Tell(told driver.Event) {
	event := kube.Event{Driver: told.Driver, VolumeID: told.VolumeID, Warning: told.Warning, Reason: told.Reason, Message: told.Message}
	for _, p := range told.Pods {
		event.Pods = append(event.Pods, kube.Pod(p))
	}
	e.Events.Tell(event)
}

// registered is called when kubelet has registered the plugin.
func (c *cluster) registered() { c.join.Do(func() { close(c.joined) }) }

// run tells the API server until ctx ends. What it cannot tell fails nothing.
func (c *cluster) run(ctx context.Context) {
	if c.shown != nil {
		defer background(func() { c.shown.Run(ctx) })()
	}
	if c.node == nil {
		return
	}
	select {
	case <-c.joined:
	case <-ctx.Done():
		return
	}
	for wait := nodeRetry; ; {
		err := c.ready(ctx)
		if err != nil {
			c.log.WarnContext(ctx, "the node is not shown as ready for encrypted volumes; this is tried again", "again_in", wait, "error", err)
		} else {
			wait = nodeRefresh
		}
		if err == nil && !c.condition {
			return
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// ready sets the condition and then removes the taint.
func (c *cluster) ready(ctx context.Context) error {
	if c.condition {
		if err := c.node.SetReady(ctx, true, "Serving", "csi-plugin is registered with kubelet"); err != nil {
			return err
		}
	}
	if c.taint == "" {
		return nil
	}
	removed, err := c.node.RemoveTaint(ctx, c.taint)
	if err == nil && removed {
		c.log.InfoContext(ctx, "removed the startup taint", "taint", c.taint)
	}
	return err
}

// unfit shows that no encrypted volume can be used on this node, and why. It
// returns the reason, with what became of that.
func (c *cluster) unfit(ctx context.Context, why error) error {
	if !c.condition {
		return why
	}
	ctx, cancel := context.WithTimeout(ctx, farewell)
	defer cancel()
	if err := c.node.SetReady(ctx, false, "NodeLacks", why.Error()); err != nil {
		return fmt.Errorf("%w (and the node's condition could not be set: %w)", why, err)
	}
	return why
}

// guardFlags are what the controller does at the API server; nothing without a name.
type guardFlags struct{ name, config string }

// open has the policy of that name kept while CSI is served.
func (g guardFlags) open(f *frontFlags, log *slog.Logger) error {
	if g.name == "" {
		return nil
	}
	config, err := kube.Config(g.config, "")
	if err != nil {
		return err
	}
	guard, err := kube.NewGuard(config, g.name, log)
	if err != nil {
		return err
	}
	f.beside = append(f.beside, func(ctx context.Context) error { guard.Run(ctx); return nil })
	return nil
}
