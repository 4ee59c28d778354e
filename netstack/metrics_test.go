package netstack

import (
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/netstack/internal/pkttest"
)

// TestMetrics checks names and labels against what operators are promised, and
// that the sums by side agree.
func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	r := newRig(t, func(c *Config) { c.Registerer = reg })
	r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "x"), pkttest.UDP("172.31.0.10:4000", "192.0.2.1:53", "x"),
		pkttest.Echo("172.31.0.10", "172.31.0.1", false, 7, "x"))
	r.fromOverlay(pkttest.UDP("10.0.0.10:53", "10.0.0.1:4000", "x"), pkttest.UDP("10.0.0.10:54", "10.0.0.1:4000", "x"))
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{}
	values := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			var names, pairs []string
			for _, l := range m.Label {
				names = append(names, l.GetName())
				pairs = append(pairs, l.GetName()+"="+l.GetValue())
			}
			slices.Sort(names)
			labels[f.GetName()] = strings.Join(names, " ")
			values[f.GetName()+" "+strings.Join(pairs, " ")] += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	for name, want := range map[string]string{
		"ztgate_packets_total": "direction leg", "ztgate_bytes_total": "direction leg",
		"ztgate_forwarded_packets_total": "family network path protocol", "ztgate_forwarded_bytes_total": "family network path protocol",
		"ztgate_dropped_packets_total": "leg reason", "ztgate_flows": "protocol", "ztgate_flows_limit": "",
		"ztgate_flows_created_total": "protocol", "ztgate_flows_removed_total": "protocol reason",
		"ztgate_nat_ports_in_use": "network protocol", "ztgate_nat_allocation_failures_total": "network protocol",
		"ztgate_flow_cache_hits_total": "", "ztgate_flow_cache_misses_total": "", "ztgate_icmp_errors_sent_total": "kind leg",
		"ztgate_tcp_mss_clamped_total": "leg", "ztgate_batch_size": "direction leg",
	} {
		got, ok := labels[name]
		if !ok || got != want {
			t.Errorf("%s: labels %q (there: %v), want %q", name, got, ok, want)
		}
	}
	for name, want := range map[string]float64{
		"ztgate_packets_total direction=rx leg=vpc":                                                            3,
		"ztgate_forwarded_packets_total family=ipv4 network=8056c2e21c000001 path=vpc_to_overlay protocol=udp": 1,
		"ztgate_forwarded_packets_total family=ipv4 network=8056c2e21c000001 path=overlay_to_vpc protocol=udp": 1,
		"ztgate_forwarded_packets_total family=ipv4 network= path=local protocol=icmp":                         1,
		"ztgate_dropped_packets_total leg=vpc reason=no_route":                                                 1,
		"ztgate_dropped_packets_total leg=overlay reason=no_flow":                                              1,
		"ztgate_nat_ports_in_use network=8056c2e21c000001 protocol=udp":                                        1,
		"ztgate_flows protocol=udp":                           1,
		"ztgate_icmp_errors_sent_total kind=no_route leg=vpc": 1,
	} {
		if got := values[name]; got != want {
			t.Errorf("%s = %v, want %v", name, got, want)
		}
	}
	r.account()
}
