package cryptmapper

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// CloneArea returns, for an authenticated device of length bytes (what
// dm-integrity provides: the volume and the area together), the region size
// that dm-clone gets and how many bytes at the end are reserved for its
// metadata. The volume has the rest.
//
// dm-clone keeps one bit for each region, and while it writes them anew both
// states. Small regions make small writes cheap, because a write that does not
// cover its region copies the rest; above 256 GiB the bits would be too many.
func CloneArea(length int64) (region int, reserved int64) {
	switch {
	case length <= 256<<30:
		region = 4 << 10
	case length <= 1<<40:
		region = 16 << 10
	default:
		region = 64 << 10
	}
	regions := (length + int64(region) - 1) / int64(region)
	area := 2*((regions+7)/8) + 2<<20
	return region, (area + 4095) &^ 4095
}

// KernelHasClone returns nil where the kernel has what volumes need to be ready
// before every sector has its tag, after it was asked to load the modules; else
// the error says what is missing.
func KernelHasClone() error {
	for _, target := range []string{"linear", "zero", "clone"} {
		if err := dm.NeedTarget(target); err != nil {
			return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
		}
	}
	return nil
}

// hydrate is Mapper.Hydrate.
func hydrate(name string, on bool) error {
	if err := CheckName(name); err != nil {
		return err
	}
	message := "disable_hydration"
	if on {
		message = "enable_hydration"
	}
	err := dm.Message(CloneName(name), message)
	if err != nil && !errors.Is(err, dm.ErrNotFound) {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	return nil
}

// Line is one line of a linear mapping's table, in sectors of 512 bytes.
type Line struct {
	Start, Length int64
	Device        dm.Number
	Offset        int64
}

// CloneTable is a dm-clone mapping, what it is made of, and its status.
type CloneTable struct {
	Info              dm.Info
	Length            int64 // sectors
	Meta, Data        Line  // the linear mappings of its metadata and of what it writes to
	Region            int64 // sectors
	Hydrated, Regions uint64
	Hydrating         bool
	// Sound is false where the kernel has given up writing the metadata.
	Sound bool
}

// ReadLines reads the table of a linear mapping; nil for any other.
func ReadLines(name string) ([]Line, error) {
	table, err := dm.Table(name)
	if err != nil {
		return nil, err
	}
	var lines []Line
	for _, t := range table {
		if t.Type != "linear" {
			return nil, nil
		}
		l := Line{Start: int64(t.Start), Length: int64(t.Length)}
		device, offset, _ := strings.Cut(t.Params, " ")
		if l.Device, err = dm.ParseNumber(device); err == nil {
			l.Offset, err = strconv.ParseInt(offset, 10, 64)
		}
		if err != nil {
			return nil, errdefs.Errorf(errdefs.ErrState, "mapping %s has the table %q: %w", name, t.Params, err)
		}
		lines = append(lines, l)
	}
	return lines, nil
}

// ReadClone reads the dm-clone layer below a mapping, nil where there is none, or
// one that is being made.
func ReadClone(name string) (*CloneTable, error) {
	info, err := dm.Status(CloneName(name))
	if errors.Is(err, dm.ErrNotFound) || err == nil && !info.Live {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	line, err := oneTarget(CloneName(name), "clone")
	if err != nil {
		return nil, err
	}
	c := &CloneTable{Info: info, Length: int64(line.Length)}
	if err := c.parts(name, line.Params); err != nil {
		return nil, err
	}
	status, err := dm.TargetStatus(CloneName(name))
	if err != nil {
		return nil, err
	}
	if len(status) != 1 {
		return nil, errdefs.Errorf(errdefs.ErrState, "mapping %s has no status", CloneName(name))
	}
	return c, c.parse(status[0].Params)
}

// parts reads "<metadata> <destination> <source> …" and what these are.
func (c *CloneTable) parts(name, params string) error {
	fields := strings.Fields(params)
	if len(fields) < 4 {
		return errdefs.Errorf(errdefs.ErrState, "mapping %s has the table %q", CloneName(name), params)
	}
	for i, layer := range []string{MetaName(name), DataName(name), ZeroName(name)} {
		info, err := dm.Status(layer)
		if err != nil {
			return errdefs.Errorf(errdefs.ErrState, "%w: %s", err, layer)
		}
		if fields[i] != info.Number.String() {
			return errdefs.Errorf(errdefs.ErrState, "mapping %s lies on %s and not on %s", CloneName(name), fields[i], layer)
		}
	}
	if _, err := oneTarget(ZeroName(name), "zero"); err != nil {
		return err
	}
	for layer, into := range map[string]*Line{MetaName(name): &c.Meta, DataName(name): &c.Data} {
		lines, err := ReadLines(layer)
		if err != nil {
			return err
		}
		if len(lines) != 1 {
			return errdefs.Errorf(errdefs.ErrState, "mapping %s is not one linear line", layer)
		}
		*into = lines[0]
	}
	return nil
}

// parse reads a status, "<metadata block size> <used>/<total blocks> <region
// size> <hydrated>/<total regions> <hydrating now> <n> <feature>… <n> <core
// argument>… <mode>". One that has failed says "Fail" and nothing else, one that
// cannot read its metadata "Error".
func (c *CloneTable) parse(status string) error {
	if status == "Fail" || status == "Error" {
		return nil
	}
	var block, used, total, now int64
	_, err := fmt.Sscanf(status, "%d %d/%d %d %d/%d %d", &block, &used, &total, &c.Region, &c.Hydrated, &c.Regions, &now)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrState, "mapping %s has the status %q: %w", c.Info.Name, status, err)
	}
	words := strings.Fields(status)
	c.Sound = words[len(words)-1] == "rw"
	c.Hydrating = !slices.Contains(words, "no_hydration")
	return nil
}
