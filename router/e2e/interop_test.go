//go:build e2e

package e2e

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"ztgate/router/lab"
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

// Every mix of our nodes and real ones that has at least one of each.
func TestInterop(t *testing.T) {
	real := reference(t)
	type mix struct {
		name                  string
		root, office, gateway lab.Make
		path                  string
	}
	mixes := []mix{
		{"office_real", lab.Ours, lab.Reference, lab.Ours, real},
		{"root_real", lab.Reference, lab.Ours, lab.Ours, real},
		{"root_and_office_real", lab.Reference, lab.Reference, lab.Ours, real},
		{"gateway_real", lab.Ours, lab.Ours, lab.Reference, real},
		{"root_and_gateway_real", lab.Reference, lab.Ours, lab.Reference, real},
		{"office_and_gateway_real", lab.Ours, lab.Reference, lab.Reference, real},
	}
	if old := older(); old != "" {
		mixes = append(mixes,
			mix{"root_and_office_old", lab.Reference, lab.Reference, lab.Ours, old},
			mix{"gateway_old", lab.Ours, lab.Ours, lab.Reference, old})
	}
	for _, c := range mixes {
		t.Run(c.name, func(t *testing.T) {
			o := options(t)
			o.Root, o.Office, o.Gateway, o.ZeroTierOne = c.root, c.office, c.gateway, c.path
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
				got, err := lab.RunIperf(s.Context(), s.Office, s.VPC, lab.OfficeAddress, m.Iperf)
				for range 2 { // on a busy machine a node doesn't always get its turn in time
					if err == nil && got.LostPercent > 10 {
						t.Logf("%s: lost %.2f %%, again", m.name, got.LostPercent)
						got, err = lab.RunIperf(s.Context(), s.Office, s.VPC, lab.OfficeAddress, m.Iperf)
					}
				}
				if err != nil {
					t.Errorf("%s: %v", m.name, err)
					continue
				}
				t.Logf("%s: %.0f Mbit/s, lost %.2f %%, %d retransmits", m.name, got.BitsPerSecond/1e6, got.LostPercent, got.Retransmits)
				if got.Bytes == 0 || got.LostPercent > 10 {
					t.Errorf("%s: %+v", m.name, got)
				}
			}
			cutGateway(t, s)
		})
	}
}

// udpRate is what iperf3 sends. Its own socket holds 90 such datagrams, and what it is
// late for on a busy machine counts as lost: all that was lost in an examined run.
const udpRate = "5M"

// cutGateway takes the gateway out of the network, which ends what it forwards, and
// puts it back.
func cutGateway(t *testing.T, s *lab.Scenario) {
	for _, yes := range []bool{false, true} {
		if err := s.SetMember(s.Context(), s.GatewayMember, map[string]any{"authorized": yes}); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		eventually(t, func() error {
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
		t.Cleanup(func() {
			if t.Failed() {
				for _, p := range s.Processes() {
					t.Log("\n" + p.Tail(30))
				}
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			_ = os.RemoveAll(s.LogDir)
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}
