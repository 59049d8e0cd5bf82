package gcpfake

import (
	"bytes"
	"context"
	"crypto/rand"
	"slices"
	"strings"

	"cloud.google.com/go/iam/apiv1/iampb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// policy returns a copy of a resource's policy, an empty one at first.
func (s *Server) policy(resource string) *iampb.Policy {
	if p := s.policies[resource]; p != nil {
		return proto.CloneOf(p)
	}
	return &iampb.Policy{Etag: []byte("ACAB")}
}

// known says whether a resource that has a policy exists.
func (s *Server) known(resource string) error {
	if !s.rings[resource] && s.keys[resource] == nil {
		return notFound("Resource", resource)
	}
	return nil
}

// GetIamPolicy is part of the service. A policy with conditions is shown only
// to who asks for version 3.
func (s *Server) GetIamPolicy(_ context.Context, r *iampb.GetIamPolicyRequest) (*iampb.Policy, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.known(r.GetResource()); err != nil {
		return nil, err
	}
	p := s.policy(r.GetResource())
	if r.GetOptions().GetRequestedPolicyVersion() < 3 && conditional(p) {
		return nil, invalid("The policy has conditions: ask for version 3.")
	}
	return p, nil
}

func conditional(p *iampb.Policy) bool {
	return slices.ContainsFunc(p.GetBindings(), func(b *iampb.Binding) bool { return b.GetCondition() != nil })
}

// SetIamPolicy is part of the service.
func (s *Server) SetIamPolicy(_ context.Context, r *iampb.SetIamPolicyRequest) (*iampb.Policy, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.known(r.GetResource()); err != nil {
		return nil, err
	}
	wanted := r.GetPolicy()
	if err := checkPolicy(wanted); err != nil {
		return nil, err
	}
	if etag := wanted.GetEtag(); len(etag) > 0 && !bytes.Equal(etag, s.policy(r.GetResource()).GetEtag()) {
		return nil, status.Error(codes.Aborted, "There were concurrent policy changes. Please retry the whole read-modify-write with exponential backoff.")
	}
	p := &iampb.Policy{Version: 1, Bindings: proto.CloneOf(wanted).GetBindings(), Etag: []byte(rand.Text())}
	if conditional(p) {
		p.Version = 3
	}
	s.policies[r.GetResource()] = p
	return proto.CloneOf(p), nil
}

func checkPolicy(p *iampb.Policy) error {
	switch v := p.GetVersion(); {
	case v != 0 && v != 1 && v != 3:
		return invalid("Policy version %d is invalid.", v)
	case v != 3 && conditional(p):
		return invalid("A policy with conditions must be of version 3.")
	}
	for _, b := range p.GetBindings() {
		if !strings.HasPrefix(b.GetRole(), "roles/") && !strings.Contains(b.GetRole(), "/roles/") {
			return invalid("Role %q is not supported for this resource.", b.GetRole())
		}
		for _, m := range b.GetMembers() {
			kind, name, _ := strings.Cut(m, ":")
			if !slices.Contains([]string{"serviceAccount", "user", "group", "domain", "principal", "principalSet"}, kind) || name == "" ||
				kind == "serviceAccount" && !strings.Contains(name, "@") {
				return invalid("Invalid argument: member %q", m)
			}
		}
	}
	return nil
}

// TestIamPermissions is part of the service: all but those that Deny took away.
func (s *Server) TestIamPermissions(_ context.Context, r *iampb.TestIamPermissionsRequest) (*iampb.TestIamPermissionsResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.known(r.GetResource()); err != nil {
		return nil, err
	}
	has := slices.Clone(r.GetPermissions())
	has = slices.DeleteFunc(has, func(p string) bool { return s.denied[p] > 0 })
	return &iampb.TestIamPermissionsResponse{Permissions: has}, nil
}
