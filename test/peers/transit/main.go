// Command transit is a small server around OpenBao's own transit engine: the
// engine's keys, ciphertexts and errors are real, what stands in front of it
// (tokens, logins, namespaces, seal) is written here after the server's
// behaviour, in memory, for tests.
//
//	transit -addr 127.0.0.1:PORT [-cert FILE -key FILE -client-ca FILE] [-mount [NAMESPACE=]PATH]...
//
// The root token stands in the environment as ROOT_TOKEN. Under /test/ the
// root token finds the switches that a test needs.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/openbao/openbao/builtin/logical/transit"
	"github.com/openbao/openbao/sdk/v2/logical"
)

func main() {
	addr := flag.String("addr", "", "address to listen on")
	cert := flag.String("cert", "", "certificate file")
	key := flag.String("key", "", "key file")
	clientCA := flag.String("client-ca", "", "CA file of client certificates")
	s := &server{
		mounts: map[string]*mount{}, tokens: map[string]*token{}, logins: map[string]*login{},
		denied: map[string]bool{}, counts: map[string]int{},
	}
	flag.Func("mount", "[NAMESPACE=]PATH of a transit engine", s.mount)
	flag.Parse()
	if len(s.mounts) == 0 {
		if err := s.mount("transit"); err != nil {
			log.Fatal(err)
		}
	}
	s.tokens[os.Getenv("ROOT_TOKEN")] = &token{root: true}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if *clientCA != "" {
		pem, err := os.ReadFile(*clientCA)
		if err != nil {
			log.Fatal(err)
		}
		config.ClientCAs = x509.NewCertPool()
		config.ClientCAs.AppendCertsFromPEM(pem)
		config.ClientAuth = tls.RequestClientCert // what it shows is judged at the login
		s.clientCAs = config.ClientCAs
	}
	web := &http.Server{Addr: *addr, Handler: s, TLSConfig: config, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(os.Stderr, "", 0)}
	if *cert == "" {
		log.Fatal(web.ListenAndServe())
	}
	log.Fatal(web.ListenAndServeTLS(*cert, *key))
}

type server struct {
	clientCAs *x509.CertPool
	mounts    map[string]*mount // by NAMESPACE=PATH; not changed while serving

	mu     sync.Mutex
	sealed bool
	tokens map[string]*token
	logins map[string]*login // by the name of the auth mount
	denied map[string]bool   // paths
	counts map[string]int    // of requests, by path
}

type mount struct {
	path    string // with a slash at its end
	engine  logical.Backend
	storage logical.Storage
}

func (s *server) mount(arg string) error {
	namespace, path, found := strings.Cut(arg, "=")
	if !found {
		namespace, path = "", arg
	}
	m := &mount{path: path + "/", storage: &logical.InmemStorage{}}
	var err error
	m.engine, err = transit.Factory(context.Background(), &logical.BackendConfig{
		StorageView: m.storage, System: logical.TestSystemView(), Logger: hclog.NewNullLogger(),
	})
	s.mounts[namespace+"="+path] = m
	return err
}

// The server's own words. A token that is no more and one whose policy does not
// allow a request get the same ones.
var (
	errSealed = errors.New("Vault is sealed")
	errDenied = errors.New("permission denied")
)

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path, ok := strings.CutPrefix(r.URL.Path, "/v1/")
	var body map[string]any
	if r.Body != nil && r.ContentLength != 0 {
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&body); err != nil {
			logical.RespondError(w, http.StatusBadRequest, fmt.Errorf("error parsing JSON"))
			return
		}
	}
	if strings.HasPrefix(r.URL.Path, "/test/") {
		s.test(w, r, body)
		return
	}
	if !ok {
		logical.RespondError(w, http.StatusNotFound, nil)
		return
	}
	namespace := strings.Trim(r.Header.Get("X-Vault-Namespace"), "/")
	s.mu.Lock()
	s.counts[path]++
	sealed := s.sealed
	s.mu.Unlock()
	if sealed {
		logical.RespondError(w, http.StatusServiceUnavailable, errSealed)
		return
	}
	if name, ok := strings.CutPrefix(path, "auth/"); ok && !strings.HasPrefix(name, "token/") {
		s.login(w, r, strings.TrimSuffix(strings.SplitN(name+"/", "/login", 2)[0], "/"), namespace, body)
		return
	}
	t, err := s.authenticate(r.Header.Get("X-Vault-Token"), namespace, path)
	if err != nil {
		logical.RespondError(w, http.StatusForbidden, err)
		return
	}
	switch path {
	case "auth/token/renew-self":
		s.renew(w, t)
	case "auth/token/lookup-self":
		answer(w, map[string]any{"data": map[string]any{"ttl": seconds(time.Until(t.expires)), "renewable": t.renewable}})
	default:
		s.transit(w, r, namespace, path, body)
	}
}

