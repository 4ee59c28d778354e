package netstack

import (
	"strconv"
	"sync/atomic"

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

// ways of packets.
const (
	wayVPCToOverlay = iota
	wayOverlayToVPC
	wayLocal    // for the gateway itself
	wayVPCToVPC // hairpin
	numWays
)

var wayNames = [numWays]string{"vpc_to_overlay", "overlay_to_vpc", "local", "vpc_to_vpc"}

// A class says how a packet is counted: way, family and protocol in one number.
const (
	classProto = 1<<2 - 1
	classV6    = 1 << 2
	classShift = 3 // of the way
	numClasses = numWays << classShift
	noClass    = 0xff // not at all
)

func makeClass(way int, v6 bool, proto int) uint8 {
	c := uint8(way)<<classShift | uint8(proto)
	if v6 {
		c |= classV6
	}
	return c
}

// classOf returns the class of a packet that is forwarded.
func classOf(from, to Side, v *ipkt.View) uint8 {
	way := wayVPCToVPC
	switch {
	case from == nat.Overlay:
		way = wayOverlayToVPC
	case to == nat.Overlay:
		way = wayVPCToOverlay
	}
	return makeClass(way, v.V6, nat.ClassOf(v.Proto))
}

// traffic counts packets and bytes. Each has a cache line of its own, since
// workers of both directions count at the same time.
type traffic struct {
	packets, bytes atomic.Uint64
	_              [48]byte
}

func (t *traffic) add(packets, bytes uint64) {
	t.packets.Add(packets)
	t.bytes.Add(bytes)
}

// forwarded counts what a network carried.
type forwarded struct{ t [numClasses]traffic }

func (f *forwarded) countClass(class uint8, packets, bytes uint64) {
	if class != noClass {
		f.t[class].add(packets, bytes)
	}
}

// local returns how many packets were for the gateway itself.
func (f *forwarded) local() (n uint64) {
	for i := wayLocal << classShift; i < (wayLocal+1)<<classShift; i++ {
		n += f.t[i].packets.Load()
	}
	return n
}

// tally adds up a batch before it is counted. Packets of a class mostly come in a
// row.
type tally struct {
	to             *forwarded
	class          uint8
	packets, bytes uint64
	used           [numClasses]struct{ packets, bytes uint64 }
}

func (t *tally) add(class uint8, bytes uint64) {
	if class != t.class {
		t.turn(class)
	}
	t.packets++
	t.bytes += bytes
}

// turn begins another row.
func (t *tally) turn(class uint8) {
	if t.class != noClass {
		u := &t.used[t.class]
		u.packets += t.packets
		u.bytes += t.bytes
	}
	t.class, t.packets, t.bytes = class, 0, 0
}

func (t *tally) flush() {
	t.turn(noClass)
	for class := range t.used {
		if u := &t.used[class]; u.packets > 0 {
			t.to.t[class].add(u.packets, u.bytes)
		}
	}
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
	vpc          forwarded // what belongs to no network: packets from the VPC to ourselves or back into it
	drops        [numLegs][numDrops]atomic.Uint64
	hits, misses atomic.Uint64
	clamped      [numLegs]atomic.Uint64
	errors       [numLegs][ipkt.NumErrorKinds]atomic.Uint64
	deviceErrors atomic.Uint64
	batches      [numLegs]histogram
}

// drop is the only place where packets end: nothing vanishes uncounted.
func (e *Engine) drop(l leg, d drop) { e.stats.drops[l][d].Add(1) }

func (e *Engine) dropN(l leg, d drop, n int) {
	if n > 0 {
		e.stats.drops[l][d].Add(uint64(n))
	}
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
	descPorts     = prometheus.NewDesc("ztgate_nat_ports_in_use", "External ports and identifiers in use.", []string{"network", "protocol"}, nil)
	descResting   = prometheus.NewDesc("ztgate_nat_ports_resting", "External ports and identifiers that wait for their last user.", []string{"network", "protocol"}, nil)
	descNoPort    = prometheus.NewDesc("ztgate_nat_allocation_failures_total", "Flows refused for want of a port.", []string{"network", "protocol"}, nil)
	descRefused   = prometheus.NewDesc("ztgate_flows_refused_total", "Flows refused by the table, by reason.", []string{"protocol", "reason"}, nil)
	descLocal     = prometheus.NewDesc("ztgate_local_packets_total", "Packets for the gateway itself.", nil, nil)
	descConflicts = prometheus.NewDesc("ztgate_route_conflicts", "Overlay routes that are not used because they overlap the VPC or a route of the kernel.", nil, nil)
	descRules     = prometheus.NewDesc("ztgate_policy_rule_hits_total", "Flows that a rule of the policy decided.", []string{"rule"}, nil)
	descFragBytes = prometheus.NewDesc("ztgate_fragment_bytes", "Bytes of fragments that wait for the rest of their packets.", nil, nil)
	descPanics    = prometheus.NewDesc("ztgate_local_stack_panics_total", "Packets on which the stack for the gateway itself panicked.", nil, nil)
	descDevice    = prometheus.NewDesc("ztgate_device_write_errors_total", "Batches that the VPC device did not take as a whole.", nil, nil)
	descHits      = prometheus.NewDesc("ztgate_flow_cache_hits_total", "Packets of established flows.", nil, nil)
	descMisses    = prometheus.NewDesc("ztgate_flow_cache_misses_total", "Packets that belong to no flow.", nil, nil)
	descErrors    = prometheus.NewDesc("ztgate_icmp_errors_sent_total", "ICMP errors sent, by leg and kind.", []string{"leg", "kind"}, nil)
	descClamped   = prometheus.NewDesc("ztgate_tcp_mss_clamped_total", "SYN segments whose MSS was lowered.", []string{"leg"}, nil)
	descBatch     = prometheus.NewDesc("ztgate_batch_size", "Packets per batch received.", []string{"leg", "direction"}, nil)
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
	set := e.set.Load()
	labels := make([]string, len(set.slots))
	for _, p := range set.ports {
		labels[p.slot] = networkLabel(p.ID)
		c.forwarded(counter, p.fwd, networkLabel(p.ID))
	}
	c.forwarded(counter, &s.vpc, "")
	local := s.vpc.local()
	for _, p := range set.ports {
		local += p.fwd.local()
	}
	counter(descLocal, local)
	c.table(counter, gauge, labels)
	counter(descHits, s.hits.Load())
	counter(descMisses, s.misses.Load())
	counter(descPanics, e.local.Panics.Load())
	counter(descDevice, s.deviceErrors.Load())
	gauge(descConflicts, float64(set.conflicts))
	gauge(descFragBytes, float64(e.frags.Bytes()))
	pol := e.pol.Load()
	for i := range pol.Len() {
		counter(descRules, pol.Hits(i), strconv.Itoa(i))
	}
	counter(descRules, pol.Hits(-1), "default")
}

type (
	countFunc func(d *prometheus.Desc, v uint64, labels ...string)
	gaugeFunc func(d *prometheus.Desc, v float64, labels ...string)
)

// forwarded collects what a network carried, or what stayed in the VPC.
func (c *collector) forwarded(counter countFunc, f *forwarded, network string) {
	for way := range numWays {
		if way != wayLocal && (way == wayVPCToVPC) != (network == "") {
			continue
		}
		for fam, family := range [2]string{"ipv4", "ipv6"} {
			for class, proto := range nat.ClassNames {
				t := &f.t[makeClass(way, fam == 1, class)]
				counter(descForwarded, t.packets.Load(), wayNames[way], network, family, proto)
				counter(descFwdBytes, t.bytes.Load(), wayNames[way], network, family, proto)
			}
		}
	}
}

// table collects what the flow table holds. labels are the networks by slot.
func (c *collector) table(counter countFunc, gauge gaugeFunc, labels []string) {
	ts := c.e.table.Stats()
	gauge(descLimit, float64(c.e.table.Limit()))
	for class, proto := range nat.ClassNames {
		gauge(descFlows, float64(ts.Live[class].Load()), proto)
		counter(descCreated, uint64(ts.Created[class].Load()), proto)
		for r, name := range nat.ReasonNames {
			counter(descRemoved, uint64(ts.Removed[class][r].Load()), proto, name)
		}
		for r, name := range nat.RefusalNames {
			if name != "" {
				counter(descRefused, uint64(ts.Refused[class][r].Load()), proto, name)
			}
		}
	}
	type row struct{ network, proto string }
	inUse, resting, failed := map[row]int{}, map[row]int{}, map[row]uint64{}
	for _, p := range c.e.table.Pools() {
		if int(p.Slot) < len(labels) && labels[p.Slot] != "" {
			r := row{labels[p.Slot], nat.ClassNames[nat.ClassOf(p.Proto)]}
			inUse[r] += p.InUse
			resting[r] += p.Resting
			failed[r] += p.Failures
		}
	}
	for r, n := range inUse {
		gauge(descPorts, float64(n), r.network, r.proto)
		gauge(descResting, float64(resting[r]), r.network, r.proto)
		counter(descNoPort, failed[r], r.network, r.proto)
	}
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
