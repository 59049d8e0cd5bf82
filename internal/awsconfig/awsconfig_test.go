package awsconfig_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/awsconfig"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// isolate keeps the machine's own AWS configuration out of a test.
func isolate(t *testing.T) {
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "AWS_") {
			t.Setenv(name, "")
			_ = os.Unsetenv(name)
		}
	}
	t.Setenv("AWS_CONFIG_FILE", "/nowhere")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// load loads, with a region where p has none.
func load(t *testing.T, p map[string]string) aws.Config {
	t.Helper()
	if p["region"] == "" {
		p["region"] = "eu-central-1"
	}
	cfg, err := awsconfig.Load(t.Context(), p)
	if err != nil {
		t.Fatalf("Load(%v): %v", p, err)
	}
	return cfg
}

// accessKey is the access key that cfg's clients would use, or the error.
func accessKey(t *testing.T, cfg aws.Config) string {
	t.Helper()
	c, err := cfg.Credentials.Retrieve(t.Context())
	if err != nil {
		return err.Error()
	}
	return c.AccessKeyID
}

func TestSources(t *testing.T) {
	isolate(t)
	both := "[default]\naws_access_key_id=DEFAULT\naws_secret_access_key=s\n[other]\naws_access_key_id=OTHER\naws_secret_access_key=s\n"
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", write(t, strings.NewReplacer("DEFAULT", "SHARED", "OTHER", "SHAREDOTHER").Replace(both)))
	t.Setenv("AWS_CONFIG_FILE", write(t, "[profile other]\nregion=us-west-2\n"))
	file := write(t, both)
	check := func(want string, p map[string]string) {
		t.Helper()
		if got := accessKey(t, load(t, p)); got != want {
			t.Errorf("%v: credentials %q, want %q", p, got, want)
		}
	}
	check("SHARED", map[string]string{})
	t.Setenv("AWS_ACCESS_KEY_ID", "ENV")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "s")
	check("ENV", map[string]string{})
	check("SHAREDOTHER", map[string]string{"profile": "other"})
	check("DEFAULT", map[string]string{"credentials-file": file})
	check("OTHER", map[string]string{"credentials-file": file, "profile": "other"})
	t.Setenv("AWS_PROFILE", "other")
	check("DEFAULT", map[string]string{"credentials-file": file})

	cfg, err := awsconfig.Load(t.Context(), map[string]string{"profile": "other"})
	if err != nil || cfg.Region != "us-west-2" {
		t.Errorf("the profile's region: %q, %v", cfg.Region, err)
	}
	t.Setenv("AWS_REGION", "eu-north-1")
	cfg, err = awsconfig.Load(t.Context(), map[string]string{"profile": "other", "region": "ap-south-1"})
	if err != nil || cfg.Region != "ap-south-1" {
		t.Errorf("the parameter's region: %q, %v", cfg.Region, err)
	}
}

func TestCredentialsFileIsReadAgain(t *testing.T) {
	isolate(t)
	path := peers.AWSCredentials(t, "OLD", "s")
	synctest.Test(t, func(t *testing.T) {
		cfg := load(t, map[string]string{"credentials-file": path})
		if got := accessKey(t, cfg); got != "OLD" {
			t.Fatal(got)
		}
		if err := os.WriteFile(path, []byte("[default]\naws_access_key_id=NEW\naws_secret_access_key=s\naws_session_token=t\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		if got := accessKey(t, cfg); got != "NEW" {
			t.Errorf("after the file changed: %s", got)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		if _, err := cfg.Credentials.Retrieve(t.Context()); !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), path) {
			t.Errorf("after the file went: %v, want ErrDenied that names it", err)
		}
	})
}

// sts answers requests for roles.
func sts(t *testing.T, answer func(r *http.Request) (int, string)) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseForm(); err != nil {
			t.Error(err)
		}
		status, body := answer(r)
		w.Header().Set("Content-Type", "text/xml")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}))
	t.Cleanup(s.Close)
	t.Setenv("AWS_ENDPOINT_URL_STS", s.URL)
}

