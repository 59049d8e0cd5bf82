package driver_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"google.golang.org/grpc"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
)

// autoKeys has a DEK for every volume, as if a controller had made it.
type autoKeys struct{ *drivertest.Keys }

func (k autoKeys) GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	return k.CreateDEK(ctx, id, dek.Spec{Cipher: dek.CipherXTS})
}

// TestSanity runs the CSI conformance suite against the driver over a wrapped
// driver in memory: filesystems, block volumes, and filesystems that are handed
// over.
func TestSanity(t *testing.T) {
	for _, run := range []struct{ name, accessType, stageWith string }{
		{"mount", "mount", driver.StageWithProxy},
		{"block", "block", driver.StageWithProxy},
		{"handed over", "mount", driver.StageWithWrapped},
	} {
		cfg := sanity.NewTestConfig()
		dir := scratch(t)
		cfg.Address = "unix://" + sanityServer(t, dir, run.stageWith)
		cfg.TargetPath, cfg.StagingPath = filepath.Join(dir, "mount"), filepath.Join(dir, "staging")
		cfg.TestVolumeAccessType = run.accessType
		cfg.TestVolumeSize, cfg.TestVolumeExpandSize = 64*mib, 96*mib
		ginkgo.Describe(run.name, func() { sanity.GinkgoTest(&cfg) })
	}
	// What the wrapped driver in memory lacks (lists, snapshots, groups) is
	// skipped; of the node's specs none may be.
	ginkgo.ReportAfterEach(func(r ginkgo.SpecReport) {
		if r.State.Is(types.SpecStateSkipped) && strings.Contains(r.FullText(), "Node Service") {
			t.Errorf("skipped: %s (%s)", r.FullText(), r.FailureMessage())
		}
	})
	gomega.RegisterFailHandler(ginkgo.Fail)
	suite, reporter := ginkgo.GinkgoConfiguration()
	reporter.Succinct, reporter.NoColor = true, true
	ginkgo.RunSpecs(t, "csi-sanity", suite, reporter)
}

// sanityServer starts a driver and returns its socket.
func sanityServer(t *testing.T, dir, stageWith string) string {
	t.Helper()
	kernel := drivertest.NewKernel()
	wrapped := &drivertest.Wrapped{Kernel: kernel}
	if err := os.MkdirAll(filepath.Join(dir, "kubelet"), 0o700); err != nil {
		t.Fatal(err)
	}
	d, err := driver.New(t.Context(), driver.Config{
		NodeName: "node-1", KubeletDir: filepath.Join(dir, "kubelet"), StageWith: stageWith, Version: "test",
		Wrapped: drivertest.Dial(t, drivertest.Serve(t, wrapped.Register)),
		Keys:    autoKeys{drivertest.NewKeys()}, Mapper: drivertest.Mapper{Kernel: kernel},
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
	return drivertest.Serve(t, func(s grpc.ServiceRegistrar) { d.Register(s) }, d.ServerOptions()...)
}
