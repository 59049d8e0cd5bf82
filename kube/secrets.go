package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

const (
	// SecretType of every Secret that holds an object. Kubernetes lets nobody
	// change the type of a Secret.
	SecretType = "cryptcsi.io/record"
	// SecretKey is its one key, which holds the object's bytes.
	SecretKey = "record"
	// LabelManagedBy is a label of each, whose value is ManagedBy.
	LabelManagedBy = "app.kubernetes.io/managed-by"
	// LabelStore is another, whose value is the store's prefix without a '-'
	// or '.' at its end.
	LabelStore = "cryptcsi.io/store"
	// ManagedBy is what LabelManagedBy says.
	ManagedBy = "cryptcsi"

	maxObject = 64 << 10 // bytes
	maxPrefix = 63       // bytes, for a label has to hold it
	maxPage   = 500      // names in one page
	maxAnswer = 32 << 20 // bytes that we read of one answer
)

// Secrets is a store of small objects (of records, see envelope.Store, whose
// contract it keeps) in the Secrets of one namespace: one Secret each, which
// anybody can look at with
//
//	kubectl get secrets -n NAMESPACE -l app.kubernetes.io/managed-by=cryptcsi
//
// A Secret is ours if it has our type and our labels. One that has an object's
// name and is not ours is never changed (ErrState). Others may annotate and
// label ours; that stays when an object is replaced.
//
// Every read asks etcd's quorum, so what one process has written another reads
// at once. A version is the Secret's UID and resourceVersion. Kubernetes keeps
// no history that a client could read; etcd forgets old revisions within
// minutes (API server's --etcd-compaction-interval), backups of etcd do not.
//
// Permissions: a Role in the namespace with the verbs create, get, list, update
// and delete on secrets, and get on namespaces, which tells an object that is
// not there from a namespace that is not there. Whoever may read Secrets there
// reads wrapped keys, whoever may delete them destroys volumes: give the store
// a namespace of its own.
type Secrets struct {
	namespace, prefix string

	secrets    corev1client.SecretInterface
	metadata   metadata.ResourceInterface // of Secrets: lists without their data
	namespaces corev1client.NamespaceInterface
}

// NewSecrets returns the store of a namespace whose Secrets have prefix and
// object name as their name. It calls nobody.
func NewSecrets(config *rest.Config, namespace, prefix string) (*Secrets, error) {
	if !dnsName(namespace, "-") || len(namespace) > 63 {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "namespace %q: must be 1 to 63 lower-case letters, digits and '-', the first and the last no '-'", namespace)
	}
	if err := checkPrefix(prefix); err != nil {
		return nil, err
	}
	config = rest.CopyConfig(config)
	config.ContentType, config.AcceptContentTypes = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return bounded{next} })
	core, err := corev1client.NewForConfig(config)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the API server's configuration: %w", err)
	}
	meta, err := metadata.NewForConfig(config)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the API server's configuration: %w", err)
	}
	return &Secrets{
		namespace: namespace, prefix: prefix,
		secrets:    core.Secrets(namespace),
		metadata:   meta.Resource(corev1.SchemeGroupVersion.WithResource("secrets")).Namespace(namespace),
		namespaces: core.Namespaces(),
	}, nil
}

// Create makes a new object; ErrExists where there is one, ErrState where a
// Secret that is not ours has its name.
func (s *Secrets) Create(ctx context.Context, name string, data []byte) error {
	if err := checkWrite(name, data); err != nil {
		return err
	}
	_, err := s.secrets.Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: s.prefix + name, Labels: s.labels()},
		Type:       SecretType,
		Data:       map[string][]byte{SecretKey: data},
	}, metav1.CreateOptions{})
	if !apierrors.IsAlreadyExists(err) {
		return s.fail(ctx, "create secrets", err)
	}
	if _, err := s.get(ctx, name); errors.Is(err, errdefs.ErrState) {
		return err
	}
	return errdefs.Errorf(errdefs.ErrExists, "Secret %s/%s exists", s.namespace, s.prefix+name)
}

// Read returns an object and its version; ErrNotFound where there is none.
func (s *Secrets) Read(ctx context.Context, name string) ([]byte, string, error) {
	secret, err := s.get(ctx, name)
	if err != nil {
		return nil, "", err
	}
	data, ok := secret.Data[SecretKey]
	switch {
	case !ok || len(secret.Data) != 1:
		return nil, "", errdefs.Errorf(errdefs.ErrCorrupt, "Secret %s/%s has %d data keys, must have the one key %q: somebody changed it",
			s.namespace, secret.Name, len(secret.Data), SecretKey)
	case len(data) > maxObject:
		return nil, "", errdefs.Errorf(errdefs.ErrCorrupt, "Secret %s/%s holds %d bytes, at most %d: it is no record", s.namespace, secret.Name, len(data), maxObject)
	}
	return data, version(secret), nil
}

