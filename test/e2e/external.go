package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// leftOut are the specs of Kubernetes' storage tests that do not run here, by
// what is in their names, and why.
func leftOut() map[string]string {
	return map[string]string{
		`\[Disruptive\]`:              "they stop kubelet by ssh, which the node does not have; a scenario kills it",
		`\[Serial\]`:                  "they want the cluster for themselves, to fill it until something gives way",
		`Feature:Windows`:             "the node is no Windows",
		`Feature:volumegroupsnapshot`: "the vendor's driver takes no snapshots of groups",
		`Feature:snapshotmetadata`:    "the vendor's driver lists no changed blocks",
	}
}

// selection are the specs that make e2e runs. All of them is make e2e-full.
func selection() []string {
	return []string{
		`Dynamic PV \(default fs\)\] volumes should store data`,
		`Dynamic PV \(ext4\)\] volumes should allow exec of files on the volume`,
		`Dynamic PV \(default fs\)\] subPath should support file as subpath`,
		`Dynamic PV \(default fs\)\] subPath should be able to unmount after the subpath directory is deleted`,
		`Dynamic PV \(default fs\)\(allowExpansion\)\] volume-expand Verify if offline PVC expansion works`,
		`Dynamic PV \(block volmode\)\] volumes should store data`,
		`Dynamic PV \(block volmode\)\(allowExpansion\)\] volume-expand should resize volume when PVC is edited while pod is using it`,
		`Dynamic PV \(filesystem volmode\)\] volumeMode should not mount / map unused volumes in a pod`,
		`Generic Ephemeral-volume \(default fs\) \(late-binding\)\] ephemeral should create read/write inline ephemeral volume`,
		`Dynamic PV \(default fs\)\] fsgroupchangepolicy \(OnRootMismatch\)\[LinuxOnly\], pod created with an initial fsgroup, new pod fsgroup applied`,
		`Dynamic PV \(default fs\)\] provisioning should provision storage with pvc data source$`,
		`Dynamic PV \(default fs\)\] provisioning should provision storage with snapshot data source \[`,
		`Dynamic PV \(default fs\)\] provisioning should provision correct filesystem size when restoring snapshot to larger size pvc`,
		`Dynamic PV \(default fs\)\] subPath should support existing single file`,
		`Dynamic PV \(default fs\)\] read-write-once-pod should block a second pod from using an in-use ReadWriteOncePod volume`,
	}
}

// selected runs the selection.
func (t *tester) selected(ctx context.Context) (string, error) {
	ran, said, err := t.externalStorage(ctx, selection()...)
	if want := len(selection()); err == nil && ran != want {
		err = fmt.Errorf("%d expressions for one spec each, and %d specs passed: Kubernetes has renamed some, or they skip themselves", want, ran)
	}
	return said, err
}

// all runs all that can run here and match an expression, and says why others do
// not.
func (t *tester) all(ctx context.Context, only string) (string, error) {
	_, said, err := t.externalStorage(ctx, only)
	for name, why := range leftOut() {
		said += fmt.Sprintf("\nleft out: %s: %s", name, why)
	}
	return said, err
}

// externalStorage runs those of Kubernetes' own storage tests whose names match
// one of ginkgo's expressions, and returns how many passed.
func (t *tester) externalStorage(ctx context.Context, focus ...string) (passed int, said string, err error) {
	// The program calls itself by name.
	kubectl := t.site.path("kubectl")
	if err := os.Symlink(t.site.kub, kubectl); err != nil {
		return 0, "", err
	}
	const processes = 4
	log := filepath.Join(t.site.logs(), "external-storage.log")
	out, err := os.Create(log)
	if err != nil {
		return 0, "", err
	}
	defer out.Close()
	const report = "external-storage.json"
	args := []string{
		fmt.Sprintf("--procs=%d", processes), "--no-color", "--timeout=4h", "--keep-going", "--fail-on-empty", "--silence-skips", "--output-interceptor-mode=none",
		"--output-dir=" + t.site.logs(), "--json-report=" + report,
	}
	for name := range leftOut() {
		args = append(args, "--skip="+name)
	}
	for _, f := range focus {
		args = append(args, "--focus=External.Storage.*"+f)
	}
	tools := filepath.Dir(t.site.kub)
	args = append(args, filepath.Join(tools, "e2e-storage.test"), "--",
		"-storage.testdriver="+t.site.source("test/e2e/storage/testdriver.yaml"), "-provider=skeleton", "-kubeconfig="+t.site.path("admin.kubeconfig"), "-kubectl-path="+kubectl,
		"-node-os-distro=custom")
	cmd := exec.CommandContext(ctx, filepath.Join(tools, "ginkgo"), args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = out, out, t.site.dir
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	err = cmd.Run()
	if err != nil {
		err = fmt.Errorf("%s: %w", log, err)
	}
	passed, said, failed := readReport(filepath.Join(t.site.logs(), report))
	return passed, said, errors.Join(err, failed)
}

// spec is what the test reads of ginkgo's report on one.
type spec struct {
	ContainerHierarchyTexts []string
	LeafNodeType            string
	LeafNodeText            string
	State                   string
	RunTime                 time.Duration
	Failure                 struct{ Message string }
}

// where is a test's folder, which its messages begin with.
var where = regexp.MustCompile(`^\S+\.go:\d+: `)

// readReport says how specs ended: how many passed, why others skipped
// themselves, and which took longest. What failed is the error.
func readReport(file string) (passed int, said string, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, "", err
	}
	var suites []struct{ SpecReports []spec }
	if err := json.Unmarshal(text, &suites); err != nil {
		return 0, "", fmt.Errorf("%s: %w", file, err)
	}
	var ran []spec
	var failed []error
	skipped := map[string]int{}
	for _, suite := range suites {
		for _, s := range suite.SpecReports {
			switch {
			case s.State == "passed" && s.LeafNodeType == "It":
				ran = append(ran, s)
			case s.State == "skipped" && s.Failure.Message != "":
				skipped[where.ReplaceAllString(s.Failure.Message, "")]++
			case s.State != "passed" && s.State != "skipped" && s.State != "pending":
				failed = append(failed, fmt.Errorf("%s: %s: %.500s", s.State, s.name(), s.Failure.Message))
			}
		}
	}
	slices.SortFunc(ran, func(a, b spec) int { return cmp.Compare(b.RunTime, a.RunTime) })
	lines := []string{fmt.Sprintf("%d passed, %d failed", len(ran), len(failed))}
	for _, why := range slices.Sorted(maps.Keys(skipped)) {
		lines = append(lines, fmt.Sprintf("%d skipped: %s", skipped[why], why))
	}
	for _, s := range ran[:min(3, len(ran))] {
		lines = append(lines, fmt.Sprintf("%.0f s: %s", s.RunTime.Seconds(), s.name()))
	}
	return len(ran), strings.Join(lines, "\n"), errors.Join(failed...)
}

// name is how the suite calls a spec, without the driver's name.
func (s spec) name() string {
	texts := append(slices.Clone(s.ContainerHierarchyTexts), s.LeafNodeText)
	return strings.Join(texts[min(1, len(texts)-1):], " ")
}
