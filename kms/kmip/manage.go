package kmip

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

const (
	// fleetGroup is the Object Group of every key that we made, and
	// groupPrefix with a name that of the versions of one.
	fleetGroup  = "cryptcsi"
	groupPrefix = "cryptcsi:"

	// maxKeyName bounds a Name, in bytes.
	maxKeyName = 200
	// maxVersions bounds the versions of one name that are looked at.
	maxVersions = 256
	// batch is how many keys are asked for in one message.
	batch = 32
	// unset stands for a label that was made to be changed later: some
	// servers cannot add an attribute to a key, but change one.
	unset = "none"
)

// version is one key in the server.
type version struct {
	id      string
	number  int // from its Name; 1 where the URI is an identifier
	names   []string
	groups  []string
	state   kmip.State
	aes256  bool
	created time.Time
	labels  map[string]label
}

// label is an instance of Application Specific Information.
type label struct {
	value string
	index *int32
}

func askAttributes(id string) kmip.OperationPayload {
	return &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{
		kmip.AttributeNameName, kmip.AttributeNameObjectGroup, kmip.AttributeNameState, kmip.AttributeNameInitialDate,
		kmip.AttributeNameCryptographicAlgorithm, kmip.AttributeNameCryptographicLength, kmip.AttributeNameApplicationSpecificInformation}}
}

func parseVersionOf(id string, attributes []kmip.Attribute) version {
	v := version{id: id, number: 1, labels: map[string]label{}}
	var algorithm kmip.CryptographicAlgorithm
	var bits int32
	for _, a := range attributes {
		switch value := a.AttributeValue.(type) {
		case kmip.Name:
			v.names = append(v.names, value.NameValue)
		case string:
			if a.AttributeName == kmip.AttributeNameObjectGroup {
				v.groups = append(v.groups, value)
			}
		case kmip.State:
			v.state = value
		case time.Time:
			v.created = value
		case kmip.CryptographicAlgorithm:
			algorithm = value
		case int32:
			bits = value
		case kmip.ApplicationSpecificInformation:
			if strings.HasPrefix(value.ApplicationNamespace, kms.LabelPrefix) {
				v.labels[value.ApplicationNamespace] = label{value.ApplicationData, a.AttributeIndex}
			}
		}
	}
	v.aes256 = algorithm == kmip.CryptographicAlgorithmAES && bits == 256
	return v
}

// inactive is the error of using v.
func (v *version) inactive() error {
	state := "unknown"
	if v.state != 0 {
		state = ttlv.EnumStr(v.state)
	}
	return errdefs.Errorf(errdefs.ErrDenied, "key %.64q is in state %s, must be Active", v.id, state)
}

// numbered returns the number of the version of name that v is; 0 if it is none.
func (v *version) numbered(name string) int {
	if slices.Contains(v.names, name) {
		return 1
	}
	if !slices.Contains(v.groups, groupPrefix+name) {
		return 0
	}
	for _, n := range v.names {
		if base, number := splitName(n); base == name {
			return number
		}
	}
	return 0
}

// versionName is the Name of a version.
func versionName(name string, number int) string {
	if number == 1 {
		return name
	}
	return fmt.Sprintf("%s-v%d", name, number)
}

// splitName undoes versionName: a name that is no version's has number 1.
func splitName(s string) (string, int) {
	if i := strings.LastIndex(s, "-v"); i > 0 {
		if n, err := strconv.Atoi(s[i+2:]); err == nil && n > 1 && versionName(s[:i], n) == s {
			return s[:i], n
		}
	}
	return s, 1
}

// versions returns what the server has of this KEK, the oldest first, at least
// one; ErrNotFound where it has nothing.
func (b *Backend) versions(ctx context.Context) ([]version, error) {
	if b.name == "" {
		vs, err := b.attributes(ctx, []string{b.id})
		if err == nil && len(vs) == 0 {
			err = errdefs.Errorf(errdefs.ErrNotFound, "the server has no key %s", b.id)
		}
		return vs, err
	}
	ids, err := b.locate(ctx)
	if err != nil {
		return nil, err
	}
	vs, err := b.attributes(ctx, ids)
	if err != nil {
		return nil, err
	}
	vs = versionsOf(b.name, vs)
	known := map[string]bool{}
	for _, v := range vs {
		known[v.id] = true
	}
	b.mu.Lock()
	b.known = known
	b.mu.Unlock()
	if len(vs) == 0 {
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "the server shows no AES-256 key with the Name %s", b.name)
	}
	return vs, nil
}

