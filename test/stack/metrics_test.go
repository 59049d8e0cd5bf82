package stack_test

import (
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/cryptcsi/cryptcsi/test/stack"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// freeAddress is one that nobody else takes in a guest.
func freeAddress(t *testing.T) string {
	t.Helper()
	lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, "listen", err)
	defer lis.Close()
	return lis.Addr().String()
}

// TestKernelMetrics: the programs, with a volume staged by way of the key
// service, show the metrics of metrics.yaml with those labels.
func TestKernelMetrics(t *testing.T) {
	bin, err := filepath.Abs("../../bin")
	must(t, "bin", err)
	kernel.Need(t, "root", "dm-crypt", "keyring", "loop", "exec:mkfs.ext4",
		"exec:"+filepath.Join(bin, "csi-plugin"), "exec:"+filepath.Join(bin, "key-service"), "exec:"+filepath.Join(bin, "loopdriver"))
	kernel.NoLeaks(t)
	ctx := t.Context()
	addresses := map[string]string{"csi-plugin": freeAddress(t), "key-service": freeAddress(t)}
	s, err := stack.Start(ctx, stack.Config{Dir: t.TempDir(), Bin: bin, KeyService: true, PluginArgs: []string{"--metrics-address=" + addresses["csi-plugin"]}})
	must(t, "start", err)
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	v, err := s.Create(ctx, "one", 64<<20, stack.MountCapability("ext4"), nil)
	must(t, "Create", err)
	must(t, "stop the key service", s.StopKeyService(syscall.SIGTERM))
	if err := v.Stage(ctx); err == nil {
		t.Error("staged without the key service")
	}
	must(t, "start it with metrics", s.StartKeyService(ctx, "--kms-uri="+s.KEK(), "--storage-uri="+s.Store(), "--metrics-address="+addresses["key-service"]))
	must(t, "Stage", v.Stage(ctx))
	defer func() { must(t, "Delete", errors.Join(v.Unstage(ctx), v.Delete(ctx))) }()

	var programs map[string]map[string][]string
	text, err := os.ReadFile("../../deploy/kubernetes/components/monitoring/metrics.yaml")
	must(t, "metrics.yaml", err)
	must(t, "metrics.yaml", yaml.UnmarshalStrict(text, &programs))
	if len(programs) != len(addresses) {
		t.Errorf("metrics.yaml has %d programs", len(programs))
	}
	for program, metrics := range programs {
		shown := scrape(t, addresses[program])
		for name, labels := range metrics {
			slices.Sort(labels)
			if got, ok := shown[name]; !ok || !slices.Equal(got, labels) {
				t.Errorf("%s: %s has labels %v (it is there: %v), want %v", program, name, got, ok, labels)
			}
		}
	}
}

// scrape returns our metrics, with the labels of each. A histogram goes by its
// own name.
func scrape(t *testing.T, address string) map[string][]string {
	t.Helper()
	line := regexp.MustCompile(`(?m)^(cryptcsi_\w+?)(?:_count)?(?:\{(.*)\})? \S+$`)
	label := regexp.MustCompile(`(\w+)="`)
	shown := map[string][]string{}
	for _, m := range line.FindAllStringSubmatch(exposed(t, address), -1) {
		labels := []string{}
		for _, l := range label.FindAllStringSubmatch(m[2], -1) {
			labels = append(labels, l[1])
		}
		slices.Sort(labels)
		shown[m[1]] = labels
	}
	return shown
}

// value returns that of a metric without labels, as it is shown.
func value(t *testing.T, address, metric string) string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + metric + ` (\S+)$`).FindStringSubmatch(exposed(t, address))
	if m == nil {
		t.Fatalf("there is no %s", metric)
	}
	return m[1]
}

// exposed is the page that Prometheus reads.
func exposed(t *testing.T, address string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+"/metrics", nil)
	must(t, "request", err)
	r, err := http.DefaultClient.Do(req)
	must(t, "scrape", err)
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	must(t, "scrape", err)
	return string(body)
}
