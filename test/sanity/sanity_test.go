// Package sanity_test runs csi-sanity, the conformance suite of kubernetes-csi,
// over csi-plugin in front of other drivers, on a real kernel.
package sanity_test

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/test/loopdriver"
	"github.com/cryptcsi/cryptcsi/test/stack"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// TestKernelSanity runs every shape in one suite, because ginkgo runs one per
// process; -ginkgo.focus chooses among them. Specs that do not apply are
// skipped with a reason that is known here; any other skip fails. The list is
// printed. Over the drivers that loopdriver plays, and where there is no controller
// of ours, only the specs in brief run, or with SANITY_ALL=1 the whole suite.
func TestKernelSanity(t *testing.T) {
	kernel.Need(t, "root", "loop", "dm-crypt", "keyring", "ext4", "exec:mkfs.ext4", "exec:losetup", "exec:../../bin/csi-plugin",
		"exec:../../bin/loopdriver", "exec:../../bin/gcepd", "exec:../../bin/crypt-worker", "exec:../../bin/key-service")
	kernel.NoLeaks(t)
	lacks := map[string][]string{}
	for _, s := range shapes() {
		lacks[s.name] = s.lacks
		describe(t, s)
	}
	ginkgo.ReportAfterSuite("every skip has a reason", func(report ginkgo.Report) {
		seconds, skipped := map[string]float64{}, map[string]int{}
		for _, spec := range report.SpecReports {
			if len(spec.ContainerHierarchyTexts) == 0 {
				continue // this report's own
			}
			name, why := spec.ContainerHierarchyTexts[0], spec.Failure.Message
			seconds[name] += spec.RunTime.Seconds()
			if !spec.State.Is(types.SpecStateSkipped) || why == "" { // "": out of focus
				continue
			}
			skipped[name+": "+why]++
			if !slices.ContainsFunc(lacks[name], func(due string) bool { return strings.Contains(why, due) }) {
				t.Errorf("skipped: %s: %s", spec.FullText(), why)
			}
		}
		fmt.Println()
		for _, name := range slices.Sorted(maps.Keys(seconds)) {
			fmt.Printf("%4.0f s      %s\n", seconds[name], name)
		}
		for _, why := range slices.Sorted(maps.Keys(skipped)) {
			fmt.Printf("%4d skipped %s\n", skipped[why], why)
		}
	})
	gomega.RegisterFailHandler(ginkgo.Fail)
	suite, reporter := ginkgo.GinkgoConfiguration()
	suite.Timeout = 0 // that of go test counts
	ginkgo.RunSpecs(t, "csi-plugin over other drivers", suite, reporter)
}

// shape is a stack that the suite runs over.
type shape struct {
	name           string
	access         []string // mount, block or both, one after the other
	program        string   // the wrapped driver's; "": loopdriver
	plugin, driver []string // more flags
	nodeAlone      bool     // no csi-plugin controller
	keyService     bool
	brief          bool     // only some specs, unless SANITY_ALL is set
	lacks          []string // what the suite may say in skipping specs
}

func shapes() []shape {
	both := []string{"mount", "block"}
	loop := []string{"GroupControllerService not supported", "ControllerModifyVolume not supported", "Modify volume not supported", "Modify Volume not supported",
		"ControllerPublishVolume.readonly field not supported"}
	gce := []string{"GroupControllerService not supported", "GetSnapshot not supported", "GetCapacity not supported",
		"does not have single node multi writer capability", "testnodevolumeattachlimit not enabled"}
	brief, briefly := os.Getenv("SANITY_ALL") == "", append(slices.Clone(loop), "only with SANITY_ALL")
	all := []shape{
		{name: "loopdriver, by a key service", access: both, keyService: true, lacks: loop},
		{name: "loopdriver, without controller", access: []string{"mount"}, nodeAlone: true, brief: brief, lacks: briefly},
		{name: "GCE PD itself", access: both, program: "gcepd", lacks: gce},
	}
	for _, name := range loopdriver.Others() {
		lacks := slices.Clone(briefly)
		switch name {
		case "topolvm.io":
			lacks = append(lacks, "does not have single node multi writer capability")
		case "rbd.csi.ceph.com":
			lacks = append(lacks, "ControllerPublishVolume not supported", "ControllerUnpublishVolume not supported", "Controller Publish, UnpublishVolume not supported")
		}
		run := shape{name: "like " + name, access: both, driver: []string{"--like=" + name}, brief: brief, lacks: lacks}
		all = append(all, run)
		if p, _ := driver.ProfileOf(name); p.HandOver {
			run.name, run.access, run.plugin = run.name+", handed over", []string{"mount"}, []string{"--stage-with=wrapped"}
			all = append(all, run)
		}
	}
	return all
}

