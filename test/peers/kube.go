package peers

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// The users that Kubeconfig knows besides those that it makes: one who may do
// everything, and the kubelets of two nodes.
const (
	KubeAdmin = "admin"
	KubeNode1 = "system:node:node-1"
	KubeNode2 = "system:node:node-2"
)

// APIServer is a kube-apiserver with an etcd of its own, and nothing else:
// what needs a controller, a scheduler or a kubelet does not happen. Node and
// RBAC authorise, NodeRestriction is on, tokens of service accounts are issued.
type APIServer struct {
	// URL is https://127.0.0.1:PORT, CAFile verifies its certificate.
	URL, CAFile string
	// Client is the admin's.
	Client kubernetes.Interface

	t    testing.TB // whose end is the server's
	dir  string
	ca   *CA
	etcd string // address
	args []string
	cmd  *exec.Cmd
}

// Kube starts an API server, with flags beside its own, which takes some seconds:
// share it.
func Kube(t testing.TB, flags ...string) *APIServer {
	t.Helper()
	program := Program(t, "kube")
	s := &APIServer{t: t, dir: t.TempDir(), ca: NewCA(t), etcd: Addr(t)}
	s.CAFile = s.ca.File
	addr, peer := Addr(t), Addr(t)
	s.URL = "https://" + addr
	Start(t, s.etcd, exec.Command(program, "etcd", "--data-dir="+filepath.Join(s.dir, "etcd"), "--unsafe-no-fsync", "--log-level=error",
		"--listen-client-urls=http://"+s.etcd, "--advertise-client-urls=http://"+s.etcd,
		"--listen-peer-urls=http://"+peer, "--initial-advertise-peer-urls=http://"+peer, "--initial-cluster=default=http://"+peer))

	_, port, err := net.SplitHostPort(addr)
	must(t, err)
	cert, key := s.ca.Issue(t, "kube-apiserver")
	accountsPublic, accounts := s.ca.Issue(t, "service accounts")
	tokens := s.file(t, "tokens", strings.Join([]string{
		KubeAdmin + `-token,` + KubeAdmin + `,1,"system:masters"`,
		KubeNode1 + `-token,` + KubeNode1 + `,2,"system:nodes"`,
		KubeNode2 + `-token,` + KubeNode2 + `,3,"system:nodes"`,
	}, "\n")+"\n")
	s.args = []string{
		program, "kube-apiserver", "--etcd-servers=http://" + s.etcd, "--bind-address=127.0.0.1", "--secure-port=" + port,
		"--tls-cert-file=" + cert, "--tls-private-key-file=" + key, "--client-ca-file=" + s.CAFile, "--token-auth-file=" + tokens,
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=" + accountsPublic,
		"--service-account-signing-key-file=" + accounts,
		"--service-cluster-ip-range=10.0.0.0/24", "--endpoint-reconciler-type=none", "--allow-privileged=true", "--shutdown-delay-duration=0", "-v=0",
	}
	s.args = append(s.args, flags...)
	s.Client, err = kubernetes.NewForConfig(s.Config(t, KubeAdmin))
	must(t, err)
	s.Run(t)
	return s
}

// Run starts the API server again, after Kill, and waits until it is ready. It
// ends with the test that Kube was called by.
func (s *APIServer) Run(t testing.TB) {
	t.Helper()
	s.cmd = exec.Command(s.args[0], s.args[1:]...)
	Start(s.t, strings.TrimPrefix(s.URL, "https://"), s.cmd)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		// The namespace is the last thing of all that tests rely on.
		_, err := s.Client.CoreV1().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		if err == nil {
			_, err = s.Client.CoreV1().Namespaces().Get(ctx, metav1.NamespaceDefault, metav1.GetOptions{})
		}
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the API server is not ready: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Kill ends the API server as a crash does, and waits for that. etcd stays.
func (s *APIServer) Kill(t testing.TB) {
	t.Helper()
	must(t, syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL))
	for syscall.Kill(s.cmd.Process.Pid, 0) == nil && t.Context().Err() == nil { // until Start's waiting has ended
		time.Sleep(5 * time.Millisecond)
	}
}

// Compact makes etcd forget everything but the present, as it does by itself
// every few minutes.
func (s *APIServer) Compact(t testing.TB) {
	t.Helper()
	present := struct {
		Header struct{ Revision string }
	}{}
	s.askEtcd(t, "/v3/kv/range", `{"key":"`+base64.StdEncoding.EncodeToString([]byte("/"))+`"}`, &present)
	s.askEtcd(t, "/v3/kv/compaction", `{"physical":true,"revision":"`+present.Header.Revision+`"}`, &struct{}{})
}

