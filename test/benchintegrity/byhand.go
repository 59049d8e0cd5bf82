package main

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
)

// byHand is the mapping that cryptsetup makes.
const byHand = "by-hand"

func passphrase() []byte { return []byte("a passphrase of enough bits 0123") }

// noWorkqueues lets dm-crypt work where the I/O is sent and where it ends.
func noWorkqueues() []string {
	return []string{"--perf-no_read_workqueue", "--perf-no_write_workqueue"}
}

func cryptsetupFormat(device string, key []byte, more ...string) error {
	return command(key, "cryptsetup", append([]string{"luksFormat", "-q", "--type=luks2", "--sector-size=4096",
		"--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--key-file=-", device}, more...)...)
}

func cryptsetupOpen(device string, key []byte, more ...string) error {
	return command(key, "cryptsetup", append([]string{"open", "--key-file=-", device, byHand}, more...)...)
}

// tower is a stack of mappings that was built by hand, lowest first.
type tower struct {
	prefix string // of their names
	names  []string
}

func (t *tower) add(name, kind, params string, sectors int64) (string, error) {
	name = t.prefix + "-" + name
	number, err := dm.Create(name, "")
	if err != nil {
		return "", err
	}
	t.names = append(t.names, name)
	table := []dm.Target{{Length: uint64(sectors), Type: kind, Params: params}}
	return dm.Path(name), errors.Join(dm.Load(name, table, false), dm.Resume(name), dm.MakeNode(name, number))
}

func (t *tower) close() (err error) {
	for _, name := range slices.Backward(t.names) {
		err = errors.Join(err, remove(name))
	}
	t.names = nil
	return err
}

// remove waits for those who look at a device for a moment.
func remove(name string) error {
	for until := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if err := dm.Remove(name); !errors.Is(err, unix.EBUSY) || time.Now().After(until) {
			return err
		}
	}
}

// integrity puts dm-crypt over dm-integrity over a blank device and returns the
// path and how many sectors there are.
func (t *tower) integrity(device string, v variant) (string, int64, error) {
	layer := append([]string{"block_size:4096", "fix_padding"}, v.layer...)
	params := fmt.Sprintf("%s 0 32 %s %d %s", device, v.mode, len(layer), strings.Join(layer, " "))
	if _, err := t.add("dif", "integrity", params, 8); err != nil {
		return "", 0, err
	}
	status, err := dm.TargetStatus(t.prefix + "-dif") // the superblock was made: it knows the length
	if err != nil {
		return "", 0, err
	}
	fields := strings.Fields(status[0].Params)
	sectors, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil {
		return "", 0, err
	}
	if err := t.close(); err != nil {
		return "", 0, err
	}
	below, err := t.add("dif", "integrity", params, sectors)
	if err != nil {
		return "", 0, err
	}
	key := make([]byte, 96)
	_, _ = rand.Read(key)
	crypt := append([]string{"integrity:32:aead", "sector_size:4096"}, v.crypt...)
	path, err := t.add("crypt", "crypt", fmt.Sprintf("capi:authenc(hmac(sha256),xts(aes))-plain64 %s 0 %s 0 %d %s",
		hex.EncodeToString(key), below, len(crypt), strings.Join(crypt, " ")), sectors)
	return path, sectors, err
}

// plain puts dm-crypt over a device.
func (t *tower) plain(device string, size int64, v variant) (string, error) {
	key := make([]byte, 64)
	_, _ = rand.Read(key)
	crypt := append([]string{"sector_size:4096"}, v.crypt...)
	return t.add("crypt", "crypt", fmt.Sprintf("aes-xts-plain64 %s 0 %s 0 %d %s", hex.EncodeToString(key), device, len(crypt), strings.Join(crypt, " ")), size/512)
}

// build builds a variant.
func (t *tower) build(i *image, size int64, v variant) (string, error) {
	if v.mode == "" {
		return t.plain(i.device, size, v)
	}
	if err := fill(i.device, 4096); err != nil { // another superblock is made
		return "", err
	}
	path, sectors, err := t.integrity(i.device, v)
	if err != nil || v.region == 0 {
		return path, err
	}
	return t.clone(path, sectors, v.region, v.clone)
}

// areaSectors is how large the area for dm-clone's metadata is: twice a bit for
// each region, and 2 MiB.
func areaSectors(sectors, region int64) int64 {
	return (2*(sectors*512/region/8) + 2*mib) / 4096 * 8
}

// clone puts dm-clone over an integrity stack of which nothing is written.
func (t *tower) clone(path string, sectors, region int64, options string) (string, error) {
	area := areaSectors(sectors, region)
	data := (sectors - area) / 8 * 8
	meta, err := t.add("meta", "linear", fmt.Sprintf("%s %d", path, data), area)
	if err != nil {
		return "", err
	}
	if err := fill(meta, area*512); err != nil {
		return "", err
	}
	below, err := t.add("data", "linear", path+" 0", data)
	if err != nil {
		return "", err
	}
	zero, err := t.add("zero", "zero", "", data)
	if err != nil {
		return "", err
	}
	return t.add("clone", "clone", fmt.Sprintf("%s %s %s %d %s", meta, below, zero, region/512, options), data)
}

// hydrate lets the clone on top hydrate, where the variant asks for it.
func (t *tower) hydrate(v variant) error {
	if !v.hydrate {
		return nil
	}
	return dm.Message(t.names[len(t.names)-1], "enable_hydration")
}

// fill writes zeros.
func fill(path string, length int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	buf, err := aligned(mib)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(buf) }()
	clear(buf)
	for at := int64(0); at < length; at += mib {
		if _, err := f.WriteAt(buf[:min(mib, length-at)], at); err != nil {
			return err
		}
	}
	return f.Sync()
}

// fillAll writes zeros to a whole device.
func fillAll(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	size, err := f.Seek(0, 2)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return fill(path, size)
}

// cloneStatus tells how many regions of a dm-clone are hydrated.
func cloneStatus(path string) (hydrated, regions int, err error) {
	status, err := dm.TargetStatus(filepath.Base(path))
	if err != nil {
		return 0, 0, err
	}
	// "<metadata block size> <used>/<all> <region size> <hydrated>/<all> …"
	fields := strings.Fields(status[0].Params)
	if status[0].Type != "clone" || len(fields) < 4 {
		return 0, 0, fmt.Errorf("%s is no dm-clone: %q", path, status[0].Params)
	}
	_, err = fmt.Sscanf(fields[3], "%d/%d", &hydrated, &regions)
	return hydrated, regions, err
}
