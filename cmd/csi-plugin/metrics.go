package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/kms"
)

// metrics is what an operator graphs. All names begin with cryptcsi_.
type metrics struct {
	registry   *prometheus.Registry
	rpcs       *prometheus.HistogramVec
	operations *prometheus.CounterVec
	kms        *prometheus.HistogramVec
	keyService *prometheus.HistogramVec
}

// buckets go from what a stage should take to kubelet's two minutes.
var buckets = []float64{.005, .02, .1, .25, .5, 1, 2.5, 5, 15, 60, 120}

func newMetrics(library string, list func() ([]cryptmapper.Mapping, error), stuck func() []string) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		rpcs: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cryptcsi_rpc_seconds",
			Help: "Calls served, by method and gRPC code.", Buckets: buckets}, []string{"method", "code"}),
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cryptcsi_mapper_operations_total",
			Help: "Operations on crypt devices, by operation and class of error."}, []string{"operation", "result"}),
		kms: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cryptcsi_kms_call_seconds",
			Help: "Calls to the KMS, by scheme, operation and class of error.", Buckets: buckets}, []string{"scheme", "operation", "result"}),
		keyService: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cryptcsi_key_service_call_seconds",
			Help: "Attempts of calls to the key service, by method and gRPC code.", Buckets: buckets}, []string{"method", "code"}),
	}
	info := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cryptcsi_build_info", Help: "Always 1.",
		ConstLabels: prometheus.Labels{"version": version, "commit": commit, "libcryptsetup": library}}, func() float64 { return 1 })
	open := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cryptcsi_open_mappings",
		Help: "Crypt devices open on this node."}, func() float64 {
		l, err := list()
		if err != nil {
			return -1
		}
		return float64(len(l))
	})
	hanging := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cryptcsi_running_workers",
		Help: "Volumes with an operation under way; one that stays here sits on a device that hangs."}, func() float64 { return float64(len(stuck())) })
	m.registry.MustRegister(m.rpcs, m.operations, m.kms, m.keyService, info, open, hanging,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) rpc(method, code string, took time.Duration) {
	m.rpcs.WithLabelValues(method, code).Observe(took.Seconds())
}

func (m *metrics) operation(op cryptmapper.Op, _ string, err error) {
	m.operations.WithLabelValues(string(op), result(err)).Inc()
}

func (m *metrics) call(c kms.Call) {
	m.kms.WithLabelValues(c.Scheme, c.Op, result(c.Err)).Observe(c.Duration.Seconds())
}

func (m *metrics) keyCall(c keyclient.Call) {
	m.keyService.WithLabelValues(c.Method, c.Code).Observe(c.Duration.Seconds())
}

// result names the class of an error, in few enough words for a label.
func result(err error) string {
	if err == nil {
		return "ok"
	}
	for _, class := range []error{errdefs.ErrInvalid, errdefs.ErrNotFound, errdefs.ErrExists, errdefs.ErrDenied,
		errdefs.ErrConflict, errdefs.ErrState, errdefs.ErrCorrupt, errdefs.ErrUnavailable,
		context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, class) {
			return class.Error()
		}
	}
	return "other"
}

// serve answers /metrics, /healthz and /readyz until ctx ends. Health is that
// the process answers; ready tells whether the wrapped driver does. Neither
// asks the KMS: a node plugin is not restarted because a KMS is away.
func (m *metrics) serve(ctx context.Context, address string, ready func(context.Context) error) error {
	lis, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("--metrics-address: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, r *http.Request) {
		if err := ready(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(lis); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
