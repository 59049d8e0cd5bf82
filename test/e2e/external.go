package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// skipped are the specs of Kubernetes' storage tests that break the only node,
// wait for minutes, or want what this cluster is not.
const skipped = `Disruptive|Slow|Serial|Feature:Windows|Feature:volumegroupsnapshot|Feature:snapshotmetadata`

// selection are the specs that make e2e runs, in as many programs as run beside
// each other; each expression is for one. All of them is make e2e-full.
func selection() [][]string {
	return [][]string{
		{
			`Dynamic PV \(default fs\)\] volumes should store data`,
			`Dynamic PV \(ext4\)\] volumes should allow exec of files on the volume`,
			`Dynamic PV \(default fs\)\] subPath should support file as subpath`,
			`Dynamic PV \(default fs\)\] subPath should be able to unmount after the subpath directory is deleted`,
			`Dynamic PV \(default fs\)\(allowExpansion\)\] volume-expand Verify if offline PVC expansion works`,
		},
		{
			`Dynamic PV \(block volmode\)\] volumes should store data`,
			`Dynamic PV \(block volmode\)\(allowExpansion\)\] volume-expand should resize volume when PVC is edited while pod is using it`,
			`Dynamic PV \(filesystem volmode\)\] volumeMode should not mount / map unused volumes in a pod`,
			`Generic Ephemeral-volume \(default fs\) \(late-binding\)\] ephemeral should create read/write inline ephemeral volume`,
			`Dynamic PV \(default fs\)\] fsgroupchangepolicy \(OnRootMismatch\)\[LinuxOnly\], pod created with an initial fsgroup, new pod fsgroup applied`,
		},
		{
			`Dynamic PV \(default fs\)\] provisioning should provision storage with pvc data source$`,
			`Dynamic PV \(default fs\)\] provisioning should provision storage with snapshot data source \[`,
			`Dynamic PV \(default fs\)\] provisioning should provision correct filesystem size when restoring snapshot to larger size pvc`,
			`Dynamic PV \(default fs\)\] subPath should support existing single file`,
			`Dynamic PV \(default fs\)\] read-write-once-pod should block a second pod from using an in-use ReadWriteOncePod volume`,
		},
	}
}

// externalStorage runs Kubernetes' own storage tests, with ginkgo's expressions
// for each program.
func (t *tester) externalStorage(ctx context.Context, shards [][]string) (string, error) {
	// The program calls itself by name.
	kubectl := t.site.path("kubectl")
	if err := os.Symlink(t.site.kub, kubectl); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	said := make([]string, len(shards))
	var runs []func() error
	for i, focus := range shards {
		runs = append(runs, func() (err error) {
			said[i], err = t.suite(ctx, i, kubectl, focus)
			return err
		})
	}
	err := together(runs...)
	return strings.Join(said, "\n"), err
}

var (
	suiteSum  = regexp.MustCompile(`Ran \d+ of \d+ Specs|\d+ Passed|\d+ Failed`)
	suiteFail = regexp.MustCompile(`(?m)^.*\[(?:FAIL|TIMEDOUT|PANICKED|INTERRUPTED)\].*$`)
)

func (t *tester) suite(ctx context.Context, n int, kubectl string, focus []string) (string, error) {
	log := filepath.Join(t.site.logs(), fmt.Sprintf("external-storage-%d.log", n))
	out, err := os.Create(log)
	if err != nil {
		return "", err
	}
	defer out.Close()
	args := []string{
		"-storage.testdriver=" + t.site.source("test/e2e/storage/testdriver.yaml"), "-provider=skeleton", "-kubeconfig=" + t.site.path("admin.kubeconfig"), "-kubectl-path=" + kubectl,
		"-ginkgo.skip=" + skipped, "-ginkgo.no-color", "-ginkgo.timeout=4h", "-node-os-distro=custom",
	}
	for _, f := range focus {
		args = append(args, "-ginkgo.focus=External.Storage.*"+f)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(filepath.Dir(t.site.kub), "e2e-storage"), args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = out, out, t.site.dir
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	err = cmd.Run()
	text, readErr := os.ReadFile(log)
	if readErr != nil {
		return "", errors.Join(err, readErr)
	}
	sum := strings.Join(suiteSum.FindAllString(string(text), -1), ", ")
	if err == nil && !strings.Contains(sum, " Passed") {
		err = errors.New("it ran no specs")
	}
	if err != nil {
		sum += "\n" + strings.Join(suiteFail.FindAllString(string(text), -1), "\n")
		err = fmt.Errorf("%s: %w", log, err)
	}
	return sum, err
}
