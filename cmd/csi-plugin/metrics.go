package main

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/internal/metrics"
	"github.com/cryptcsi/cryptcsi/keyclient"
)

// measured is what an operator graphs.
type measured struct {
	*metrics.Set
	operations *prometheus.CounterVec
	keyService *prometheus.HistogramVec
	retries    *prometheus.CounterVec
	steps      *prometheus.HistogramVec
	finishes   *prometheus.CounterVec
	hydrations prometheus.Histogram
	failures   prometheus.Counter
}

func newMeasured(library string, list func() ([]cryptmapper.Mapping, error), stuck func() []string) *measured {
	// From what a stage should take to kubelet's two minutes.
	buckets := []float64{.005, .02, .1, .25, .5, 1, 2.5, 5, 15, 60, 120}
	m := &measured{
		Set: metrics.New(buckets, map[string]string{"version": version, "commit": commit, "libcryptsetup": library}),
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cryptcsi_mapper_operations_total",
			Help: "Operations on crypt devices, by operation and class of error."}, []string{"operation", "result"}),
		keyService: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cryptcsi_key_service_call_seconds",
			Help: "Attempts of calls to the key service, by method and gRPC code.", Buckets: buckets}, []string{"method", "code"}),
		retries: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cryptcsi_key_service_retries_total",
			Help: "Attempts after the first of a call to the key service, by method."}, []string{"method"}),
	}
	m.Add(m.keyService, m.retries)
	if list == nil { // a controller has no mappings
		return m
	}
	m.steps = prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cryptcsi_stage_step_seconds",
		Help: "Steps of NodeStageVolume that succeeded: announce, borrow, key, open (of which header), fill (mkfs), confirm, mount, note.", Buckets: buckets}, []string{"step"})
	m.finishes = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cryptcsi_hydration_finishes_total",
		Help: "Attempts to finish a volume that is hydrated, by class of error."}, []string{"result"})
	m.hydrations = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "cryptcsi_hydration_seconds",
		Help:    "From when a volume that hydrates was first seen by this process until it was finished.",
		Buckets: []float64{10, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 72 * 3600, 7 * 24 * 3600}})
	m.failures = prometheus.NewCounter(prometheus.CounterOpts{Name: "cryptcsi_integrity_errors_total",
		Help: "Reports of the kernel about sectors of volumes on this node that are not authentic; at most ten in five seconds."})
	m.finishes.WithLabelValues(metrics.Result(nil)) // so that the first failure is an increase
	m.Add(m.operations, m.steps, m.finishes, m.hydrations, m.failures)
	m.Gauge("cryptcsi_open_mappings", "Crypt devices open on this node.", func() float64 {
		l, err := list()
		if err != nil {
			return -1
		}
		return float64(len(l))
	})
	m.Gauge("cryptcsi_running_workers", "Volumes with an operation under way; one that stays here sits on a device that hangs.",
		func() float64 { return float64(len(stuck())) })
	return m
}

func (m *measured) operation(op cryptmapper.Op, _ string, err error) {
	m.operations.WithLabelValues(string(op), metrics.Result(err)).Inc()
}

func (m *measured) stageStep(step string, took time.Duration) {
	m.steps.WithLabelValues(step).Observe(took.Seconds())
}

func (m *measured) finished(took time.Duration, err error) {
	m.finishes.WithLabelValues(metrics.Result(err)).Inc()
	if err == nil {
		m.hydrations.Observe(took.Seconds())
	}
}

// watchHydration adds what the hydrator is doing.
func (m *measured) watchHydration(status func() driver.HydrationStatus) {
	for state, count := range map[string]func(driver.HydrationStatus) int{
		"running":   func(s driver.HydrationStatus) int { return s.Running },
		"paused":    func(s driver.HydrationStatus) int { return s.Paused },
		"finishing": func(s driver.HydrationStatus) int { return s.Finishing },
		"failed":    func(s driver.HydrationStatus) int { return s.Failed },
	} {
		m.Add(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cryptcsi_hydrating_volumes",
			Help: "Volumes that are not yet written in full: written in the background, paused for their pods or for other volumes, to be finished, or failed with their disk.", ConstLabels: prometheus.Labels{"state": state}},
			func() float64 { return float64(count(status())) }))
	}
	m.Gauge("cryptcsi_hydration_remaining_bytes", "Bytes of all volumes on this node that are not written yet.",
		func() float64 { return float64(status().Remaining) })
	m.Add(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "cryptcsi_hydration_written_bytes_total",
		Help: "Bytes by which volumes came nearer to being written in full."}, func() float64 { return float64(status().Written) }))
}

func (m *measured) keyCall(c keyclient.Call) {
	m.keyService.WithLabelValues(c.Method, c.Code).Observe(c.Duration.Seconds())
	if c.Attempt > 1 {
		m.retries.WithLabelValues(c.Method).Inc()
	}
}

// watchKeyService adds the state of the connection to the key service: the one
// that it is in is 1, all others are 0.
func (m *measured) watchKeyService(state func() string) {
	for _, name := range keyclient.States() {
		m.Add(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cryptcsi_key_service_state",
			Help: "1 for the state that the connection to the key service is in.", ConstLabels: prometheus.Labels{"state": name}},
			func() float64 {
				if state() == name {
					return 1
				}
				return 0
			}))
	}
}
