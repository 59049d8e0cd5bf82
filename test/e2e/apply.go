package main

import (
	"context"
	"fmt"
	"regexp"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// ourImage is the image of one of our programs, as manifests name it.
var ourImage = regexp.MustCompile(`("cryptcsi/(?:csi-plugin|key-service)):dev`)

// apply does what `kubectl apply --server-side -k` does, with fields that the
// API server does not know an error.
func (c *controlPlane) apply(ctx context.Context, dir string) error {
	return c.applyTagged(ctx, dir, "dev")
}

// applyTagged is apply with another tag at our images.
func (c *controlPlane) applyTagged(ctx context.Context, dir, tag string) error {
	built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		return err
	}
	groups, err := restmapper.GetAPIGroupResources(c.client.Discovery())
	if err != nil {
		return err
	}
	kinds := restmapper.NewDiscoveryRESTMapper(groups)
	for _, r := range built.Resources() {
		text, err := r.MarshalJSON()
		if err != nil {
			return err
		}
		text = ourImage.ReplaceAll(text, []byte("${1}:"+tag))
		o := &unstructured.Unstructured{}
		if err := o.UnmarshalJSON(text); err != nil {
			return err
		}
		if err := c.applyObject(ctx, kinds, o); err != nil {
			return fmt.Errorf("%s: %s %s: %w", dir, o.GetKind(), o.GetName(), err)
		}
	}
	return nil
}

func (c *controlPlane) applyObject(ctx context.Context, kinds meta.RESTMapper, o *unstructured.Unstructured) error {
	kind := o.GroupVersionKind()
	known, err := kinds.RESTMapping(kind.GroupKind(), kind.Version)
	if err != nil {
		return err
	}
	var to dynamic.ResourceInterface = c.dynamic.Resource(known.Resource)
	if known.Scope.Name() == meta.RESTScopeNameNamespace {
		namespace := o.GetNamespace()
		if namespace == "" {
			namespace = metav1.NamespaceDefault
		}
		to = c.dynamic.Resource(known.Resource).Namespace(namespace)
	}
	text, err := o.MarshalJSON()
	if err != nil {
		return err
	}
	_, err = to.Patch(ctx, o.GetName(), types.ApplyPatchType, text, metav1.PatchOptions{FieldManager: "e2e", FieldValidation: "Strict"})
	return err
}
