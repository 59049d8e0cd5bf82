package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// The log of the kernel's dm-log-writes, see log-writes.rst in the kernel's
// documentation and drivers/md/dm-log-writes.c: a superblock, then for each
// entry one block with its description (and the text of a mark) and the data.
// A write enters the log with the first FLUSH that covers it, a FUA write by
// itself: so the disk as it was promised to be at such an entry is everything
// up to there.

const (
	logMagic   = 0x6a736677736872
	logVersion = 1

	logFlush   = 1
	logFUA     = 2
	logDiscard = 4
	logMark    = 8
)

// entry is one of a log. Places and lengths are in bytes.
type entry struct {
	flags  uint64
	offset int64 // on the device
	length int64
	data   int64  // where in the log
	mark   string // the text of a mark
}

func (e entry) stop() bool { return e.flags&(logFlush|logFUA) != 0 }

// readLog returns the entries of a log.
func readLog(log io.ReaderAt) ([]entry, error) {
	var super struct {
		Magic, Version, Entries uint64
		SectorSize              uint32
	}
	if err := binary.Read(io.NewSectionReader(log, 0, 28), binary.LittleEndian, &super); err != nil {
		return nil, fmt.Errorf("the log's superblock: %w", err)
	}
	block := int64(super.SectorSize)
	if super.Magic != logMagic || super.Version != logVersion || block < 512 || block > 1<<16 {
		return nil, fmt.Errorf("this is no log of dm-log-writes: %+v", super)
	}
	at := block
	var entries []entry
	for i := range super.Entries {
		var raw struct{ Sector, Sectors, Flags, DataLen uint64 }
		const size = 32
		if err := binary.Read(io.NewSectionReader(log, at, size), binary.LittleEndian, &raw); err != nil {
			return nil, fmt.Errorf("entry %d of the log: %w", i, err)
		}
		e := entry{flags: raw.Flags, offset: int64(raw.Sector) * block, length: int64(raw.Sectors) * block, data: at + block}
		if raw.DataLen > uint64(block-size) {
			return nil, fmt.Errorf("entry %d of the log has %d bytes of text", i, raw.DataLen)
		}
		if raw.Flags&logMark != 0 {
			text := make([]byte, raw.DataLen)
			if _, err := log.ReadAt(text, at+size); err != nil {
				return nil, fmt.Errorf("entry %d of the log: %w", i, err)
			}
			e.mark = strings.TrimRight(string(text), "\x00")
		}
		at += block
		if raw.Flags&(logDiscard|logMark) == 0 {
			at += e.length
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// replay writes entries of a log to an image.
func replay(log io.ReaderAt, entries []entry, image io.WriterAt) error {
	for _, e := range entries {
		if e.flags&logMark != 0 || e.length == 0 {
			continue
		}
		if e.flags&logDiscard != 0 {
			return errors.New("the log has a discard: nothing in these stacks may send one")
		}
		from := io.NewSectionReader(log, e.data, e.length)
		if _, err := io.Copy(io.NewOffsetWriter(image, e.offset), from); err != nil {
			return fmt.Errorf("replaying %d bytes at %d: %w", e.length, e.offset, err)
		}
	}
	return nil
}
