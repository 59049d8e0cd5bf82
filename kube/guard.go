package kube

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	admissionclient "k8s.io/client-go/kubernetes/typed/admissionregistration/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// FinalizerVolumes keeps the policy against uninstalling while there are
// encrypted volumes.
const FinalizerVolumes = "cryptcsi.io/encrypted-volumes"

// AttributePrefix begins the volume attributes of an encrypted volume, and of no
// other.
const AttributePrefix = "cryptcsi.io/"

const (
	guardAge     = 10 * time.Minute // how old what Guard knows may be
	guardTimeout = 15 * time.Second // of one request
	guardRetry   = 10 * time.Second
	guardRefresh = 10 * time.Minute // of finalizers, which others may have removed
)

// Guard keeps a ValidatingAdmissionPolicy and its binding, both of one name, from
// being deleted: they have FinalizerVolumes while the binding denies and there is
// an encrypted volume, and lose it when there is none left or the binding denies no
// more. So they are deleted at once where nothing is in the way, whoever runs by
// then. An encrypted volume is a PersistentVolume with a volume attribute that begins
// with AttributePrefix, or with AnnotationFormatted. Several Guards do no harm to
// each other. It needs
//
//	rules:
//	- apiGroups: [""]
//	  resources: [persistentvolumes]
//	  verbs: [list, watch]
//	- apiGroups: [admissionregistration.k8s.io]
//	  resources: [validatingadmissionpolicybindings]
//	  resourceNames: [cryptcsi-uninstall]
//	  verbs: [get, list, watch, patch]
//	- apiGroups: [admissionregistration.k8s.io]
//	  resources: [validatingadmissionpolicies]
//	  resourceNames: [cryptcsi-uninstall]
//	  verbs: [get, patch]
type Guard struct {
	name     string
	log      *slog.Logger
	volumes  *table[struct{}] // the encrypted ones
	bindings *table[bool]     // of that name; whether it denies
	meta     metadata.Interface
	changed  chan struct{}
	follow   []func(context.Context)
}

// NewGuard returns a Guard of the policy and binding of that name that knows
// nothing until Run. It calls nobody.
func NewGuard(config *rest.Config, name string, log *slog.Logger) (*Guard, error) {
	g := &Guard{name: name, log: log, changed: make(chan struct{}, 1)}
	if err := g.connect(config); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the API server's configuration: %w", err)
	}
	return g, nil
}

func (g *Guard) connect(config *rest.Config) (err error) {
	config = rest.CopyConfig(config)
	config.ContentType, config.AcceptContentTypes = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON
	if g.meta, err = metadata.NewForConfig(config); err != nil {
		return err
	}
	ages := []*age{newAge(guardAge, time.Now), newAge(guardAge, time.Now)}
	core, err := corev1client.NewForConfig(ages[0].config(config))
	if err != nil {
		return err
	}
	admission, err := admissionclient.NewForConfig(ages[1].config(config))
	if err != nil {
		return err
	}
	g.volumes = newTable("PersistentVolumes", ages[0], keepEncrypted, func(struct{}) string { return "" })
	g.bindings = newTable("ValidatingAdmissionPolicyBindings", ages[1], keepDenies, func(bool) string { return "" })
	g.volumes.changed, g.bindings.changed = g.tell, g.tell
	volumes := source(ages[0], core.PersistentVolumes().List, core.PersistentVolumes().Watch)
	bindings := named(source(ages[1], admission.ValidatingAdmissionPolicyBindings().List, admission.ValidatingAdmissionPolicyBindings().Watch), g.name)
	g.follow = []func(context.Context){
		func(ctx context.Context) { g.volumes.follow(ctx, volumes, &corev1.PersistentVolume{}) },
		func(ctx context.Context) {
			g.bindings.follow(ctx, bindings, &admissionv1.ValidatingAdmissionPolicyBinding{})
		},
	}
	return nil
}

