//go:build e2e

package e2e

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/lab"
	"ztgate/router/lab/labtest"
)

// reference returns the path of a zerotier-one and skips without one.
func reference(t *testing.T) string {
	t.Helper()
	path := os.Getenv("ZT_ONE")
	if path == "" {
		t.Skip("set ZT_ONE to the path of a zerotier-one to test with real peers")
	}
	return path
}

// Bulk data between our nodes and real ones, each as the office and as the gateway.
func TestInteropBulk(t *testing.T) {
	t.Parallel()
	real := reference(t)
	type mix struct {
		name                  string
		root, office, gateway lab.Program
		path                  string
		seal                  bool
	}
	mixes := []mix{
		{"office_real", lab.Reference, lab.Reference, lab.Ours, real, false},
		{"gateway_real", lab.Ours, lab.Ours, lab.Reference, real, false},
	}
	if old := older(); old != "" {
		mixes = append(mixes,
			mix{"office_old", lab.Ours, lab.Reference, lab.Ours, old, false},
			mix{"gateway_old", lab.Reference, lab.Ours, lab.Reference, old, false})
	}
	if path := newer(); path != "" {
		mixes = append(mixes,
			mix{"office_new", lab.Ours, lab.Reference, lab.Ours, path, false},
			mix{"office_sealing", lab.Ours, lab.Reference, lab.Ours, path, true},
			mix{"gateway_new", lab.Ours, lab.Ours, lab.Reference, path, false},
			mix{"gateway_sealing", lab.Ours, lab.Ours, lab.Reference, path, true})
	}
	if path := independent(); path != "" {
		mixes = append(mixes,
			mix{"office_go", lab.Ours, lab.Reference, lab.Ours, path, false},
			mix{"office_go_sealing", lab.Ours, lab.Reference, lab.Ours, path, true},
			mix{"gateway_go", lab.Ours, lab.Ours, lab.Reference, path, false})
	}
	for _, c := range mixes { // one after the other: they need the machine
		t.Run(c.name, func(t *testing.T) {
			name := func(m lab.Program) string {
				if m != lab.Reference {
					return nameOurs
				}
				k := implementation{name: version(t, c.path)}
				if c.seal {
					k = k.sealing()
				}
				return k.name
			}
			recordTest(t, row{property: "HTTPS, bulk TCP and UDP both ways", root: name(c.root), controller: name(c.root), member: name(c.office), gateway: name(c.gateway)})
			o := options(t)
			o.Root, o.Office, o.Gateway, o.ZeroTierOne, o.Seal = c.root, c.office, c.gateway, c.path, c.seal
			o.Prefix += "bulk"
			s := start(t, o)
			r := &lab.Report{}
			err := s.Check(r)
			var text strings.Builder
			r.WriteText(&text)
			t.Log("\n" + text.String())
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range []struct {
				name string
				lab.Iperf
			}{
				{"TCP to the office", lab.Iperf{}},
				{"TCP from the office", lab.Iperf{Reverse: true}},
				{"UDP to the office", lab.Iperf{UDP: true, Bitrate: udpRate, Length: 1200}},
				{"UDP from the office", lab.Iperf{UDP: true, Bitrate: udpRate, Length: 1200, Reverse: true}},
			} {
				m.Duration = duration(t)
				measure(t, s, m.name, m.Iperf)
			}
			cutGateway(t, s)
		})
	}
}

// measure runs iperf3 once. What it lost has to be counted somewhere.
func measure(t *testing.T, s *lab.Scenario, name string, o lab.Iperf) {
	before := losses(t, s)
	got, err := lab.RunIperf(s.Context(), s.Office, s.VPC, lab.OfficeAddress, o)
	if err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	t.Logf("%s: %.0f Mbit/s, lost %d of %d, %d retransmits", name, got.BitsPerSecond/1e6, got.Lost, got.Datagrams, got.Retransmits)
	counted := uint64(0)
	for what, n := range losses(t, s) {
		if n -= before[what]; n > 0 {
			t.Logf("%s: dropped at %s: %d", name, what, n)
			counted += n
		}
	}
	if got.Bytes == 0 || uint64(got.Lost) > counted+uint64(got.Datagrams)/100 {
		t.Errorf("%s: lost %d, of which only %d were counted anywhere", name, got.Lost, counted)
	}
}

// losses returns what was dropped on the way so far, by the kernel or by us.
func losses(t *testing.T, s *lab.Scenario) map[string]uint64 {
	t.Helper()
	out := map[string]uint64{}
	for where, n := range map[string]*lab.Namespace{"office": s.Office, "gateway": s.Gateway, "VPC": s.VPC, "underlay": s.Inet} {
		l, err := n.Losses()
		if err != nil {
			t.Fatal(err)
		}
		out[where+"'s node, receive buffer"] = l.OpenSockets
		out[where+"'s iperf3, receive buffer"] = l.ReceiveBuffers - l.OpenSockets
		for dev, k := range l.Interfaces {
			out[where+"'s "+dev] = k
		}
	}
	if s.GatewayAPI != nil {
		m, err := s.Metrics(s.Context())
		if err != nil {
			t.Fatal(err)
		}
		for reason, k := range m.By("ztgate_dropped_packets_total", "reason") {
			out["our gateway, "+reason] = uint64(k)
		}
	}
	return out
}

// udpRate is what iperf3 sends.
const udpRate = "20M"

// cutGateway takes the gateway out of the network, which ends what it forwards, and
// puts it back.
func cutGateway(t *testing.T, s *lab.Scenario) {
	for _, yes := range []bool{false, true} {
		if err := s.SetMember(s.Context(), s.GatewayMember, map[string]any{"authorized": yes}); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		testwait.NoError(t, 30*time.Second, func() error {
			err := fetch(s)
			if !yes {
				return not(err, "the gateway was put out and still forwards")
			}
			return err
		})
		t.Logf("gateway authorised %v: so for the VPC too within %v", yes, time.Since(start).Round(100*time.Millisecond))
	}
}

// duration is how long each transfer takes; ZTGATE_E2E_SECONDS makes it longer.
func duration(t *testing.T) time.Duration {
	d, err := time.ParseDuration(os.Getenv("ZTGATE_E2E_SECONDS") + "s")
	if err != nil {
		return 2 * time.Second
	}
	return d
}

// prefix begins the names of the lab's namespaces. ZTGATE_E2E_PREFIX changes it,
// so that several runs on one machine don't meet.
func prefix() string {
	if p := os.Getenv("ZTGATE_E2E_PREFIX"); p != "" {
		return p
	}
	return "zglabe2e"
}

// onLibzt says that office and gateway run on libzt in the tests that don't choose
// their nodes.
func onLibzt() bool { return os.Getenv("ZTGATE_E2E_NODE") == "libzt" }

func options(t *testing.T) lab.Options {
	t.Helper()
	binary := os.Getenv("ZTGATE")
	if binary == "" {
		t.Fatal("set ZTGATE to the path of the program to test (make e2e does)")
	}
	o := lab.Options{Binary: binary, Prefix: prefix(), Duration: time.Second, Progress: t.Output()}
	if onLibzt() {
		o.Office, o.Gateway = lab.Libzt, lab.Libzt
	}
	return o
}

// start brings a scenario up for the length of the test.
func start(t *testing.T, o lab.Options) *lab.Scenario {
	t.Helper()
	s, err := lab.Start(context.Background(), o)
	if s != nil {
		labtest.End(t, s.Topology)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}
