package kms

import (
	"encoding/base64"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// Translation is a URI of Edgeless Constellation in our own words. What was
// secret in it stands in files in memory, which the URI names by a path under
// /proc/self/fd: they belong to this process and are gone after Close.
type Translation struct {
	// URI is ours; "" where the original says that there is no store.
	URI string
	// Warnings tell what is wrong with the original, for the log. They do
	// not repeat what is secret in it.
	Warnings []string

	files []*os.File
}

// Close removes the files that hold the secrets. What was opened by URI may
// read them for as long as it lives.
func (t *Translation) Close() error {
	var first error
	for _, f := range t.files {
		if err := f.Close(); first == nil {
			first = err
		}
	}
	t.files = nil
	return first
}

// IsConstellation says whether a URI is one of Constellation's.
func IsConstellation(uri string) bool {
	return strings.HasPrefix(uri, "kms://") || strings.HasPrefix(uri, "storage://")
}

// FromConstellation translates a URI of Constellation (kms://… or storage://…;
// formats: its package internal/kms/uri, and masterSecret of its RFC on
// external KMS). ErrInvalid, without the URI, where it lacks a parameter, has
// one that is not known, or one twice.
//
// Its encoder does not escape values, others do. So a value ends only where
// another known parameter begins, is unescaped once if all of its '%' begin
// escapes, and is taken as it stands otherwise; a '+' is always a plus.
func FromConstellation(uri string) (*Translation, error) {
	form, query, _ := strings.Cut(uri, "?")
	translate, names := constellationForm(form)
	if translate == nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "is none of Constellation's: it has kms://aws, kms://azure, kms://gcp, kms://cluster-kms and storage://aws, storage://azure, storage://gcp, storage://no-store")
	}
	params, err := constellationParams(query, names)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", form, err)
	}
	t := &Translation{}
	if err := translate(t, params); err != nil {
		_ = t.Close()
		return nil, fmt.Errorf("%s: %w", form, err)
	}
	if u, err := url.Parse(t.URI); err != nil || u.User != nil {
		_ = t.Close()
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s: one of the names in it cannot be part of a URI", form)
	}
	return t, nil
}

// constellationForm returns how to translate a form, and its parameters, all
// of which are mandatory.
func constellationForm(form string) (translate func(*Translation, map[string]string) error, names []string) {
	switch form {
	case "kms://aws":
		return constellationAWSKMS, []string{"region", "accessKeyID", "accessKey", "keyName"}
	case "kms://azure":
		return constellationAzureKMS, []string{"tenantID", "clientID", "clientSecret", "vaultName", "vaultType", "keyName"}
	case "kms://gcp":
		return constellationGCPKMS, []string{"projectID", "location", "keyRing", "credentialsPath", "keyName"}
	case "kms://cluster-kms":
		return constellationCluster, []string{"key", "salt"}
	case "storage://aws":
		return constellationS3, []string{"bucket", "region", "accessKeyID", "accessKey"}
	case "storage://azure":
		return constellationAzblob, []string{"account", "container", "tenantID", "clientID", "clientSecret"}
	case "storage://gcp":
		return constellationGCS, []string{"projectID", "bucket", "credentialsPath"}
	case "storage://no-store":
		return func(*Translation, map[string]string) error { return nil }, nil
	}
	return nil, nil
}

// constellationParams splits a query.
func constellationParams(query string, names []string) (map[string]string, error) {
	params := map[string]string{}
	last := ""
	if query == "" && len(names) == 0 {
		return params, nil
	}
	for part := range strings.SplitSeq(query, "&") {
		name, value, ok := strings.Cut(part, "=")
		if name == "masterSecret" && slices.Contains(names, "key") {
			name = "key"
		}
		switch _, twice := params[name]; {
		case ok && slices.Contains(names, name) && twice:
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "parameter %q is given twice", name)
		case ok && slices.Contains(names, name):
			params[name], last = value, name
		case last == "":
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "its first parameter is none of %s", strings.Join(names, ", "))
		default: // an '&' within a value
			params[last] += "&" + part
		}
	}
	for _, name := range names {
		if params[name] == "" {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "parameter %q is missing", name)
		}
		if unescaped, err := url.PathUnescape(params[name]); err == nil {
			params[name] = unescaped
		}
		if strings.ContainsAny(params[name], "\x00\r\n") {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "parameter %q has a line break in it", name)
		}
	}
	return params, nil
}

