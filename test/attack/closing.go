package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
)

// closing takes the disk away below open volumes and closes them: Close knows
// neither the disk nor a key.
func (s *suite) closing() {
	s.section("closing an open volume; plain cryptsetup close is not asked")
	for _, c := range []struct {
		name string
		do   func(file, dev, below string) error
	}{
		{"the header is noise by now", func(file, _, _ string) error { return write(file, 0, noise(2*copySize)) }},
		{"the disk has no length any more", func(file, _, _ string) error { return os.Truncate(file, 0) }},
		{"every access to the disk is an I/O error", func(_, _, below string) error { return failing(below) }},
		{"the loop device was detached", func(_, dev, _ string) error { detachLoop(dev); return nil }},
	} {
		for _, on := range []*volume{s.bare, s.sealed} {
			name := c.name
			if on == s.sealed {
				name += ", integrity"
			}
			if !s.only.MatchString(name) {
				continue
			}
			took, err := s.closeAfter(on, c.do)
			s.row(name, noPlain, "closes", fmt.Sprintf("in %.1f s", took.Seconds()), err)
		}
	}
}

// belowName is a linear mapping between the loop device and the volume.
const belowName = "below-the-volume"

func (s *suite) closeAfter(on *volume, do func(file, dev, below string) error) (took time.Duration, err error) {
	path := filepath.Join(s.dir, "closing")
	if err := copyDisk(path, on.disk); err != nil {
		return 0, err
	}
	dev, detach, err := loop(path, false)
	if err != nil {
		return 0, err
	}
	defer detach()
	if _, err := output("dmsetup", "create", belowName, "--table", fmt.Sprintf("0 %d linear %s 0", 24*mib/512, dev)); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, removeMapping(belowName), s.nothingLeft()) }()
	m, err := s.mapper.Open(s.ctx, cryptmapper.Volume{Name: s.mapping, Device: dm.Path(belowName)}, on.d)
	if err != nil {
		return 0, err
	}
	if err := errors.Join(write(m.Path, firstAt, older()), do(path, dev, belowName)); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(s.ctx, propertyDeadline)
	defer cancel()
	began := time.Now()
	err = s.mapper.Close(ctx, s.mapping)
	return time.Since(began), err
}

// failing makes a mapping fail every access.
func failing(name string) error {
	table := fmt.Sprintf("0 %d error", 24*mib/512)
	if _, err := output("dmsetup", "load", name, "--table", table); err != nil {
		return err
	}
	if _, err := output("dmsetup", "suspend", "--noflush", "--nolockfs", name); err != nil {
		return err
	}
	_, err := output("dmsetup", "resume", name)
	return err
}
