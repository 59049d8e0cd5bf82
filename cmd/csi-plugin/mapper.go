package main

import (
	"context"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// mapper lets a driver work with a cryptmapper.Mapper. The two packages do not
// know each other; their types have the same shape.
type mapper struct{ *cryptmapper.Mapper }

func (m mapper) Open(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	got, err := m.Mapper.Open(ctx, cryptmapper.Volume(v), d)
	return driver.Mapping(got), err
}

func (m mapper) MarkMade(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	got, err := m.Mapper.MarkMade(ctx, cryptmapper.Volume(v), d)
	return driver.Mapping(got), err
}

func (m mapper) Resize(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	got, err := m.Mapper.Resize(ctx, cryptmapper.Volume(v), d)
	return driver.Mapping(got), err
}

func (m mapper) Finish(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	got, err := m.Mapper.Finish(ctx, cryptmapper.Volume(v), d)
	return driver.Mapping(got), err
}

func (m mapper) List() ([]driver.Mapping, error) {
	list, err := m.Mapper.List()
	var out []driver.Mapping
	for _, got := range list {
		out = append(out, driver.Mapping(got))
	}
	return out, err
}

// HeaderUUID lets a driver find the key of a volume that Constellation made.
func (m mapper) HeaderUUID(ctx context.Context, device string) (string, error) {
	copies, err := m.Peek(ctx, device)
	if err != nil {
		return "", err
	}
	if len(copies) == 0 {
		return "", errdefs.Errorf(errdefs.ErrState, "there is no LUKS header on %s; it will not be formatted", device)
	}
	for _, c := range copies {
		switch {
		case c.DEKID != "":
			return "", errdefs.Errorf(errdefs.ErrState, "the volume on %s is not as Constellation made it, its key is %s: serve it with a driver that asks for keys of cryptcsi", device, c.DEKID)
		case c.UUID != copies[0].UUID:
			return "", errdefs.Errorf(errdefs.ErrState, "the two header copies on %s have different UUIDs, %q and %q", device, copies[0].UUID, c.UUID)
		}
	}
	if err := dek.CheckUUID(copies[0].UUID); err != nil {
		return "", errdefs.Errorf(errdefs.ErrState, "the header on %s: %w", device, err)
	}
	return copies[0].UUID, nil
}