// transit hands a request to the engine that is mounted there.
func (s *server) transit(w http.ResponseWriter, r *http.Request, namespace, path string, body map[string]any) {
	for name, m := range s.mounts {
		if name != namespace+"="+strings.TrimSuffix(m.path, "/") || !strings.HasPrefix(path, m.path) {
			continue
		}
		req := &logical.Request{
			Path: strings.TrimPrefix(path, m.path), MountPoint: m.path, Data: body, Storage: m.storage,
			Operation: map[string]logical.Operation{
				"GET": logical.ReadOperation, "LIST": logical.ListOperation, "DELETE": logical.DeleteOperation,
				"PUT": logical.UpdateOperation, "POST": logical.UpdateOperation,
			}[r.Method],
		}
		if r.URL.Query().Get("list") == "true" {
			req.Operation = logical.ListOperation
		}
		if req.Operation == logical.UpdateOperation {
			found, exists, err := m.engine.HandleExistenceCheck(r.Context(), req)
			if err == nil && found && !exists {
				req.Operation = logical.CreateOperation
			}
		}
		resp, err := m.engine.HandleRequest(r.Context(), req)
		if code, failed := logical.RespondErrorCommon(req, resp, err); failed != nil || code != 0 {
			logical.RespondError(w, code, failed)
			return
		}
		if resp == nil {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		answer(w, map[string]any{"data": resp.Data, "warnings": resp.Warnings})
		return
	}
	logical.RespondError(w, http.StatusNotFound, fmt.Errorf("no handler for route %q. route entry not found.", path))
}

// token is what a login gave.
type token struct {
	id        string
	root      bool
	namespace string
	expires   time.Time
	renewal   time.Duration // what a renewal gives
	renewable bool
}

func (s *server) authenticate(id, namespace, path string) (*token, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tokens[id]
	switch {
	case t == nil || !t.root && (time.Now().After(t.expires) || t.namespace != namespace):
		return nil, errDenied
	case s.denied[path]:
		return nil, fmt.Errorf("1 error occurred:\n\t* %w\n\n", errDenied)
	}
	return t, nil
}

func (s *server) renew(w http.ResponseWriter, t *token) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !t.renewable {
		logical.RespondError(w, http.StatusBadRequest, errors.New("lease is not renewable"))
		return
	}
	t.expires = time.Now().Add(t.renewal)
	answer(w, map[string]any{"auth": map[string]any{"client_token": t.id, "lease_duration": seconds(t.renewal), "renewable": true}})
}

// login is an auth mount.
type login struct {
	Kind      string // approle, kubernetes, jwt, cert
	Namespace string
	RoleID    string // approle
	SecretID  string // approle
	Role      string // the others
	JWT       string // kubernetes, jwt
	TTL       int    // seconds; 0 is for ever
	RenewTTL  int    // seconds that a renewal gives; 0: it cannot be renewed
}

