package azurefake

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// discovery answers with the token service's endpoints.
func (s *Server) discovery(w http.ResponseWriter) {
	base := s.server.URL + "/" + Tenant
	answer(w, http.StatusOK, map[string]any{
		"issuer":                 base + "/v2.0",
		"authorization_endpoint": base + "/oauth2/v2.0/authorize",
		"token_endpoint":         base + "/oauth2/v2.0/token",
	})
}

// token issues one, to the client that proves itself.
func (s *Server) token(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		tokenError(w, http.StatusBadRequest, "invalid_request", "AADSTS900144: The request body is malformed.")
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	form := r.PostForm
	switch {
	case form.Get("grant_type") != "client_credentials" || form.Get("scope") == "":
		tokenError(w, http.StatusBadRequest, "invalid_request", "AADSTS900144: The request body must contain grant_type and scope.")
	case !strings.HasPrefix(form.Get("scope"), s.Resource()+"/.default"):
		tokenError(w, http.StatusBadRequest, "invalid_resource", "AADSTS500011: The resource principal named "+form.Get("scope")+" was not found in the tenant.")
	case !strings.HasPrefix(r.URL.Path, "/"+Tenant+"/") || form.Get("client_id") != Client:
		tokenError(w, http.StatusBadRequest, "unauthorized_client", "AADSTS700016: Application was not found in the directory.")
	case !s.proves(form):
		tokenError(w, http.StatusUnauthorized, "invalid_client", "AADSTS7000215: Invalid client secret provided.")
	default:
		token := rand.Text()
		s.tokens[token] = time.Now().Add(s.lifetime)
		seconds := int(s.lifetime.Seconds())
		answer(w, http.StatusOK, map[string]any{"token_type": "Bearer", "expires_in": seconds, "ext_expires_in": seconds, "access_token": token})
	}
}

// proves tells whether a token request comes from who it says.
func (s *Server) proves(form url.Values) bool {
	if assertion := form.Get("client_assertion"); assertion != "" {
		return assertion == s.federated || s.signed(assertion)
	}
	return form.Get("client_secret") == s.secret
}

// signed checks a JWT's signature, PS256 by the trusted certificate.
func (s *Server) signed(jwt string) bool {
	end := strings.LastIndexByte(jwt, '.')
	if end < 0 || s.trusted == nil {
		return false
	}
	signature, err := base64.RawURLEncoding.DecodeString(jwt[end+1:])
	public, ok := s.trusted.PublicKey.(*rsa.PublicKey)
	if err != nil || !ok {
		return false
	}
	digest := sha256.Sum256([]byte(jwt[:end]))
	return rsa.VerifyPSS(public, crypto.SHA256, digest[:], signature, nil) == nil
}

// authorised tells whether a request has a token that is good, and notes it.
func (s *Server) authorised(r *http.Request) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok || !time.Now().Before(s.tokens[token]) {
		return false
	}
	s.calls = append(s.calls, r.Method+" "+r.URL.Path)
	return true
}

func tokenError(w http.ResponseWriter, status int, code, description string) {
	answer(w, status, map[string]any{"error": code, "error_description": description})
}