// Replace changes the object if it is still that version, else ErrConflict.
func (s *Secrets) Replace(ctx context.Context, name string, data []byte, old string) error {
	if err := checkWrite(name, data); err != nil {
		return err
	}
	// Read first: the Secret may carry labels and annotations of others.
	secret, err := s.get(ctx, name)
	if errors.Is(err, errdefs.ErrNotFound) || err == nil && version(secret) != old {
		return errChanged()
	}
	if err != nil {
		return err
	}
	secret.Data = map[string][]byte{SecretKey: data}
	_, err = s.secrets.Update(ctx, secret, metav1.UpdateOptions{}) // with its UID and resourceVersion
	return s.changed(s.fail(ctx, "update secrets", err))
}

// Delete removes the object under the condition of Replace.
func (s *Secrets) Delete(ctx context.Context, name, old string) error {
	if err := checkName(name); err != nil {
		return err
	}
	uid, revision, ok := strings.Cut(old, "/")
	if !ok || uid == "" || revision == "" {
		return errChanged() // and never a request without a condition
	}
	err := s.secrets.Delete(ctx, s.prefix+name, metav1.DeleteOptions{
		Preconditions: &metav1.Preconditions{UID: (*types.UID)(&uid), ResourceVersion: &revision},
	})
	return s.changed(s.fail(ctx, "delete secrets", err))
}

// List returns up to limit names (and at most 500) in ascending order and the
// token of the next page. Where a token is older than what etcd remembers, the
// listing goes on after the last name in the state of now.
func (s *Secrets) List(ctx context.Context, token string, limit int) ([]string, string, error) {
	options := metav1.ListOptions{
		LabelSelector: labels.SelectorFromSet(s.labels()).String(),
		Limit:         int64(min(max(limit, 1), maxPage)),
		Continue:      token,
	}
	page, err := s.metadata.List(ctx, options)
	if status := apierrors.APIStatus(nil); apierrors.IsResourceExpired(err) && errors.As(err, &status) && status.Status().Continue != "" {
		options.Continue = status.Status().Continue
		page, err = s.metadata.List(ctx, options)
	}
	if err != nil {
		return nil, "", s.fail(ctx, "list secrets", err)
	}
	if len(page.Items) == 0 && token == "" {
		return nil, page.Continue, s.checkNamespace(ctx)
	}
	var names []string
	for _, item := range page.Items {
		if name, ok := strings.CutPrefix(item.Name, s.prefix); ok && checkName(name) == nil {
			names = append(names, name)
		}
	}
	slices.Sort(names) // as etcd has them
	return names, page.Continue, nil
}

// Make makes the namespace.
func (s *Secrets) Make(ctx context.Context) error {
	_, err := s.namespaces.Create(ctx, &corev1.Namespace{
		ObjectMeta: metav1.ObjectMeta{Name: s.namespace, Labels: map[string]string{LabelManagedBy: ManagedBy}},
	}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return s.fail(ctx, "create namespaces", err)
}

// Permissions returns, by operation, verbs and resources as a Role has them.
func (s *Secrets) Permissions() map[string]string {
	return map[string]string{
		"create":  "create secrets",
		"read":    "get secrets, get namespaces",
		"replace": "get secrets, update secrets",
		"delete":  "delete secrets",
		"list":    "list secrets, get namespaces",
		"make":    "create namespaces",
	}
}

// get returns an object's Secret if it is ours. Without a resourceVersion the
// API server asks etcd's quorum and not its cache.
func (s *Secrets) get(ctx context.Context, name string) (*corev1.Secret, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	secret, err := s.secrets.Get(ctx, s.prefix+name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		if err := s.checkNamespace(ctx); err != nil {
			return nil, err
		}
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "there is no Secret %s/%s", s.namespace, s.prefix+name)
	}
	if err != nil {
		return nil, s.fail(ctx, "get secrets", err)
	}
	if secret.Type != SecretType {
		return nil, errdefs.Errorf(errdefs.ErrState, "Secret %s/%s is of type %q and not ours: it is left alone; rename it, or give the store a namespace or a prefix of its own",
			s.namespace, secret.Name, secret.Type)
	}
	for key, want := range s.labels() {
		if got, ok := secret.Labels[key]; !ok || got != want {
			return nil, errdefs.Errorf(errdefs.ErrState, "Secret %s/%s has the label %s=%q, must be %q: somebody changed it, or another store uses this name; put the label back if it is this store's",
				s.namespace, secret.Name, key, got, want)
		}
	}
	return secret, nil
}

// checkNamespace is asked where nothing was found: in a namespace that does
// not exist that would be a wrong answer. Where we may not see the namespace,
// or cannot ask now, it is the API server's answer that counts.
func (s *Secrets) checkNamespace(ctx context.Context) error {
	_, err := s.namespaces.Get(ctx, s.namespace, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return s.errNoNamespace()
	case apierrors.IsForbidden(err):
		return nil
	}
	return s.fail(ctx, "get namespaces", err)
}