// versionsOf returns those of vs that are versions of name, the oldest first.
func versionsOf(name string, vs []version) []version {
	var ours []version
	for _, v := range vs {
		if v.number = v.numbered(name); v.number > 0 && v.aes256 {
			ours = append(ours, v)
		}
	}
	slices.SortFunc(ours, func(a, b version) int {
		return cmp.Or(cmp.Compare(a.number, b.number), a.created.Compare(b.created),
			cmp.Compare(len(a.id), len(b.id)), cmp.Compare(a.id, b.id)) // identifiers may be counters
	})
	return ours
}

// current returns the version that wraps.
func current(vs []version) (*version, error) {
	for i := len(vs) - 1; i >= 0; i-- {
		if vs[i].state == kmip.StateActive && vs[i].aes256 {
			return &vs[i], nil
		}
	}
	if v := &vs[len(vs)-1]; v.state != kmip.StateActive {
		return nil, v.inactive()
	}
	return nil, errdefs.Errorf(errdefs.ErrState, "key %.64q is no AES-256 key", vs[len(vs)-1].id)
}

// locate returns the identifiers of what may be versions of the name.
func (b *Backend) locate(ctx context.Context) ([]string, error) {
	byName := &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{objectType(), attribute(kmip.AttributeNameName, nameAttribute(b.name))}}
	byGroup := &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{objectType(), attribute(kmip.AttributeNameObjectGroup, groupPrefix+b.name)}}
	items, err := b.pool.do(ctx, byName, byGroup)
	if err != nil {
		return nil, err
	}
	named, err := answer[*payloads.LocateResponsePayload](&items[0])
	if err != nil {
		return nil, err
	}
	ids := named.UniqueIdentifier
	grouped, err := answer[*payloads.LocateResponsePayload](&items[1])
	switch {
	case err == nil:
		ids = append(ids, grouped.UniqueIdentifier...)
	case !errors.Is(err, errdefs.ErrInvalid): // a server without groups has version 1 only
		return nil, err
	}
	slices.Sort(ids)
	ids = slices.Compact(ids)
	if len(ids) > maxVersions {
		return nil, errdefs.Errorf(errdefs.ErrState, "the server has %d keys with the Name or Object Group of %s, must be at most %d: destroy old versions", len(ids), b.name, maxVersions)
	}
	return ids, nil
}

// attributes asks for the attributes of keys; those that are gone are left out.
func (b *Backend) attributes(ctx context.Context, ids []string) ([]version, error) {
	var vs []version
	for chunk := range slices.Chunk(ids, batch) {
		var requests []kmip.OperationPayload
		for _, id := range chunk {
			requests = append(requests, askAttributes(id))
		}
		items, err := b.pool.do(ctx, requests...)
		if err != nil {
			return nil, err
		}
		for i := range items {
			a, err := answer[*payloads.GetAttributesResponsePayload](&items[i])
			switch {
			case errors.Is(err, errdefs.ErrNotFound):
			case err != nil:
				return nil, err
			default:
				vs = append(vs, parseVersionOf(chunk[i], a.Attribute))
			}
		}
	}
	return vs, nil
}

func attribute(name kmip.AttributeName, value any) kmip.Attribute {
	return kmip.Attribute{AttributeName: name, AttributeValue: value}
}

func instance(name kmip.AttributeName, index int32, value any) kmip.Attribute {
	return kmip.Attribute{AttributeName: name, AttributeIndex: &index, AttributeValue: value}
}

func objectType() kmip.Attribute {
	return attribute(kmip.AttributeNameObjectType, kmip.ObjectTypeSymmetricKey)
}

func nameAttribute(name string) kmip.Name {
	return kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString}
}