func keepEncrypted(obj any) (struct{}, bool) {
	pv, ok := obj.(*corev1.PersistentVolume)
	if !ok {
		return struct{}{}, false
	}
	if _, formatted := pv.Annotations[AnnotationFormatted]; formatted || pv.Spec.CSI == nil {
		return struct{}{}, formatted
	}
	for name := range pv.Spec.CSI.VolumeAttributes {
		if strings.HasPrefix(name, AttributePrefix) {
			return struct{}{}, true
		}
	}
	return struct{}{}, false
}

func keepDenies(obj any) (bool, bool) {
	b, ok := obj.(*admissionv1.ValidatingAdmissionPolicyBinding)
	return ok && slices.Contains(b.Spec.ValidationActions, admissionv1.Deny), ok
}

func (g *Guard) tell() {
	select {
	case g.changed <- struct{}{}:
	default: // somebody has, and nobody has looked yet
	}
}

// Run keeps the two until ctx ends. What goes wrong is logged and tried again.
func (g *Guard) Run(ctx context.Context) {
	var all sync.WaitGroup
	defer all.Wait()
	for _, follow := range g.follow {
		all.Go(func() { follow(ctx) })
	}
	for wait := guardRefresh; ; {
		select {
		case <-g.changed:
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		wait = guardRefresh
		if err := g.settle(ctx); err != nil && ctx.Err() == nil {
			wait = guardRetry
			g.log.WarnContext(ctx, "the policy against uninstalling is not kept as it should be; this is tried again", "policy", g.name, "again_in", wait, "error", err)
		}
	}
}

// settle gives both the finalizer, or takes it from both.
func (g *Guard) settle(ctx context.Context) error {
	if err := errors.Join(g.volumes.ready(), g.bindings.ready()); err != nil {
		return nil //nolint:nilerr // the next change, or the refresh, comes when they are
	}
	denies, _ := g.bindings.get(g.name)
	volumes := g.volumes.size()
	hold := denies && volumes > 0
	var errs []error
	// The binding first: without the policy the API server lets nobody change it who
	// may not list everything.
	for _, resource := range []string{"validatingadmissionpolicybindings", "validatingadmissionpolicies"} {
		done, err := settled(ctx, resource+" "+g.name, func() (bool, error) { return g.set(ctx, resource, hold) })
		if done {
			g.log.InfoContext(ctx, "the finalizer against uninstalling is set or taken away", "resource", resource, "name", g.name, "set", hold, "encrypted_volumes", volumes, "denies", denies)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// set is ErrConflict where the object was changed between reading and writing, and
// false where nothing is to be done.
func (g *Guard) set(ctx context.Context, resource string, hold bool) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, guardTimeout)
	defer cancel()
	objects := g.meta.Resource(schema.GroupVersionResource{Group: admissionv1.GroupName, Version: "v1", Resource: resource})
	o, err := objects.Get(ctx, g.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, asked(ctx, "get "+resource, err)
	}
	held := slices.Contains(o.Finalizers, FinalizerVolumes)
	if held == hold || hold && o.DeletionTimestamp != nil { // which can be given none any more
		return false, nil
	}
	finalizers := slices.DeleteFunc(slices.Clone(o.Finalizers), func(f string) bool { return f == FinalizerVolumes })
	if hold {
		finalizers = append(finalizers, FinalizerVolumes)
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": o.UID, "resourceVersion": o.ResourceVersion, "finalizers": finalizers, // only if it still is that
	}})
	if err != nil {
		return false, err
	}
	_, err = objects.Patch(ctx, g.name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: ManagedBy})
	switch {
	case apierrors.IsConflict(err):
		return false, errdefs.Errorf(errdefs.ErrConflict, "%s %s was changed", resource, g.name)
	case apierrors.IsNotFound(err):
		return false, nil
	case err != nil:
		return false, asked(ctx, "patch "+resource, err)
	}
	return true, nil
}
