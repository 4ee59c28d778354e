//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/control"
	"ztgate/router/lab"
)

// blackHole makes the internet lose IP packets above a size, without a word.
func blackHole(s *lab.Scenario, size int) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, n := range []*lab.Namespace{s.Gateway, s.Office, s.Root} {
		// What the filter sees is what would be on a wire.
		if out, err := n.Run(ctx, "ethtool", "-K", "eth-inet", "tx-udp-segmentation", "off"); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
	}
	out, err := s.Inet.Input(ctx, fmt.Sprintf("table bridge hole { chain forward { type filter hook forward priority 0; ip protocol udp ip length > %d counter drop; }; }", size), "nft", "-f", "-")
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// transfers uploads 1 MB and downloads for a second, over new connections.
func transfers(t *testing.T, s *lab.Scenario) {
	t.Helper()
	file := strings.Repeat("0123456789abcdef", 1<<16)
	for name, args := range map[string][]string{
		"upload":   {"--data-binary", "@-", "https://" + office + "/upload"},
		"download": {"-o", "/dev/null", "-w", "%{size_download}", "https://" + office + "/download?seconds=1"},
	} {
		start := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		out, err := s.VPC.Input(ctx, file, "curl", append([]string{"-sSk", "--max-time", "15"}, args...)...)
		cancel()
		took := time.Since(start)
		t.Logf("%s: %v, %s", name, took.Round(time.Millisecond), strings.TrimSpace(string(out)))
		if err != nil || took > 5*time.Second {
			t.Errorf("%s took %v: %v", name, took, err)
		}
	}
}

// officeMTU waits until the gateway knows what its path to the office carries.
func officeMTU(t *testing.T, s *lab.Scenario, least, most int) {
	t.Helper()
	testwait.NoError(t, 15*time.Second, func() error {
		peers, err := s.GatewayAPI.Peers(context.Background())
		for _, p := range peers.Peers {
			for _, path := range p.Paths {
				if p.Address == s.OfficeAddr && path.Preferred && path.MTU >= least && path.MTU <= most {
					return nil
				}
				err = errors.Join(err, fmt.Errorf("path to %s at %s: %d bytes", p.Address, path.Endpoint, path.MTU))
			}
		}
		return err
	})
}

func holes(t *testing.T, s *lab.Scenario) float64 {
	t.Helper()
	m, err := s.Metrics(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return m.Sum("ztgate_path_mtu_black_holes_total", nil)
}

// A way that loses large datagrams from the start on costs no transfer its life, and
// neither does one that begins to.
func TestBlackHole(t *testing.T) {
	t.Run("from the start", func(t *testing.T) {
		o := options(t)
		o.Prepare = func(s *lab.Scenario) error { return blackHole(s, 1400) }
		s := start(t, o)
		transfers(t, s)
		officeMTU(t, s, 1300, 1372)
		if n := holes(t, s); n < 1 {
			t.Errorf("%v black holes counted", n)
		}
		x, err := s.GatewayAPI.Explain(context.Background(), control.Question{Protocol: "tcp", Source: netip.MustParseAddrPort("172.31.0.10:1234"), Destination: netip.MustParseAddrPort(office + ":443")})
		if err != nil || x.PathMTU < 1300 || x.PathMTU > 1372 {
			t.Errorf("explain: %+v, %v", x, err)
		}
		m, err := s.Metrics(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if direct := m.Sum("ztgate_wire_path_bytes_total", map[string]string{"path": "direct", "direction": "tx"}); direct < 1e6 {
			t.Errorf("%v bytes sent directly", direct)
		}
	})
	t.Run("at the gateway's own link", func(t *testing.T) {
		o := options(t)
		o.Prepare = func(s *lab.Scenario) error {
			_, err := s.Gateway.Run(context.Background(), "ip", "link", "set", "eth-inet", "mtu", "1350")
			return err
		}
		s := start(t, o)
		transfers(t, s)
		officeMTU(t, s, 1250, 1322)
	})
	t.Run("later", func(t *testing.T) {
		s := start(t, options(t))
		transfers(t, s)
		officeMTU(t, s, 1432, 1432)
		done := make(chan error, 1)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		begin := time.Now()
		go func() {
			_, err := s.VPC.Input(ctx, strings.Repeat("x", 3<<20), "curl", "-sSk", "--limit-rate", "1M", "--data-binary", "@-", "https://"+office+"/upload")
			done <- err
		}()
		testwait.NoError(t, 5*time.Second, func() error { // it is under way
			flows, err := s.GatewayAPI.Flows(ctx, control.FlowQuery{})
			for _, f := range flows.Flows {
				if f.BytesOut > 500_000 && f.State == "established" {
					return nil
				}
			}
			return errors.Join(err, errors.New("no upload"))
		})
		if err := blackHole(s, 1300); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		t.Logf("3 MB at 1 MB/s took %v", time.Since(begin))
		officeMTU(t, s, 1200, 1272)
		transfers(t, s)
	})
}

// A real zerotier-one answers the probes. What it sends itself can't be helped but by
// what hosts are told about their segments.
func TestInteropBlackHole(t *testing.T) {
	t.Parallel()
	o := options(t)
	o.Root, o.Office, o.ZeroTierOne = lab.Reference, lab.Reference, reference(t)
	o.Prefix += "hole"
	o.Prepare = func(s *lab.Scenario) error { return blackHole(s, 1400) }
	s := start(t, o)
	recordTest(t, row{property: "a path that loses large datagrams", root: version(t, o.ZeroTierOne), controller: version(t, o.ZeroTierOne), member: version(t, o.ZeroTierOne), gateway: nameOurs})
	officeMTU(t, s, 1300, 1372)
	transfers(t, s)
}