// brief tells which specs a wrapped driver's habits are most likely to change.
func brief(spec string) bool {
	for _, part := range []string{
		"Node Service should", "NodeExpandVolume should work", "NodeUnpublishVolume should remove", "ExpandVolume [Controller Server] should work",
		"CreateVolume should create volume from", "lifecycle should work",
	} {
		if strings.Contains(spec, part) {
			return true
		}
	}
	return false
}

// describe adds the suite over a stack of its own, which lives as long as the
// suite's specs run. Where the driver makes IDs of names, an operator forgets the
// IDs of deleted volumes after each spec: the suite uses names again, which
// Kubernetes never does.
func describe(t *testing.T, run shape) {
	t.Helper()
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	args := slices.Clone(run.driver)
	if run.program == "" {
		args = append(args, "--max-volumes=4")
	}
	c := stack.Config{
		Dir: t.TempDir(), Bin: bin, Driver: run.program, PluginArgs: run.plugin, DriverArgs: args,
		Controller: !run.nodeAlone, KeyService: run.keyService,
	}
	ginkgo.Describe(run.name, ginkgo.Ordered, ginkgo.ContinueOnFailure, func() {
		var s *stack.Stack
		var configs []*sanity.TestConfig
		ginkgo.BeforeAll(func(ctx ginkgo.SpecContext) {
			s, err = stack.Start(ctx, c)
			gomega.Expect(err).NotTo(gomega.HaveOccurred())
			for _, cfg := range configs {
				gomega.Expect(connect(cfg, s)).To(gomega.Succeed())
			}
		})
		ginkgo.BeforeEach(func() {
			if run.brief && !brief(ginkgo.CurrentSpecReport().FullText()) {
				ginkgo.Skip("only with SANITY_ALL")
			}
		})
		ginkgo.AfterEach(func(ctx ginkgo.SpecContext) {
			if run.program == "gcepd" {
				gomega.Expect(s.Forget(ctx)).To(gomega.Succeed())
			}
		})
		ginkgo.AfterAll(func() {
			if s == nil {
				return // it did not start
			}
			if t.Failed() {
				ginkgo.GinkgoWriter.Println(s.Logs())
			}
			gomega.Expect(s.Stop()).To(gomega.Succeed())
			gomega.Expect(os.RemoveAll(c.Dir)).To(gomega.Succeed())
		})
		for _, access := range run.access {
			cfg := config(run.program, access)
			if run.brief {
				cfg.IdempotentCount = 2
			}
			configs = append(configs, &cfg)
			ginkgo.Describe(access, func() { t.Cleanup(sanity.GinkgoTest(&cfg).Finalize) })
		}
		if run.program == "" && !slices.Contains(run.lacks, "ControllerPublishVolume not supported") {
			ginkgo.It("Node Service should let a volume grow while it is published", func(ctx ginkgo.SpecContext) { grow(ctx, s) })
		}
		if run.program == "gcepd" {
			ginkgo.It("gives no second key to an ID that is made of a name", func(ctx ginkgo.SpecContext) { nameAgain(ctx, s) })
		}
	})
}