func role(action, key string) string {
	return fmt.Sprintf(`<%sResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><%sResult><Credentials><AccessKeyId>%s</AccessKeyId><SecretAccessKey>s</SecretAccessKey>`+
		`<SessionToken>t</SessionToken><Expiration>%s</Expiration></Credentials></%sResult></%sResponse>`,
		action, action, key, time.Now().Add(time.Hour).UTC().Format(time.RFC3339), action, action)
}

func TestRoles(t *testing.T) {
	isolate(t)
	const arn = "arn:aws:iam::111122223333:role/kek"
	refusal := ""
	sts(t, func(r *http.Request) (int, string) {
		f := r.Form
		switch {
		case refusal != "":
			return 403, "<ErrorResponse><Error><Type>Sender</Type><Code>" + refusal + "</Code><Message>S3CR3T no</Message></Error></ErrorResponse>"
		case f.Get("RoleArn") != arn || f.Get("RoleSessionName") != "cryptcsi":
			return 400, ""
		case f.Get("Action") == "AssumeRoleWithWebIdentity" && f.Get("WebIdentityToken") == "JWT":
			return 200, role("AssumeRoleWithWebIdentity", "WEB")
		case f.Get("Action") == "AssumeRole" && strings.Contains(r.Header.Get("Authorization"), "Credential=BASE/"):
			return 200, role("AssumeRole", "ASSUMED")
		}
		return 400, ""
	})
	t.Setenv("AWS_ACCESS_KEY_ID", "ENV")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "s")
	web := map[string]string{"role-arn": arn, "web-identity-token-file": write(t, "JWT"), "endpoint": "http://127.0.0.1:1"}
	if got := accessKey(t, load(t, web)); got != "WEB" {
		t.Errorf("web identity: %s", got)
	}
	if got := accessKey(t, load(t, map[string]string{"role-arn": arn, "credentials-file": peers.AWSCredentials(t, "BASE", "s")})); got != "ASSUMED" {
		t.Errorf("assumed role: %s", got)
	}
	for _, code := range []string{"AccessDenied", "ExpiredTokenException", "InvalidIdentityToken", "SignatureDoesNotMatch"} {
		refusal = code
		_, err := load(t, web).Credentials.Retrieve(t.Context())
		if !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), code) {
			t.Errorf("%s: %v, want ErrDenied", code, err)
		}
		if code == "SignatureDoesNotMatch" && strings.Contains(err.Error(), "S3CR3T") {
			t.Errorf("%s shows what AWS repeats of the request: %v", code, err)
		}
	}
	t.Setenv("AWS_ENDPOINT_URL_STS", "http://"+peers.Addr(t))
	if _, err := load(t, web).Credentials.Retrieve(t.Context()); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("nobody there: %v, want ErrUnavailable", err)
	}
	web["web-identity-token-file"] = filepath.Join(t.TempDir(), "token")
	if _, err := awsconfig.Load(t.Context(), web); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("no token: %v", err)
	}
}

func TestInstanceMetadata(t *testing.T) {
	isolate(t)
	asked, status := 0, 200
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "600")
		switch {
		case r.URL.Path == "/latest/api/token":
			_, _ = io.WriteString(w, "token")
		case status != 200:
			w.WriteHeader(status)
		case strings.HasSuffix(r.URL.Path, "/security-credentials/"):
			_, _ = io.WriteString(w, "role")
		default:
			_, _ = fmt.Fprintf(w, `{"Code":"Success","AccessKeyId":"IMDS","SecretAccessKey":"s","Token":"t","Expiration":%q}`, time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
		}
	}))
	defer s.Close()
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", s.URL)
	t.Setenv("AWS_EC2_METADATA_DISABLED", "false")
	t.Setenv("AWS_DEFAULTS_MODE", "auto")
	cfg := load(t, map[string]string{})
	if asked != 0 {
		t.Error("Load asked the metadata service")
	}
	if got := accessKey(t, cfg); got != "IMDS" {
		t.Errorf("credentials %s", got)
	}
	for code, want := range map[int]error{404: errdefs.ErrDenied, 503: errdefs.ErrUnavailable} {
		status = code
		if _, err := load(t, map[string]string{}).Credentials.Retrieve(t.Context()); !errors.Is(err, want) {
			t.Errorf("metadata answers %d: %v, want %v", code, err, want)
		}
	}
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://"+peers.Silent(t))
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := load(t, map[string]string{}).Credentials.Retrieve(ctx); !errors.Is(awsconfig.Class(err), errdefs.ErrUnavailable) || time.Since(start) > 2*time.Second {
		t.Errorf("no answer: %v after %v", err, time.Since(start))
	}
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	if _, err := load(t, map[string]string{}).Credentials.Retrieve(t.Context()); !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), "AWS_WEB_IDENTITY_TOKEN_FILE") {
		t.Errorf("no credentials anywhere: %v, want ErrDenied that says where to look", err)
	}
}

