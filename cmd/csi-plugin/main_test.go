package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A command line that cannot work ends with words and a code of its own.
func TestCommandLines(t *testing.T) {
	dir := t.TempDir()
	uri := filepath.Join(dir, "uri")
	if err := os.WriteFile(uri, []byte("cluster:///x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	key, config := filepath.Join(dir, "key"), filepath.Join(dir, "config")
	for path, content := range map[string]string{key: strings.Repeat("k", 32), config: "kms-urri: x"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		args string
		code int
		says string
	}{
		{"", 2, "csi-plugin node"},
		{"help", 0, "csi-plugin node"},
		{"--help", 0, "csi-plugin inspect"},
		{"nod", 2, `unknown verb "nod"`},
		{"version extra", 2, `unexpected argument "extra"`},
		{"node --help", 0, "-wrapped-endpoint"},
		{"inspect --help", 0, "-kubelet-dir"},
		{"node --bogus", 2, "bogus"},
		{"node", 2, "--key-service"},
		{"node --key-service=unix:///k --kms-uri=cluster:///x", 2, "excludes"},
		{"node --key-service=unix:///k --storage-uri=mem://", 2, "excludes"},
		{"controller --help", 0, "-delete-grace"},
		{"controller", 2, "controller: where keys come from is missing"},
		{"controller --key-service=unix:///k --wrapped-endpoint=unix:///a --check-config", 0, "the configuration is right"},
		{"controller --key-service=unix:///k --wrapped-endpoint=unix:///a --kek-names=gold,lead --check-config", 0, "the configuration is right"},
		{"controller --key-service=unix:///k --wrapped-endpoint=unix:///a --kek-names=gold,", 2, "--kek-names: KEK name"},
		{"controller --kms-uri=gold=static://" + key + " --storage-uri=mem:// --wrapped-endpoint=unix:///a --check-config", 0, "the configuration is right"},
		{"controller --kms-uri=gold=static://" + key + " --storage-uri=mem:// --wrapped-endpoint=unix:///a --kek-names=gold", 2, "--kek-names goes with --key-service"},
		{"controller --key-service=unix:///k --wrapped-endpoint=unix:///a --key-service-protocol=constellation", 2, "no records"},
		{"controller --key-service=unix:///k --wrapped-endpoint=unix:///a --create-keys", 2, "create-keys"},
		{"controller --kms-uri=cluster:///x --storage-uri=mem:// --wrapped-endpoint=tcp:1", 2, "controller: --wrapped-endpoint"},
		{"node --key-service=unix:///k --wrapped-endpoint=unix:///a --profile=x.example.com", 2, "no driver of the name"},
		{"node --key-service=unix:///k --wrapped-endpoint=unix:///a --profile=ebs.csi.aws.com,alias=perhaps", 2, "must be one of no, yes"},
		{"node --key-service=dns:///example.com:1 --wrapped-endpoint=unix:///a --check-config", 1, "plaintext is for"},
		{"node --key-service=unix:///k --wrapped-endpoint=unix:///a --check-config", 0, "the configuration is right"},
		{"node --kms-uri=cluster:///x", 2, "--storage-uri"},
		{"node --storage-uri=mem://", 2, "--kms-uri"},
		{"node --kms-uri-file=/nowhere --storage-uri=mem:// --wrapped-endpoint=unix:///a --check-config", 1, "/nowhere"},
		{"node --kms-uri=static://" + key + " --storage-uri=mem:// --wrapped-endpoint=unix:///a --check-config", 0, "the configuration is right"},
		{"node --config=" + config, 2, `no flag "kms-urri"`},
		{"node --kms-uri-file=" + uri + " --storage-uri=mem://", 2, "--wrapped-endpoint is required"},
		{"node --kms-uri=cluster:///x --storage-uri=mem:// --wrapped-endpoint=tcp:1", 2, "must be a unix socket"},
		{"node --kms-uri=cluster:///x --storage-uri=mem:// --wrapped-endpoint=unix:///a --endpoint=unix:///a", 2, "same socket"},
		{"node --kms-uri=cluster:///x --storage-uri=mem:// --wrapped-endpoint=unix:///a --kubelet-registration-path=csi.sock", 2, "must be an absolute path"},
		{"node --kms-uri=cluster:///x --storage-uri=mem:// --wrapped-endpoint=unix:///a --warm-workers=-1", 2, "--warm-workers"},
		{"node --kms-uri=cluster:///x --storage-uri=mem:// --wrapped-endpoint=unix:///a --integrity-init=none", 2, `must be "clone" or "wipe"`},
		{"node --kms-uri=cluster:///x --storage-uri=mem:// --wrapped-endpoint=unix:///a --hydrating-volumes=0", 2, "--hydrating-volumes"},
		{"node --kms-uri=cluster:///x --storage-uri=mem:// --wrapped-endpoint=unix:///a --node-condition", 2, "--kubelet-registration-path"},
		{"node --kms-uri=cluster:///x --storage-uri=mem:// --wrapped-endpoint=unix:///a --startup-taint=a/b", 2, "--kubelet-registration-path"},
		{"node --kms-uri=cluster:///x --storage-uri=mem:// --wrapped-endpoint=unix:///a --logging-format=xml", 2, "--logging-format"},
		{"node --kms-uri=cluster:///x --storage-uri=mem:// --wrapped-endpoint=unix:///a --crypt-worker=/nowhere", 1, "crypt-worker /nowhere does not run"},
		{"node --kms-uri=cluster:///x --storage-uri=mem:// --wrapped-endpoint=unix:///a --crypt-worker=/bin/true", 1, "is no version"},
	} {
		var out bytes.Buffer
		code := run(t.Context(), strings.Fields(tt.args), &out, &out)
		if code != tt.code || !strings.Contains(out.String(), tt.says) {
			t.Errorf("csi-plugin %s: exit code %d, want %d; it should say %q:\n%s", tt.args, code, tt.code, tt.says, &out)
		}
	}
}

// A worker of another build speaks another protocol.
func TestWorkerOfAnotherBuild(t *testing.T) {
	worker := filepath.Join(t.TempDir(), "crypt-worker")
	answer := func(text string) {
		if err := os.WriteFile(worker, []byte("#!/bin/sh\necho '"+text+"'\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	answer("crypt-worker " + version + ", commit " + commit + ", libcryptsetup 2.6.1")
	if library, err := libcryptsetup(t.Context(), worker); err != nil || library != "2.6.1" {
		t.Errorf("libcryptsetup = %q, %v", library, err)
	}
	answer("crypt-worker v0.0.1, commit " + commit + ", libcryptsetup 2.6.1")
	if _, err := libcryptsetup(t.Context(), worker); err == nil || !strings.Contains(err.Error(), "install both from one build") {
		t.Errorf("a worker of another version: %v", err)
	}
}

func TestVersion(t *testing.T) {
	var out bytes.Buffer
	if code := run(t.Context(), []string{"--version"}, &out, &out); code != 0 {
		t.Fatalf("exit code %d: %s", code, &out)
	}
	for _, want := range []string{"csi-plugin " + version, "commit " + commit, "libcryptsetup ", "KMS: awskms, "} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("version has no %q: %s", want, &out)
		}
	}
}

// Which KEKs a class may name: those of the configuration, or with a key service
// those of --kek-names.
func TestNamesOfKEKs(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, bytes.Repeat([]byte("k"), 32), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ args, want string }{
		{"--kms-uri=static://" + key + " --kms-uri=lead=static://" + key + " --kms-uri=gold=static://" + key + " --storage-uri=mem://", "[gold lead]"},
		{"--kms-uri=static://" + key + " --storage-uri=mem://", "[]"},
		{"--key-service=unix:///k --kek-names=lead,gold", "[lead gold]"},
		{"--key-service=unix:///k", "[]"},
	} {
		f, err := parseControllerFlags(append(strings.Fields(tt.args), "--wrapped-endpoint=unix:///a"), io.Discard)
		if err != nil {
			t.Fatalf("%s: %v", tt.args, err)
		}
		keys, closeKeys, err := f.keys.open(t.Context(), slog.New(slog.DiscardHandler), keyOptions{})
		if err != nil {
			t.Fatalf("%s: %v", tt.args, err)
		}
		names, err := f.keys.keksOf(keys)
		closeKeys()
		if err != nil || fmt.Sprint(names) != tt.want {
			t.Errorf("%s: %v, %v, want %s", tt.args, names, err, tt.want)
		}
	}
}
