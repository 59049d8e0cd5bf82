package secret_test

import (
	"os"
	"testing"

	"github.com/cryptcsi/cryptcsi/secret"
)

func TestMemoryFile(t *testing.T) {
	f, path, err := secret.MemoryFile("test", []byte("content"))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got, err := os.ReadFile(path); err != nil || string(got) != "content" {
			t.Errorf("it holds %q, %v", got, err)
		}
	}
	if err := os.WriteFile(path, []byte("other"), 0o600); err == nil {
		t.Error("it can be changed")
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadFile(path); err == nil {
		t.Error("it is still there")
	}
}
