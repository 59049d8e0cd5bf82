package kube

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	storagev1client "k8s.io/client-go/kubernetes/typed/storage/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/flowcontrol"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// AttributeDEKID is the volume attribute by which a PersistentVolume names
// another DEK ID than "<driver>/<volumeHandle>", which then is not its own.
const AttributeDEKID = "cryptcsi.io/dek-id"

const (
	defaultStaleness = 2 * time.Minute
	minStaleness     = 8 * time.Second

	readTimeout  = 5 * time.Second // of asking the API server about one volume
	claimTimeout = 30 * time.Second
	listPage     = 500

	// Reads that the index could not answer, a second and at once. A node
	// stages its volumes all at once when it starts.
	nodeReads, nodeBurst = 5, 100
	allReads, allBurst   = 200, 1000
	claimReads           = 1
	claimBurst           = 5
	maxNodes             = 20000 // whose reads are counted
	maxFound             = 4096  // volumes that the index did not know
)

// AttachmentsOptions of Attachments. The zero value is good.
type AttachmentsOptions struct {
	// Staleness is how old what we know of the cluster may be. Beyond it,
	// every answer is ErrUnavailable. Where the API server goes away, answers
	// go on for a quarter of it at least. The whole cluster must be listed in
	// half of it. 0 is 2 minutes; at least 8 seconds.
	Staleness time.Duration
	// Attachers has, by the driver's name in PersistentVolumes, the attacher's
	// in VolumeAttachments where that is another.
	Attachers map[string]string
	// Now tells the time; nil is time.Now.
	Now func() time.Time
}

// Attachments knows which node may have which volume's DEK. It follows
// VolumeAttachments, PersistentVolumes, CSIDrivers and Nodes, of which it keeps
// some hundred bytes each, and answers from memory. Its methods may be called
// concurrently; until Run has heard from the API server all of them are
// ErrUnavailable.
//
// A node may have the DEK of a volume
//
//   - whose VolumeAttachment says that the volume is attached to that node, as
//     external-attacher reports before kubelet stages it, and which is not
//     being deleted. It names a PersistentVolume with that DEK ID, or has the
//     volume's driver and handle inline, as for a pod's in-tree volume that
//     Kubernetes migrated to CSI;
//   - or, where the CSIDriver says that attachRequired is false, if the
//     PersistentVolume is bound and has a node affinity that the Node's labels
//     satisfy. A kubelet may change most of its own Node's labels: such a rule
//     holds against a compromised node only over a label whose key begins with
//     node-restriction.kubernetes.io/, or over the field metadata.name.
//
// A PersistentVolume's DEK ID is "<driver>/<volumeHandle>", or what its volume
// attribute AttributeDEKID says: whoever may create PersistentVolumes can thus
// name any DEK. One that is not of kind CSI has none, also where Kubernetes
// migrates it.
//
// A yes is never older than Staleness, and usually some milliseconds. What
// memory denies is looked up once more in the API server, because an
// attachment may be seconds old.
type Attachments struct {
	attachers map[string]string
	staleness time.Duration
	now       func() time.Time

	attachments *table[attachment]
	volumes     *table[volume]
	drivers     *table[driver]
	nodes       *table[node]
	follow      []func(context.Context) // one for each table

	core    corev1client.CoreV1Interface // for single reads
	storage storagev1client.StorageV1Interface
	meta    metadata.Interface

	reads  singleflight.Group
	all    flowcontrol.RateLimiter
	claims flowcontrol.RateLimiter

	mu    sync.Mutex
	nodeR map[string]flowcontrol.RateLimiter
	found map[dek.ID]foundVolume
}

// foundVolume is a PersistentVolume that a read found and memory did not have.
type foundVolume struct {
	name  string
	until time.Time
}

// attachment is what is kept of a VolumeAttachment: where it stands between
// its node and a PersistentVolume, or a volume of its own.
type attachment struct {
	name, node, attacher string
	volume               string // PersistentVolume's name, or
	inline               *volume
	attached, deleting   bool
}

// volume is what is kept of a PersistentVolume.
type volume struct {
	name, driver, handle string
	id                   dek.ID
	bound                bool
	affinity             *corev1.NodeSelector
	note                 string // annotation
	noted                bool
}

type driver struct{ attach bool }

type node struct{ labels map[string]string }