func (s *server) login(w http.ResponseWriter, r *http.Request, mount, namespace string, body map[string]any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.logins[mount]
	if l == nil || l.Namespace != namespace {
		logical.RespondError(w, http.StatusForbidden, errDenied) // to strangers all paths look alike
		return
	}
	if status, err := l.judge(s.clientCAs, r, body); err != nil {
		logical.RespondError(w, status, err)
		return
	}
	id := fmt.Sprintf("hvs.%s-%d-%d", mount, len(s.tokens), time.Now().UnixNano())
	ttl := time.Duration(l.TTL) * time.Second
	if ttl == 0 {
		ttl = 24 * time.Hour
	}
	s.tokens[id] = &token{
		id: id, namespace: namespace, expires: time.Now().Add(ttl),
		renewal: time.Duration(l.RenewTTL) * time.Second, renewable: l.RenewTTL > 0,
	}
	answer(w, map[string]any{"auth": map[string]any{"client_token": id, "lease_duration": l.TTL, "renewable": l.RenewTTL > 0}})
}

// judge looks at what a login came with; the answers are the server's.
func (l *login) judge(clientCAs *x509.CertPool, r *http.Request, body map[string]any) (int, error) {
	switch l.Kind {
	case "approle":
		if body["role_id"] != l.RoleID || body["secret_id"] != l.SecretID {
			return http.StatusBadRequest, errors.New("invalid role or secret ID")
		}
	case "kubernetes":
		if body["role"] != l.Role {
			return http.StatusBadRequest, fmt.Errorf("invalid role name %q", body["role"])
		}
		if body["jwt"] != l.JWT {
			return http.StatusForbidden, errDenied
		}
	case "jwt":
		if body["role"] != l.Role {
			return http.StatusBadRequest, fmt.Errorf("role %q could not be found", body["role"])
		}
		if body["jwt"] != l.JWT {
			return http.StatusBadRequest, errors.New("error validating token: error verifying token signature: no known key successfully validated the token signature")
		}
	case "cert":
		if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
			return http.StatusBadRequest, errors.New("client certificate must be supplied")
		}
		leaf := r.TLS.PeerCertificates[0]
		_, err := leaf.Verify(x509.VerifyOptions{Roots: clientCAs, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		if err != nil || leaf.Subject.CommonName != l.Role || body["name"] != nil && body["name"] != l.Role {
			return http.StatusBadRequest, errors.New("invalid certificate or no client certificate supplied")
		}
	}
	return 0, nil
}

// test are the switches. Each call changes one thing.
func (s *server) test(w http.ResponseWriter, r *http.Request, body map[string]any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.tokens[r.Header.Get("X-Vault-Token")]; t == nil || !t.root {
		logical.RespondError(w, http.StatusForbidden, errDenied)
		return
	}
	on, _ := body["on"].(bool)
	name, _ := body["name"].(string)
	switch r.URL.Path {
	case "/test/seal":
		s.sealed = on
	case "/test/deny":
		s.denied[name] = on
	case "/test/token": // adds a token that lives for an hour, or takes one away
		delete(s.tokens, name)
		if on {
			s.tokens[name] = &token{id: name, expires: time.Now().Add(time.Hour)}
		}
	case "/test/revoke": // all but the root token
		maps.DeleteFunc(s.tokens, func(_ string, t *token) bool { return !t.root })
	case "/test/login":
		raw, _ := json.Marshal(body["login"])
		l := &login{}
		if err := json.Unmarshal(raw, l); err != nil || !slices.Contains([]string{"approle", "kubernetes", "jwt", "cert"}, l.Kind) {
			logical.RespondError(w, http.StatusBadRequest, fmt.Errorf("login %s: %v", raw, err))
			return
		}
		s.logins[name] = l
	case "/test/counts":
		answer(w, map[string]any{"data": s.counts})
		return
	default:
		logical.RespondError(w, http.StatusNotFound, nil)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func answer(w http.ResponseWriter, fields map[string]any) {
	all := map[string]any{
		"request_id": "test", "lease_id": "", "renewable": false, "lease_duration": 0,
		"data": nil, "wrap_info": nil, "warnings": nil, "auth": nil,
	}
	maps.Copy(all, fields)
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(all)
}

func seconds(d time.Duration) int { return int(max(d, 0).Round(time.Second) / time.Second) }
