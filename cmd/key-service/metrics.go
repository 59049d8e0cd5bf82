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

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyservice"
	"github.com/cryptcsi/cryptcsi/kms"
)

// metrics is what an operator graphs. All names begin with cryptcsi_.
type metrics struct {
	registry  *prometheus.Registry
	rpcs      *prometheus.HistogramVec
	decisions *prometheus.CounterVec
	kms       *prometheus.HistogramVec
}

func newMetrics() *metrics {
	buckets := []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		rpcs: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cryptcsi_rpc_seconds",
			Help: "Calls served, by method and gRPC code.", Buckets: buckets}, []string{"method", "code"}),
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cryptcsi_key_decisions_total",
			Help: "Requests for keys, by method, whether the caller may, and gRPC code."}, []string{"method", "allowed", "code"}),
		kms: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cryptcsi_kms_call_seconds",
			Help: "Calls to the KMS, by scheme, operation and class of error.", Buckets: buckets}, []string{"scheme", "operation", "result"}),
	}
	m.registry.MustRegister(m.rpcs, m.decisions, m.kms,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cryptcsi_build_info", Help: "Always 1.",
			ConstLabels: prometheus.Labels{"version": version, "commit": commit}}, func() float64 { return 1 }),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// watch adds what is read when it is asked for.
func (m *metrics) watch(s *keyservice.Server, count func(context.Context) (int64, error)) {
	gauge := func(name, help string, value func() float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
	gauge("cryptcsi_sealed", "1 while the service has no KMS and store.", func() float64 {
		if s.Sealed() {
			return 1
		}
		return 0
	})
	gauge("cryptcsi_calls_running", "Calls that are worked on.", func() float64 { n, _ := s.Load(); return float64(n) })
	gauge("cryptcsi_calls_waiting", "Calls that wait for their turn.", func() float64 { _, n := s.Load(); return float64(n) })
	gauge("cryptcsi_records", "DEKs in the store, counted every 5 minutes at most; -1 while that is not known.", func() float64 {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		n, _ := count(ctx)
		return float64(n)
	})
}

func (m *metrics) rpc(method, code string, took time.Duration) {
	m.rpcs.WithLabelValues(method, code).Observe(took.Seconds())
}

func (m *metrics) decision(d keyservice.Decision) {
	m.decisions.WithLabelValues(d.Method, fmt.Sprint(d.Allowed), d.Code).Inc()
}

func (m *metrics) call(c kms.Call) {
	m.kms.WithLabelValues(c.Scheme, c.Op, result(c.Err)).Observe(c.Duration.Seconds())
}

// result names the class of an error, in few enough words for a label.
func result(err error) string {
	if err == nil {
		return "ok"
	}
	for _, class := range []error{errdefs.ErrInvalid, errdefs.ErrDenied, errdefs.ErrState, errdefs.ErrCorrupt, errdefs.ErrUnavailable,
		context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, class) {
			return class.Error()
		}
	}
	return "other"
}

// serve answers /metrics, /healthz and /readyz until ctx ends.
func (m *metrics) serve(ctx context.Context, address string, ready func() error) error {
	lis, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("--metrics-address: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
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
