package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/driver"
)

// peekTime bounds the look at one header; a device that hangs costs no more.
const peekTime = 5 * time.Second

// inspect prints the encrypted volumes of this node. It needs no key and no
// running csi-plugin; only the header column reads the disks.
func inspect(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	fs := newFlags("inspect", stderr)
	kubelet := fs.String("kubelet-dir", "/var/lib/kubelet", "kubelet's directory")
	worker := workerFlag(fs)
	headers := fs.Bool("headers", true, "read the headers' state from the disks")
	if err := parse(fs, args); err != nil {
		return err
	}
	m := cryptmapper.New(cryptmapper.Options{Worker: []string{*worker}})
	defer m.Shutdown()
	boot, err := driver.Linux{}.BootID()
	if err != nil {
		return err
	}
	list, err := driver.Inspect(ctx, *kubelet, mapper{m}, driver.Linux{}, boot)
	if err != nil {
		return err
	}
	return printMappings(stdout, list, func(i driver.MappingInfo) string {
		if !*headers || i.Backing == "" {
			return ""
		}
		return headerState(ctx, m, i)
	})
}

// printMappings prints the table. Its error is about what is not in there.
func printMappings(stdout io.Writer, list []driver.MappingInfo, header func(driver.MappingInfo) string) error {
	var problems []error
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	row := func(cells ...string) { fmt.Fprintln(w, strings.Join(cells, "\t")) }
	row("VOLUME", "MAPPING", "STATE", "DEVICE", "CIPHER", "INTEGRITY", "OPTIONS", "HYDRATED", "SIZE", "MODE", "DAMAGE", "HEADER")
	for _, i := range list {
		problems = append(problems, i.Problem)
		cells := []string{i.VolumeID, i.Name, string(i.State), i.Backing, i.Cipher, string(i.Integrity), options(i.Mapping), i.Progress(),
			size(i.Size), mode(i), i.Damage.String(), header(i)}
		for n := range cells {
			cells[n] = cmp.Or(cells[n], "-")
		}
		row(cells...)
	}
	return errors.Join(append(problems, w.Flush())...)
}

// options are what a mapping has beyond what all have.
func options(m driver.Mapping) string {
	var words []string
	if m.Direct {
		words = append(words, "direct")
	}
	if m.Discard {
		words = append(words, "discard")
	}
	if m.Performance != "" {
		words = append(words, m.Performance)
	}
	return strings.Join(words, ",")
}

func mode(i driver.MappingInfo) string {
	access := cmp.Or(i.AccessType, "-")
	if i.Filesystem != "" {
		access = i.Filesystem
	}
	if i.ReadOnly {
		return access + " ro"
	}
	return access
}

// headerState says in a few words how the header on the disk looks. Nothing in
// it is checked against a key, so it is for people and never for decisions.
func headerState(ctx context.Context, m *cryptmapper.Mapper, i driver.MappingInfo) string {
	// Where udev makes no /dev/block, sysfs still knows the node's name.
	link, err := os.Readlink("/sys/dev/block/" + i.Backing)
	if err != nil {
		return "unreadable: device " + i.Backing + " is gone"
	}
	ctx, cancel := context.WithTimeout(ctx, peekTime)
	defer cancel()
	copies, err := m.Peek(ctx, filepath.Join("/dev", strings.ReplaceAll(filepath.Base(link), "!", "/")))
	switch {
	case err != nil:
		return "unreadable: " + err.Error()
	case len(copies) == 0:
		return "none: damaged or foreign"
	}
	c := copies[0]
	if c.DEKID == "" {
		return "not made by cryptcsi: LUKS UUID " + c.UUID
	}
	words := []string{fmt.Sprintf("%d of 2 copies", len(copies)), fmt.Sprintf("sequence %d", c.Sequence)}
	if len(copies) == 2 && copies[0] != copies[1] {
		words[0] = "copies differ"
	}
	if i.DEK != "" && c.DEKID != string(i.DEK) {
		words = append(words, "of another volume: "+c.DEKID)
	}
	if !c.Made {
		words = append(words, "not finished")
	}
	return strings.Join(words, ", ")
}

func size(n int64) string {
	switch {
	case n == 0:
		return "-"
	case n%(1<<30) == 0:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 10<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	default:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
}
