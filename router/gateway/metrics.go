package gateway

import (
	"maps"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"ztgate/router/config"
	"ztgate/router/control"
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
	for _, t := range s.config().Targets {
		connect.WithLabelValues(t.String()) // exported from the start
	}
	s.targets.onDone = func(t config.Target, up bool, d time.Duration) {
		if up {
			connect.WithLabelValues(t.String()).Observe(d.Seconds())
		}
	}
}

var (
	descPeers = prometheus.NewDesc("ztgate_peers", "Known peers, by role and by the path to them.", []string{"role", "path"}, nil)
	descRTT   = prometheus.NewDesc("ztgate_peer_rtt_seconds", "Last measured round-trip times of the peers known now.", []string{"path"}, nil)
	descNet   = prometheus.NewDesc("ztgate_network_status", "1 for the status a network has, 0 for the others.", []string{"network", "status"}, nil)
	descCert  = prometheus.NewDesc("ztgate_network_certificate_expiry_timestamp_seconds", "When our certificate of a network expires, Unix time.", []string{"network"}, nil)
	descUp    = prometheus.NewDesc("ztgate_target_up", "Whether the last probe of a target succeeded.", []string{"target"}, nil)
	descCheck = prometheus.NewDesc("ztgate_health_status", "1 if a check of health is passed.", []string{"check"}, nil)
)

// stateCollector reads at scrape time what is known anyway.
type stateCollector struct{ s *service }

func (c *stateCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descPeers, descRTT, descNet, descCert, descUp, descCheck} {
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
			gauge(descCert, float64(n.Certificate.UnixMilli())/1000, n.ID.String())
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
}

func (c *stateCollector) peers(ch chan<- prometheus.Metric, gauge func(*prometheus.Desc, float64, ...string)) {
	type key struct{ role, path string }
	count := map[key]int{}
	type histogram struct {
		n       uint64
		sum     float64
		buckets map[float64]uint64
	}
	rtt := map[string]*histogram{}
	for _, path := range []string{"direct_ipv4", "direct_ipv6", "relay", "none"} {
		for _, role := range ztnode.Roles() {
			count[key{role, path}] = 0
		}
		h := &histogram{buckets: map[float64]uint64{}}
		for _, b := range rttBuckets {
			h.buckets[b] = 0
		}
		rtt[path] = h
	}
	for _, p := range c.s.node.Peers() {
		path := pathLabel(p)
		count[key{p.Role, path}]++
		if p.Latency < 0 {
			continue
		}
		h, seconds := rtt[path], p.Latency/1000
		h.n++
		h.sum += seconds
		for _, b := range rttBuckets {
			if seconds <= b {
				h.buckets[b]++
			}
		}
	}
	for k, n := range count {
		gauge(descPeers, float64(n), k.role, k.path)
	}
	for path, h := range rtt {
		ch <- prometheus.MustNewConstHistogram(descRTT, h.n, h.sum, maps.Clone(h.buckets), path)
	}
}
