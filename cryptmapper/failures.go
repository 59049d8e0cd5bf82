package cryptmapper

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// kernelLog is where every process with CAP_SYSLOG can follow it.
const kernelLog = "/dev/kmsg"

// longestRecord is more than the kernel ever returns of one.
const longestRecord = 16 << 10

// unauthentic is dm-crypt's line about a sector whose tag is wrong. dm-crypt
// counts nothing and raises no device-mapper event, and dm-integrity's counter
// is about tags that it computes itself: the line is all that there is.
// Kernel 6.1 begins it with another module's name, by mistake.
var unauthentic = regexp.MustCompile(`^(?:trusted_key: )?device-mapper: crypt: dm-([0-9]+): INTEGRITY AEAD ERROR`)

// WatchIntegrity follows the kernel's log from now on, until ctx ends, and calls
// seen with the name of the mapping for each line about a sector of it that is
// not authentic. The kernel writes at most ten such lines in five seconds, so
// that they count reports and not sectors. ErrUnavailable where the log cannot
// be read.
func WatchIntegrity(ctx context.Context, seen func(mapping string)) error {
	log, err := os.Open(kernelLog)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "following the kernel's log: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = log.Close() })()
	defer func() { _ = log.Close() }()
	if _, err := log.Seek(0, io.SeekEnd); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "following the kernel's log: %w", err)
	}
	record := make([]byte, longestRecord)
	for {
		n, err := log.Read(record)
		switch {
		case errors.Is(err, unix.EPIPE): // it was quicker than we are; the next read goes on
			continue
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return errdefs.Errorf(errdefs.ErrUnavailable, "following the kernel's log: %w", err)
		}
		if minor, ok := parseRecord(record[:n]); ok {
			if name := mappingOf(minor); name != "" {
				seen(name)
			}
		}
	}
}

// parseRecord reads "<priority>,<sequence>,<time>,<flags>;<text>\n…" and returns
// the minor number of the device whose sector is not authentic. What processes
// have written into the log does not count.
func parseRecord(record []byte) (minor uint32, ok bool) {
	head, text, _ := bytes.Cut(record, []byte(";"))
	priority, _, _ := bytes.Cut(head, []byte(","))
	if p, err := strconv.Atoi(string(priority)); err != nil || p > 7 { // facility 0 is the kernel
		return 0, false
	}
	found := unauthentic.FindSubmatch(text)
	if found == nil {
		return 0, false
	}
	n, err := strconv.ParseUint(string(found[1]), 10, 32)
	return uint32(n), err == nil
}

// mappingOf returns which mapping of ours a device-mapper device is, or is a
// layer of; "" for none.
func mappingOf(minor uint32) string {
	all, err := dm.List()
	if err != nil {
		return ""
	}
	for _, m := range all {
		if m.Number.Minor != minor || !strings.HasPrefix(m.Name, Prefix) {
			continue
		}
		for _, suffix := range Layers("") {
			if name, layer := strings.CutSuffix(m.Name, suffix); layer {
				return name
			}
		}
		return m.Name
	}
	return ""
}
