package kmip

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

func TestVersionNames(t *testing.T) {
	for _, name := range []string{"a", "a-v", "a-v1", "a-v02", "a-v2-", "-v2", "a-vx"} {
		if base, n := splitName(name); base != name || n != 1 {
			t.Errorf("%s is taken for version %d of %s", name, n, base)
		}
	}
	for n := 2; n < 200; n += 9 {
		if base, got := splitName(versionName("a-v2", n)); base != "a-v2" || got != n {
			t.Errorf("%s is version %d of %s", versionName("a-v2", n), got, base)
		}
	}
}

// TestVersionsOf: which keys are versions, and in which order.
func TestVersionsOf(t *testing.T) {
	const ours = groupPrefix + "k"
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	all := []version{
		{id: "10", names: []string{"k-v2"}, groups: []string{fleetGroup, ours}, created: at(5), aes256: true},
		{id: "9", names: []string{"k-v2"}, groups: []string{fleetGroup, ours}, created: at(5), aes256: true},
		{id: "3", names: []string{"k-v10"}, groups: []string{ours}, created: at(1), aes256: true},
		{id: "8", names: []string{"other", "k"}, created: at(9), aes256: true},
		{id: "7", names: []string{"k"}, created: at(8), aes256: true},
		{id: "foreign group", names: []string{"k-v3"}, groups: []string{groupPrefix + "other"}, aes256: true},
		{id: "no group", names: []string{"k-v4"}, aes256: true},
		{id: "no name", groups: []string{ours}, aes256: true},
		{id: "another name", names: []string{"x-v4"}, groups: []string{ours}, aes256: true},
		{id: "short", names: []string{"k"}},
	}
	var got []string
	for _, v := range versionsOf("k", all) {
		got = append(got, v.id)
	}
	if want := []string{"7", "8", "9", "10", "3"}; !slices.Equal(got, want) {
		t.Errorf("versions %v, want %v", got, want)
	}
}

// FuzzParse: no answer brings the process down.
func FuzzParse(f *testing.F) {
	for _, p := range []kmip.OperationPayload{
		&payloads.EncryptResponsePayload{UniqueIdentifier: "1", Data: make([]byte, 64), AuthenticatedEncryptionTag: make([]byte, 16)},
		&payloads.LocateResponsePayload{UniqueIdentifier: []string{"1", "2"}},
		&payloads.DiscoverVersionsResponsePayload{ProtocolVersion: []kmip.ProtocolVersion{kmip.V1_4, kmip.V1_0}},
		&payloads.GetAttributesResponsePayload{UniqueIdentifier: "1", Attribute: []kmip.Attribute{
			attribute(kmip.AttributeNameState, kmip.StateActive), attribute(kmip.AttributeNameName, nameAttribute("k"))}},
	} {
		f.Add(ttlv.MarshalTTLV(&kmip.ResponseMessage{
			Header:    kmip.ResponseHeader{ProtocolVersion: kmip.V1_4, TimeStamp: time.Unix(1, 0), BatchCount: 1},
			BatchItem: []kmip.ResponseBatchItem{{Operation: p.Operation(), ResponsePayload: p}}}))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		items, err := parse(b)
		if err == nil && len(items) == 0 {
			t.Error("an answer without items")
		}
		for i := range items {
			if refused := failed(&items[i]); refused != nil {
				_ = refused.Error()
			}
			if a, err := answer[*payloads.GetAttributesResponsePayload](&items[i]); err == nil {
				_ = fmt.Sprint(parseVersionOf("1", a.Attribute))
			}
		}
	})
}
