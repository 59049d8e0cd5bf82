package cryptmapper

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Prefix starts the name of every mapping that the driver makes.
const Prefix = "cryptcsi-"

// TemporaryPrefix starts the names that libcryptsetup gives to what it needs
// for a moment.
const TemporaryPrefix = "temporary-cryptsetup-"

// integritySuffix is what libcryptsetup appends to a mapping's name for the
// dm-integrity layer below it.
const integritySuffix = "_dif"

// IntegrityName returns the name of the dm-integrity layer of a mapping.
func IntegrityName(name string) string { return name + integritySuffix }

// Stack is a mapping and what lies below it, as the kernel's tables show it.
type Stack struct {
	Top       dm.Info
	Lines     []Line  // of a linear mapping over the dm-crypt one; nil where Top is that
	Lower     dm.Info // the dm-crypt mapping
	Crypt     CryptTable
	Integrity *IntegrityTable // nil without such a layer
	Clone     *CloneTable     // nil without such a layer
}

// DiscardOption is the one in dm-crypt's table that lets discards through.
const DiscardOption = "allow_discards"

// PerformanceOptions are those in dm-crypt's table that say on which CPUs and in
// which contexts it works, and nothing of what it does.
func PerformanceOptions() []string {
	return []string{"no_read_workqueue", "no_write_workqueue", "same_cpu_crypt", "submit_from_crypt_cpus"}
}

// CryptTable is a dm-crypt table line. Sectors have 512 bytes.
type CryptTable struct {
	Length   int64 // sectors
	Cipher   string
	Key      string // a keyring reference ":size:type:description"
	IVOffset int64
	Device   dm.Number
	Offset   int64 // sectors
	Options  []string
	// Performance holds the options that are in PerformanceOptions. Options has
	// all others; both are sorted.
	Performance []string
}

// dm-integrity's modes, as its table names them, of those that ours can have.
const (
	ModeJournal = "J"
	ModeDirect  = "D"
)

// IntegrityTable is a dm-integrity table line and its status.
type IntegrityTable struct {
	Info           dm.Info
	Length         int64 // sectors
	Device         dm.Number
	Offset         int64 // sectors
	TagSize        int
	Mode           string // ModeJournal, ModeDirect
	JournalSectors int64
	Interleave     int
	Options        []string // those without a number, sorted
	Mismatches     int64    // authentication failures since activation
	Provided       int64    // data sectors that the superblock provides
}

// ReadStack reads what the kernel knows of a mapping. dm.ErrNotFound where
// there is none; ErrState where it is not a mapping of ours.
func ReadStack(name string) (Stack, error) {
	// A layer may go while the mapping stays: then there is another stack.
	for range 8 {
		s, err := readStack(name)
		if !errors.Is(err, dm.ErrNotFound) {
			return s, err
		}
		if _, err := dm.Status(name); err != nil {
			return s, err
		}
	}
	return Stack{}, errdefs.Errorf(errdefs.ErrState, "mapping %s has layers that come and go", name)
}

func readStack(name string) (Stack, error) {
	var s Stack
	var err error
	if s.Top, err = dm.Status(name); err != nil {
		return s, err
	}
	lower := name
	if s.Lines, err = ReadLines(name); err != nil {
		return s, err
	}
	if s.Lines != nil {
		lower = CryptName(name)
		if s.Clone, err = ReadClone(name); err != nil {
			return s, err
		}
	}
	below, err := ReadLower(lower)
	if s.Lines != nil && errors.Is(err, dm.ErrNotFound) {
		return s, errdefs.Errorf(errdefs.ErrState, "mapping %s is linear and there is no %s below it: it was not made by cryptcsi", name, lower)
	}
	s.Lower, s.Crypt, s.Integrity = below.Lower, below.Crypt, below.Integrity
	return s, err
}

// ReadLower reads a dm-crypt mapping and the dm-integrity one below it. There is
// no Top in what it returns.
func ReadLower(name string) (Stack, error) {
	var s Stack
	var err error
	if s.Lower, err = dm.Status(name); err != nil {
		return s, err
	}
	line, err := oneTarget(name, "crypt")
	if err != nil {
		return s, err
	}
	if s.Crypt, err = parseCrypt(line); err != nil {
		return s, errdefs.Errorf(errdefs.ErrState, "mapping %s: %w", name, err)
	}
	below, err := dm.Status(IntegrityName(name))
	if errors.Is(err, dm.ErrNotFound) || err == nil && below.Number != s.Crypt.Device {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	s.Integrity, err = readIntegrity(IntegrityName(name), below)
	return s, err
}

// LoadedIntegrity reads the dm-integrity table that Resume would make the active
// one of a mapping.
func LoadedIntegrity(name string) (IntegrityTable, error) {
	table, err := dm.LoadedTable(name)
	if err != nil {
		return IntegrityTable{}, err
	}
	if len(table) != 1 || table[0].Type != "integrity" {
		return IntegrityTable{}, errdefs.Errorf(errdefs.ErrState, "mapping %s has no dm-integrity table loaded", name)
	}
	t, err := parseIntegrity(table[0])
	if err != nil {
		return t, errdefs.Errorf(errdefs.ErrState, "mapping %s: %w", name, err)
	}
	return t, nil
}

func readIntegrity(name string, info dm.Info) (*IntegrityTable, error) {
	line, err := oneTarget(name, "integrity")
	if err != nil {
		return nil, err
	}
	t, err := parseIntegrity(line)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrState, "mapping %s: %w", name, err)
	}
	t.Info = info
	status, err := dm.TargetStatus(name)
	if err != nil || len(status) != 1 {
		return nil, errdefs.Errorf(errdefs.ErrState, "mapping %s has no status: %w", name, err)
	}
	if _, err := fmt.Sscan(status[0].Params, &t.Mismatches, &t.Provided); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrState, "mapping %s has the status %q: %w", name, status[0].Params, err)
	}
	return &t, nil
}

