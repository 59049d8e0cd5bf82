package loopdriver_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"

	"github.com/cryptcsi/cryptcsi/test/loopdriver"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// TestKernelSanity runs csi-sanity over the driver alone, in each shape that it
// can take. One suite holds them all: ginkgo runs one per process.
func TestKernelSanity(t *testing.T) {
	kernel.Need(t, "root", "loop", "ext4", "exec:mkfs.ext4")
	shapes := []struct {
		name       string
		accessType string
		cfg        loopdriver.Config
	}{
		{"mount", "mount", loopdriver.Config{}},
		{"block", "block", loopdriver.Config{}},
		{"mount without stage", "mount", loopdriver.Config{NoStage: true}},
		{"block without stage", "block", loopdriver.Config{NoStage: true}},
		{"block without attach", "block", loopdriver.Config{NoAttach: true}},
	}
	for _, s := range shapes {
		s.cfg.MaxVolumes = 4
		s.cfg.DataDir = filepath.Join(t.TempDir(), "data")
		must(t, "mkdir", os.Mkdir(s.cfg.DataDir, 0o700))
		t.Cleanup(func() { noLeaks(t, s.cfg.DataDir) })
		cfg := sanity.NewTestConfig()
		cfg.Address = start(t, s.cfg).socket
		cfg.TestVolumeAccessType = s.accessType
		cfg.TestVolumeSize = 64 * mib
		cfg.TestVolumeExpandSize = 96 * mib
		cfg.TestVolumeParameters = map[string]string{"note": "sanity"}
		cfg.TestNodeVolumeAttachLimit = true
		cfg.TargetPath = filepath.Join(t.TempDir(), "target")
		cfg.StagingPath = filepath.Join(t.TempDir(), "staging")
		ginkgo.Describe(s.name, func() {
			sc := sanity.GinkgoTest(&cfg)
			t.Cleanup(sc.Finalize)
		})
	}
	ginkgo.ReportAfterSuite("skipped specs have a reason", func(report ginkgo.Report) {
		for _, spec := range report.SpecReports {
			if spec.State.Is(types.SpecStateSkipped) && !maySkip(spec.ContainerHierarchyTexts[0], spec.Failure.Message) {
				t.Errorf("skipped: %s: %s", spec.FullText(), spec.Failure.Message)
			}
		}
	})
	gomega.RegisterFailHandler(ginkgo.Fail)
	suite, reporter := ginkgo.GinkgoConfiguration()
	suite.Timeout = 0 // that of go test counts
	ginkgo.RunSpecs(t, "loopdriver", suite, reporter)
}

// maySkip tells which specs do not apply: those of services and methods that
// the driver does not have, in that shape.
func maySkip(shape, reason string) bool {
	switch reason {
	case "GroupControllerService not supported",
		"ControllerModifyVolume not supported", "Modify volume not supported", "Modify Volume not supported",
		"ControllerPublishVolume.readonly field not supported":
		return true
	case "NodeStageVolume not supported", "NodeUnstageVolume not supported":
		return strings.HasSuffix(shape, "without stage")
	case "ControllerPublishVolume not supported", "ControllerUnpublishVolume not supported",
		"Controller Publish, UnpublishVolume not supported":
		return strings.HasSuffix(shape, "without attach")
	}
	return false
}
