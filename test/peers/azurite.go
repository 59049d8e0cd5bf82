package peers

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob"
)

// Azure is a storage account like Azure's, with Blob Storage.
type Azure struct {
	// URL is http://127.0.0.1:PORT.
	URL string
	// ConnectionStringFile says where and who.
	ConnectionStringFile string
	// Client may do everything.
	Client *azblob.Client
}

// The account that Azurite has always, and its key, which everybody knows.
const (
	azureAccount = "devstoreaccount1"
	azureKey     = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)

// Azurite starts Azurite's Blob Storage.
func Azurite(t testing.TB) *Azure {
	t.Helper()
	script := filepath.Join(Root(), ".tools", "azurite", "node_modules", "azurite", "dist", "src", "blob", "main.js")
	if _, err := os.Stat(script); err != nil {
		Missing(t, "azurite")
	}
	addr := Addr(t)
	host, port, _ := strings.Cut(addr, ":")
	Start(t, addr, exec.Command(Program(t, "node"), script, "--silent", "--disableTelemetry", "--inMemoryPersistence",
		"--skipApiVersionCheck", "--blobHost", host, "--blobPort", port))
	return (&Azure{}).At(t, "http://"+addr)
}

// At is the same account behind another URL.
func (a *Azure) At(t testing.TB, endpoint string) *Azure {
	t.Helper()
	text := fmt.Sprintf("DefaultEndpointsProtocol=http;AccountName=%s;AccountKey=%s;BlobEndpoint=%s/%s;", azureAccount, azureKey, endpoint, azureAccount)
	file := filepath.Join(t.TempDir(), "connection-string")
	must(t, os.WriteFile(file, []byte(text+"\n"), 0o600))
	client, err := azblob.NewClientFromConnectionString(text, nil)
	must(t, err)
	return &Azure{URL: endpoint, ConnectionStringFile: file, Client: client}
}

// URI returns the store URI of a container, which may not exist.
func (a *Azure) URI(container string) string {
	return "azblob://" + container + "?connection-string-file=" + a.ConnectionStringFile
}

// Container makes a new one and returns its name.
func (a *Azure) Container(t testing.TB) string {
	t.Helper()
	name := BucketName()
	_, err := a.Client.CreateContainer(t.Context(), name, nil)
	must(t, err)
	return name
}

// AzureBlobs begins the names of the permissions on blobs, AzureContainers
// those on containers.
const (
	AzureContainers = "Microsoft.Storage/storageAccounts/blobServices/containers/"
	AzureBlobs      = AzureContainers + "blobs/"
)

// DenyAzure is a for someone who lacks the permissions that are named
// (AzureBlobs+"write"), and what Azure answers then.
func DenyAzure(t testing.TB, a *Azure, permissions ...string) *Azure {
	t.Helper()
	return a.At(t, Proxy(t, a.URL, func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		if slices.Contains(permissions, azurePermission(r)) {
			const code = "AuthorizationPermissionMismatch"
			w.Header().Set("X-Ms-Error-Code", code)
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprintf(w, "<?xml version=\"1.0\" encoding=\"utf-8\"?><Error><Code>%s</Code><Message>This request is not authorized to perform this operation using this permission.</Message></Error>", code)
			return
		}
		pass.ServeHTTP(w, r)
	}))
}

// azurePermission is what a request needs.
func azurePermission(r *http.Request) string {
	q := r.URL.Query()
	switch {
	case q.Get("restype") == "container" && q.Get("comp") == "" && r.Method == http.MethodPut:
		return AzureContainers + "write"
	case r.Method == http.MethodPut:
		return AzureBlobs + "write"
	case r.Method == http.MethodDelete && q.Has("versionid"):
		return AzureBlobs + "deleteBlobVersion/action"
	case r.Method == http.MethodDelete:
		return AzureBlobs + "delete"
	}
	return AzureBlobs + "read"
}
