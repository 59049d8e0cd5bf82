package driver_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"

	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
)

// TestSanity runs the CSI conformance suite against node and controller over a
// wrapped driver in memory: filesystems, block volumes, and filesystems that are handed
// over.
func TestSanity(t *testing.T) {
	for _, run := range []struct{ name, accessType, stageWith string }{
		{"mount", "mount", driver.StageWithProxy},
		{"block", "block", driver.StageWithProxy},
		{"handed over", "mount", driver.StageWithWrapped},
	} {
		cfg := sanity.NewTestConfig()
		dir := scratch(t)
		node, controller := sanityServers(t, dir, run.stageWith)
		cfg.Address, cfg.ControllerAddress = "unix://"+node, "unix://"+controller
		cfg.TargetPath, cfg.StagingPath = filepath.Join(dir, "mount"), filepath.Join(dir, "staging")
		cfg.TestVolumeAccessType = run.accessType
		cfg.TestVolumeSize, cfg.TestVolumeExpandSize = 64*mib, 96*mib
		ginkgo.Describe(run.name, func() { sanity.GinkgoTest(&cfg) })
	}
	// What the wrapped driver in memory lacks (modifying) is skipped; of the node's and the groups' specs none may be.
	ginkgo.ReportAfterEach(func(r ginkgo.SpecReport) {
		if r.State.Is(types.SpecStateSkipped) && (strings.Contains(r.FullText(), "Node Service") || strings.Contains(r.FullText(), "GroupController")) {
			t.Errorf("skipped: %s (%s)", r.FullText(), r.FailureMessage())
		}
	})
	gomega.RegisterFailHandler(ginkgo.Fail)
	suite, reporter := ginkgo.GinkgoConfiguration()
	reporter.Succinct, reporter.NoColor = true, true
	ginkgo.RunSpecs(t, "csi-sanity", suite, reporter)
}

// sanityServers starts node and controller and returns their sockets.
func sanityServers(t *testing.T, dir, stageWith string) (node, controller string) {
	t.Helper()
	p := newPlant(t)
	kernel, wrapped := p.wrapped.Kernel, p.wrapped
	if err := os.MkdirAll(filepath.Join(dir, "kubelet"), 0o700); err != nil {
		t.Fatal(err)
	}
	d, err := driver.New(t.Context(), driver.Config{
		NodeName: "node-1", KubeletDir: filepath.Join(dir, "kubelet"), StageWith: stageWith, Version: "test",
		Wrapped: drivertest.Dial(t, drivertest.Serve(t, wrapped.Register)),
		Keys:    p.ring, Mapper: drivertest.Mapper{Kernel: kernel},
		Mounts: kernel, Filesystems: kernel, Devices: kernel,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, v := range kernel.Violations() {
			t.Errorf("violation: %s", v)
		}
	})
	c, err := driver.NewController(t.Context(), driver.ControllerConfig{
		Wrapped: drivertest.Dial(t, drivertest.Serve(t, wrapped.Register)), Keys: p.ring, Version: "test",
	})
	if err != nil {
		t.Fatal(err)
	}
	return drivertest.Serve(t, d.Register, d.ServerOptions()...), drivertest.Serve(t, c.Register)
}