func constellationAWSKMS(t *Translation, p map[string]string) error {
	credentials, err := t.awsCredentials(p)
	if err != nil {
		return err
	}
	t.uri("awskms", "", p["keyName"], "region", p["region"], "credentials-file", credentials)
	return nil
}

func constellationS3(t *Translation, p map[string]string) error {
	credentials, err := t.awsCredentials(p)
	if err != nil {
		return err
	}
	t.uri("s3", p["bucket"], "", "region", p["region"], "credentials-file", credentials)
	return nil
}

func constellationAzureKMS(t *Translation, p map[string]string) error {
	if known := []string{"vault.azure.net", "vault.azure.cn", "vault.usgovcloudapi.net", "managedhsm.azure.net"}; !slices.Contains(known, p["vaultType"]) {
		return errdefs.Errorf(errdefs.ErrInvalid, "parameter %q is none of %s (vault.microsoftazure.de was closed with its cloud)", "vaultType", strings.Join(known, ", "))
	}
	secretFile, err := t.secret("clientSecret", []byte(p["clientSecret"]))
	if err != nil {
		return err
	}
	t.uri("azurekeyvault", p["vaultName"]+"."+p["vaultType"], "keys/"+p["keyName"],
		"tenant-id", p["tenantID"], "client-id", p["clientID"], "client-secret-file", secretFile)
	return nil
}

func constellationAzblob(t *Translation, p map[string]string) error {
	secretFile, err := t.secret("clientSecret", []byte(p["clientSecret"]))
	if err != nil {
		return err
	}
	t.uri("azblob", p["container"], "", "storage-account", p["account"],
		"tenant-id", p["tenantID"], "client-id", p["clientID"], "client-secret-file", secretFile)
	return nil
}

func constellationGCPKMS(t *Translation, p map[string]string) error {
	t.uri("gcpckms", "projects", p["projectID"]+"/locations/"+p["location"]+"/keyRings/"+p["keyRing"]+"/cryptoKeys/"+p["keyName"],
		"credentials-file", p["credentialsPath"])
	return nil
}

func constellationGCS(t *Translation, p map[string]string) error {
	t.uri("gs", p["bucket"], "", "project", p["projectID"], "credentials-file", p["credentialsPath"])
	return nil
}

func constellationCluster(t *Translation, p map[string]string) error {
	paths := map[string]string{}
	for _, name := range []string{"key", "salt"} {
		raw, err := base64.URLEncoding.DecodeString(p[name])
		if err != nil {
			return errdefs.Errorf(errdefs.ErrInvalid, "parameter %q is not URL-safe base64 with padding", name)
		}
		if paths[name], err = t.secret(name, raw); err != nil {
			return err
		}
		clear(raw)
	}
	t.uri("cluster", "", paths["key"], "salt-file", paths["salt"])
	return nil
}

// awsCredentials makes a shared-credentials file.
func (t *Translation) awsCredentials(p map[string]string) (path string, err error) {
	if strings.ContainsAny(p["accessKeyID"]+p["accessKey"], " \t") {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "parameters accessKeyID and accessKey must not have spaces in them")
	}
	return t.secret("accessKey", []byte("[default]\naws_access_key_id = "+p["accessKeyID"]+"\naws_secret_access_key = "+p["accessKey"]+"\n"))
}

// secret puts what stood in a parameter into a file in memory.
func (t *Translation) secret(name string, content []byte) (path string, err error) {
	f, path, err := secret.MemoryFile(name, content)
	if err != nil {
		return "", errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	t.files = append(t.files, f)
	t.Warnings = append(t.Warnings, fmt.Sprintf("the URI holds a secret (%s), which whoever sees the configuration can read: put it into a file and use this build's own URIs", name))
	return path, nil
}

// uri sets the URI from its parts, the parameters in the order given.
func (t *Translation) uri(scheme, host, path string, params ...string) {
	u := url.URL{Scheme: scheme, Host: host, Path: "/" + strings.TrimPrefix(path, "/")}
	if path == "" {
		u.Path = ""
	}
	var query []string
	for i := 0; i < len(params); i += 2 {
		query = append(query, params[i]+"="+strings.ReplaceAll(url.QueryEscape(params[i+1]), "+", "%20"))
	}
	u.RawQuery = strings.Join(query, "&")
	t.URI = u.String()
}
