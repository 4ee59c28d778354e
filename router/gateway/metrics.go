package gateway

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/host/tuntap"
	"ztgate/zerotier/ztnode"
)

// registerStandard registers the collectors that need nothing but the process.
func registerStandard(reg prometheus.Registerer, cfg *config.Config) {
	b := control.BuildInfo()
	ingress := cfg.VPC.Ingress
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "ztgate_build_info", Help: "Always 1; the labels say which program this is.",
			ConstLabels: prometheus.Labels{"version": b.Version, "revision": b.Revision, "goversion": b.GoVersion,
				"node": cfg.Node, "ingress": ingress},
		}, func() float64 { return 1 }))
}

// Buckets from a host on the same network to the other side of the world.
var rttBuckets = []float64{.0002, .0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2}

// registerMetrics registers what the service knows.
func (s *service) registerMetrics(reg prometheus.Registerer) {
	reg.MustRegister(&stateCollector{s})
	f := promauto.With(reg)
	connect := f.NewHistogramVec(prometheus.HistogramOpts{
		Name: "ztgate_target_connect_seconds", Help: "Time that successful probes of a target took.", Buckets: rttBuckets}, []string{"target"})
	failures := f.NewCounterVec(prometheus.CounterOpts{
		Name: "ztgate_target_probe_failures_total", Help: "Probes of a target that failed."}, []string{"target"})
	for _, t := range s.config().Targets { // exported from the start
		connect.WithLabelValues(t.String())
		failures.WithLabelValues(t.String())
	}
	s.targets.onDone = func(t config.Target, up bool, d time.Duration) {
		if up {
			connect.WithLabelValues(t.String()).Observe(d.Seconds())
		} else {
			failures.WithLabelValues(t.String()).Inc()
		}
	}
	s.rtt = newRTTs(f)
}

// rtts observes round-trip times of peers.
type rtts struct {
	byPath map[string]prometheus.Observer

	mu   sync.Mutex
	last map[string]float64 // by peer, ms
}

func newRTTs(f promauto.Factory) *rtts {
	vec := f.NewHistogramVec(prometheus.HistogramOpts{
		Name: "ztgate_peer_rtt_seconds", Help: "Round-trip times to peers, as they are measured.", Buckets: rttBuckets}, []string{"path"})
	r := &rtts{byPath: map[string]prometheus.Observer{}}
	for _, path := range pathLabels {
		r.byPath[path] = vec.WithLabelValues(path)
	}
	return r
}

// observe takes the times that are other than last time. One that is measured again to
// the microsecond is missed.
func (r *rtts) observe(peers []ztnode.Peer, now time.Time) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	last := make(map[string]float64, len(peers))
	for _, p := range peers {
		if p.Latency < 0 {
			continue
		}
		last[p.Address] = p.Latency
		if old, known := r.last[p.Address]; !known || old != p.Latency {
			r.byPath[pathLabel(p, now)].Observe(p.Latency / 1000)
		}
	}
	r.last = last
}

var (
	descPeers = prometheus.NewDesc("ztgate_peers", "Known peers, by role and by the path to them.", []string{"role", "path"}, nil)
	descNet   = prometheus.NewDesc("ztgate_network_status", "1 for the status a network has, 0 for the others.", []string{"network", "status"}, nil)
	descCert  = prometheus.NewDesc("ztgate_network_certificate_expiry_timestamp_seconds", "When our certificate of a network expires, Unix time.", []string{"network"}, nil)
	descUp    = prometheus.NewDesc("ztgate_target_up", "Whether the last probe of a target succeeded.", []string{"target"}, nil)
	descCheck = prometheus.NewDesc("ztgate_health_status", "1 if a check of health is passed.", []string{"check"}, nil)
	descState = prometheus.NewDesc("ztgate_health_state", "1 for the state that health has, 0 for the others.", []string{"state"}, nil)
	descWrite = prometheus.NewDesc("ztgate_interface_write_method", "1 for the way in which packets are written to interfaces, 0 for the others.", []string{"method"}, nil)
	descHeard = prometheus.NewDesc("ztgate_network_controller_last_heard_timestamp_seconds", "When a network's controller was last heard, Unix time.", []string{"network"}, nil)

	descReload   = prometheus.NewDesc("ztgate_config_last_reload_successful", "1 unless the last reload of the configuration failed.", nil, nil)
	descReloaded = prometheus.NewDesc("ztgate_config_last_reload_success_timestamp_seconds", "When the configuration in force was read, Unix time.", nil, nil)
)

// stateCollector reads at scrape time what is known anyway.
type stateCollector struct{ s *service }

func (c *stateCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descPeers, descNet, descCert, descUp, descCheck, descState, descWrite, descHeard, descReload, descReloaded} {
		ch <- d
	}
}

func (c *stateCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	one := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	c.peers(ch, gauge)
	for _, n := range c.s.networks() {
		for _, status := range ztnode.Statuses() {
			gauge(descNet, one(n.Status == status), n.ID.String(), status)
		}
		if !n.Certificate.IsZero() {
			gauge(descCert, unixTime(n.Certificate), n.ID.String())
		}
		if !n.LastController.IsZero() {
			gauge(descHeard, unixTime(n.LastController), n.ID.String())
		}
	}
	for _, t := range c.s.targets.states() {
		gauge(descUp, one(t.Up), t.Target)
	}
	h := c.s.health()
	for _, check := range h.Checks {
		gauge(descCheck, one(check.OK), check.Name)
	}
	gauge(descCheck, one(h.Ready), "ready")
	for _, state := range control.States() {
		gauge(descState, one(h.State == state), string(state))
	}
	if w := c.s.writes; w != nil {
		for _, m := range []tuntap.Method{tuntap.IOUring, tuntap.Writev} {
			gauge(descWrite, one(w.Method == string(m)), string(m))
		}
	}
	reloaded := c.s.lastReload.succeeded()
	if reloaded.IsZero() {
		reloaded = c.s.start
	}
	gauge(descReload, one(c.s.lastReload.failure() == nil))
	gauge(descReloaded, unixTime(reloaded))
}

func unixTime(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

func (c *stateCollector) peers(ch chan<- prometheus.Metric, gauge func(*prometheus.Desc, float64, ...string)) {
	type key struct{ role, path string }
	count := map[key]int{}
	for _, path := range pathLabels {
		for _, role := range ztnode.Roles() {
			count[key{role, path}] = 0
		}
	}
	now := time.Now()
	for _, p := range c.s.node.Peers() {
		count[key{p.Role, pathLabel(p, now)}]++
	}
	for k, n := range count {
		gauge(descPeers, float64(n), k.role, k.path)
	}
}
