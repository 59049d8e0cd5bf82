package kube

import (
	"context"
	"errors"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Files is one Secret or ConfigMap as the folder of files that a pod mounts. It
// is made by others, empty: who fills it needs get and update for that name
// alone. Not for concurrent use.
type Files struct {
	what   string // for messages
	secret *corev1.Secret
	config *corev1.ConfigMap
	client corev1client.CoreV1Interface
}

// ReadSecret reads a Secret. ErrNotFound where it does not exist.
func ReadSecret(ctx context.Context, c *rest.Config, namespace, name string) (*Files, error) {
	f := &Files{what: "Secret " + namespace + "/" + name}
	return f, f.read(ctx, c, func() (err error) {
		f.secret, err = f.client.Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
		return err
	})
}

// ReadConfigMap reads a ConfigMap. ErrNotFound where it does not exist.
func ReadConfigMap(ctx context.Context, c *rest.Config, namespace, name string) (*Files, error) {
	f := &Files{what: "ConfigMap " + namespace + "/" + name}
	return f, f.read(ctx, c, func() (err error) {
		f.config, err = f.client.ConfigMaps(namespace).Get(ctx, name, metav1.GetOptions{})
		return err
	})
}

func (f *Files) read(ctx context.Context, c *rest.Config, get func() error) error {
	client, err := corev1client.NewForConfig(c)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "the API server's address or credentials: %w", err)
	}
	f.client = client
	return f.fail(ctx, "reading", get())
}

// Get returns a file's content, nil where there is none. It is not to be
// changed, and a Secret's is wiped by Wipe.
func (f *Files) Get(name string) []byte {
	if f.config != nil {
		return []byte(f.config.Data[name])
	}
	return f.secret.Data[name]
}

// Empty says that there are no files.
func (f *Files) Empty() bool {
	if f.config != nil {
		return len(f.config.Data) == 0 && len(f.config.BinaryData) == 0
	}
	return len(f.secret.Data) == 0
}

// Put writes files beside those that others have, and leaves them. ErrConflict
// where somebody changed the object since it was read; then nothing is written.
// Files that are there as they are to be take no call.
func (f *Files) Put(ctx context.Context, files map[string][]byte) error {
	same := func(name string) bool { return string(f.Get(name)) == string(files[name]) }
	if !slices.ContainsFunc(slices.Collect(maps.Keys(files)), func(name string) bool { return !same(name) }) {
		return nil
	}
	var err error
	if f.config != nil {
		next := f.config.DeepCopy()
		if next.Data == nil {
			next.Data = map[string]string{}
		}
		for name, content := range files {
			next.Data[name] = string(content)
		}
		next, err = f.client.ConfigMaps(next.Namespace).Update(ctx, next, metav1.UpdateOptions{})
		if err == nil {
			f.config = next
		}
		return f.fail(ctx, "writing", err)
	}
	next := f.secret.DeepCopy()
	if next.Data == nil {
		next.Data = map[string][]byte{}
	}
	maps.Copy(next.Data, files)
	next, err = f.client.Secrets(next.Namespace).Update(ctx, next, metav1.UpdateOptions{})
	if err == nil {
		f.secret = next
	}
	return f.fail(ctx, "writing", err)
}

// Wipe overwrites a Secret's content, as far as it can be reached: what
// encoding it left in memory stays there.
func (f *Files) Wipe() {
	if f.secret != nil {
		for _, content := range f.secret.Data {
			clear(content)
		}
	}
}

func (f *Files) fail(ctx context.Context, doing string, err error) error {
	class := errdefs.ErrUnavailable
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return errors.Join(ctx.Err(), err)
	case apierrors.IsNotFound(err):
		class = errdefs.ErrNotFound
	case apierrors.IsConflict(err):
		class = errdefs.ErrConflict
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		class = errdefs.ErrDenied
	case apierrors.IsInvalid(err), apierrors.IsRequestEntityTooLargeError(err):
		class = errdefs.ErrInvalid
	}
	return errdefs.Errorf(class, "%s %s: %w", doing, f.what, err)
}