func (s *APIServer) askEtcd(t testing.TB, path, body string, answer any) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+s.etcd+path, strings.NewReader(body))
	must(t, err)
	resp, err := http.DefaultClient.Do(r)
	must(t, err)
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("etcd %s: %s", path, resp.Status)
	}
	must(t, json.NewDecoder(resp.Body).Decode(answer))
}

// Namespace makes a namespace and returns its name.
func (s *APIServer) Namespace(t testing.TB) string {
	t.Helper()
	n, err := s.Client.CoreV1().Namespaces().Create(t.Context(),
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-"}}, metav1.CreateOptions{})
	must(t, err)
	return n.Name
}

// Allow gives a user the verbs on resources of the core group in a namespace,
// and nothing else there that an earlier Allow gave. It returns when the API
// server decides so.
func (s *APIServer) Allow(t testing.TB, user, namespace string, rules ...rbacv1.PolicyRule) {
	t.Helper()
	name := metav1.ObjectMeta{Name: user, Namespace: namespace}
	role := &rbacv1.Role{ObjectMeta: name, Rules: rules}
	defer s.awaitRules(t, user, namespace, rules)
	_, err := s.Client.RbacV1().Roles(namespace).Create(t.Context(), role, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = s.Client.RbacV1().Roles(namespace).Update(t.Context(), role, metav1.UpdateOptions{})
		must(t, err)
		return
	}
	must(t, err)
	_, err = s.Client.RbacV1().RoleBindings(namespace).Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: name,
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, Name: user}},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: user},
	}, metav1.CreateOptions{})
	must(t, err)
}

// AllowCluster gives a user the rules in the whole cluster, and nothing else
// there that an earlier AllowCluster gave. It returns when the API server
// decides so, for resources without a name.
func (s *APIServer) AllowCluster(t testing.TB, user string, rules ...rbacv1.PolicyRule) {
	t.Helper()
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: user}, Rules: rules}
	defer s.awaitRules(t, user, "", rules)
	_, err := s.Client.RbacV1().ClusterRoles().Create(t.Context(), role, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = s.Client.RbacV1().ClusterRoles().Update(t.Context(), role, metav1.UpdateOptions{})
		must(t, err)
		return
	}
	must(t, err)
	_, err = s.Client.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: user},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, Name: user}},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: user},
	}, metav1.CreateOptions{})
	must(t, err)
}

// awaitRules asks until the authorizer, which watches the rules, has them.
func (s *APIServer) awaitRules(t testing.TB, user, namespace string, rules []rbacv1.PolicyRule) {
	t.Helper()
	for _, rule := range rules {
		for _, verb := range []string{"create", "get", "list", "watch", "update", "patch", "delete"} {
			want := slices.ContainsFunc(rules, func(r rbacv1.PolicyRule) bool {
				return slices.Equal(r.Resources, rule.Resources) && slices.Contains(r.Verbs, verb)
			})
			for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
				review, err := s.Client.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), &authorizationv1.SubjectAccessReview{
					Spec: authorizationv1.SubjectAccessReviewSpec{User: user, ResourceAttributes: &authorizationv1.ResourceAttributes{
						Namespace: namespace, Verb: verb, Group: rule.APIGroups[0], Resource: rule.Resources[0],
					}},
				}, metav1.CreateOptions{})
				must(t, err)
				if review.Status.Allowed == want {
					break
				}
				if time.Now().After(end) {
					t.Fatalf("the API server does not take %v", rules)
				}
			}
		}
	}
}

// Core is a rule for one resource of the core group.
func Core(resource string, verbs ...string) rbacv1.PolicyRule {
	return rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{resource}, Verbs: verbs}
}

// Kubeconfig returns a file by which its bearer is that user: one of those
// named above, or any other, who comes with a client certificate and may do
// nothing until Allow.
func (s *APIServer) Kubeconfig(t testing.TB, user string) string {
	t.Helper()
	auth := &clientcmdapi.AuthInfo{}
	switch user {
	case KubeAdmin, KubeNode1, KubeNode2:
		auth.Token = user + "-token"
	default:
		auth.ClientCertificate, auth.ClientKey = s.ca.Issue(t, user)
	}
	file := filepath.Join(t.TempDir(), "kubeconfig")
	must(t, clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"test": {Server: s.URL, CertificateAuthority: s.CAFile}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{user: auth},
		Contexts:       map[string]*clientcmdapi.Context{"test": {Cluster: "test", AuthInfo: user}},
		CurrentContext: "test",
	}, file))
	return file
}

// Config is Kubeconfig for a client in this process.
func (s *APIServer) Config(t testing.TB, user string) *rest.Config {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", s.Kubeconfig(t, user))
	must(t, err)
	config.QPS = -1
	return config
}

func (s *APIServer) file(t testing.TB, name, content string) string {
	t.Helper()
	path := filepath.Join(s.dir, name)
	must(t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