// NewAttachments returns Attachments that know nothing until Run. It calls
// nobody.
func NewAttachments(config *rest.Config, o AttachmentsOptions) (*Attachments, error) {
	if o.Staleness == 0 {
		o.Staleness = defaultStaleness
	}
	if o.Staleness < minStaleness {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "a staleness of %v is too short for a watch: at least %v", o.Staleness, minStaleness)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	a := &Attachments{
		attachers: maps.Clone(o.Attachers), staleness: o.Staleness, now: o.Now,
		all:    flowcontrol.NewTokenBucketRateLimiter(allReads, allBurst),
		claims: flowcontrol.NewTokenBucketRateLimiter(claimReads, claimBurst),
		nodeR:  map[string]flowcontrol.RateLimiter{}, found: map[dek.ID]foundVolume{},
	}
	config = rest.CopyConfig(config)
	config.ContentType, config.AcceptContentTypes = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON
	if err := errors.Join(a.connect(config), a.makeTables(config)); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the API server's configuration: %w", err)
	}
	return a, nil
}

// connect makes the clients of single reads, whose answers are bounded.
func (a *Attachments) connect(config *rest.Config) (err error) {
	config = rest.CopyConfig(config)
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return bounded{next} })
	if a.core, err = corev1client.NewForConfig(config); err != nil {
		return err
	}
	if a.storage, err = storagev1client.NewForConfig(config); err != nil {
		return err
	}
	a.meta, err = metadata.NewForConfig(config)
	return err
}

// makeTables makes the tables and their clients: one client each, so that each
// knows its own age.
func (a *Attachments) makeTables(config *rest.Config) error {
	ages := []*age{newAge(a.staleness, a.now), newAge(a.staleness, a.now), newAge(a.staleness, a.now), newAge(a.staleness, a.now)}
	a.attachments = newTable("VolumeAttachments", ages[0], keepAttachment, attachment.key)
	a.volumes = newTable("PersistentVolumes", ages[1], keepVolume, func(v volume) string { return string(v.id) })
	a.drivers = newTable("CSIDrivers", ages[2], keepDriver, func(driver) string { return "" })
	a.nodes = newTable("Nodes", ages[3], keepNode, func(node) string { return "" })

	storage, err := storagev1client.NewForConfig(ages[0].config(config))
	if err != nil {
		return err
	}
	attachments := source(ages[0], storage.VolumeAttachments().List, storage.VolumeAttachments().Watch)
	core, err := corev1client.NewForConfig(ages[1].config(config))
	if err != nil {
		return err
	}
	volumes := source(ages[1], core.PersistentVolumes().List, core.PersistentVolumes().Watch)
	if storage, err = storagev1client.NewForConfig(ages[2].config(config)); err != nil {
		return err
	}
	drivers := source(ages[2], storage.CSIDrivers().List, storage.CSIDrivers().Watch)
	meta, err := metadata.NewForConfig(ages[3].config(config))
	if err != nil {
		return err
	}
	nodes := source(ages[3], meta.Resource(nodesResource()).List, meta.Resource(nodesResource()).Watch)
	a.follow = []func(context.Context){
		func(ctx context.Context) { a.attachments.follow(ctx, attachments, &storagev1.VolumeAttachment{}) },
		func(ctx context.Context) { a.volumes.follow(ctx, volumes, &corev1.PersistentVolume{}) },
		func(ctx context.Context) { a.drivers.follow(ctx, drivers, &storagev1.CSIDriver{}) },
		func(ctx context.Context) { a.nodes.follow(ctx, nodes, &metav1.PartialObjectMetadata{}) },
	}
	return nil
}

// Run follows the cluster until ctx is done. What goes wrong with that is
// logged by ctx's klog logger, and tried again after at most some seconds.
func (a *Attachments) Run(ctx context.Context) {
	var wg sync.WaitGroup
	for _, follow := range a.follow {
		wg.Go(func() { follow(ctx) })
	}
	wg.Wait()
}

// HasSynced says whether the whole cluster has been listed once.
func (a *Attachments) HasSynced() bool {
	for _, age := range []*age{a.attachments.age, a.volumes.age, a.drivers.age, a.nodes.age} {
		if _, ok := age.get(); !ok {
			return false
		}
	}
	return true
}

// Ready is nil while answers are given, else ErrUnavailable with the reason.
func (a *Attachments) Ready() error {
	for _, ready := range []func() error{a.attachments.ready, a.volumes.ready, a.drivers.ready, a.nodes.ready} {
		if err := ready(); err != nil {
			return err
		}
	}
	return nil
}

