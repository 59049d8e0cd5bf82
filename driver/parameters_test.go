package driver_test

import (
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/dek"
)

// The record says whether a volume may discard; a copy may say it otherwise.
func TestDiscardParameter(t *testing.T) {
	p := newPlant(t).start()
	p.mustCreate(request("src", with("cryptcsi.io/discard", "true")))
	if d := p.dek(volumeDEK("vol-src")); d.Spec != (dek.Spec{Name: "src", Cipher: dek.CipherXTS, Discard: true}) {
		t.Errorf("spec = %+v", d.Spec)
	}
	_, err := p.create(request("src"))
	p.refused("without it this time", err, codes.AlreadyExists)
	p.formatted(volumeDEK("vol-src"))
	_, err = p.snapshot("s", "vol-src")
	p.ok("CreateSnapshot", err)
	p.mustCreate(request("copy", of("snap-s", ""), with("cryptcsi.io/discard", "false")))
	if d := p.dek(volumeDEK("vol-copy")); d.Spec.Discard || d.State != dek.Rotating {
		t.Errorf("the copy's record: %+v", d)
	}
	p.lawful()
}

// The mapping obeys the record.
func TestDiscardOnANode(t *testing.T) {
	for _, discard := range []bool{false, true} {
		m := newMachine(t)
		m.createDEK(dek.Spec{Cipher: dek.CipherXTS, Discard: discard})
		m.start()
		m.ok("stage", m.stage(mountCap("ext4")))
		if got := m.mapping().Discard; got != discard {
			t.Errorf("the record says %v, the mapping %v", discard, got)
		}
		m.ok("unstage", m.unstage())
		m.clean()
	}
}