func oneTarget(name, kind string) (dm.Target, error) {
	table, err := dm.Table(name)
	if err != nil {
		return dm.Target{}, err
	}
	if len(table) != 1 || table[0].Type != kind || table[0].Start != 0 {
		return dm.Target{}, errdefs.Errorf(errdefs.ErrState, "mapping %s is not one dm-%s target: it was not made by cryptcsi, or not finished", name, kind)
	}
	return table[0], nil
}

// parseCrypt reads "<cipher> <key> <iv offset> <device> <offset> [<n> <option>…]".
func parseCrypt(t dm.Target) (CryptTable, error) {
	c := CryptTable{Length: int64(t.Length)}
	f := strings.Fields(t.Params)
	if len(f) < 5 {
		return c, fmt.Errorf("dm-crypt table with %d fields", len(f))
	}
	var err error
	c.Cipher, c.Key = f[0], f[1]
	if c.Device, err = dm.ParseNumber(f[3]); err != nil {
		return c, err
	}
	if c.IVOffset, err = strconv.ParseInt(f[2], 10, 64); err != nil {
		return c, fmt.Errorf("dm-crypt table: %w", err)
	}
	if c.Offset, err = strconv.ParseInt(f[4], 10, 64); err != nil {
		return c, fmt.Errorf("dm-crypt table: %w", err)
	}
	for _, option := range f[min(6, len(f)):] {
		if slices.Contains(PerformanceOptions(), option) {
			c.Performance = append(c.Performance, option)
		} else {
			c.Options = append(c.Options, option)
		}
	}
	slices.Sort(c.Options)
	slices.Sort(c.Performance)
	return c, nil
}

// parseIntegrity reads "<device> <offset> <tag size> <mode> <n> <option>…".
func parseIntegrity(t dm.Target) (IntegrityTable, error) {
	i := IntegrityTable{Length: int64(t.Length)}
	f := strings.Fields(t.Params)
	if len(f) < 5 {
		return i, fmt.Errorf("dm-integrity table with %d fields", len(f))
	}
	var err error
	if i.Device, err = dm.ParseNumber(f[0]); err != nil {
		return i, err
	}
	if i.Offset, err = strconv.ParseInt(f[1], 10, 64); err != nil {
		return i, fmt.Errorf("dm-integrity table: %w", err)
	}
	if i.TagSize, err = strconv.Atoi(f[2]); err != nil {
		return i, fmt.Errorf("dm-integrity table: %w", err)
	}
	i.Mode = f[3]
	for _, option := range f[5:] {
		key, value, ok := strings.Cut(option, ":")
		if !ok {
			i.Options = append(i.Options, option)
		}
		switch key {
		case "journal_sectors":
			i.JournalSectors, err = strconv.ParseInt(value, 10, 64)
		case "interleave_sectors":
			i.Interleave, err = strconv.Atoi(value)
		}
		if err != nil {
			return i, fmt.Errorf("dm-integrity table: %w", err)
		}
	}
	slices.Sort(i.Options)
	return i, nil
}

// Mapping returns the stack in the words of Mapper's callers.
func (s Stack) Mapping() Mapping {
	m := Mapping{
		Name:        s.Top.Name,
		Path:        dm.Path(s.Top.Name),
		Number:      s.Top.Number.String(),
		Backing:     s.Crypt.Device.String(),
		Size:        s.Size(),
		ReadOnly:    s.Top.ReadOnly,
		Cipher:      s.Crypt.Cipher,
		Discard:     slices.Contains(s.Crypt.Options, DiscardOption),
		Performance: strings.Join(s.Crypt.Performance, ","),
		Suspended:   s.Top.Suspended || s.Lower.Suspended,
	}
	if c := s.Clone; c != nil {
		m.Hydrated, m.Regions, m.Hydrating, m.Failed = c.Hydrated, c.Regions, c.Hydrating, !c.Sound
		m.Suspended = m.Suspended || c.Info.Suspended
	}
	if s.Integrity != nil {
		m.Integrity = dek.IntegrityHMAC
		m.Direct = s.Integrity.Mode == ModeDirect
		m.Backing = s.Integrity.Device.String()
		m.Suspended = m.Suspended || s.Integrity.Info.Suspended
	}
	return m
}

// Size returns the length of the top mapping in bytes.
func (s Stack) Size() int64 {
	if s.Lines == nil {
		return s.Crypt.Length * 512
	}
	var n int64
	for _, l := range s.Lines {
		n += l.Length * 512
	}
	return n
}

// Bottom returns the raw device that the stack sits on.
func (s Stack) Bottom() dm.Number {
	if s.Integrity != nil {
		return s.Integrity.Device
	}
	return s.Crypt.Device
}

// list returns every mapping of ours that can be described; those that are
// half-made are left out.
func list() ([]Mapping, error) {
	all, err := dm.List()
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	var ours []Mapping
	for _, m := range all {
		if !strings.HasPrefix(m.Name, Prefix) || isLayer(m.Name) {
			continue
		}
		s, err := ReadStack(m.Name)
		if errors.Is(err, dm.ErrNotFound) {
			continue
		}
		if err != nil {
			ours = append(ours, Mapping{Name: m.Name, Path: dm.Path(m.Name), Number: m.Number.String()})
			continue
		}
		ours = append(ours, s.Mapping())
	}
	return ours, nil
}
