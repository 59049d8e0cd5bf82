package main

import (
	"crypto/tls"
	"fmt"
	"math"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/internal/metrics"
	"github.com/cryptcsi/cryptcsi/keyservice"
)

// measured is what an operator graphs.
type measured struct {
	*metrics.Set
	decisions *prometheus.CounterVec
}

func newMeasured() *measured {
	m := &measured{
		Set: metrics.New([]float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20},
			map[string]string{"version": version, "commit": commit}),
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cryptcsi_key_decisions_total",
			Help: "Requests for keys, by method, whether the caller may, and gRPC code."}, []string{"method", "allowed", "code"}),
	}
	m.Add(m.decisions)
	return m
}

// watch adds what is read when it is asked for.
func (m *measured) watch(s *keyservice.Server, records func() int64) {
	m.Gauge("cryptcsi_sealed", "1 while the service has no KMS and store.", func() float64 {
		if s.Sealed() {
			return 1
		}
		return 0
	})
	m.Gauge("cryptcsi_calls_running", "Calls that are worked on.", func() float64 { n, _ := s.Load(); return float64(n) })
	m.Gauge("cryptcsi_calls_waiting", "Calls that wait for their turn.", func() float64 { _, n := s.Load(); return float64(n) })
	m.Gauge("cryptcsi_records", "DEKs in the store, counted every 5 minutes at most; -1 while that is not known.", func() float64 { return float64(records()) })
}

// watchCertificate adds when the certificate ends that a client is shown now.
func (m *measured) watchCertificate(conf *tls.Config) {
	m.Gauge("cryptcsi_certificate_expiry_timestamp_seconds", "When the certificate that is served ends, in seconds since 1970; +Inf without TLS.", func() float64 {
		if conf == nil {
			return math.Inf(1)
		}
		now, err := conf.GetConfigForClient(nil)
		if err != nil {
			return 0
		}
		return float64(now.Certificates[0].Leaf.NotAfter.Unix())
	})
}

// watchCache adds what the cache of keys does.
func (m *measured) watchCache(stats func() envelope.CacheStats) {
	count := func(name, help string, of func(envelope.CacheStats) uint64) {
		m.Add(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 { return float64(of(stats())) }))
	}
	count("cryptcsi_dek_cache_hits_total", "Keys that were handed out without asking the KMS.", func(s envelope.CacheStats) uint64 { return s.Hits })
	count("cryptcsi_dek_cache_misses_total", "Keys that the KMS was asked for.", func(s envelope.CacheStats) uint64 { return s.Misses })
	m.Gauge("cryptcsi_dek_cache_entries", "Keys that are kept.", func() float64 { return float64(stats().Entries) })
}

func (m *measured) decision(d keyservice.Decision) {
	m.decisions.WithLabelValues(d.Method, fmt.Sprint(d.Allowed), d.Code).Inc()
}