// Permissions implements kms.Permitter with the names of KMIP's operations.
func (b *Backend) Permissions() map[string]string {
	find := "Get Attributes"
	if b.name != "" {
		find = "Locate, Get Attributes"
	}
	wrap, unwrap := find+", Encrypt", "Decrypt"
	if b.name != "" {
		unwrap = find + ", Decrypt"
	}
	if b.allowExport {
		wrap, unwrap = wrap+", Get", unwrap+", Get"
	}
	return map[string]string{
		kms.OpWrap: wrap, kms.OpUnwrap: unwrap, kms.OpCurrentKeyID: find, kms.OpDescribe: find,
		kms.OpCreate: find + ", Create, Activate", kms.OpRotate: find + ", Create, Activate",
		kms.OpSetVersion: find + ", Revoke, Destroy",
		kms.OpList:       "Locate, Get Attributes", kms.OpLabel: find + ", Modify Attribute, Add Attribute",
	}
}

// Create implements kms.Manager. A key whose making was cut off is finished.
func (b *Backend) Create(ctx context.Context, n kms.NewKey) (kms.Key, error) {
	switch base, number := splitName(b.name); {
	case b.name == "":
		return kms.Key{}, errdefs.Errorf(errdefs.ErrInvalid, "a KMIP server chooses the unique identifiers of its keys: give the URI as kmip://host/?name=<name>")
	case number != 1:
		return kms.Key{}, errdefs.Errorf(errdefs.ErrInvalid, "%s would be a version of the key %s: choose a name that does not end like this", b.name, base)
	case n.Policy != nil:
		return kms.Key{}, errdefs.Errorf(errdefs.ErrInvalid, "KMIP has no policy documents: say in the server's own configuration who may use the key")
	case n.RotationPeriod != 0:
		return kms.Key{}, errdefs.Errorf(errdefs.ErrInvalid, "a KMIP server does not rotate by itself: run `key-service kek rotate` at intervals")
	}
	vs, err := b.versions(ctx)
	if errors.Is(err, errdefs.ErrNotFound) {
		made := b.make(ctx, 1, n.Labels)
		if vs, err = b.versions(ctx); err != nil {
			return kms.Key{}, cmp.Or(made, err)
		}
		// Somebody else may have made it at the same moment: what is there counts.
	}
	if err != nil {
		return kms.Key{}, err
	}
	key := b.key(b.name, vs)
	for _, l := range []string{kms.LabelCluster, kms.LabelPurpose} {
		if key.Labels[l] != n.Labels[l] {
			return kms.Key{}, errdefs.Errorf(errdefs.ErrExists, "the key %s exists and has the label %s=%q, not %q", b.name, l, key.Labels[l], n.Labels[l])
		}
	}
	if _, err := current(vs); err != nil && vs[len(vs)-1].state != kmip.StatePreActive {
		return kms.Key{}, errdefs.Errorf(errdefs.ErrExists, "the key %s exists and no version of it can be used (%w): rotate it", b.name, err)
	}
	return b.activated(ctx, vs)
}

// Describe implements kms.Manager.
func (b *Backend) Describe(ctx context.Context) (kms.Key, error) {
	vs, err := b.versions(ctx)
	if err != nil {
		return kms.Key{}, err
	}
	return b.key(b.name, vs), nil
}

// Rotate implements kms.Manager. A version whose making was cut off is finished.
func (b *Backend) Rotate(ctx context.Context) (kms.Key, error) {
	if b.name == "" {
		return kms.Key{}, errdefs.Errorf(errdefs.ErrInvalid, "a unique identifier is one key for ever: rotate by name (kmip://host/?name=<name>), or create another key, put its identifier into the URI and rewrap")
	}
	vs, err := b.versions(ctx)
	if err != nil {
		return kms.Key{}, err
	}
	last := vs[len(vs)-1]
	if last.state != kmip.StatePreActive {
		if err := b.make(ctx, last.number+1, b.key(b.name, vs).Labels); err != nil {
			return kms.Key{}, err
		}
		if vs, err = b.versions(ctx); err != nil {
			return kms.Key{}, err
		}
	}
	return b.activated(ctx, vs)
}

