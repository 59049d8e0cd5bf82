package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// The values of --plaintext-volumes.
const (
	plaintextRefuse = "refuse"
	plaintextPass   = "pass-through"
)

// plaintextFlags say which volumes are passed through unencrypted.
type plaintextFlags struct{ mode, file string }

func (f *plaintextFlags) add(fs *flag.FlagSet) {
	fs.StringVar(&f.mode, "plaintext-volumes", plaintextRefuse, `volumes that were there, unencrypted, before csi-plugin was: "refuse", or "pass-through" for those in --plaintext-volumes-file`)
	fs.StringVar(&f.file, "plaintext-volumes-file", "", "list of these, as csi-plugin plaintext-list writes it; read at start")
}

func (f *plaintextFlags) check(verb string) error {
	switch {
	case f.mode != plaintextRefuse && f.mode != plaintextPass:
		return usageError(fmt.Sprintf("%s: --plaintext-volumes %q: must be %q or %q", verb, f.mode, plaintextRefuse, plaintextPass))
	case f.mode == plaintextPass && f.file == "":
		return usageError(verb + ": --plaintext-volumes=pass-through needs --plaintext-volumes-file: no volume is unencrypted because something about it is missing")
	case f.mode == plaintextRefuse && f.file != "":
		return usageError(verb + ": --plaintext-volumes-file is given and --plaintext-volumes is not \"pass-through\": one of them is a mistake")
	}
	return nil
}

// read returns the list, nil where no volume is passed through.
func (f *plaintextFlags) read() (driver.Plaintext, error) {
	if f.mode != plaintextPass {
		return nil, nil
	}
	data, err := os.ReadFile(f.file)
	if err != nil {
		return nil, fmt.Errorf("--plaintext-volumes-file: %w", err)
	}
	list, err := driver.ParsePlaintext(data)
	if err != nil {
		return nil, fmt.Errorf("--plaintext-volumes-file %s: %w", f.file, err)
	}
	return list, nil
}

// plaintextList writes the list of a driver's volumes that are not marked as
// encrypted. It is for once, before csi-plugin comes between: from then on new
// volumes are encrypted, and the list is what is trusted.
func plaintextList(args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	fs := newFlags("plaintext-list", stderr)
	name := fs.String("driver-name", "", "CSI driver whose volumes to list (required)")
	if err := parse(fs, args); err != nil {
		return err
	}
	if *name == "" {
		return usageError("plaintext-list: --driver-name is required; PersistentVolumes are read from the standard input: kubectl get pv -o json | csi-plugin plaintext-list --driver-name=…")
	}
	volumes, err := readVolumes(stdin)
	if err != nil {
		return err
	}
	var ids []string
	encrypted, others := 0, 0
	for _, v := range volumes {
		switch {
		case v.Spec.CSI.Driver != *name:
			others++
		case v.encrypted():
			encrypted++
		default:
			id, err := dek.VolumeID(*name, v.Spec.CSI.Handle)
			if err != nil {
				return errdefs.Errorf(errdefs.ErrInvalid, "PersistentVolume %s: %w", v.Metadata.Name, err)
			}
			ids = append(ids, string(id))
		}
	}
	slices.Sort(ids)
	ids = slices.Compact(ids)
	fmt.Fprintf(stdout, "# The volumes of %s that were there, unencrypted, before csi-plugin was.\n", *name)
	for _, id := range ids {
		fmt.Fprintln(stdout, id)
	}
	fmt.Fprintf(stderr, "%d volumes of %s are listed; left out: %d that are encrypted, %d that are not this driver's\n", len(ids), *name, encrypted, others)
	return nil
}

// persistentVolume is what matters here of Kubernetes' type.
type persistentVolume struct {
	Kind     string
	Metadata struct{ Name string }
	Spec     struct {
		CSI struct {
			Driver     string
			Handle     string            `json:"volumeHandle"`
			Attributes map[string]string `json:"volumeAttributes"`
		}
	}
}

func (v persistentVolume) encrypted() bool {
	for key := range v.Spec.CSI.Attributes {
		if strings.HasPrefix(key, driver.KeyPrefix) {
			return true
		}
	}
	return false
}

// readVolumes reads what `kubectl get pv -o json` prints.
func readVolumes(r io.Reader) ([]persistentVolume, error) {
	invalid := func(format string, args ...any) ([]persistentVolume, error) {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the standard input is not what kubectl get pv -o json prints: "+format, args...)
	}
	var list struct {
		Kind  string
		Items []persistentVolume
	}
	if err := json.NewDecoder(r).Decode(&list); err != nil {
		return invalid("%v", err)
	}
	if list.Kind != "List" && list.Kind != "PersistentVolumeList" {
		return invalid("its kind is %q", list.Kind)
	}
	for _, v := range list.Items {
		if v.Kind != "" && v.Kind != "PersistentVolume" {
			return invalid("there is a %q in it", v.Kind)
		}
	}
	return list.Items, nil
}
