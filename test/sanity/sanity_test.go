// Package sanity_test runs csi-sanity, the conformance suite of kubernetes-csi,
// over csi-plugin in front of loopdriver, on a real kernel.
package sanity_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"

	"github.com/cryptcsi/cryptcsi/test/stack"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// TestKernelSanity runs every shape in one suite, because ginkgo runs one per
// process. Specs that do not apply are skipped with a reason that is known
// here; any other skip fails. The list is printed.
func TestKernelSanity(t *testing.T) {
	kernel.Need(t, "root", "loop", "dm-crypt", "keyring", "ext4", "exec:mkfs.ext4", "exec:../../bin/csi-plugin", "exec:../../bin/loopdriver", "exec:../../bin/crypt-worker", "exec:../../bin/key-service")
	topolvm := []string{"--driver-name=topolvm.io", "--no-stage", "--single-writer", "--fault=stack-publish", "--node-expansion-required=mount"}
	for _, s := range []shape{
		{name: "mount", accessType: "mount", keyService: true},
		{name: "block", accessType: "block"},
		{name: "mount, without controller", accessType: "mount", nodeAlone: true},
		{name: "mount, handed over", accessType: "mount", plugin: []string{"--stage-with=wrapped"}},
		{name: "mount, a driver like host-path", accessType: "mount", driver: []string{"--driver-name=hostpath.csi.k8s.io", "--fixed-type", "--fault=no-grow"}},
		{name: "mount, a driver like TopoLVM", accessType: "mount", driver: topolvm},
		{name: "block, a driver like TopoLVM", accessType: "block", driver: topolvm},
	} {
		describe(t, s)
	}
	skipped := map[string]int{}
	ginkgo.ReportAfterSuite("every skip has a reason", func(report ginkgo.Report) {
		for _, spec := range report.SpecReports {
			if !spec.State.Is(types.SpecStateSkipped) {
				continue
			}
			skipped[spec.Failure.Message]++
			if !known(spec.Failure.Message) {
				t.Errorf("skipped: %s: %s", spec.FullText(), spec.Failure.Message)
			}
		}
	})
	gomega.RegisterFailHandler(ginkgo.Fail)
	suite, reporter := ginkgo.GinkgoConfiguration()
	suite.Timeout = 0 // that of go test counts
	ginkgo.RunSpecs(t, "csi-plugin over loopdriver", suite, reporter)
	for reason, n := range skipped {
		fmt.Printf("%4d skipped: %s\n", n, reason)
	}
}

// shape is what the suite runs over.
type shape struct {
	name, accessType string
	plugin, driver   []string // more flags
	nodeAlone        bool     // no csi-plugin controller
	keyService       bool
}

// describe adds the suite over a stack of its own.
func describe(t *testing.T, run shape) {
	t.Helper()
	name := run.name
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	kernel.NoLeaks(t)
	s, err := stack.Start(t.Context(), stack.Config{
		Dir: t.TempDir(), Bin: bin, PluginArgs: run.plugin, DriverArgs: append(slices.Clone(run.driver), "--max-volumes=4"),
		Controller: !run.nodeAlone, KeyService: run.keyService,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Errorf("%s: stopping: %v", name, err)
		}
		if t.Failed() {
			t.Logf("%s:\n%s", name, s.Logs())
		}
	})
	cfg := sanity.NewTestConfig()
	cfg.Address = s.Endpoint
	cfg.ControllerAddress = s.ControllerEndpoint()
	cfg.TestVolumeAccessType = run.accessType
	cfg.TestVolumeSize = 64 << 20
	cfg.TestVolumeExpandSize = 96 << 20
	cfg.TestVolumeParameters = map[string]string{"note": "sanity"}
	cfg.TestNodeVolumeAttachLimit = true
	cfg.TargetPath = filepath.Join(s.KubeletDir(), "pods", "target")
	cfg.StagingPath = filepath.Join(s.KubeletDir(), "plugins", "staging")
	for _, dir := range []string{"pods", "plugins"} {
		if err := os.MkdirAll(filepath.Join(s.KubeletDir(), dir), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	ginkgo.Describe(name, func() {
		sc := sanity.GinkgoTest(&cfg)
		t.Cleanup(sc.Finalize)
	})
}

// known tells which skips are due: services and methods that loopdriver does
// not have.
func known(reason string) bool {
	for _, r := range []string{
		"GroupControllerService not supported",
		"ControllerModifyVolume not supported", "Modify volume not supported", "Modify Volume not supported",
		"ControllerPublishVolume.readonly field not supported",
		"does not have single node multi writer capability", // TopoLVM
	} {
		if strings.Contains(reason, r) {
			return true
		}
	}
	return false
}