// activated activates the last version, if it never was, and returns the key.
func (b *Backend) activated(ctx context.Context, vs []version) (kms.Key, error) {
	last := vs[len(vs)-1]
	if last.state != kmip.StatePreActive {
		return b.key(b.name, vs), nil
	}
	_, refused := ask[*payloads.ActivateResponsePayload](ctx, b.pool, &payloads.ActivateRequestPayload{UniqueIdentifier: last.id})
	vs, err := b.versions(ctx)
	if err != nil {
		return kms.Key{}, cmp.Or(refused, err)
	}
	active := slices.ContainsFunc(vs, func(v version) bool { return v.id == last.id && v.state == kmip.StateActive })
	if refused != nil && !active { // else somebody was faster
		return kms.Key{}, refused
	}
	return b.key(b.name, vs), nil
}

// make creates a version, not yet active.
func (b *Backend) make(ctx context.Context, number int, labels map[string]string) error {
	attributes := []kmip.Attribute{
		attribute(kmip.AttributeNameCryptographicAlgorithm, kmip.CryptographicAlgorithmAES),
		attribute(kmip.AttributeNameCryptographicLength, int32(256)),
		attribute(kmip.AttributeNameCryptographicUsageMask, kmip.CryptographicUsageEncrypt|kmip.CryptographicUsageDecrypt),
		attribute(kmip.AttributeNameName, nameAttribute(versionName(b.name, number))),
		instance(kmip.AttributeNameObjectGroup, 0, fleetGroup),
		instance(kmip.AttributeNameObjectGroup, 1, groupPrefix+b.name),
	}
	for i, information := range labelAttributes(labels) {
		attributes = append(attributes, instance(kmip.AttributeNameApplicationSpecificInformation, int32(i), information))
	}
	err := error(nil)
	for _, guards := range b.guards() {
		_, err = ask[*payloads.CreateResponsePayload](ctx, b.pool, &payloads.CreateRequestPayload{
			ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: append(slices.Clip(attributes), guards...)}})
		if !errors.Is(err, errdefs.ErrInvalid) {
			break // made, or refused for another reason than an attribute
		}
	}
	return err
}

// guards are the attributes that keep a key in the server, those first that
// the fewest servers know.
func (b *Backend) guards() [][]kmip.Attribute {
	if b.allowExport {
		return [][]kmip.Attribute{nil}
	}
	sensitive, extractable := attribute(kmip.AttributeNameSensitive, true), attribute(kmip.AttributeNameExtractable, false)
	return [][]kmip.Attribute{{sensitive, extractable}, {sensitive}, nil}
}

// labelAttributes are the labels as Application Specific Information, with a
// place for the time of last use.
func labelAttributes(labels map[string]string) []kmip.ApplicationSpecificInformation {
	var all []kmip.ApplicationSpecificInformation
	for name, value := range labels {
		all = append(all, kmip.ApplicationSpecificInformation{ApplicationNamespace: name, ApplicationData: value})
	}
	if _, ok := labels[kms.LabelActive]; !ok && len(labels) > 0 {
		all = append(all, kmip.ApplicationSpecificInformation{ApplicationNamespace: kms.LabelActive, ApplicationData: unset})
	}
	return all
}

// SetVersion implements kms.Manager: it can destroy.
func (b *Backend) SetVersion(ctx context.Context, keyID string, s kms.VersionState) error {
	if s != kms.Destroyed && s != kms.Destroying {
		return errdefs.Errorf(errdefs.ErrInvalid, "KMIP knows no way back from a revoked key, so that versions are not %s: rewrap, then destroy the old version", s)
	}
	vs, err := b.versions(ctx)
	if err != nil {
		return err
	}
	if keyID == "" {
		for i := range vs { // the current one last
			if err := b.destroy(ctx, &vs[i]); err != nil {
				return err
			}
		}
		return nil
	}
	i := slices.IndexFunc(vs, func(v version) bool { return v.id == keyID })
	if i < 0 {
		return errdefs.Errorf(errdefs.ErrNotFound, "%.64q is no version of this key, or no longer", keyID)
	}
	if v, err := current(vs); err == nil && v.id == keyID {
		return errdefs.Errorf(errdefs.ErrState, "%s is the current version: rotate first", keyID)
	}
	return b.destroy(ctx, &vs[i])
}

