package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// A disk is an image with something above it that can lose what was written: it
// is what the volume's device is made of for one session.
type disk struct {
	kind  string // how it loses writes
	image string // the file
	loops []string
	size  int64
}

const (
	kindLog    = "log"    // dm-log-writes: what was not flushed is lost, afterwards and at any flush
	kindFlakey = "flakey" // dm-flakey: from a moment on nothing reaches the disk

	diskName = "hydration-disk"
)

// path is the device that the volume lies on.
func (d *disk) path() string { return dm.Path(diskName) }

// before is the image as it was when the session began, and log what was written since.
func (d *disk) before() string { return d.image + ".before" }
func (d *disk) log() string    { return d.image + ".log" }

// openDisk puts a losing device over an image.
func openDisk(kind, image string) (_ *disk, err error) {
	d := &disk{kind: kind, image: image}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	if d.size, err = d.attach(image); err != nil {
		return nil, err
	}
	if kind == kindFlakey {
		return d, create(diskName, d.table(true))
	}
	if err := copySparse(d.before(), image); err != nil {
		return nil, err
	}
	if err := makeFile(d.log(), 16<<30); err != nil {
		return nil, err
	}
	if _, err := d.attach(d.log()); err != nil {
		return nil, err
	}
	return d, create(diskName, dm.Target{Length: uint64(d.size / 512), Type: "log-writes", Params: strings.Join(d.loops, " ")})
}

func (d *disk) attach(path string) (int64, error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	loop, err := kernel.Attach(file)
	if err != nil {
		return 0, err
	}
	d.loops = append(d.loops, loop)
	return file.Seek(0, io.SeekEnd)
}

// table of dm-flakey: 60 seconds up and none down, or the other way round.
func (d *disk) table(up bool) dm.Target {
	params := fmt.Sprintf("%s 0 60 0", d.loops[0])
	if !up {
		params = fmt.Sprintf("%s 0 0 60 1 drop_writes", d.loops[0])
	}
	return dm.Target{Length: uint64(d.size / 512), Type: "flakey", Params: params}
}

// cut makes the device take all further writes and forget them.
func (d *disk) cut() error {
	return errors.Join(dm.Load(diskName, []dm.Target{d.table(false)}, false), dm.Suspend(diskName), dm.Resume(diskName))
}

// mark puts a word into the log, behind everything that was acknowledged.
func (d *disk) mark(text string) error {
	if d.kind != kindLog {
		return nil
	}
	return dm.Message(diskName, "mark "+text)
}

// close takes everything away but the files.
func (d *disk) close() error {
	err := dm.Remove(diskName)
	if errors.Is(err, dm.ErrNotFound) {
		err = nil
	}
	for _, loop := range d.loops {
		err = errors.Join(err, kernel.Detach(loop))
	}
	d.loops = nil
	return err
}

// entries of the log of a disk that is closed.
func (d *disk) entries() ([]entry, error) {
	log, err := os.Open(d.log())
	if err != nil {
		return nil, err
	}
	defer log.Close()
	return readLog(log)
}

// rewind makes the image what it was before, with these entries on top.
func (d *disk) rewind(entries []entry) error {
	log, err := os.Open(d.log())
	if err != nil {
		return err
	}
	defer log.Close()
	image, err := os.OpenFile(d.before(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(replay(log, entries, image), image.Close()); err != nil {
		return err
	}
	return os.Rename(d.before(), d.image)
}

func makeFile(path string, size int64) error {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return os.Truncate(path, size)
}

// copySparse copies a file and leaves its holes.
func copySparse(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	size, err := in.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if err := makeFile(to, size); err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	for at := int64(0); ; {
		start, err := in.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		if at, err = in.Seek(start, unix.SEEK_HOLE); err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(out, start), io.NewSectionReader(in, start, at-start)); err != nil {
			return err
		}
	}
}

// create makes a mapping. The program dmsetup, and not what is to be tested.
func create(name string, t dm.Target) error {
	cmd := exec.Command("dmsetup", "create", name, "--table", fmt.Sprintf("%d %d %s %s", t.Start, t.Length, t.Type, t.Params))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("dmsetup create %s: %w: %s", name, err, out)
	}
	return nil
}