// TestEndpoint: the parameter wins over the environment, redirects are not
// followed, and no answer is read without end.
func TestEndpoint(t *testing.T) {
	isolate(t)
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the request went elsewhere") }))
	defer other.Close()
	asked, long := 0, false
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		if !long {
			http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
			return
		}
		for chunk := make([]byte, 1<<20); ; {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}))
	defer s.Close()
	for _, name := range []string{"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_KMS"} {
		t.Setenv(name, other.URL)
	}
	cfg := load(t, map[string]string{"endpoint": s.URL, "credentials-file": peers.AWSCredentials(t, "A", "s")})
	client := kms.NewFromConfig(cfg)
	for _, long = range []bool{false, true} {
		asked = 0
		_, err := client.ListKeys(t.Context(), &kms.ListKeysInput{})
		if err == nil || asked == 0 || asked > 3 {
			t.Errorf("long %v: %v after %d requests", long, err, asked)
		}
		if long && !strings.Contains(err.Error(), "longer than") {
			t.Errorf("an endless answer: %.200v", err)
		}
	}
}

func TestRefused(t *testing.T) {
	isolate(t)
	file, token := peers.AWSCredentials(t, "A", "S3CR3T"), write(t, "JWT")
	const role = "arn:aws:iam::111122223333:role/kek"
	for _, tt := range []struct {
		p    map[string]string
		want string
	}{
		{nil, "region is not known"},
		{map[string]string{"region": ""}, `"region" is empty`},
		{map[string]string{"region": "evil.example.com/"}, "no region"},
		{map[string]string{"region": "EU"}, "no region"},
		{map[string]string{"region": "eu-central-1", "endpoint": "host:80"}, "https://host"},
		{map[string]string{"region": "eu-central-1", "endpoint": "https://"}, "https://host"},
		{map[string]string{"region": "eu-central-1", "endpoint": "https://user:S3CR3T@host"}, "https://host"},
		{map[string]string{"region": "eu-central-1", "profile": "nobody"}, "nobody"},
		{map[string]string{"region": "eu-central-1", "credentials-file": "/nowhere/file"}, "/nowhere/file"},
		{map[string]string{"region": "eu-central-1", "credentials-file": t.TempDir()}, "no regular file"},
		{map[string]string{"region": "eu-central-1", "credentials-file": file, "profile": "other"}, "[other]"},
		{map[string]string{"region": "eu-central-1", "credentials-file": write(t, "S3CR3T")}, "[default]"},
		{map[string]string{"region": "eu-central-1", "credentials-file": write(t, "[default]\naws_access_key_id=A\n")}, "aws_secret_access_key"},
		{map[string]string{"region": "eu-central-1", "role-arn": "kek"}, "role's ARN"},
		{map[string]string{"region": "eu-central-1", "role-arn": "arn:aws:kms:eu-central-1:111122223333:key/x"}, "role's ARN"},
		{map[string]string{"region": "eu-central-1", "web-identity-token-file": token}, "role-arn"},
		{map[string]string{"region": "eu-central-1", "web-identity-token-file": t.TempDir(), "role-arn": role}, "no regular file"},
		{map[string]string{"region": "eu-central-1", "web-identity-token-file": token, "role-arn": role, "profile": "default"}, "which credentials"},
		{map[string]string{"region": "eu-central-1", "web-identity-token-file": token, "role-arn": role, "credentials-file": file}, "which credentials"},
	} {
		_, err := awsconfig.Load(t.Context(), tt.p)
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Load(%v) = %v, want ErrInvalid with %q", tt.p, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), "S3CR3T") {
			t.Errorf("Load(%v) shows a secret: %v", tt.p, err)
		}
	}
}
