package main

import (
	"context"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
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

func (m mapper) List() ([]driver.Mapping, error) {
	list, err := m.Mapper.List()
	var out []driver.Mapping
	for _, got := range list {
		out = append(out, driver.Mapping(got))
	}
	return out, err
}
