package gateway

import (
	"github.com/prometheus/client_golang/prometheus"

	"ztgate/netstack"
	"ztgate/zerotier"
	"ztgate/zerotier/portmap"
	"ztgate/zerotier/transport"
	"ztgate/zerotier/vl1"
)

// ciphers names the cipher suites.
var ciphers = [...]string{"poly1305", "salsa2012_poly1305", "trusted", "aes_gmac_siv"}

// collectWire collects what both implementations of a node have: the sockets' counters.
func collectWire(s transport.Stats, counter func(d *prometheus.Desc, v uint64, labels ...string)) {
	counter(netstack.DescPackets, s.Rx.Datagrams, "wire", "rx")
	counter(netstack.DescPackets, s.Tx.Datagrams, "wire", "tx")
	counter(netstack.DescBytes, s.Rx.Bytes, "wire", "rx")
	counter(netstack.DescBytes, s.Tx.Bytes, "wire", "tx")
	s.EachDrop(func(reason string, n uint64) { counter(netstack.DescDropped, n, "wire", reason) })
}

// wireCollector reads the node's counters at scrape time. It describes nothing
// in advance, since other sides share some of its names.
type wireCollector struct{ n *zerotier.Node }

func (*wireCollector) Describe(chan<- *prometheus.Desc) {}

var (
	descQueue     = prometheus.NewDesc("ztgate_queue_depth", "Entries that wait in a queue.", []string{"queue"}, nil)
	descQueueMax  = prometheus.NewDesc("ztgate_queue_limit", "Most entries that a queue takes.", []string{"queue"}, nil)
	descCrypto    = prometheus.NewDesc("ztgate_wire_crypto_bytes_total", "Bytes sealed and opened, by cipher suite.", []string{"cipher", "direction"}, nil)
	descRejected  = prometheus.NewDesc("ztgate_wire_rejected_packets_total", "Packets from the wire that were refused, by reason.", []string{"reason"}, nil)
	descMappings  = prometheus.NewDesc("ztgate_port_mappings", "UDP ports that routers in front of this host map to it.", []string{"protocol"}, nil)
	descMapped    = prometheus.NewDesc("ztgate_port_mapping_requests_total", "Requests to routers for a port mapping, by what became of them.", []string{"result"}, nil)
	descCarried   = prometheus.NewDesc("ztgate_wire_path_bytes_total", "Bytes of encrypted packets for this node and from it, by the way: direct, or through a root.", []string{"path", "direction"}, nil)
	descHoles     = prometheus.NewDesc("ztgate_path_mtu_black_holes_total", "Times that large datagrams vanished on a path while small ones arrived.", nil, nil)
	descSealed    = prometheus.NewDesc("ztgate_wire_sealed_hellos_total", "Sealed HELLOs opened and sent.", []string{"direction"}, nil)
	descFragments = prometheus.NewDesc("ztgate_fragments_total", "Fragments of overlay packets, by what became of them.", []string{"direction", "result"}, nil)
)

func (c *wireCollector) Collect(ch chan<- prometheus.Metric) {
	s := c.n.Stats()
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge := func(d *prometheus.Desc, v int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	collectWire(s.Wire, counter)
	s.Network.EachDrop(func(reason string, n uint64) { counter(netstack.DescDropped, n, "overlay", "network_"+reason) })
	for i, name := range ciphers[:len(s.VL1.SealedBytes)] {
		counter(descCrypto, s.VL1.SealedBytes[i], name, "tx")
		counter(descCrypto, s.VL1.OpenedBytes[i], name, "rx")
	}
	for _, r := range vl1.Rejects() {
		counter(descRejected, s.VL1.RejectedBy(r), r.String())
	}
	for direction, name := range []string{"rx", "tx"} {
		counter(descCarried, s.VL1.DirectBytes[direction], "direct", name)
		counter(descCarried, s.VL1.RelayBytes[direction], "relay", name)
	}
	counter(descSealed, s.VL1.SealedHellosIn, "rx")
	counter(descSealed, s.VL1.SealedHellosOut, "tx")
	counter(descHoles, s.VL1.BlackHoles)
	counter(descFragments, s.VL1.FragmentsOut, "tx", "sent")
	counter(descFragments, s.VL1.FragmentsIn, "rx", "received")
	counter(descFragments, s.VL1.Reassembled, "rx", "reassembled")
	counter(descFragments, s.VL1.FragmentsExpired, "rx", "expired")
	counter(descFragments, s.VL1.FragmentsDisplaced, "rx", "displaced")
	mappings := map[string]int{}
	for _, m := range c.n.PortMappings() {
		mappings[m.Protocol]++
	}
	for _, p := range portmap.Protocols() {
		gauge(descMappings, mappings[p], p)
	}
	s.PortMap.Each(func(result string, n uint64) { counter(descMapped, n, result) })
	for _, q := range []struct {
		name         string
		depth, limit int
	}{{"outgoing", s.VL1.OutQueue, s.VL1.OutQueueLimit}, {"held", s.VL1.HeldQueue, s.VL1.HeldQueueLimit},
		{"retry", s.VL1.RetryQueue, s.VL1.RetryQueueLimit}} {
		gauge(descQueue, q.depth, q.name)
		gauge(descQueueMax, q.limit, q.name)
	}
}
