// Package metrics is what every serving program of ours measures, and how it
// shows that and its health over HTTP. All names begin with cryptcsi_.
package metrics

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

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

// Set is one program's metrics: calls served, calls to KMS and store, the build, and
// what the program adds. Its methods may be called concurrently.
type Set struct {
	registry *prometheus.Registry
	rpcs     *prometheus.HistogramVec
	kms      *prometheus.HistogramVec
	stores   *prometheus.HistogramVec
}

// New returns the metrics of a program, with buckets in seconds for what it
// serves and calls. build are the labels of cryptcsi_build_info.
func New(buckets []float64, build map[string]string) *Set {
	s := &Set{
		registry: prometheus.NewRegistry(),
		rpcs: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cryptcsi_rpc_seconds",
			Help: "Calls served, by method and gRPC code.", Buckets: buckets}, []string{"method", "code"}),
		kms: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cryptcsi_kms_call_seconds",
			Help: "Calls to the KMS, by scheme, operation and class of error.", Buckets: buckets}, []string{"scheme", "operation", "result"}),
		stores: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cryptcsi_store_call_seconds",
			Help: "Calls to the store of records, by scheme, operation and class of error.", Buckets: buckets}, []string{"scheme", "operation", "result"}),
	}
	s.Add(s.rpcs, s.kms, s.stores,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cryptcsi_build_info", Help: "Always 1.", ConstLabels: build}, func() float64 { return 1 }),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return s
}

// Add adds metrics; it panics for a name that is there already.
func (s *Set) Add(more ...prometheus.Collector) { s.registry.MustRegister(more...) }

// Gauge adds a value that is read when it is asked for, concurrently.
func (s *Set) Gauge(name, help string, value func() float64) {
	s.Add(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
}

// RPC counts a call that was served.
func (s *Set) RPC(method, code string, took time.Duration) {
	s.rpcs.WithLabelValues(method, code).Observe(took.Seconds())
}

// KMS counts a call to a KMS.
func (s *Set) KMS(c kms.Call) {
	s.kms.WithLabelValues(c.Scheme, c.Op, Result(c.Err)).Observe(c.Duration.Seconds())
}

// Store counts a call to a store of records.
func (s *Set) Store(scheme, operation string, took time.Duration, err error) {
	s.stores.WithLabelValues(scheme, operation, Result(err)).Observe(took.Seconds())
}

// Result names the class of an error, in few enough words for a label.
func Result(err error) string {
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

// Handler answers /metrics, /healthz and /readyz. Health is that the process
// answers; ready says why the program cannot serve, without asking a KMS:
// nothing is restarted because a KMS is away.
func (s *Set) Handler(ready func(context.Context) error) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(s.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, r *http.Request) {
		if err := ready(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// Serve is Handler on a TCP address until ctx ends.
func (s *Set) Serve(ctx context.Context, address string, ready func(context.Context) error) error {
	lis, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("--metrics-address: %w", err)
	}
	server := &http.Server{Handler: s.Handler(ready), ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(lis); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
