package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// Addresses. All of them are in the namespaces of this program.
const (
	hostIP     = "10.99.0.1" // of the control plane and the DNS server, on the tap device
	nodeIP     = "10.99.0.2"
	podNet     = "10.244.0.0/24"
	serviceNet = "10.96.0.0/24"
	apiService = "10.96.0.1" // the service kubernetes; it is hostIP by another name
	tapDevice  = "tap0"
	nodeName   = "node-1"
	nodeUser   = "system:node:" + nodeName
)

// site is where everything lies.
type site struct {
	dir string // for files of this run, seen by the guest at the same path
	bin string // our programs
	kub string // the program kubernetes
}

func (s site) path(name ...string) string {
	return filepath.Join(append([]string{s.dir}, name...)...)
}

func (s site) logs() string { return s.path("log") }

// controlPlane is everything of Kubernetes but the node.
type controlPlane struct {
	site      site
	ca        *authority
	processes []*process
	admin     *rest.Config
	client    kubernetes.Interface
	dynamic   dynamic.Interface
}

// startControlPlane returns when the API server is ready.
func startControlPlane(ctx context.Context, s site) (*controlPlane, error) {
	if err := commands(ctx,
		"ip link set lo up",
		"ip addr add "+apiService+"/32 dev lo",
		"ip tuntap add dev "+tapDevice+" mode tap",
		"ip addr add "+hostIP+"/24 dev "+tapDevice,
		"ip link set "+tapDevice+" up",
		"ip route add "+podNet+" via "+nodeIP,
	); err != nil {
		return nil, err
	}
	ca, err := newAuthority(s.path("pki"))
	if err != nil {
		return nil, err
	}
	c := &controlPlane{site: s, ca: ca}
	if err := c.startAPIServer(); err != nil {
		return nil, err
	}
	if c.admin, err = clientcmd.BuildConfigFromFlags("", s.path("admin.kubeconfig")); err != nil {
		return nil, err
	}
	c.admin.QPS = -1
	if c.client, err = kubernetes.NewForConfig(c.admin); err != nil {
		return nil, err
	}
	if c.dynamic, err = dynamic.NewForConfig(c.admin); err != nil {
		return nil, err
	}
	if err := c.awaitAPI(ctx); err != nil {
		return nil, err
	}
	return c, c.startControllers()
}

func (c *controlPlane) start(name string, args ...string) error {
	p, err := start(c.site.logs(), name, append([]string{c.site.kub, name}, args...)...)
	if err == nil {
		c.processes = append(c.processes, p)
	}
	return err
}

// lose ends everything as a power cut does.
func (c *controlPlane) lose() {
	for _, p := range c.processes {
		_ = p.cmd.Process.Kill()
	}
	for _, p := range c.processes {
		<-p.done
	}
}

// restart starts what was lost, on the data that is there, and returns when the
// API server is ready.
func (c *controlPlane) restart(ctx context.Context) error {
	lost := c.processes
	c.processes = nil
	for _, p := range lost {
		if err := c.start(p.name, p.cmd.Args[2:]...); err != nil {
			return err
		}
	}
	return c.awaitAPI(ctx)
}

func (c *controlPlane) startAPIServer() error {
	s := c.site
	cert, key, err := c.ca.issue("kube-apiserver", "", hostIP, apiService, "127.0.0.1", "kubernetes", "kubernetes.default", "kubernetes.default.svc")
	if err != nil {
		return err
	}
	// What a kubelet is asked by, for logs and exec.
	clientCert, clientKey, err := c.ca.issue("kube-apiserver-kubelet-client", "system:masters")
	if err != nil {
		return err
	}
	accounts, accountsKey, err := c.ca.issue("service-accounts", "")
	if err != nil {
		return err
	}
	var tokens strings.Builder
	for i, user := range []struct{ file, name, group string }{
		{"admin", "admin", "system:masters"},
		{"controller-manager", "system:kube-controller-manager", ""},
		{"scheduler", "system:kube-scheduler", ""},
		{"kubelet", nodeUser, "system:nodes"},
	} {
		token := user.file + "-token"
		fmt.Fprintf(&tokens, "%s,%s,%d,%q\n", token, user.name, i, user.group)
		if err := c.writeKubeconfig(user.file, token); err != nil {
			return err
		}
	}
	if err := os.WriteFile(s.path("tokens"), []byte(tokens.String()), 0o600); err != nil {
		return err
	}
	const etcd, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
	return errors.Join(
		c.start("etcd", "--data-dir="+s.path("etcd"), "--unsafe-no-fsync", "--log-level=error",
			"--listen-client-urls="+etcd, "--advertise-client-urls="+etcd,
			"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=default="+peer),
		c.start("kube-apiserver", "--etcd-servers="+etcd, "--bind-address=0.0.0.0", "--secure-port=443", "--advertise-address="+hostIP,
			"--tls-cert-file="+cert, "--tls-private-key-file="+key, "--client-ca-file="+c.ca.file, "--token-auth-file="+s.path("tokens"),
			"--kubelet-preferred-address-types=InternalIP", "--kubelet-client-certificate="+clientCert, "--kubelet-client-key="+clientKey,
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
			"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+accounts, "--service-account-signing-key-file="+accountsKey,
			"--service-cluster-ip-range="+serviceNet, "--endpoint-reconciler-type=none", "--allow-privileged=true", "--shutdown-delay-duration=0"))
}

func (c *controlPlane) startControllers() error {
	key := c.ca.path("service-accounts.key")
	return errors.Join(
		c.start("kube-controller-manager", "--kubeconfig="+c.site.path("controller-manager.kubeconfig"), "--bind-address=127.0.0.1",
			"--use-service-account-credentials", "--leader-elect=false", "--service-account-private-key-file="+key, "--root-ca-file="+c.ca.file,
			"--allocate-node-cidrs=false", "--attach-detach-reconcile-sync-period=10s",
			"--node-monitor-grace-period=20s", "--node-monitor-period=2s"),
		c.start("kube-scheduler", "--kubeconfig="+c.site.path("scheduler.kubeconfig"), "--bind-address=127.0.0.1", "--leader-elect=false"),
	)
}

func (c *controlPlane) writeKubeconfig(name, token string) error {
	return clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"e2e": {Server: "https://" + hostIP, CertificateAuthority: c.ca.file}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{name: {Token: token}},
		Contexts:       map[string]*clientcmdapi.Context{"e2e": {Cluster: "e2e", AuthInfo: name}},
		CurrentContext: "e2e",
	}, c.site.path(name+".kubeconfig"))
}

// awaitAPI waits until the API server is ready and has its first namespace.
func (c *controlPlane) awaitAPI(ctx context.Context) error {
	return c.await(ctx, time.Minute, "the API server", func(ctx context.Context) error {
		if _, err := c.client.CoreV1().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx); err != nil {
			return err
		}
		_, err := c.client.CoreV1().Namespaces().Get(ctx, metav1.NamespaceDefault, metav1.GetOptions{})
		return err
	})
}

// await asks again and again until nothing is missing. What is still missing
// at the end is the error.
func (c *controlPlane) await(whole context.Context, patience time.Duration, what string, missing func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(whole, patience)
	defer cancel()
	for {
		err := missing(ctx)
		if err == nil {
			return nil
		}
		for _, p := range c.processes {
			if died := p.failed(); died != nil {
				return died
			}
		}
		select {
		case <-ctx.Done():
			if why := interrupted(whole); why != nil {
				return fmt.Errorf("%s: %w", what, why)
			}
			return fmt.Errorf("%s: not after %v: %w", what, patience, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
