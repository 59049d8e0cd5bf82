package azurefake

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// pageSize is small, so that every list has pages.
const pageSize = 2

// actions maps the permissions of access policies to the data actions of a
// Managed HSM.
var actions = map[string]string{
	"keys/get":               "keys/read/action",
	"keys/list":              "keys/read/action",
	"keys/create":            "keys/create",
	"keys/update":            "keys/write/action",
	"keys/delete":            "keys/delete",
	"keys/recover":           "keys/deletedKeys/recover/action",
	"keys/purge":             "keys/deletedKeys/delete",
	"keys/rotate":            "keys/rotate/action",
	"keys/getrotationpolicy": "keys/read/action",
	"keys/setrotationpolicy": "keys/write/action",
	"keys/wrapKey":           "keys/wrap/action",
	"keys/unwrapKey":         "keys/unwrap/action",
	"keys/encrypt":           "keys/encrypt/action",
	"keys/decrypt":           "keys/decrypt/action",
}

// problem is an error as the service answers it.
type problem struct {
	status               int
	code, message, inner string
}

// Error is part of error.
func (p problem) Error() string { return p.code + ": " + p.message }

func answerError(w http.ResponseWriter, err error) {
	p, ok := err.(problem) //nolint:errorlint // nobody wraps them here
	if !ok {
		p = problem{http.StatusInternalServerError, "InternalServerError", err.Error(), ""}
	}
	detail := map[string]any{"code": p.code, "message": p.message}
	if p.inner != "" {
		detail["innererror"] = map[string]any{"code": p.inner}
	}
	answer(w, p.status, map[string]any{"error": detail})
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the client went away
}

func badParameter(format string, args ...any) error {
	return problem{http.StatusBadRequest, "BadParameter", fmt.Sprintf(format, args...), ""}
}

func notFound(name, version string) error {
	return problem{http.StatusNotFound, "KeyNotFound", fmt.Sprintf("A key with (name/id) %s/%s was not found in this key vault. "+
		"If you recently deleted this key you may be able to recover it using the correct recovery command.", name, version), ""}
}

// forbidden is the refusal of a call for want of a permission.
func (s *Server) forbidden(permission string) error {
	if s.hsm {
		return problem{http.StatusForbidden, "Forbidden", "Caller is not authorized to perform action on resource.\r\n" +
			"Caller: appid=" + Client + "\r\nAction: 'Microsoft.KeyVault/managedHsm/" + actions[permission] + "'\r\n" +
			"Assignment: (not found)\r\n", "ForbiddenByRbac"}
	}
	return problem{http.StatusForbidden, "Forbidden", fmt.Sprintf("The user, group or application 'appid=%s' does not have keys %s permission on key vault 'fake;location=nowhere'.",
		Client, strings.TrimPrefix(permission, "keys/")), "AccessDenied"}
}

// vault answers an authorised request.
func (s *Server) vault(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 64<<10))
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.failures) > 0 {
		f := s.failures[0]
		s.failures = s.failures[1:]
		if f.retryAfter != "" {
			w.Header().Set("Retry-After", f.retryAfter)
		}
		answerError(w, problem{f.status, "Throttled", "Request was not processed because too many requests were received.", ""})
		return
	}
	result, err := s.route(r, body)
	if err != nil {
		answerError(w, err)
		return
	}
	answer(w, http.StatusOK, result)
}

