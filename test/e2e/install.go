package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	namespace  = "cryptcsi"
	records    = "cryptcsi-keys"
	driverName = "loop.encrypted.example.com"
)

// installVendor installs what a cluster has before cryptcsi comes: a driver, and
// the snapshot controller.
func (c *controlPlane) installVendor(ctx context.Context) error {
	// A pod of nobody needs it, and the controller manager makes it when it has begun.
	err := c.await(ctx, time.Minute, "the service account of kube-system", func(ctx context.Context) error {
		_, err := c.client.CoreV1().ServiceAccounts(metav1.NamespaceSystem).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	if err != nil {
		return err
	}
	tools := filepath.Dir(filepath.Dir(c.site.kub))
	crds := filepath.Join(tools, "snapshot-crds")
	if err := c.apply(ctx, crds); err != nil {
		return err
	}
	err = c.await(ctx, time.Minute, "the snapshot controller's kinds", func(context.Context) error {
		_, err := c.client.Discovery().ServerResourcesForGroupVersion("snapshot.storage.k8s.io/v1")
		return err
	})
	return errors.Join(err, c.apply(ctx, filepath.Join(tools, "snapshot-controller")), c.apply(ctx, c.site.source("test/e2e/vendor")))
}

// source is a folder of this repository.
func (s site) source(name string) string { return filepath.Join(s.bin, "..", name) }

// install does what docs/install.md says.
func (c *controlPlane) install(ctx context.Context) error {
	return c.apply(ctx, c.site.source("test/e2e/cluster"))
}

// installPrevious installs the build before this one, for which certificate and
// master secret are made by hand.
func (c *controlPlane) installPrevious(ctx context.Context) error {
	create := metav1.CreateOptions{}
	if _, err := c.client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, create); err != nil {
		return err
	}
	cert, key, err := c.ca.issue("key-service", "", "key-service.cryptcsi.svc")
	if err != nil {
		return err
	}
	files := map[string][]byte{}
	for name, file := range map[string]string{"tls.crt": cert, "tls.key": key, "ca.crt": c.ca.file} {
		if files[name], err = os.ReadFile(file); err != nil {
			return err
		}
	}
	master := map[string][]byte{"master-secret": make([]byte, 32), "salt": make([]byte, 32)}
	for _, b := range master {
		if _, err := rand.Read(b); err != nil {
			return err
		}
	}
	for name, data := range map[string]map[string][]byte{"key-service-tls": files, "cryptcsi-master-secret": master} {
		_, err := c.client.CoreV1().Secrets(namespace).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: data}, create)
		if err != nil {
			return err
		}
	}
	_, err = c.client.CoreV1().ConfigMaps(namespace).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "key-service-ca"}, Data: map[string]string{"ca.crt": string(files["ca.crt"])}}, create)
	if err != nil {
		return err
	}
	return c.applyPrevious(ctx)
}

// applyPrevious applies the manifests of the build before this one.
func (c *controlPlane) applyPrevious(ctx context.Context) error {
	return c.applyTagged(ctx, c.site.source("test/e2e/before"), previousTag)
}

// installed waits until all pods of a namespace are ready, at least n of them.
func (c *controlPlane) installed(ctx context.Context, namespace string, n int) error {
	return c.await(ctx, patience, "pods of "+namespace, func(ctx context.Context) error {
		pods, err := c.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, p := range pods.Items {
			if p.Status.Phase == corev1.PodSucceeded {
				continue // of a Job
			}
			if err := podReady(&p); err != nil {
				return err
			}
		}
		if len(pods.Items) < n {
			return fmt.Errorf("%d pods, want %d", len(pods.Items), n)
		}
		return nil
	})
}

// podReady says what a pod lacks, nil if it is ready.
func podReady(p *corev1.Pod) error {
	if p.DeletionTimestamp != nil {
		return fmt.Errorf("pod %s is on its way out", p.Name)
	}
	for _, condition := range p.Status.Conditions {
		if condition.Type == corev1.PodReady && condition.Status == corev1.ConditionTrue {
			return nil
		}
	}
	why := []string{string(p.Status.Phase)}
	for _, s := range p.Status.ContainerStatuses {
		switch {
		case s.State.Waiting != nil:
			why = append(why, fmt.Sprintf("%s: %s %s", s.Name, s.State.Waiting.Reason, s.State.Waiting.Message))
		case s.State.Terminated != nil:
			why = append(why, fmt.Sprintf("%s ended with %d", s.Name, s.State.Terminated.ExitCode))
		case !s.Ready:
			why = append(why, s.Name+" is not ready")
		}
	}
	return fmt.Errorf("pod %s: %s", p.Name, strings.Join(why, "; "))
}

// registered waits until kubelet has a driver.
func (c *controlPlane) registered(ctx context.Context, driver string) error {
	return c.await(ctx, patience, "registration with kubelet", func(ctx context.Context) error {
		n, err := c.client.StorageV1().CSINodes().Get(ctx, nodeName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, d := range n.Spec.Drivers {
			if d.Name == driver {
				return nil
			}
		}
		return fmt.Errorf("the node has the drivers %v", n.Spec.Drivers)
	})
}
