// Package keyconfig is the configuration of keys that the programs share:
// flags that name KEKs and stores, and what becomes of them.
package keyconfig

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/envelope/stores"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/config"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/all"
	"github.com/cryptcsi/cryptcsi/secret"
)

// MinRecordAuth is the shortest secret of --record-auth-secret-file, in bytes.
const MinRecordAuth = 32

// maxFile bounds every file that is read here.
const maxFile = 64 << 10

// Flags is the configuration as it was given. The zero value has none.
type Flags struct {
	kms, storage []config.Item
	recordAuth   string
	grace        time.Duration
	kekTimeout   time.Duration
}

// The kinds of a config.Item.
const (
	uriItem  = "uri"
	fileItem = "file"
)

// Add adds the flags.
func (f *Flags) Add(fs *flag.FlagSet) {
	fs.Var(&config.List{Items: &f.kms, Kind: uriItem}, "kms-uri", "KEK, e.g. cluster:///etc/cryptcsi/master-secret?salt-file=/etc/cryptcsi/salt; of several the first wraps and all unwrap; NAME=URI gives it a name, and wraps what asks for that KEK")
	fs.Var(&config.List{Items: &f.kms, Kind: fileItem}, "kms-uri-file", "file that holds a --kms-uri, for a URI with a secret in it; may be repeated")
	fs.Var(&config.List{Items: &f.storage, Kind: uriItem}, "storage-uri", "store of the wrapped DEKs, e.g. s3://bucket?region=eu-central-1; of several the first gets new ones")
	fs.Var(&config.List{Items: &f.storage, Kind: fileItem}, "storage-uri-file", "file that holds a --storage-uri; may be repeated")
	fs.StringVar(&f.recordAuth, "record-auth-secret-file", "", "file with a random secret (32 bytes at least) that authenticates records; needed where the KEK wraps with a public key")
	fs.DurationVar(&f.grace, "delete-grace", 0, "how long the key of a deleted volume can be restored; 0 destroys it at once")
	fs.DurationVar(&f.kekTimeout, "kms-timeout", kms.DefaultTimeout, "how long one call to a KMS may take")
}

// Given says whether a KEK, and whether a store was named.
func (f *Flags) Given() (kek, store bool) { return len(f.kms) > 0, len(f.storage) > 0 }

// Check finds what can be found without reading a file.
func (f *Flags) Check() error {
	kek, store := f.Given()
	switch {
	case !kek:
		return errdefs.Errorf(errdefs.ErrInvalid, "--kms-uri (or --kms-uri-file) is required")
	case !store:
		return errdefs.Errorf(errdefs.ErrInvalid, "--storage-uri (or --storage-uri-file) is required")
	}
	return f.CheckRanges()
}

// CheckRanges finds values that cannot be.
func (f *Flags) CheckRanges() error {
	if f.kekTimeout <= 0 || f.grace < 0 {
		return errdefs.Errorf(errdefs.ErrInvalid, "--kms-timeout must be above zero and --delete-grace not below")
	}
	return nil
}

// RecordAuthGiven says whether a secret that authenticates records was named.
func (f *Flags) RecordAuthGiven() bool { return f.recordAuth != "" }

// Opened is one KEK or store of the configuration: it, or why it did not open.
type Opened[T any] struct {
	Name string // its URI without parameters, or where the URI was to come from
	KEK  string // what NAME= before a KEK's URI gave it; "" is none
	It   T
	Err  error
	uri  string
}

// Keys are the KEKs and stores of a configuration, the default ones first.
type Keys struct {
	KEKs   []Opened[*kms.KEK]
	Stores []Opened[envelope.Store]

	mux        kms.Mux // one, because backends may share what they load
	recordAuth secret.Bytes
	grace      time.Duration
	files      []io.Closer
}

// Options are what opening takes besides flags. The zero value works.
type Options struct {
	KMS   kms.Options
	Store Observe
}

// Open opens every KEK and store, without calling a service, and tells log of
// URIs that should be written otherwise. The error is about anything else;
// Keys.Err is about them. The caller closes the Keys.
func (f *Flags) Open(ctx context.Context, o Options, log *slog.Logger) (*Keys, error) {
	k := &Keys{grace: f.grace, mux: all.Mux()}
	if f.recordAuth != "" {
		s, err := readSecret(f.recordAuth)
		if err != nil {
			return nil, fmt.Errorf("--record-auth-secret-file: %w", err)
		}
		k.recordAuth = s
	}
	if o.KMS.Timeout == 0 {
		o.KMS.Timeout = f.kekTimeout
	}
	f.open(ctx, k, o, log)
	return k, nil
}