// route calls what the method and path name.
func (s *Server) route(r *http.Request, body []byte) (any, error) {
	elements := strings.Split(strings.TrimPrefix(r.URL.Path, "/"), "/")
	name, rest := "", []string{}
	if len(elements) > 1 {
		name, rest = elements[1], elements[2:]
	}
	version, operation := "", ""
	if len(rest) > 0 {
		operation = rest[len(rest)-1]
	}
	if len(rest) > 1 || r.Method != http.MethodPost && len(rest) > 0 { // else the current one
		version = rest[0]
	}
	do := func(permission string, f func() (any, error)) (any, error) {
		if s.denied[permission] {
			return nil, s.forbidden(permission)
		}
		return f()
	}
	call := r.Method + " " + elements[0]
	switch {
	case call == "GET keys" && name == "":
		return do("keys/list", func() (any, error) { return s.list(r) })
	case call == "GET keys" && version == "versions":
		return do("keys/list", func() (any, error) { return s.versions(r, name) })
	case call == "GET keys" && version == "rotationpolicy":
		return do("keys/getrotationpolicy", func() (any, error) { return s.rotationPolicy(name, nil) })
	case call == "PUT keys" && version == "rotationpolicy":
		return do("keys/setrotationpolicy", func() (any, error) { return s.rotationPolicy(name, body) })
	case call == "GET keys":
		return do("keys/get", func() (any, error) { return s.get(name, version) })
	case call == "PATCH keys":
		return do("keys/update", func() (any, error) { return s.update(name, version, body) })
	case call == "DELETE keys":
		return do("keys/delete", func() (any, error) { return s.delete(name) })
	case call == "POST keys" && operation == "create":
		return do("keys/create", func() (any, error) { return s.createKey(name, body) })
	case call == "POST keys" && operation == "rotate":
		return do("keys/rotate", func() (any, error) { return s.rotate(name) })
	case call == "GET deletedkeys":
		return do("keys/get", func() (any, error) { return s.getDeleted(name) })
	case call == "POST deletedkeys" && operation == "recover":
		return do("keys/recover", func() (any, error) { return s.recover(name) })
	case call == "DELETE deletedkeys":
		return do("keys/purge", func() (any, error) { return s.purge(name) })
	case call == "POST keys" && operations[operation].permission != "":
		return do(operations[operation].permission, func() (any, error) { return s.operate(name, version, operation, body) })
	}
	return nil, problem{http.StatusMethodNotAllowed, "MethodNotAllowed", "no such operation", ""}
}

// key is a key with its versions, the oldest first.
type key struct {
	versions []*version
	policy   json.RawMessage
	gone     time.Time // of deleted ones
}

func (k *key) current() *version { return k.versions[len(k.versions)-1] }

// version returns the one of that ID, the current one for none.
func (k *key) version(id string) *version {
	if id == "" {
		return k.current()
	}
	if i := slices.IndexFunc(k.versions, func(v *version) bool { return v.id == id }); i >= 0 {
		return k.versions[i]
	}
	return nil
}

func (s *Server) find(name, id string) (*version, error) {
	k, ok := s.keys[name]
	if !ok || k.version(id) == nil {
		return nil, notFound(name, id)
	}
	return k.version(id), nil
}

func (s *Server) kid(name, id string) string {
	kid := s.server.URL + "/keys/" + name
	if id != "" {
		kid += "/" + id
	}
	return kid
}

func (s *Server) bundle(name string, v *version) map[string]any {
	return map[string]any{"key": v.jwk(s.kid(name, v.id)), "attributes": v.attributes(), "tags": v.tags}
}

func (s *Server) get(name, id string) (any, error) {
	v, err := s.find(name, id)
	if err != nil {
		return nil, err
	}
	return s.bundle(name, v), nil
}

func (s *Server) add(name string, v *version) {
	if s.keys[name] == nil {
		s.keys[name] = &key{}
	}
	s.keys[name].versions = append(s.keys[name].versions, v)
}

// createKey makes a key, or a new version of one.
func (s *Server) createKey(name string, body []byte) (any, error) {
	var n newKey
	if err := json.Unmarshal(body, &n); err != nil {
		return nil, badParameter("The request body is invalid.")
	}
	switch {
	case s.deleted[name] != nil:
		return nil, problem{http.StatusConflict, "Conflict", "Key " + name + " is currently in a deleted but recoverable state, and its name cannot be reused; " +
			"in this state, the key can only be recovered or purged.", "ObjectIsDeletedButRecoverable"}
	case s.hsm != strings.HasSuffix(n.Kty, "-HSM") && n.Kty != "RSA-HSM":
		return nil, badParameter("Key type %s is not supported here.", n.Kty)
	}
	v, err := s.version(n)
	if err != nil {
		return nil, badParameter("%v", err)
	}
	s.add(name, v)
	return s.bundle(name, v), nil
}

func (s *Server) rotate(name string) (any, error) {
	last, err := s.find(name, "")
	if err != nil {
		return nil, err
	}
	v, err := s.version(last.like())
	if err != nil {
		return nil, err
	}
	s.add(name, v)
	return s.bundle(name, v), nil
}

// update changes attributes and replaces tags, as far as they are given.
func (s *Server) update(name, id string, body []byte) (any, error) {
	v, err := s.find(name, id)
	if err != nil {
		return nil, err
	}
	var change struct {
		Attributes struct {
			Enabled *bool `json:"enabled"`
		} `json:"attributes"`
		Tags map[string]string `json:"tags"`
	}
	if err := json.Unmarshal(body, &change); err != nil {
		return nil, badParameter("The request body is invalid.")
	}
	if change.Attributes.Enabled != nil {
		v.enabled = *change.Attributes.Enabled
	}
	if change.Tags != nil {
		v.tags = change.Tags
	}
	return s.bundle(name, v), nil
}

