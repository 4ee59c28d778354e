package netstack

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
)

// Metrics that collectors of other sides share.
var (
	DescPackets = prometheus.NewDesc("ztgate_packets_total", "Packets that entered or left the process, by side: vpc, overlay or wire.", []string{"leg", "direction"}, nil)
	DescBytes   = prometheus.NewDesc("ztgate_bytes_total", "Bytes that entered or left the process, by side: vpc, overlay or wire.", []string{"leg", "direction"}, nil)
	DescDropped = prometheus.NewDesc("ztgate_dropped_packets_total", "Packets dropped, by side and reason.", []string{"leg", "reason"}, nil)
)

var (
	descForwarded   = prometheus.NewDesc("ztgate_forwarded_packets_total", "Packets forwarded, each counted once.", []string{"path", "network", "family", "protocol"}, nil)
	descFwdBytes    = prometheus.NewDesc("ztgate_forwarded_bytes_total", "Bytes of IP packets forwarded.", []string{"path", "network", "family", "protocol"}, nil)
	descFlows       = prometheus.NewDesc("ztgate_flows", "Live flows.", []string{"protocol"}, nil)
	descLimit       = prometheus.NewDesc("ztgate_flows_limit", "Most flows that the table holds.", nil, nil)
	descCreated     = prometheus.NewDesc("ztgate_flows_created_total", "Flows opened.", []string{"protocol"}, nil)
	descRemoved     = prometheus.NewDesc("ztgate_flows_removed_total", "Flows that ended, by reason.", []string{"protocol", "reason"}, nil)
	descPorts       = prometheus.NewDesc("ztgate_nat_ports_in_use", "External ports and identifiers in use.", []string{"network", "protocol"}, nil)
	descQuarantined = prometheus.NewDesc("ztgate_nat_ports_resting", "External ports and identifiers that are quarantined for their last user.", []string{"network", "protocol"}, nil)
	descNoPort      = prometheus.NewDesc("ztgate_nat_allocation_failures_total", "Flows refused because no external port was left.", []string{"network", "protocol"}, nil)
	descRefused     = prometheus.NewDesc("ztgate_flows_refused_total", "Flows refused by the table, by reason.", []string{"protocol", "reason"}, nil)
	descLocal       = prometheus.NewDesc("ztgate_local_packets_total", "Packets for the gateway itself.", nil, nil)
	descConflicts   = prometheus.NewDesc("ztgate_route_conflicts", "Routes and addresses of networks that are not used; ztgate status says why.", nil, nil)
	descRules       = prometheus.NewDesc("ztgate_policy_rule_hits_total", "Flows that a rule of the policy decided.", []string{"rule"}, nil)
	descFragBytes   = prometheus.NewDesc("ztgate_fragment_bytes", "Bytes of fragments that wait for the rest of their packets.", nil, nil)
	descPanics      = prometheus.NewDesc("ztgate_local_stack_panics_total", "Packets on which the gateway's own TCP/IP stack panicked.", nil, nil)
	descDevice      = prometheus.NewDesc("ztgate_device_write_errors_total", "Batches of which the VPC device took a part only, or nothing.", nil, nil)
	descHits        = prometheus.NewDesc("ztgate_flow_cache_hits_total", "Packets of established flows.", nil, nil)
	descMisses      = prometheus.NewDesc("ztgate_flow_cache_misses_total", "Packets that belong to no flow.", nil, nil)
	descErrors      = prometheus.NewDesc("ztgate_icmp_errors_sent_total", "ICMP errors sent, by side and kind.", []string{"leg", "kind"}, nil)
	descResets      = prometheus.NewDesc("ztgate_tcp_resets_sent_total", "RSTs sent to ends of connections that are refused or over, by side.", []string{"leg"}, nil)
	descConnect     = prometheus.NewDesc("ztgate_flow_connect_seconds", "Time from the first SYN of a TCP flow to the answer, as both pass.", []string{"path"}, nil)
	descClamped     = prometheus.NewDesc("ztgate_tcp_mss_clamped_total", "SYN segments whose MSS was lowered.", []string{"leg"}, nil)
	descBatch       = prometheus.NewDesc("ztgate_batch_size", "Packets per batch received.", []string{"leg", "direction"}, nil)
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
	for side := range numSides {
		for dir := range numDirections {
			counter(DescPackets, s.traffic[side][dir].packets.Load(), sideNames[side], directionNames[dir])
			counter(DescBytes, s.traffic[side][dir].bytes.Load(), sideNames[side], directionNames[dir])
		}
		for _, d := range drops() {
			counter(DescDropped, s.drops[side][d].Load(), sideNames[side], d.String())
		}
		for k := range ipkt.NumErrorKinds {
			counter(descErrors, s.errors[side][k].Load(), sideNames[side], ipkt.ErrorKind(k).String())
		}
		counter(descResets, s.resets[side].Load(), sideNames[side])
		counter(descClamped, s.clamped[side].Load(), sideNames[side])
		ch <- s.batches[side].metric(sideNames[side])
	}
	set := e.set.Load()
	labels := make([]string, len(set.slots))
	for _, at := range set.attachments {
		labels[at.slot] = networkLabel(at.ID)
		c.forwarded(counter, at.fwd, networkLabel(at.ID))
	}
	c.forwarded(counter, &s.vpc, "")
	local := s.vpc.local()
	for _, at := range set.attachments {
		local += at.fwd.local()
	}
	counter(descLocal, local)
	c.table(ch, counter, gauge, set, labels)
	counter(descHits, s.hits.Load())
	counter(descMisses, s.misses.Load())
	counter(descPanics, e.local.Panics.Load())
	counter(descDevice, s.deviceErrors.Load())
	gauge(descConflicts, float64(set.conflicts()))
	gauge(descFragBytes, float64(e.frags.Bytes()))
	pol := set.policy
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
func (c *collector) forwarded(counter countFunc, f *pathCounters, network string) {
	for path := range numPaths {
		if path != pathLocal && (path == pathVPCToVPC) != (network == "") {
			continue
		}
		for fam, family := range [2]string{"ipv4", "ipv6"} {
			for class, proto := range nat.ClassNames {
				t := &f.t[makeClass(path, fam == 1, class)]
				counter(descForwarded, t.packets.Load(), pathNames[path], network, family, proto)
				counter(descFwdBytes, t.bytes.Load(), pathNames[path], network, family, proto)
			}
		}
	}
}

// table collects what the flow table holds. labels are the networks by slot.
func (c *collector) table(ch chan<- prometheus.Metric, counter countFunc, gauge gaugeFunc, set *netSet, labels []string) {
	ts := c.e.table.Stats()
	gauge(descLimit, float64(c.e.table.Limit()))
	for side, path := range [...]int{VPCSide: pathVPCToOverlay, OverlaySide: pathOverlayToVPC} {
		count, seconds, buckets := ts.Connect[side].Read()
		ch <- prometheus.MustNewConstHistogram(descConnect, count, seconds, buckets, pathNames[path])
	}
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
	inUse, quarantined, failed := map[row]int{}, map[row]int{}, map[row]uint64{}
	for _, p := range c.e.table.Pools() {
		behind := set.isBehind(ipkt.Addr(p.External)) // of hosts of all networks
		if behind || int(p.Slot) < len(labels) && labels[p.Slot] != "" {
			r := row{proto: nat.ClassNames[nat.ClassOf(p.Proto)]}
			if !behind {
				r.network = labels[p.Slot]
			}
			inUse[r] += p.InUse
			quarantined[r] += p.Quarantined
			failed[r] += p.Failures
		}
	}
	for r, n := range inUse {
		gauge(descPorts, float64(n), r.network, r.proto)
		gauge(descQuarantined, float64(quarantined[r]), r.network, r.proto)
		counter(descNoPort, failed[r], r.network, r.proto)
	}
}

func (h *histogram) metric(side string) prometheus.Metric {
	buckets := make(map[float64]uint64, len(batchBounds))
	sum := uint64(0)
	for i, b := range batchBounds {
		sum += h.buckets[i].Load()
		buckets[float64(b)] = sum
	}
	return prometheus.MustNewConstHistogram(descBatch, h.count.Load(), float64(h.sum.Load()), buckets, side, "rx")
}
