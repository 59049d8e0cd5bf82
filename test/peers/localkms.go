package peers

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
)

// AWS is a KMS with AWS's protocol.
type AWS struct {
	// Region that requests must be signed for, and the service's URL.
	Region, Endpoint string
	// AccessKey and SecretKey are the only credentials that it knows;
	// CredentialsFile holds them as profile [default].
	AccessKey, SecretKey, CredentialsFile string
	// Client is a client with them, and no retries.
	Client *kms.Client
}

// LocalKMS starts a KMS without keys.
func LocalKMS(t testing.TB) *AWS {
	t.Helper()
	addr := Addr(t)
	a := &AWS{Region: "eu-central-1", Endpoint: "http://" + addr, AccessKey: "AKIA" + rand.Text()[:16], SecretKey: rand.Text()}
	a.CredentialsFile = AWSCredentials(t, a.AccessKey, a.SecretKey)
	Start(t, addr, exec.CommandContext(t.Context(), Program(t, "local-kms"), "-addr", addr, "-dir", filepath.Join(t.TempDir(), "db"),
		"-region", a.Region, "-access-key", a.AccessKey, "-secret-key", a.SecretKey))
	a.Client = kms.New(kms.Options{
		Region: a.Region, BaseEndpoint: &a.Endpoint, Retryer: aws.NopRetryer{},
		Credentials: credentials.NewStaticCredentialsProvider(a.AccessKey, a.SecretKey, ""),
	})
	return a
}

// AWSCredentials writes a shared-credentials file and returns its path.
func AWSCredentials(t testing.TB, accessKey, secretKey string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "credentials")
	text := fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n", accessKey, secretKey)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Key makes a symmetric key and returns its ARN.
func (a *AWS) Key(t testing.TB) string {
	t.Helper()
	made, err := a.Client.CreateKey(t.Context(), &kms.CreateKeyInput{})
	if err != nil {
		t.Fatalf("CreateKey: %v", err)
	}
	return *made.KeyMetadata.Arn
}

// Rotate rotates a key and waits until that is done.
func (a *AWS) Rotate(t testing.TB, arn string) {
	t.Helper()
	material := func() string {
		d, err := a.Client.DescribeKey(t.Context(), &kms.DescribeKeyInput{KeyId: &arn})
		if err != nil {
			t.Fatalf("DescribeKey: %v", err)
		}
		return *d.KeyMetadata.CurrentKeyMaterialId
	}
	before := material()
	if _, err := a.Client.RotateKeyOnDemand(t.Context(), &kms.RotateKeyOnDemandInput{KeyId: &arn}); err != nil {
		t.Fatalf("RotateKeyOnDemand: %v", err)
	}
	for n := 0; material() == before; n++ {
		if n == 10 {
			t.Fatal("the key did not rotate")
		}
	}
}

// Deny takes permissions ("kms:Encrypt") away, those and no others, and
// returns how to give them back. Call it without any to allow all.
func (a *AWS) Deny(t testing.TB, actions ...string) (undo func()) {
	t.Helper()
	body, err := json.Marshal(actions)
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(context.WithoutCancel(t.Context()), http.MethodPut, a.Endpoint+"/-/denied", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	_ = answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		t.Fatalf("denying %v: %s", actions, answer.Status)
	}
	return func() { a.Deny(t) }
}
