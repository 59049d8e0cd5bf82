package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyclient"
)

// otherNode asks the key service as the plugin of a node that has not the
// volume: with a genuine token of its service account, bound to a pod there.
func (t *tester) otherNode(ctx context.Context) (string, error) {
	const other = "node-2"
	create := metav1.CreateOptions{}
	_, err := t.client.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: other}, Spec: corev1.NodeSpec{Unschedulable: true}}, create)
	if err != nil {
		return "", err
	}
	mine, err := t.asksAs(ctx, nodeName)
	if err != nil {
		return "", fmt.Errorf("the node that has the volume: %w", err)
	}
	_, err = t.asksAs(ctx, other)
	if err == nil {
		return "", errors.New("the other node gets the key")
	}
	if !errors.Is(err, errdefs.ErrDenied) {
		return "", fmt.Errorf("the other node is not refused: %w", err)
	}
	return fmt.Sprintf("node-1: state %s; node-2: %v", mine.State, err), errors.Join(
		t.client.CoreV1().Pods(namespace).Delete(ctx, "plugin-"+nodeName, metav1.DeleteOptions{}),
		t.client.CoreV1().Nodes().Delete(ctx, other, metav1.DeleteOptions{}))
}

// asksAs asks for the key of the claim files from a pod on a node.
func (t *tester) asksAs(ctx context.Context, node string) (dek.DEK, error) {
	v, err := t.volume(ctx, "files")
	if err != nil {
		return dek.DEK{}, err
	}
	pod, err := t.client.CoreV1().Pods(namespace).Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "plugin-" + node}, Spec: corev1.PodSpec{
		NodeName: node, ServiceAccountName: "cryptcsi-node", Containers: []corev1.Container{{Name: "c", Image: "nowhere/nothing"}},
	}}, metav1.CreateOptions{})
	if err != nil {
		return dek.DEK{}, err
	}
	token, err := t.client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, "cryptcsi-node", &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences:      []string{"cryptcsi-key-service"},
		BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}, metav1.CreateOptions{})
	if err != nil {
		return dek.DEK{}, err
	}
	file := t.site.path("token-" + node)
	if err := os.WriteFile(file, []byte(token.Status.Token), 0o600); err != nil {
		return dek.DEK{}, err
	}
	authorities, err := t.client.CoreV1().ConfigMaps(namespace).Get(ctx, "key-service-ca", metav1.GetOptions{})
	if err != nil {
		return dek.DEK{}, err
	}
	ca := t.site.path("key-service-ca.crt")
	if err := os.WriteFile(ca, []byte(authorities.Data["ca.crt"]), 0o600); err != nil {
		return dek.DEK{}, err
	}
	addresses, _ := endpoints(ctx, t.client, "key-service."+namespace)
	if len(addresses) == 0 {
		return dek.DEK{}, errors.New("the key service has no address")
	}
	a := addresses[0]
	k, err := keyclient.New(keyclient.Config{
		Address: fmt.Sprintf("dns:///%d.%d.%d.%d:7443", a[0], a[1], a[2], a[3]), CAFile: ca, ServerName: "key-service.cryptcsi.svc", TokenFile: file, Attempts: 1,
	})
	if err != nil {
		return dek.DEK{}, err
	}
	defer func() { _ = k.Close() }()
	got, err := k.GetDEK(ctx, dek.ID(driverName+"/"+v.Spec.CSI.VolumeHandle))
	if err == nil {
		got.Wipe()
	}
	return got, err
}
