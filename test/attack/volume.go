package main

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/secret"
)

// What lies on every volume, at these places of its mapping: one block each.
const (
	blockSize = 4096
	firstAt   = 1 * mib
	secondAt  = 2 * mib
)

func first() []byte  { return block("The first block of a pod's data. ") }
func second() []byte { return block("Another block, of other contents ") }
func older() []byte  { return block("What stood there some time before ") }

// block fills one with a text.
func block(text string) []byte { return bytes.Repeat([]byte(text), blockSize/len(text)+1)[:blockSize] }

// volume is one that cryptcsi made, as its disk was at some moments, and what
// its record says at the end.
type volume struct {
	d dek.DEK

	unmade string // backing file when it was formatted and not finished yet
	live   string // in use, just after older was written in the place of first
	older  string // finished, holding older in the place of first
	disk   string // as it is now

	ours, plain table // the mapping of the disk as it is now, opened by either
}

// make makes a volume. size is that of its device.
func (s *suite) make(name string, id dek.ID, size int64, integrity dek.Integrity) (*volume, error) {
	key := secret.New(dek.Size)
	_, _ = rand.Read(key.Expose())
	v := &volume{d: dek.DEK{
		ID: id, State: dek.Prepared, Key: key,
		Spec:  dek.Spec{Cipher: dek.CipherXTS, Integrity: integrity},
		Claim: dek.Claim{Node: "node-1", UUID: dek.NewUUID()},
	}}
	at := func(moment string) string { return filepath.Join(s.dir, name+"-"+moment) }
	v.unmade, v.live, v.older, v.disk = at("unmade"), at("live"), at("older"), at("disk")
	file, err := os.Create(v.disk)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(file.Truncate(size), file.Close()); err != nil {
		return nil, err
	}
	dev, detach, err := loop(v.disk, false)
	if err != nil {
		return nil, err
	}
	defer detach()
	cv := cryptmapper.Volume{Name: s.mapping, Device: dev}
	if _, err := s.mapper.Open(s.ctx, cv, v.d); err != nil {
		return nil, err
	}
	if err := errors.Join(s.close(), copyDisk(v.unmade, v.disk)); err != nil {
		return nil, err
	}
	m, err := s.mapper.Open(s.ctx, cv, v.d)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(write(m.Path, secondAt, second()), write(m.Path, firstAt, older()), copyDisk(v.live, v.disk)); err != nil {
		return nil, err
	}
	if m, err = s.mapper.MarkMade(s.ctx, cv, v.d); err != nil {
		return nil, err
	}
	v.d.State, v.d.Header = dek.Formatted, m.Header
	if err := s.age(v, cv); err != nil {
		return nil, err
	}
	detach()
	return v, s.seePlain(v)
}

// age closes the finished volume, keeps its disk as the older one, and gives it
// what it holds now.
func (s *suite) age(v *volume, cv cryptmapper.Volume) error {
	if err := errors.Join(s.close(), copyDisk(v.older, v.disk)); err != nil {
		return err
	}
	m, err := s.mapper.Open(s.ctx, cv, v.d)
	if err != nil {
		return err
	}
	if err := write(m.Path, firstAt, first()); err != nil {
		return err
	}
	if v.ours, err = readTable(s.mapping); err != nil {
		return err
	}
	return s.close()
}

// seePlain opens the volume with plain cryptsetup: a scratch copy, because even
// that may write.
func (s *suite) seePlain(v *volume) error {
	scratch := v.disk + "-scratch"
	if err := copyDisk(scratch, v.disk); err != nil {
		return err
	}
	seen, err := s.plainly(scratch, v.d.Key.Expose(), time.Minute, nil)
	if err == nil && (!seen.opened || seen.content != "data readable" || seen.leaks) {
		err = fmt.Errorf("cryptsetup does not open the untouched volume: %+v", seen)
	}
	v.plain = seen.table
	return errors.Join(err, os.Remove(scratch))
}

// close closes the suite's mapping.
func (s *suite) close() error { return s.mapper.Close(s.ctx, s.mapping) }

// intact tells whether the blocks of a finished volume can be read through its
// mapping; a block that gives an I/O error is refused, one of other content is
// an error.
func intact(path string) (readable int, err error) {
	for at, want := range map[int64][]byte{firstAt: first(), secondAt: second()} {
		got, err := read(path, at, blockSize)
		switch {
		case err == nil && bytes.Equal(got, want):
			readable++
		case err == nil:
			return 0, fmt.Errorf("the block at %d reads as %.12q…", at, got)
		}
	}
	return readable, nil
}

// table is what `dmsetup table` says of a mapping and of the layers below,
// without what differs at every opening: numbers of devices.
type table struct{ top, integrity string }

func readTable(name string) (table, error) {
	top, err := dmTable(name)
	if err != nil {
		return table{}, err
	}
	below, err := dmTable(name + "_dif")
	if err != nil {
		below = ""
	}
	f, g := strings.Fields(top), strings.Fields(below)
	if len(f) > 6 {
		f[6] = "DEVICE"
	}
	if len(g) > 3 {
		g[3] = "DEVICE"
	}
	return table{strings.Join(f, " "), strings.Join(g, " ")}, nil
}

func dmTable(name string) (string, error) {
	lines, err := dm.Table(name)
	if err != nil || len(lines) != 1 {
		return "", fmt.Errorf("table of mapping %s: %d lines, %w", name, len(lines), err)
	}
	return fmt.Sprintf("%d %d %s %s", lines[0].Start, lines[0].Length, lines[0].Type, lines[0].Params), nil
}

// differences says in a few words how a table differs from the one that it
// should be.
func (t table) differences(want table) []string {
	var list []string
	if t.integrity == "" && want.integrity != "" {
		list = append(list, "integrity gone")
	} else if t.integrity != want.integrity {
		list = append(list, "integrity layer differs")
	}
	got, should := append(strings.Fields(t.top), make([]string, 8)...), append(strings.Fields(want.top), make([]string, 8)...)
	for i, name := range []string{"", "size", "target", "cipher", "key", "IV offset", "", "offset"} {
		switch {
		case got[i] == should[i] || name == "":
		case name == "key":
			list = append(list, "another key")
		case name == "size":
			list = append(list, "other size")
		default:
			list = append(list, name+" "+got[i])
		}
	}
	if options := strings.TrimSpace(strings.Join(got[8:], " ")); options != strings.TrimSpace(strings.Join(should[8:], " ")) {
		list = append(list, "options: "+cmp.Or(options, "none"))
	}
	return list
}