func (s *Secrets) errNoNamespace() error {
	return errdefs.Errorf(errdefs.ErrState, "there is no namespace %s: make it, or correct its name in the store's URI", s.namespace)
}

// fail gives an error its class. request is what the API server was asked for,
// in the words of a Role.
func (s *Secrets) fail(ctx context.Context, request string, err error) error {
	status := apierrors.APIStatus(nil)
	switch {
	case err == nil:
		return nil
	case apierrors.IsNotFound(err) && errors.As(err, &status) && status.Status().Details != nil && status.Status().Details.Kind == "namespaces":
		return s.errNoNamespace()
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return errdefs.Errorf(errdefs.ErrState, "namespace %s is being deleted, and every key in it", s.namespace)
	case apierrors.IsUnauthorized(err):
		return errdefs.Errorf(errdefs.ErrDenied, "%s in namespace %s: the API server does not accept our credentials (from the pod's service account or the kubeconfig file): %w",
			request, s.namespace, err)
	case apierrors.IsForbidden(err):
		return errdefs.Errorf(errdefs.ErrDenied, "we may not %s in namespace %s: a Role or an admission policy has to allow it: %w", request, s.namespace, err)
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err), apierrors.IsRequestEntityTooLargeError(err):
		return errdefs.Errorf(errdefs.ErrInvalid, "%s in namespace %s: %w", request, s.namespace, err)
	case apierrors.IsNotFound(err):
		return errdefs.Errorf(errdefs.ErrNotFound, "%s in namespace %s: %w", request, s.namespace, err)
	case apierrors.IsConflict(err):
		return errdefs.Errorf(errdefs.ErrConflict, "%s in namespace %s: %w", request, s.namespace, err)
	case ctx.Err() != nil:
		return fmt.Errorf("%s in namespace %s: %w", request, s.namespace, ctx.Err())
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "%s in namespace %s: the API server cannot be asked: %w", request, s.namespace, err)
}

// changed is what a conditional write says where the object is gone: that it
// is not the version it was to be.
func (s *Secrets) changed(err error) error {
	if errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, errdefs.ErrConflict) {
		return errChanged()
	}
	return err
}

func (s *Secrets) labels() labels.Set {
	return labels.Set{LabelManagedBy: ManagedBy, LabelStore: strings.TrimRight(s.prefix, "-.")}
}

// version of a Secret: neither a later state nor a later Secret of the same
// name has the same.
func version(secret *corev1.Secret) string {
	return string(secret.UID) + "/" + secret.ResourceVersion
}

func errChanged() error {
	return errdefs.Errorf(errdefs.ErrConflict, "the Secret was changed or deleted by someone else")
}

// checkName keeps to the names of envelope.Store, less one: a Secret's name
// ends with a letter or a digit.
func checkName(name string) error {
	if len(name) > 100 || !dnsName(name, "-") || name[0] < 'a' {
		return errdefs.Errorf(errdefs.ErrInvalid, "object name %q: must be 1 to 100 lower-case letters, digits and '-', the first a letter, the last no '-'", name)
	}
	return nil
}

// checkPrefix keeps to what a Secret's name and a label's value can begin with.
func checkPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	parts := strings.Split(prefix, ".")
	if last := len(parts) - 1; last > 0 && parts[last] == "" {
		parts = parts[:last]
	} else {
		parts[last] = strings.TrimRight(parts[last], "-")
	}
	for _, part := range parts {
		if !dnsName(part, "-") || len(prefix) > maxPrefix {
			return errdefs.Errorf(errdefs.ErrInvalid, "prefix %q: must be at most %d lower-case letters, digits, '-' and '.', the first no '-', none beside a '.'", prefix, maxPrefix)
		}
	}
	return nil
}

func checkWrite(name string, data []byte) error {
	if len(data) > maxObject {
		return errdefs.Errorf(errdefs.ErrInvalid, "object of %d bytes: at most %d", len(data), maxObject)
	}
	return checkName(name)
}

// dnsName says whether s is made of lower-case letters, digits and, except at
// its ends, the characters between. It is not empty.
func dnsName(s, between string) bool {
	return s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789"+between) == "" &&
		!strings.ContainsRune(between, rune(s[0])) && !strings.ContainsRune(between, rune(s[len(s)-1]))
}

// bounded reads no more of an answer than maxAnswer bytes.
type bounded struct{ next http.RoundTripper }

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(r)
	if err == nil {
		resp.Body = http.MaxBytesReader(nil, resp.Body, maxAnswer)
	}
	return resp, err
}

// WrappedRoundTripper lets client-go find the transport.
func (b bounded) WrappedRoundTripper() http.RoundTripper { return b.next }