// Allowed is nil if a node may have a DEK. ErrDenied says why not, in words for
// the audit log and not for the node; ErrUnavailable that nobody knows now.
func (a *Attachments) Allowed(ctx context.Context, node string, id dek.ID) error {
	if node == "" || strings.Contains(node, " ") || id == "" {
		return errdefs.Errorf(errdefs.ErrDenied, "the caller is on no node that Kubernetes could have (%q), or names no DEK", node)
	}
	if err := a.Ready(); err != nil {
		return err
	}
	if a.remembered(node, id) == nil {
		return nil
	}
	if !a.mayRead(node) {
		return errdefs.Errorf(errdefs.ErrUnavailable, "node %s asked for too many DEKs that it may not have, as far as we know: call again later", node)
	}
	return a.once(ctx, readTimeout, "allowed", node, id, func(ctx context.Context) error { return a.read(ctx, node, id) })
}

// once does what all callers at a time ask for, for which nobody's ctx counts.
func (a *Attachments) once(ctx context.Context, timeout time.Duration, what, node string, id dek.ID, f func(context.Context) error) error {
	done := a.reads.DoChan(what+" "+node+" "+string(id), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
		defer cancel()
		return nil, f(ctx)
	})
	select {
	case r := <-done:
		return r.Err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// mayRead takes one read from what a node has, and from what all have.
func (a *Attachments) mayRead(node string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	limit, ok := a.nodeR[node]
	if !ok {
		if len(a.nodeR) >= maxNodes {
			clear(a.nodeR)
		}
		limit = flowcontrol.NewTokenBucketRateLimiter(nodeReads, nodeBurst)
		a.nodeR[node] = limit
	}
	return limit.TryAccept() && a.all.TryAccept()
}

// remembered decides by what we know.
func (a *Attachments) remembered(node string, id dek.ID) error {
	why := errNoVolume(id)
	for _, at := range a.attachments.under(inlineKey(node, id)) {
		if why = at.gives(a.attacher(at.inline.driver)); why == nil {
			return nil
		}
	}
	for _, v := range a.volumes.under(string(id)) {
		attached := a.attachments.under(attachedKey(node, v.name))
		for _, at := range attached {
			if why = at.gives(a.attacher(v.driver)); why == nil {
				return nil
			}
		}
		if len(attached) > 0 {
			continue
		}
		if a.needsAttach(v) {
			why = errNotAttached(node, v)
			continue
		}
		n, ok := a.nodes.get(node)
		if !ok {
			why = errNoNode(node)
		} else if why = v.reaches(node, n.labels); why == nil {
			return nil
		}
	}
	return why
}

// read decides by what the API server says now. The PersistentVolume of a
// driver without attach is found only if memory knows it.
func (a *Attachments) read(ctx context.Context, node string, id dek.ID) error {
	known := a.volumes.under(string(id))
	why := errNoVolume(id)
	if len(known) > 0 {
		why = errNotAttached(node, known[0])
	}
	for _, name := range a.attachmentNames(node, id, known) {
		got, err := a.storage.VolumeAttachments().Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return unasked("get volumeattachments", err)
		}
		at, _ := keepAttachment(got)
		v, err := a.readVolume(ctx, at)
		switch {
		case err != nil:
			return err
		case at.node != node || v.id != id:
			continue
		}
		if why = at.gives(a.attacher(v.driver)); why == nil {
			a.remember(id, at.volume)
			return nil
		}
	}
	for _, v := range known {
		if a.needsAttach(v) {
			continue
		}
		if why = a.readReach(ctx, node, v.name, id); why == nil || !errors.Is(why, errdefs.ErrDenied) {
			return why
		}
	}
	return why
}