// grow lets a volume grow while it is in use. The suite grows one before it is
// attached, when no driver has to do anything on the node.
func grow(ctx context.Context, s *stack.Stack) {
	v, err := s.Create(ctx, "grows", 64<<20, stack.BlockCapability(), nil)
	gomega.Expect(err).NotTo(gomega.HaveOccurred())
	gomega.Expect(v.Up(ctx)).To(gomega.Succeed())
	gomega.Expect(v.Expand(ctx, 1<<30)).To(gomega.Succeed())
	gomega.Expect(v.Down(ctx)).To(gomega.Succeed())
	gomega.Expect(v.Delete(ctx)).To(gomega.Succeed())
}

// nameAgain makes, deletes and makes a volume of one name.
func nameAgain(ctx context.Context, s *stack.Stack) {
	req := &csi.CreateVolumeRequest{
		Name: "again", CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 20}, VolumeCapabilities: []*csi.VolumeCapability{stack.BlockCapability()},
	}
	first, err := s.Controller.CreateVolume(ctx, req)
	gomega.Expect(err).NotTo(gomega.HaveOccurred())
	id := first.GetVolume().GetVolumeId()
	_, err = s.Controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	gomega.Expect(err).NotTo(gomega.HaveOccurred())

	_, err = s.Controller.CreateVolume(ctx, req)
	gomega.Expect(status.Code(err)).To(gomega.Equal(codes.AlreadyExists))
	gomega.Expect(s.Forget(ctx)).To(gomega.Succeed())
	again, err := s.Controller.CreateVolume(ctx, req)
	gomega.Expect(err).NotTo(gomega.HaveOccurred())
	gomega.Expect(again.GetVolume().GetVolumeId()).To(gomega.Equal(id))
	_, err = s.Controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	gomega.Expect(err).NotTo(gomega.HaveOccurred())
}

// config is what the suite has to know of the driver.
func config(program, access string) sanity.TestConfig {
	cfg := sanity.NewTestConfig()
	cfg.TestVolumeAccessType = access
	cfg.TestVolumeSize = 64 << 20
	cfg.TestVolumeExpandSize = 96 << 20
	cfg.TestVolumeParameters = map[string]string{"note": "sanity"}
	cfg.TestNodeVolumeAttachLimit = true
	if program == "gcepd" { // disks of whole GiB, and more of them than a test should attach
		cfg.TestVolumeSize = 1<<30 - 16<<20
		cfg.TestVolumeExpandSize = 2<<30 - 16<<20
		cfg.TestVolumeParameters = map[string]string{"type": "hyperdisk-balanced", "provisioned-iops-on-create": "3000", "provisioned-throughput-on-create": "150Mi"}
		cfg.TestVolumeMutableParameters = map[string]string{"iops": "3013", "throughput": "151"}
		cfg.TestNodeVolumeAttachLimit = false
		cfg.IDGen = gceIDs{}
	}
	return cfg
}

// connect tells the suite where the stack is.
func connect(cfg *sanity.TestConfig, s *stack.Stack) error {
	cfg.Address = s.Endpoint
	cfg.ControllerAddress = s.ControllerEndpoint()
	cfg.TargetPath = filepath.Join(s.KubeletDir(), "pods", "target")
	cfg.StagingPath = filepath.Join(s.KubeletDir(), "plugins", "staging")
	for _, dir := range []string{"pods", "plugins"} {
		if err := os.MkdirAll(filepath.Join(s.KubeletDir(), dir), 0o750); err != nil {
			return err
		}
	}
	return nil
}

// gceIDs are IDs in the form that GCE PD checks.
type gceIDs struct{ sanity.DefaultIDGenerator }

func (g gceIDs) GenerateUniqueValidVolumeID() string {
	return "projects/test-project/zones/country-region-zone/disks/" + g.DefaultIDGenerator.GenerateUniqueValidVolumeID()
}

func (g gceIDs) GenerateUniqueValidNodeID() string {
	return "projects/test-project/zones/country-region-zone/instances/" + g.DefaultIDGenerator.GenerateUniqueValidNodeID()
}