func (s *Server) delete(name string) (any, error) {
	if _, err := s.find(name, ""); err != nil {
		return nil, err
	}
	s.deleted[name] = s.keys[name]
	s.deleted[name].gone = time.Now()
	delete(s.keys, name)
	return s.getDeleted(name)
}

func (s *Server) getDeleted(name string) (any, error) {
	k, ok := s.deleted[name]
	if !ok {
		return nil, notFound(name, "")
	}
	b := s.bundle(name, k.current())
	b["recoveryId"] = s.server.URL + "/deletedkeys/" + name
	b["deletedDate"] = k.gone.Unix()
	b["scheduledPurgeDate"] = k.gone.Add(retention).Unix()
	return b, nil
}

func (s *Server) recover(name string) (any, error) {
	k, ok := s.deleted[name]
	if !ok {
		return nil, notFound(name, "")
	}
	s.keys[name] = k
	delete(s.deleted, name)
	return s.get(name, "")
}

func (s *Server) purge(name string) (any, error) {
	if s.deleted[name] == nil {
		return nil, notFound(name, "")
	}
	delete(s.deleted, name)
	return map[string]any{}, nil
}

// list answers one page of keys; an item has the current version's properties
// and a name without version.
func (s *Server) list(r *http.Request) (any, error) {
	var items []any
	for _, name := range slices.Sorted(maps.Keys(s.keys)) {
		v := s.keys[name].current()
		items = append(items, map[string]any{"kid": s.kid(name, ""), "attributes": v.attributes(), "tags": v.tags})
	}
	return s.page(r, items)
}

// versions answers one page of a key's versions, in no particular order.
func (s *Server) versions(r *http.Request, name string) (any, error) {
	k, ok := s.keys[name]
	if !ok {
		return nil, notFound(name, "")
	}
	byID := map[string]*version{}
	for _, v := range k.versions {
		byID[v.id] = v
	}
	var items []any
	for _, id := range slices.Sorted(maps.Keys(byID)) {
		items = append(items, map[string]any{"kid": s.kid(name, id), "attributes": byID[id].attributes(), "tags": byID[id].tags})
	}
	return s.page(r, items)
}

func (s *Server) page(r *http.Request, items []any) (any, error) {
	query := r.URL.Query()
	start, _ := strconv.Atoi(query.Get("$skiptoken"))
	if start < 0 || start > len(items) {
		return nil, badParameter("The skip token is invalid.")
	}
	page := map[string]any{"value": items[start:min(start+pageSize, len(items))], "nextLink": nil}
	if start+pageSize < len(items) {
		query.Set("$skiptoken", strconv.Itoa(start+pageSize))
		page["nextLink"] = s.server.URL + r.URL.Path + "?" + query.Encode()
	}
	return page, nil
}

// rotationPolicy sets a policy, unless body is nil, and returns it.
func (s *Server) rotationPolicy(name string, body []byte) (any, error) {
	k, ok := s.keys[name]
	if !ok {
		return nil, notFound(name, "")
	}
	if body != nil {
		if err := checkPolicy(body); err != nil {
			return nil, err
		}
		k.policy = body
	}
	if k.policy == nil { // what a key without one has
		return json.RawMessage(`{"id":"` + s.kid(name, "") + `/rotationpolicy","lifetimeActions":[{"trigger":{"timeBeforeExpiry":"P30D"},"action":{"type":"Notify"}}],"attributes":{}}`), nil
	}
	return k.policy, nil
}

func checkPolicy(body []byte) error {
	var policy struct {
		LifetimeActions []struct {
			Trigger struct{ TimeAfterCreate, TimeBeforeExpiry string }
			Action  struct{ Type string }
		}
	}
	if err := json.Unmarshal(body, &policy); err != nil {
		return badParameter("The rotation policy is invalid.")
	}
	duration := regexp.MustCompile(`^P(\d+Y)?(\d+M)?(\d+D)?$`)
	for _, a := range policy.LifetimeActions {
		after := a.Trigger.TimeAfterCreate
		var days int
		_, _ = fmt.Sscanf(after, "P%dD", &days) // other forms are longer
		switch {
		case strings.EqualFold(a.Action.Type, "rotate") && after != "" && !duration.MatchString(after):
			return badParameter("%s is no ISO 8601 duration of years, months and days.", after)
		case days > 0 && days < 7:
			return badParameter("The rotation period must be at least 7 days.")
		}
	}
	return nil
}