// attachmentNames returns what the VolumeAttachments may be called that would
// give a node a DEK: Kubernetes makes the name from handle, attacher and node.
func (a *Attachments) attachmentNames(node string, id dek.ID, known []volume) []string {
	var names []string
	if name, handle, ok := strings.Cut(string(id), "/"); ok {
		known = append(slices.Clip(known), volume{driver: name, handle: handle})
	}
	for _, v := range known {
		sum := sha256.Sum256([]byte(v.handle + a.attacher(v.driver) + node))
		names = append(names, fmt.Sprintf("csi-%x", sum))
		for _, at := range a.attachments.under(attachedKey(node, v.name)) {
			names = append(names, at.name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// readVolume returns an attachment's volume, zero where there is none.
func (a *Attachments) readVolume(ctx context.Context, at attachment) (volume, error) {
	if at.inline != nil {
		return *at.inline, nil
	}
	pv, err := a.core.PersistentVolumes().Get(ctx, at.volume, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return volume{}, nil
	}
	if err != nil {
		return volume{}, unasked("get persistentvolumes", err)
	}
	v, _ := keepVolume(pv)
	return v, nil
}

func (a *Attachments) readReach(ctx context.Context, node, name string, id dek.ID) error {
	v, err := a.readVolume(ctx, attachment{volume: name})
	if err != nil {
		return err
	}
	if v.id != id {
		return errNoVolume(id)
	}
	n, err := a.meta.Resource(nodesResource()).Get(ctx, node, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return errNoNode(node)
	case err != nil:
		return unasked("get nodes", err)
	}
	return v.reaches(node, n.Labels)
}

// remember keeps the PersistentVolume of an ID that our index may not know yet.
func (a *Attachments) remember(id dek.ID, name string) {
	if name == "" || len(a.volumes.under(string(id))) > 0 {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.found) >= maxFound {
		maps.DeleteFunc(a.found, func(_ dek.ID, f foundVolume) bool { return f.until.Before(a.now()) })
	}
	if len(a.found) < maxFound {
		a.found[id] = foundVolume{name, a.now().Add(a.staleness)}
	}
}

// names returns the names of the PersistentVolumes with that ID.
func (a *Attachments) names(id dek.ID) []string {
	var names []string
	for _, v := range a.volumes.under(string(id)) {
		names = append(names, v.name)
	}
	if len(names) > 0 {
		return names
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if f, ok := a.found[id]; ok && a.now().Before(f.until) {
		return []string{f.name}
	}
	return nil
}

// StaleClaim says whether a node that has claimed a volume's format cannot be
// formatting it any more, because no VolumeAttachment, not even one that is
// being deleted, joins the two. It asks the API server, at most once a second
// (ErrUnavailable beyond). False where that proves nothing: no PersistentVolume
// has that DEK ID, or its driver has no attach.
func (a *Attachments) StaleClaim(ctx context.Context, node string, id dek.ID) (bool, error) {
	if err := a.Ready(); err != nil {
		return false, err
	}
	known := a.volumes.under(string(id))
	proves := len(known) > 0 && len(a.attachments.under(inlineKey(node, id))) == 0
	for _, v := range known {
		proves = proves && a.needsAttach(v) && len(a.attachments.under(attachedKey(node, v.name))) == 0
	}
	if !proves {
		return false, nil
	}
	if !a.claims.TryAccept() {
		return false, errdefs.Errorf(errdefs.ErrUnavailable, "too many claims are being checked: call again later")
	}
	err := a.once(ctx, claimTimeout, "claim", node, id, func(ctx context.Context) error { return a.noAttachment(ctx, node, id) })
	if errors.Is(err, errdefs.ErrConflict) {
		return false, nil
	}
	return err == nil, err
}

// noAttachment is ErrConflict if an attachment joins a node with that DEK ID,
// or with who knows what.
func (a *Attachments) noAttachment(ctx context.Context, node string, id dek.ID) error {
	options := metav1.ListOptions{Limit: listPage}
	for {
		page, err := a.storage.VolumeAttachments().List(ctx, options)
		if err != nil {
			return unasked("list volumeattachments", err)
		}
		for i := range page.Items {
			at, _ := keepAttachment(&page.Items[i])
			if at.node != node {
				continue
			}
			v, err := a.readVolume(ctx, at)
			if err != nil {
				return err
			}
			if v.id == id || v.name == "" && at.inline == nil {
				return errdefs.Errorf(errdefs.ErrConflict, "VolumeAttachment %s", at.name)
			}
		}
		if options.Continue = page.Continue; page.Continue == "" {
			return nil
		}
	}
}

// attacher returns the name that a driver has in VolumeAttachments.
func (a *Attachments) attacher(driver string) string {
	if name, ok := a.attachers[driver]; ok {
		return name
	}
	return driver
}

// needsAttach says whether a volume's driver attaches. As Kubernetes does, we
// take that for granted where there is no CSIDriver.
func (a *Attachments) needsAttach(v volume) bool {
	d, ok := a.drivers.get(v.driver)
	return !ok || d.attach
}

// gives is nil where an attachment gives its node the volume of a driver with
// that attacher.
func (at attachment) gives(attacher string) error {
	switch {
	case at.attacher != attacher:
		return errdefs.Errorf(errdefs.ErrDenied, "VolumeAttachment %s is of attacher %s, the volume's is %s", at.name, at.attacher, attacher)
	case at.deleting:
		return errdefs.Errorf(errdefs.ErrDenied, "VolumeAttachment %s is being deleted", at.name)
	case !at.attached:
		return errdefs.Errorf(errdefs.ErrDenied, "VolumeAttachment %s: the volume is not attached yet", at.name)
	}
	return nil
}

// reaches is nil where a volume without attach may be used on a node.
func (v volume) reaches(node string, labels map[string]string) error {
	switch {
	case !v.bound:
		return errdefs.Errorf(errdefs.ErrDenied, "PersistentVolume %s is not bound to a claim", v.name)
	case v.affinity == nil:
		return errdefs.Errorf(errdefs.ErrDenied, "PersistentVolume %s may be used on every node: driver %s has no attach, and the volume no node affinity; only a prefix policy can say who may have its key", v.name, v.driver)
	case !matches(v.affinity, node, labels):
		return errdefs.Errorf(errdefs.ErrDenied, "node %s does not satisfy the node affinity of PersistentVolume %s", node, v.name)
	}
	return nil
}

func errNoVolume(id dek.ID) error {
	return errdefs.Errorf(errdefs.ErrDenied, "no PersistentVolume or attached volume has DEK ID %.300q", id)
}

func errNotAttached(node string, v volume) error {
	return errdefs.Errorf(errdefs.ErrDenied, "no VolumeAttachment joins PersistentVolume %s and node %s", v.name, node)
}

func errNoNode(node string) error {
	return errdefs.Errorf(errdefs.ErrDenied, "there is no Node %s", node)
}

// unasked is ErrUnavailable for something that the API server did not answer.
// request is in the words of a ClusterRole.
func unasked(request string, err error) error {
	switch {
	case apierrors.IsUnauthorized(err):
		return errdefs.Errorf(errdefs.ErrUnavailable, "%s: the API server does not accept our own credentials: %w", request, err)
	case apierrors.IsForbidden(err):
		return errdefs.Errorf(errdefs.ErrUnavailable, "we may not %s: our ClusterRole or an admission policy has to allow it: %w", request, err)
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "%s: the API server cannot be asked: %w", request, err)
}

// key is under what an attachment is found: its node and its volume.
func (at attachment) key() string {
	switch {
	case at.inline != nil:
		return inlineKey(at.node, at.inline.id)
	case at.volume != "":
		return attachedKey(at.node, at.volume)
	}
	return ""
}

// Names of nodes and volumes and DEK IDs hold no space.
func attachedKey(node, volume string) string  { return node + " " + volume }
func inlineKey(node string, id dek.ID) string { return node + "  " + string(id) }

func keepAttachment(obj any) (attachment, bool) {
	va, ok := obj.(*storagev1.VolumeAttachment)
	if !ok {
		return attachment{}, false
	}
	at := attachment{
		name: va.Name, node: va.Spec.NodeName, attacher: va.Spec.Attacher,
		attached: va.Status.Attached, deleting: va.DeletionTimestamp != nil,
	}
	if source := va.Spec.Source; source.PersistentVolumeName != nil {
		at.volume = *source.PersistentVolumeName
	} else if source.InlineVolumeSpec != nil {
		v := newVolume("", source.InlineVolumeSpec)
		at.inline = &v
	}
	return at, true
}

// keepVolume keeps a PersistentVolume that has a DEK ID.
func keepVolume(obj any) (volume, bool) {
	pv, ok := obj.(*corev1.PersistentVolume)
	if !ok {
		return volume{}, false
	}
	v := newVolume(pv.Name, &pv.Spec)
	v.bound = pv.Status.Phase == corev1.VolumeBound
	v.note, v.noted = pv.Annotations[AnnotationFormatted]
	return v, v.id != ""
}

// newVolume has an empty ID where the volume can have no DEK of ours.
func newVolume(name string, spec *corev1.PersistentVolumeSpec) volume {
	v := volume{name: name}
	if spec.NodeAffinity != nil {
		v.affinity = spec.NodeAffinity.Required
	}
	csi := spec.CSI
	if csi == nil {
		return v
	}
	v.driver, v.handle = csi.Driver, csi.VolumeHandle
	id, err := dek.VolumeID(csi.Driver, csi.VolumeHandle)
	if other, ok := csi.VolumeAttributes[AttributeDEKID]; ok {
		id, err = dek.ParseID(other)
	}
	if err == nil && !id.Snapshot() {
		v.id = id
	}
	return v
}

func keepDriver(obj any) (driver, bool) {
	d, ok := obj.(*storagev1.CSIDriver)
	if !ok {
		return driver{}, false
	}
	return driver{attach: d.Spec.AttachRequired == nil || *d.Spec.AttachRequired}, true
}

func keepNode(obj any) (node, bool) {
	n, ok := obj.(*metav1.PartialObjectMetadata)
	if !ok {
		return node{}, false
	}
	return node{labels: n.Labels}, true
}

var _ cache.ReflectorStore = (*table[volume])(nil)