// destroy revokes and destroys a version. What was done already is no error.
func (b *Backend) destroy(ctx context.Context, v *version) error {
	switch v.state {
	case kmip.StateDestroyed, kmip.StateDestroyedCompromised:
		return nil
	case kmip.StateActive:
		reason := kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeCessationOfOperation}
		if _, err := ask[*payloads.RevokeResponsePayload](ctx, b.pool, &payloads.RevokeRequestPayload{UniqueIdentifier: v.id, RevocationReason: reason}); err != nil {
			return err
		}
	}
	_, err := ask[*payloads.DestroyResponsePayload](ctx, b.pool, &payloads.DestroyRequestPayload{UniqueIdentifier: v.id})
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	return err
}

// List implements kms.Fleet.
func (b *Backend) List(ctx context.Context) ([]kms.Key, error) {
	found, err := ask[*payloads.LocateResponsePayload](ctx, b.pool, &payloads.LocateRequestPayload{
		Attribute: []kmip.Attribute{objectType(), attribute(kmip.AttributeNameObjectGroup, fleetGroup)}})
	if err != nil {
		return nil, err
	}
	all, err := b.attributes(ctx, found.UniqueIdentifier)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, v := range all {
		for _, g := range v.groups {
			if name, ok := strings.CutPrefix(g, groupPrefix); ok {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	var keys []kms.Key
	for _, name := range slices.Compact(names) {
		if vs := versionsOf(name, all); len(vs) > 0 {
			if k := b.key(name, vs); len(k.Labels) > 0 {
				keys = append(keys, k)
			}
		}
	}
	return keys, nil
}

// Label implements kms.Fleet: the labels are those of the current version.
func (b *Backend) Label(ctx context.Context, labels map[string]string) error {
	vs, err := b.versions(ctx)
	if err != nil {
		return err
	}
	v, err := current(vs)
	if err != nil {
		return err
	}
	for name, value := range labels {
		information := kmip.ApplicationSpecificInformation{ApplicationNamespace: name, ApplicationData: value}
		a := attribute(kmip.AttributeNameApplicationSpecificInformation, information)
		if old, ok := v.labels[name]; ok {
			a.AttributeIndex = old.index
			_, err = ask[*payloads.ModifyAttributeResponsePayload](ctx, b.pool, &payloads.ModifyAttributeRequestPayload{UniqueIdentifier: v.id, Attribute: a})
		} else {
			_, err = ask[*payloads.AddAttributeResponsePayload](ctx, b.pool, &payloads.AddAttributeRequestPayload{UniqueIdentifier: v.id, Attribute: a})
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// key is what Describe says of versions; name is "" where the URI names an identifier.
func (b *Backend) key(name string, vs []version) kms.Key {
	u := url.URL{Scheme: Scheme, Host: b.pool.addr, Path: "/" + b.id}
	if name != "" {
		u = url.URL{Scheme: Scheme, Host: b.pool.addr, Path: "/", RawQuery: "name=" + strings.ReplaceAll(url.PathEscape(name), "&", "%26")}
	}
	k := kms.Key{URI: u.String(), Created: vs[0].created, Labels: map[string]string{}}
	now, err := current(vs)
	if err != nil {
		now = &vs[len(vs)-1]
	}
	for label, l := range now.labels {
		if l.value != unset {
			k.Labels[label] = l.value
		}
	}
	for i := range vs {
		k.Versions = append(k.Versions, kms.Version{
			KeyID: vs[i].id, State: vs[i].stateOf(), Current: err == nil && &vs[i] == now, Created: vs[i].created})
	}
	return k
}

func (v *version) stateOf() kms.VersionState {
	switch v.state {
	case kmip.StateActive:
		return kms.Enabled
	case kmip.StateDestroyed, kmip.StateDestroyedCompromised:
		return kms.Destroyed
	}
	return kms.Disabled
}
