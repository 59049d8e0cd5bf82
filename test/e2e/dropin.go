package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// vendorName is the name of the wrapped driver, under which it serves too.
const vendorName = "loop.cryptcsi.io"

// Where what is not of the cluster answers, as test/e2e/dropin has it.
const (
	transitAddress = hostIP + ":8200"
	objectsAddress = hostIP + ":9000"
	transitToken   = "root-token-of-a-test"
)

// old is a claim of the time before cryptcsi, young one of the time after; both
// have the same class.
func old() want   { return want{name: "old", class: "plain", size: "64Mi"} }
func young() want { return want{name: "young", class: "plain", size: "64Mi"} }

// dropIn puts csi-plugin into the place of the vendor's registrar and sidecars,
// with keys outside of the cluster.
func (t *tester) dropIn(ctx context.Context) (string, error) {
	if err := t.up(ctx, old()); err != nil {
		return "", err
	}
	if _, err := t.sh(ctx, "old", "echo '"+marker+"' > /data/file && sync"); err != nil {
		return "", err
	}
	if err := errors.Join(t.outsideKeys(ctx), t.plaintextList(ctx), t.vendorSteps(ctx)); err != nil {
		return "", err
	}
	if err := t.apply(ctx, t.site.source("test/e2e/dropin")); err != nil {
		return "", err
	}
	if err := errors.Join(t.installed(ctx, namespace, 5), t.registered(ctx, vendorName)); err != nil {
		return "", err
	}
	if err := errors.Join(t.returns(ctx, old()), t.up(ctx, young())); err != nil {
		return "", err
	}
	if _, err := t.sh(ctx, "young", "echo '"+marker+"' > /data/file && sync"); err != nil {
		return "", err
	}
	was, err := t.sh(ctx, "old", "grep ' /data ' /proc/mounts")
	if err != nil {
		return "", err
	}
	is, err := t.sh(ctx, "young", "grep ' /data ' /proc/mounts")
	if err != nil {
		return "", err
	}
	if !strings.HasPrefix(was, "/dev/loop") || !strings.HasPrefix(is, "/dev/mapper/cryptcsi-") {
		return "", fmt.Errorf("the old volume is %s, the new one %s", was, is)
	}
	return fmt.Sprintf("old: %.40s…\nnew: %.40s…", was, is), t.noPlaintext(ctx, "young")
}

// vendorSteps takes the vendor's registrar and sidecars away and waits until
// kubelet knows the driver no more.
func (t *tester) vendorSteps(ctx context.Context) error {
	if err := t.apply(ctx, t.site.source("test/e2e/vendor/driver")); err != nil {
		return err
	}
	if err := t.client.AppsV1().Deployments("kube-system").Delete(ctx, "loopdriver", metav1.DeleteOptions{}); err != nil {
		return err
	}
	return t.await(ctx, patience, "the end of the vendor's registration", func(ctx context.Context) error {
		n, err := t.client.StorageV1().CSINodes().Get(ctx, nodeName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, d := range n.Spec.Drivers {
			if d.Name == vendorName {
				return errors.New("the driver is still registered")
			}
		}
		pods, err := t.client.CoreV1().Pods("kube-system").List(ctx, metav1.ListOptions{LabelSelector: "app in (loopdriver, loopdriver-controller)"})
		if err != nil {
			return err
		}
		if len(pods.Items) != 1 {
			return fmt.Errorf("%d pods of the vendor, want 1", len(pods.Items))
		}
		return podReady(&pods.Items[0])
	})
}

// plaintextList makes the list of volumes that are there, as docs/storageclass.md
// says.
func (t *tester) plaintextList(ctx context.Context) error {
	volumes, err := t.kubectl(ctx, "get", "pv", "-o", "json")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(t.site.bin, "csi-plugin"), "plaintext-list", "--driver-name="+vendorName)
	cmd.Stdin = strings.NewReader(volumes)
	var said bytes.Buffer
	cmd.Stderr = &said
	list, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("plaintext-list: %w: %s", err, said.String())
	}
	_, err = t.client.CoreV1().ConfigMaps(namespace).Create(ctx, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "dropin-plaintext"}, Data: map[string]string{"volumes": string(list)},
	}, metav1.CreateOptions{})
	return err
}

// outsideKeys starts a KMS and an object store, which are no part of the
// cluster, and hands it what it needs to use them.
func (t *tester) outsideKeys(ctx context.Context) error {
	tools := filepath.Dir(t.site.kub)
	cert, key, err := t.ca.issue("transit", "", hostIP)
	if err != nil {
		return err
	}
	logs := t.site.logs()
	// The token is the test's own and opens nothing else.
	_, errTransit := start(logs, "transit", "/usr/bin/env", "ROOT_TOKEN="+transitToken, filepath.Join(tools, "transit"), "-addr", transitAddress, "-cert", cert, "-key", key, "-mount", "transit")
	_, errObjects := start(logs, "gofakes3", filepath.Join(tools, "gofakes3"), "-backend", "memory", "-initialbucket", "records", "-host", objectsAddress)
	if err := errors.Join(errTransit, errObjects); err != nil {
		return err
	}
	ca, err := os.ReadFile(t.ca.file)
	if err != nil {
		return err
	}
	if err := t.await(ctx, time.Minute, "the object store", func(context.Context) error { return answers(objectsAddress) }); err != nil {
		return err
	}
	if err := t.await(ctx, time.Minute, "the KMS", func(ctx context.Context) error { return makeKEK(ctx, ca) }); err != nil {
		return err
	}
	_, err = t.client.CoreV1().Secrets(namespace).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "dropin-keys"}, Data: map[string][]byte{
		"ca.crt": ca, "token": []byte(transitToken), "credentials": []byte("[default]\naws_access_key_id = test\naws_secret_access_key = testtest\n"),
	}}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

func answers(address string) error {
	conn, err := net.DialTimeout("tcp", address, time.Second)
	if err == nil {
		err = conn.Close()
	}
	return err
}

// makeKEK makes the key that the KMS wraps with.
func makeKEK(ctx context.Context, ca []byte) error {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}}
	defer client.CloseIdleConnections()
	r, err := http.NewRequestWithContext(ctx, http.MethodPut, "https://"+transitAddress+"/v1/transit/keys/kek", strings.NewReader("{}"))
	if err != nil {
		return err
	}
	r.Header.Set("X-Vault-Token", transitToken)
	answer, err := client.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode >= 300 {
		return errors.New("making a key: " + answer.Status)
	}
	return nil
}
