// Package kube talks to the API server: [Secrets] are a store, [Tokens] tell who
// is asking, [Attachments] which node may have which volume's DEK, [Notes] keep a
// header's floor on the PersistentVolume. On a node [Events] tell users what
// happens to their volumes, and [Node] whether there can be any. [Guard] keeps
// cryptcsi from being uninstalled while there are volumes.
//
// # Permissions
//
// Secrets, Events, Node and Guard say themselves what they need. The others need this and nothing else;
// without notes, neither patch nor, for a cluster that lists by watching
// (sendInitialEvents, Kubernetes 1.32 and later), any list but that of
// volumeattachments:
//
//	apiVersion: rbac.authorization.k8s.io/v1
//	kind: ClusterRole
//	metadata:
//	  name: cryptcsi-key-service
//	rules:
//	- apiGroups: [authentication.k8s.io]
//	  resources: [tokenreviews]
//	  verbs: [create]
//	- apiGroups: [storage.k8s.io]
//	  resources: [volumeattachments]
//	  verbs: [get, list, watch]
//	- apiGroups: [storage.k8s.io]
//	  resources: [csidrivers]
//	  verbs: [list, watch]
//	- apiGroups: [""]
//	  resources: [nodes]
//	  verbs: [get, list, watch]
//	- apiGroups: [""]
//	  resources: [persistentvolumes]
//	  verbs: [get, list, watch, patch]
//
// Whoever may write VolumeAttachments, PersistentVolumes or CSIDrivers decides
// who may have which key, and whoever may change annotations of
// PersistentVolumes can undo a note: no node and no pod but Kubernetes'
// controllers and the CSI sidecars has a need for either.
package kube

import (
	"errors"
	"io/fs"
	"os"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Config says how to reach the API server: as the kubeconfig file says, in the
// context of that name or its current one, or, where no file is given, as the
// pod does in which this runs. It reads files and calls nobody. A token file
// is read again when its content rotates.
func Config(kubeconfig, context string) (*rest.Config, error) {
	c, err := load(kubeconfig, context)
	if err != nil {
		return nil, err
	}
	if c.BearerTokenFile != "" {
		if _, err := os.Stat(c.BearerTokenFile); err != nil {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "the token for the API server: %w", err)
		}
	}
	c.UserAgent = "cryptcsi"
	c.QPS = -1 // the API server's own fairness limits us; a second limit here would only hide it
	c.WarningHandler = rest.NoWarnings{}
	return c, nil
}

func load(kubeconfig, context string) (*rest.Config, error) {
	if kubeconfig == "" {
		if context != "" {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "context %q without kubeconfig: contexts are named in such a file", context)
		}
		c, err := rest.InClusterConfig()
		if err != nil {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "this is no pod with a service account's token (%w): name a kubeconfig file", err)
		}
		return c, nil
	}
	rules := &clientcmd.ClientConfigLoadingRules{ExplicitPath: kubeconfig}
	overrides := &clientcmd.ConfigOverrides{CurrentContext: context}
	c, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, overrides).ClientConfig()
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission):
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "kubeconfig: %w", err)
	case err != nil:
		// Its text may quote the file, which holds credentials.
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "kubeconfig %s is not usable with context %q (\"\" is its current one): see kubectl config view", kubeconfig, context)
	}
	return c, nil
}
