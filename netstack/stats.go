package netstack

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
)

// leg is a side of the process.
type leg uint8

const (
	legVPC leg = iota
	legOverlay
	numLegs
)

var legNames = [numLegs]string{"vpc", "overlay"}

// directions, seen from the process.
const (
	rx = iota
	tx
	numDirections
)

var directionNames = [numDirections]string{"rx", "tx"}

// ways of forwarded packets.
const (
	vpcToOverlay = iota
	overlayToVPC
	numWays
)

var wayNames = [numWays]string{"vpc_to_overlay", "overlay_to_vpc"}

// traffic counts packets and bytes.
type traffic struct{ packets, bytes atomic.Uint64 }

// forwarded counts what a network carried, by way, family and class.
type forwarded struct {
	t [numWays][2][nat.NumClasses]traffic
}

func (f *forwarded) count(way int, v *ipkt.View) {
	family := 0
	if v.V6 {
		family = 1
	}
	t := &f.t[way][family][nat.ClassOf(v.Proto)]
	t.packets.Add(1)
	t.bytes.Add(uint64(len(v.B)))
}

var batchBounds = [...]int{1, 2, 4, 8, 16, 32, 64, 128}

// histogram counts batch sizes.
type histogram struct {
	buckets [len(batchBounds)]atomic.Uint64
	count   atomic.Uint64
	sum     atomic.Uint64
}

func (h *histogram) observe(n int) {
	if n == 0 {
		return
	}
	h.count.Add(1)
	h.sum.Add(uint64(n))
	for i, b := range batchBounds {
		if n <= b {
			h.buckets[i].Add(1)
			return
		}
	}
}

type counters struct {
	traffic      [numLegs][numDirections]traffic
	drops        [numLegs][numDrops]atomic.Uint64
	hits, misses atomic.Uint64
	local        atomic.Uint64 // packets for the gateway itself
	clamped      [numLegs]atomic.Uint64
	errors       [numLegs][ipkt.NumErrorKinds]atomic.Uint64
	batches      [numLegs]histogram
}

func (c *counters) count(l leg, dir, n int) {
	t := &c.traffic[l][dir]
	t.packets.Add(1)
	t.bytes.Add(uint64(n))
}

// drop is the only place where packets end: nothing vanishes uncounted.
func (e *Engine) drop(l leg, d drop) { e.stats.drops[l][d].Add(1) }

// limiter limits ICMP errors as Linux does: 1000 a second, bursts of 50.
type limiter struct {
	mu     sync.Mutex
	tokens float64
	last   int64
}

const (
	errorRate  = 1000
	errorBurst = 50
)

func (l *limiter) allow(now int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last == 0 {
		l.tokens = errorBurst
	} else {
		l.tokens = min(errorBurst, l.tokens+float64(now-l.last)/float64(time.Second)*errorRate)
	}
	l.last = now
	if l.tokens < 1 {
		return false
	}
	l.tokens--
	return true
}