func (f *Flags) open(ctx context.Context, k *Keys, o Options, log *slog.Logger) {
	for _, item := range f.kms {
		kek := open(k, item, "kms", log, func(uri string) (*kms.KEK, error) { return k.mux.OpenWith(ctx, uri, o.KMS) })
		switch {
		case kek.It == nil && kek.Err == nil:
			kek.Err = errdefs.Errorf(errdefs.ErrInvalid, "%s names no KEK", kek.Name)
		case kek.KEK != "" && k.named(kek.KEK) != nil:
			kek.Err = errors.Join(kek.Err, errdefs.Errorf(errdefs.ErrInvalid, "%s: another KEK is named %q too", kek.Name, kek.KEK))
		}
		k.KEKs = append(k.KEKs, kek)
	}
	for _, item := range f.storage {
		s := open(k, item, "storage", log, func(uri string) (envelope.Store, error) {
			store, err := stores.Mux().Open(ctx, uri)
			if err != nil {
				return nil, err
			}
			scheme, _, _ := strings.Cut(uri, ":")
			return &probedStore{store: store, scheme: scheme, observe: o.Store}, nil
		})
		if s.It != nil || s.Err != nil { // storage://no-store is none
			k.Stores = append(k.Stores, s)
		}
	}
}

// URIs returns the URIs that the flags give, those of files read, and the
// secret that authenticates records, for somebody else to open. The caller
// wipes the secret.
func (f *Flags) URIs() (kmsURIs, storageURIs []string, recordAuth secret.Bytes, err error) {
	for _, list := range []struct {
		items []config.Item
		uris  *[]string
	}{{f.kms, &kmsURIs}, {f.storage, &storageURIs}} {
		for _, item := range list.items {
			uri := item.Value
			if item.Kind == fileItem {
				if uri, err = readURI(item.Value); err != nil {
					return nil, nil, secret.Bytes{}, err
				}
			}
			*list.uris = append(*list.uris, uri)
		}
	}
	if f.recordAuth != "" {
		recordAuth, err = readSecret(f.recordAuth)
	}
	return kmsURIs, storageURIs, recordAuth, err
}

// OpenGiven opens KEKs and stores that somebody gives to a process that runs.
// Files stand for paths: {0}, {1}, … in the URIs. Files and recordAuth stay
// the caller's. What the flags say besides (grace, timeout) counts.
func (f *Flags) OpenGiven(ctx context.Context, kmsURIs, storageURIs []string, files [][]byte, recordAuth []byte, o Options, log *slog.Logger) (*Keys, error) {
	k := &Keys{grace: f.grace, mux: all.Mux()}
	if o.KMS.Timeout == 0 {
		o.KMS.Timeout = f.kekTimeout
	}
	var names []string
	for i, content := range files {
		f, path, err := secret.MemoryFile(fmt.Sprintf("given-%d", i), content)
		if err != nil {
			return nil, errors.Join(errdefs.Errorf(errdefs.ErrUnavailable, "%w", err), k.Close())
		}
		k.files = append(k.files, f)
		names = append(names, fmt.Sprintf("{%d}", i), path)
	}
	if len(recordAuth) > 0 {
		k.recordAuth = secret.Take(slices.Clone(recordAuth))
	}
	var given Flags
	for _, uri := range kmsURIs {
		given.kms = append(given.kms, config.Item{Kind: uriItem, Value: strings.NewReplacer(names...).Replace(uri)})
	}
	for _, uri := range storageURIs {
		given.storage = append(given.storage, config.Item{Kind: uriItem, Value: strings.NewReplacer(names...).Replace(uri)})
	}
	given.open(ctx, k, o, log)
	if err := k.Err(); err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

// open opens what one flag names.
func open[T any](k *Keys, item config.Item, what string, log *slog.Logger, open func(uri string) (T, error)) Opened[T] {
	o := Opened[T]{Name: "--" + what + "-uri"}
	uri := item.Value
	if item.Kind == fileItem {
		o.Name = fmt.Sprintf("--%s-uri-file %s", what, item.Value)
		if uri, o.Err = readURI(item.Value); o.Err != nil {
			return o
		}
	}
	if what == "kms" {
		if o.KEK, uri, o.Err = cutName(uri); o.Err != nil {
			return o
		}
	}
	if kms.IsConstellation(uri) {
		translation, err := kms.FromConstellation(uri)
		if err != nil {
			o.Err = err
			return o
		}
		k.files = append(k.files, translation)
		for _, warning := range translation.Warnings {
			log.Warn("an old form of URI", "flag", o.Name, "why", warning)
		}
		if uri = translation.URI; uri == "" {
			return o
		}
	}
	if u, err := kms.ParseURI(uri); err == nil {
		o.Name = kms.Redact(u)
	}
	o.uri = uri
	o.It, o.Err = open(uri)
	return o
}

// cutName takes NAME= from before a KEK's URI. No URI looks like that: a ':'
// ends its scheme, before any '='. ErrInvalid for what cannot be a name.
func cutName(uri string) (name, rest string, err error) {
	name, rest, ok := strings.Cut(uri, "=")
	if !ok || strings.Contains(name, ":") {
		return "", uri, nil
	}
	if dek.CheckKEK(name) != nil {
		return "", "", errdefs.Errorf(errdefs.ErrInvalid, "--kms-uri: what stands before \"=\" is no name of a KEK (1 to 63 lower-case letters, digits and '-', no '-' at the beginning); it is not shown: it may be a secret")
	}
	return name, rest, nil
}

// named returns the KEK of that name; nil where there is none.
func (k *Keys) named(name string) *Opened[*kms.KEK] {
	for i := range k.KEKs {
		if k.KEKs[i].KEK == name {
			return &k.KEKs[i]
		}
	}
	return nil
}

// KEK returns the KEK of that name, the first one for "". ErrInvalid where there
// is none, and the KEK's own error where it did not open.
func (k *Keys) KEK(name string) (*Opened[*kms.KEK], error) {
	o := k.named(name)
	if name == "" {
		o = &k.KEKs[0]
	}
	if o == nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "no KEK is named %q: name it with --kms-uri %s=…", name, name)
	}
	return o, o.Err
}

