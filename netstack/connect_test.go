package netstack

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
	"ztgate/netstack/policy"
)

// TestConnectTimes checks that a connection is timed from its first SYN to the answer,
// once, under the direction of its client.
func TestConnectTimes(t *testing.T) {
	reg := prometheus.NewRegistry()
	r := newRig(t, func(c *Config) {
		c.Registerer = reg
		c.Policy = policy.New(policy.Accept, []policy.Rule{{Action: policy.Accept, Direction: policy.In}})
		c.Forwards = []PortForward{{From: OverlaySide, Proto: ipkt.TCP, Listen: pkttest.Addr("10.0.0.1:80"), To: pkttest.Addr("172.31.0.10:80")}}
	})
	segment := func(src, dst string, flags uint8, seq, ack uint32) []byte {
		return pkttest.Packet{Proto: ipkt.TCP, Flags: flags, Src: pkttest.Addr(src), Dst: pkttest.Addr(dst), Seq: seq, Ack: ack, Window: 1000}.Bytes()
	}
	out := func(b []byte) { r.feed([][]byte{b}, nil); r.take() }
	in := func(b []byte) { r.feed(nil, [][]byte{b}); r.take() }
	connect := func(port int, after ...time.Duration) { // SYNs again and again, then the answer
		client, outside, server := fmt.Sprintf("172.31.0.10:%d", port), fmt.Sprintf("10.0.0.1:%d", port), "10.0.0.10:443"
		for _, d := range after {
			out(segment(client, server, ipkt.SYN, 1, 0))
			r.now = r.now.Add(d)
		}
		in(segment(server, outside, ipkt.SYN|ipkt.ACK, 9, 2))
		r.now = r.now.Add(time.Second)
		in(segment(server, outside, ipkt.SYN|ipkt.ACK, 9, 2)) // repeated
		out(segment(client, server, ipkt.ACK, 2, 10))
	}
	read := func(path string) (*dto.Histogram, map[float64]uint64) {
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.Metric {
				if f.GetName() == "ztgate_flow_connect_seconds" && m.Label[0].GetValue() == path {
					buckets := map[float64]uint64{}
					for _, b := range m.Histogram.Bucket {
						buckets[b.GetUpperBound()] = b.GetCumulativeCount()
					}
					return m.Histogram, buckets
				}
			}
		}
		t.Fatalf("no times of %s", path)
		return nil, nil
	}
	if h, buckets := read("vpc_to_overlay"); h.GetSampleCount() != 0 || len(buckets) != 13 {
		t.Errorf("at first: %v", h)
	} else if bounds := slices.Sorted(maps.Keys(buckets)); bounds[0] != 0.0002 || bounds[12] != 3 {
		t.Errorf("buckets %v", bounds)
	}
	connect(4000, 150*time.Microsecond)
	connect(4001, 1500*time.Microsecond)
	connect(4002, time.Second, 40*time.Millisecond)
	connect(4003, time.Second, 2*time.Second, 100*time.Millisecond)
	// Refused, picked up in the middle, never answered: no connection was made.
	out(segment("172.31.0.10:4010", "10.0.0.10:443", ipkt.SYN, 1, 0))
	in(segment("10.0.0.10:443", "10.0.0.1:4010", ipkt.RST|ipkt.ACK, 0, 2))
	out(segment("172.31.0.10:4011", "10.0.0.10:443", ipkt.ACK, 1, 7))
	in(segment("10.0.0.10:443", "10.0.0.1:4011", ipkt.ACK, 7, 1))
	out(segment("172.31.0.10:4012", "10.0.0.10:443", ipkt.SYN, 1, 0))
	in(segment("10.0.0.10:443", "10.0.0.1:4012", ipkt.SYN|ipkt.ACK, 9, 77)) // to something else
	// A tuple that is used again is timed again.
	out(segment("172.31.0.10:4010", "10.0.0.10:443", ipkt.SYN, 100, 0))
	r.now = r.now.Add(30 * time.Millisecond)
	in(segment("10.0.0.10:443", "10.0.0.1:4010", ipkt.SYN|ipkt.ACK, 9, 101))
	h, buckets := read("vpc_to_overlay")
	if h.GetSampleCount() != 5 || h.GetSampleSum() < 4.17 || h.GetSampleSum() > 4.18 {
		t.Errorf("%d connections took %v s", h.GetSampleCount(), h.GetSampleSum())
	}
	for bound, want := range map[float64]uint64{.0002: 1, .001: 1, .002: 2, .05: 3, 1: 3, 3: 4} {
		if buckets[bound] != want {
			t.Errorf("%d connections took at most %v s, want %d", buckets[bound], bound, want)
		}
	}
	in(segment("10.0.0.10:5000", "10.0.0.1:80", ipkt.SYN, 1, 0))
	r.now = r.now.Add(5 * time.Millisecond)
	out(segment("172.31.0.10:80", "10.0.0.10:5000", ipkt.SYN|ipkt.ACK, 9, 2))
	if h, buckets := read("overlay_to_vpc"); h.GetSampleCount() != 1 || buckets[.005] != 1 || buckets[.002] != 0 {
		t.Errorf("from the overlay: %v", h)
	}
}