var (
	descPackets   = prometheus.NewDesc("ztgate_packets_total", "Packets that entered or left the process, by leg.", []string{"leg", "direction"}, nil)
	descBytes     = prometheus.NewDesc("ztgate_bytes_total", "Bytes that entered or left the process, by leg.", []string{"leg", "direction"}, nil)
	descForwarded = prometheus.NewDesc("ztgate_forwarded_packets_total", "Packets forwarded, each counted once.", []string{"path", "network", "family", "protocol"}, nil)
	descFwdBytes  = prometheus.NewDesc("ztgate_forwarded_bytes_total", "Bytes of IP packets forwarded.", []string{"path", "network", "family", "protocol"}, nil)
	descDropped   = prometheus.NewDesc("ztgate_dropped_packets_total", "Packets dropped, by leg and reason.", []string{"leg", "reason"}, nil)
	descFlows     = prometheus.NewDesc("ztgate_flows", "Live flows.", []string{"protocol"}, nil)
	descLimit     = prometheus.NewDesc("ztgate_flows_limit", "Most flows that the table holds.", nil, nil)
	descCreated   = prometheus.NewDesc("ztgate_flows_created_total", "Flows opened.", []string{"protocol"}, nil)
	descRemoved   = prometheus.NewDesc("ztgate_flows_removed_total", "Flows that ended, by reason.", []string{"protocol", "reason"}, nil)
	descPorts     = prometheus.NewDesc("ztgate_nat_ports_in_use", "External ports and identifiers in use.", []string{"protocol"}, nil)
	descNoPort    = prometheus.NewDesc("ztgate_nat_allocation_failures_total", "Flows refused for want of a port.", []string{"protocol"}, nil)
	descHits      = prometheus.NewDesc("ztgate_flow_cache_hits_total", "Packets of established flows.", nil, nil)
	descMisses    = prometheus.NewDesc("ztgate_flow_cache_misses_total", "Packets that belong to no flow.", nil, nil)
	descErrors    = prometheus.NewDesc("ztgate_icmp_errors_sent_total", "ICMP errors sent, by leg and kind.", []string{"leg", "kind"}, nil)
	descClamped   = prometheus.NewDesc("ztgate_tcp_mss_clamped_total", "SYN segments whose MSS was lowered.", []string{"leg"}, nil)
	descBatch     = prometheus.NewDesc("ztgate_batch_size", "Packets per batch received.", []string{"leg", "direction"}, nil)
	descLocal     = prometheus.NewDesc("ztgate_local_packets_total", "Packets for the gateway itself.", nil, nil)
)

// collector reads the engine's counters at scrape time. It describes nothing in
// advance, since the node's collector shares some of its names.
type collector struct{ e *Engine }

func (*collector) Describe(chan<- *prometheus.Desc) {}

func (c *collector) Collect(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	e, s := c.e, &c.e.stats
	for l := range numLegs {
		for dir := range numDirections {
			counter(descPackets, s.traffic[l][dir].packets.Load(), legNames[l], directionNames[dir])
			counter(descBytes, s.traffic[l][dir].bytes.Load(), legNames[l], directionNames[dir])
		}
		for _, d := range drops() {
			counter(descDropped, s.drops[l][d].Load(), legNames[l], d.String())
		}
		for k := range ipkt.NumErrorKinds {
			counter(descErrors, s.errors[l][k].Load(), legNames[l], ipkt.ErrorKind(k).String())
		}
		counter(descClamped, s.clamped[l].Load(), legNames[l])
		ch <- s.batches[l].metric(legNames[l])
	}
	for _, p := range e.set.Load().ports {
		for way := range numWays {
			for fam, family := range [2]string{"ipv4", "ipv6"} {
				for class, proto := range nat.ClassNames {
					t := &p.fwd.t[way][fam][class]
					labels := []string{wayNames[way], networkLabel(p.ID), family, proto}
					counter(descForwarded, t.packets.Load(), labels...)
					counter(descFwdBytes, t.bytes.Load(), labels...)
				}
			}
		}
	}
	ts := e.table.Stats()
	gauge(descLimit, float64(e.table.Limit()))
	for class, proto := range nat.ClassNames {
		gauge(descFlows, float64(ts.Live[class].Load()), proto)
		gauge(descPorts, float64(ts.PortsInUse[class].Load()), proto)
		counter(descCreated, uint64(ts.Created[class].Load()), proto)
		counter(descRemoved, uint64(ts.Idle[class].Load()), proto, "idle")
		counter(descRemoved, uint64(ts.Closed[class].Load()), proto, "closed")
		counter(descRemoved, uint64(ts.Evicted[class].Load()), proto, "evicted")
		counter(descRemoved, uint64(ts.Flushed[class].Load()), proto, "flushed")
		counter(descNoPort, uint64(ts.NoPort[class].Load()), proto)
	}
	counter(descHits, s.hits.Load())
	counter(descMisses, s.misses.Load())
	counter(descLocal, s.local.Load())
}

func (h *histogram) metric(leg string) prometheus.Metric {
	buckets := make(map[float64]uint64, len(batchBounds))
	sum := uint64(0)
	for i, b := range batchBounds {
		sum += h.buckets[i].Load()
		buckets[float64(b)] = sum
	}
	return prometheus.MustNewConstHistogram(descBatch, h.count.Load(), float64(h.sum.Load()), buckets, leg, "rx")
}