// OpenKEK opens another KEK in the place of beside, with its credentials:
// parameters that uri lacks are taken from there.
func (k *Keys) OpenKEK(ctx context.Context, uri string, beside *Opened[*kms.KEK]) (*kms.KEK, error) {
	u, err := kms.ParseURI(uri)
	if err != nil {
		return nil, err
	}
	own, err := kms.ParseURI(beside.uri)
	if err != nil {
		return nil, err
	}
	query := strings.Split(u.RawQuery, "&")
	for pair := range strings.SplitSeq(own.RawQuery, "&") {
		name, _, _ := strings.Cut(pair, "=")
		if !slices.ContainsFunc(query, func(q string) bool { return strings.HasPrefix(q, name+"=") }) {
			query = append(query, pair)
		}
	}
	u.RawQuery = strings.Trim(strings.Join(query, "&"), "&")
	return k.mux.OpenWith(ctx, u.String(), kms.Options{})
}

// Err says which KEKs and stores did not open.
func (k *Keys) Err() error {
	var errs []error
	for _, o := range k.KEKs {
		errs = append(errs, o.Err)
	}
	for _, o := range k.Stores {
		errs = append(errs, o.Err)
	}
	return errors.Join(errs...)
}

// Opened returns the KEKs that opened.
func (k *Keys) Opened() []*kms.KEK {
	var keks []*kms.KEK
	for _, o := range k.KEKs {
		if o.It != nil {
			keks = append(keks, o.It)
		}
	}
	return keks
}

// Keyring returns the Keyring over all of them, which owns them from then on:
// close it and then the Keys.
func (k *Keys) Keyring(o envelope.Options) (*envelope.Keyring, error) {
	if err := k.Err(); err != nil {
		return nil, err
	}
	keks := k.Opened()
	var all []envelope.Store
	for _, o := range k.Stores {
		all = append(all, o.It)
	}
	for _, kek := range k.KEKs {
		o.KEKNames = append(o.KEKNames, kek.KEK)
	}
	o.RecordAuth, o.Grace = k.recordAuth, k.grace
	keyring, err := envelope.New(keks, all, o)
	if err != nil {
		return nil, err
	}
	k.KEKs, k.Stores, k.recordAuth = nil, nil, secret.Bytes{}
	return keyring, nil
}

// RecordAuth says whether there is a secret that authenticates records.
func (k *Keys) RecordAuth() bool { return k.recordAuth.Len() > 0 }

// Close closes what no Keyring owns.
func (k *Keys) Close() error {
	var errs []error
	for _, o := range k.KEKs {
		if o.It != nil {
			errs = append(errs, o.It.Close())
		}
	}
	for _, o := range k.Stores {
		if c, ok := o.It.(io.Closer); ok {
			errs = append(errs, c.Close())
		}
	}
	k.recordAuth.Wipe()
	for _, f := range k.files {
		errs = append(errs, f.Close())
	}
	k.KEKs, k.Stores, k.files = nil, nil, nil
	return errors.Join(errs...)
}

// readURI reads the one line of a file.
func readURI(path string) (string, error) {
	data, err := readFile(path)
	if err != nil {
		return "", err
	}
	uri := strings.TrimSpace(string(data))
	if uri == "" || strings.ContainsAny(uri, "\r\n") {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "%s must hold one URI on one line", path)
	}
	return uri, nil
}

func readSecret(path string) (secret.Bytes, error) {
	data, err := readFile(path)
	if err != nil {
		return secret.Bytes{}, err
	}
	s := secret.Take(data)
	if s.Len() < MinRecordAuth {
		n := s.Len()
		s.Wipe()
		return secret.Bytes{}, errdefs.Errorf(errdefs.ErrInvalid, "%s has %d bytes, at least %d random ones are needed: head -c 32 /dev/urandom", path, n, MinRecordAuth)
	}
	return s, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	if len(data) > maxFile {
		clear(data)
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s is longer than %d bytes", path, maxFile)
	}
	return data, nil
}
