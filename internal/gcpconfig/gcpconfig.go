// Package gcpconfig is what the Google clients have in common: as whom they
// call, and the access tokens for that. Credentials are never in a URI: they
// are those in a file, or what the metadata server answers. No error shows
// anything of a credentials file but its type and the hosts that it names.
package gcpconfig

import (
	"cmp"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	googlecredentials "cloud.google.com/go/auth/credentials"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// ParamFile is the URI parameter that names a credentials file.
const ParamFile = "credentials-file"

const (
	maxFile     = 64 << 10 // in bytes
	envFile     = "GOOGLE_APPLICATION_CREDENTIALS"
	accountPath = "instance/service-accounts/default/"
)

// impersonated finds the service account in the URL of an impersonation.
var impersonated = regexp.MustCompile(`/serviceAccounts/([^/:@]+@[^/:@]+):generateAccessToken$`)

// Caller is as whom services are called: a credentials file, or without one
// the service account of the metadata server.
type Caller struct {
	file string
	seen contents
}

// contents is what we look at in a credentials file; the SDK reads the rest.
type contents struct {
	Type             string `json:"type"`
	ClientEmail      string `json:"client_email"`
	ImpersonationURL string `json:"service_account_impersonation_url"`
	UniverseDomain   string `json:"universe_domain"`
	QuotaProject     string `json:"quota_project_id"`
	Source           struct {
		Executable there  `json:"executable"`
		File       string `json:"file"`
	} `json:"credential_source"`
	Impersonator *contents `json:"source_credentials"`
}

// there says that a field is there, and not what is in it.
type there bool

// UnmarshalJSON is part of json.Unmarshaler.
func (t *there) UnmarshalJSON([]byte) error {
	*t = true
	return nil
}

// FindCaller returns the caller that a file names or else application default
// credentials: the file that GOOGLE_APPLICATION_CREDENTIALS names, gcloud's
// own, or without any the metadata server, which is not asked. A file is of
// type service_account, external_account (workload identity federation),
// impersonated_service_account or authorized_user, and names no program to
// run. ErrInvalid for any other one.
func FindCaller(file string) (Caller, error) {
	if file = cmp.Or(file, os.Getenv(envFile), gcloudFile()); file == "" {
		return Caller{}, nil
	}
	_, seen, err := readCredentials(file)
	return Caller{file, seen}, err
}

// gcloudFile is what `gcloud auth application-default login` left, if it did.
func gcloudFile() string {
	home, err := os.UserHomeDir()
	if err != nil {
		return ""
	}
	file := filepath.Join(home, ".config", "gcloud", "application_default_credentials.json")
	if _, err := os.Stat(file); err != nil {
		return ""
	}
	return file
}

// readCredentials reads a file and checks its type.
func readCredentials(file string) ([]byte, contents, error) {
	data, err := ReadFile("credentials file", file)
	if err != nil {
		return nil, contents{}, err
	}
	var c contents
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, contents{}, errdefs.Errorf(errdefs.ErrInvalid, "the credentials file %s is no JSON of Google's credentials", file)
	}
	switch googlecredentials.CredType(c.Type) {
	case googlecredentials.ServiceAccount, googlecredentials.ExternalAccount, googlecredentials.ImpersonatedServiceAccount, googlecredentials.AuthorizedUser:
	default:
		return nil, contents{}, errdefs.Errorf(errdefs.ErrInvalid, "the credentials file %s is of type %.40q, must be service_account, external_account, impersonated_service_account or authorized_user", file, c.Type)
	}
	for from := &c; from != nil; from = from.Impersonator {
		if from.Source.Executable {
			return nil, contents{}, errdefs.Errorf(errdefs.ErrInvalid, "the credentials file %s wants to run a program: not offered, have it write the token into a file", file)
		}
	}
	return data, c, nil
}

// ReadFile reads a regular file of at most 64 KiB, and waits for nobody to
// write one. ErrInvalid, in which what says what kind of file it is, where it
// cannot be read.
func ReadFile(what, path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe must not hang us
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the %s: %w", what, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the %s %s must be a regular file of at most %d bytes", what, path, maxFile)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the %s: %w", what, err)
	}
	return data, nil
}

// String is for messages: where the credentials come from.
func (c Caller) String() string {
	if c.file == "" {
		return "the metadata server (there is no URI parameter " + ParamFile + ", no " + envFile + " and no file of gcloud)"
	}
	return c.file
}

// Universe is the domain of the cloud that the credentials belong to.
func (c Caller) Universe() string {
	if c.seen.UniverseDomain == "" {
		return "googleapis.com"
	}
	return c.seen.UniverseDomain
}

// Email returns the service account's, for which it may have to ask the
// metadata server. ErrInvalid where the caller is none, or where only Google
// knows; ErrUnavailable where the metadata server did not answer.
func (c Caller) Email(ctx context.Context) (string, error) {
	email := c.seen.ClientEmail
	if m := impersonated.FindStringSubmatch(c.seen.ImpersonationURL); m != nil {
		email = m[1]
	}
	if c.file == "" {
		answer, err := metadataClient().GetWithContext(ctx, accountPath+"email")
		if err != nil && !refused(err) {
			return "", errdefs.Errorf(errdefs.ErrUnavailable, "who the service account is, is asked of %s: %s", c, brief(err))
		}
		email = strings.TrimSpace(answer)
	}
	if strings.Count(email, "@") != 1 || strings.ContainsAny(email, " /:") {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "the credentials from %s are not those of one service account", c)
	}
	return email, nil
}
