//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/lab"
	"ztgate/router/lab/labtest"
)

// Ends of connections from the office into the VPC.
const (
	server4, server6 = "172.31.0.10", "fd31:1::10"
	nat4, nat6       = "172.31.0.250", "fd31:1::250"
	gw4, gw6         = "172.31.0.1", "fd31:1::1"
	office6          = "fd77:100::10"
)

// inboundConfig accepts what the office opens in the VPC.
const inboundConfig = `
policy:
  rules:
    - {action: reject, direction: in, proto: tcp, ports: [8081]}
    - {action: accept, direction: in}
vpc:
  nat_address: [%s]
`

// inbound is a scenario in which the office reaches a server of the VPC that has no route back
// to the overlay. The link lets no packet pass whose ends in the VPC aren't the gateway's own,
// as a cloud's source/destination check does; allowed are those ends.
func inbound(t *testing.T, suffix, ingress, nat string, allowed ...string) *lab.Scenario {
	o := options(t)
	o.Prefix += suffix
	o.Ingress = ingress
	o.Sources = []string{"172.31.0.0/16", "fd31:1::/64"}
	o.Config = fmt.Sprintf(inboundConfig, nat)
	o.Prepare = func(s *lab.Scenario) error {
		var v4, v6 []string
		for _, a := range append([]string{gw4, gw6}, allowed...) {
			if netip.MustParseAddr(a).Is4() {
				v4 = append(v4, a)
			} else {
				v6 = append(v6, a)
			}
		}
		ctx := s.Context()
		do := func(n *lab.Namespace, args ...string) error {
			out, err := n.Run(ctx, args[0], args[1:]...)
			if err != nil {
				return fmt.Errorf("%v: %w: %s", args, err, out)
			}
			return nil
		}
		check := fmt.Sprintf(`table netdev check {
			counter foreign {}
			chain in { type filter hook ingress device "eth0" priority 0;
				ip saddr != {%s} counter name foreign drop
				ip6 saddr != {fe80::/10, ::, %s} counter name foreign drop
			}
		}`, strings.Join(v4, ", "), strings.Join(v6, ", "))
		forward := map[bool]string{true: "0", false: "1"}[ingress == config.IngressPacket]
		out, err := s.VPC.Input(ctx, check, "nft", "-f", "-")
		if err != nil {
			err = fmt.Errorf("nft: %w: %s", err, out)
		}
		return errors.Join(err,
			s.Gateway.Sysctl("net/ipv6/conf/all/forwarding", forward),
			do(s.Gateway, "ip", "-6", "addr", "add", gw6+"/64", "dev", "eth-vpc", "nodad"),
			do(s.VPC, "ip", "-6", "addr", "add", server6+"/64", "dev", "eth0", "nodad"),
			do(s.VPC, "ip", "route", "del", "10.0.0.0/24"))
	}
	s := start(t, o)
	ctx := t.Context()
	routes := []map[string]any{{"target": "10.0.0.0/24"}, {"target": "fd77:100::/64"},
		{"target": "172.31.0.0/16", "via": "10.0.0.1"}, {"target": "fd31:1::/64", "via": "fd77:100::1"}}
	if _, err := s.RootAPI.SetNetwork(ctx, s.Network.String(), map[string]any{"routes": routes}); err != nil {
		t.Fatal(err)
	}
	assign(t, s, s.GatewayMember, "10.0.0.1", "fd77:100::1")
	assign(t, s, s.OfficeAddr, office, office6)
	serveVPC(t, s)
	testwait.NoError(t, soon, func() error {
		for _, host := range []string{server4, server6} {
			if out, err := s.Office.Run(ctx, "ip", "route", "get", host); err != nil || !strings.Contains(string(out), "zt0") {
				return fmt.Errorf("the office has no way to %s: %s", host, out)
			}
		}
		h, err := s.GatewayAPI.Health(ctx)
		if err == nil && !h.Ready {
			err = fmt.Errorf("not ready: %+v", h.Failed())
		}
		return errors.Join(err, pings(s.Office, "10.0.0.1"), pings(s.Office, "fd77:100::1"))
	})
	return s
}

// serveVPC starts nginx on the VPC's server, which says who asks and serves a large file.
func serveVPC(t *testing.T, s *lab.Scenario) {
	t.Helper()
	dir := t.TempDir()
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(filepath.Join(dir, "large"), make([]byte, 20<<20), 0o644)); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "nginx.conf")
	text := fmt.Sprintf(`user root; pid %[1]s/pid; error_log %[1]s/error; daemon off; master_process off; events {}
http { access_log off; client_body_temp_path %[1]s; proxy_temp_path %[1]s; fastcgi_temp_path %[1]s; uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;
server { listen 80; listen 8081; listen [::]:80; listen [::]:8081; root %[1]s; location = / { return 200 "VPC server, you are $remote_addr\n"; } } }`, dir)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := s.VPC.Command(t.Context(), "nginx", "-c", conf)
	if err := s.VPC.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	testwait.NoError(t, soon, func() error {
		c, err := s.VPC.Dial(t.Context(), "tcp", server4+":80")
		if err == nil {
			_ = c.Close()
		}
		return err
	})
}

// host writes an address as it stands in a URL.
func urlHost(a string) string {
	if strings.Contains(a, ":") {
		return "[" + a + "]"
	}
	return a
}

// foreign returns how many packets the imitated source/destination check has dropped.
func foreign(t *testing.T, s *lab.Scenario) string {
	t.Helper()
	return regexp.MustCompile(`packets \d+`).FindString(run(t, s.VPC, "nft", "list", "counter", "netdev", "check", "foreign"))
}

// testInbound tries what the office may do in the VPC; seen says as whom the server sees it,
// by family.
func testInbound(t *testing.T, s *lab.Scenario, seen map[string]string) {
	for server, as := range seen {
		t.Run("curl "+server, func(t *testing.T) {
			out := run(t, s.Office, "curl", "-sS", "--max-time", "5", "http://"+urlHost(server)+"/")
			if want := "VPC server, you are " + as + "\n"; out != want {
				t.Errorf("got %q, want %q", out, want)
			}
			out = run(t, s.Office, "curl", "-sS", "--max-time", "20", "-o", "/dev/null", "-w", "%{size_download}", "http://"+urlHost(server)+"/large")
			if out != fmt.Sprint(20<<20) {
				t.Errorf("%s of %d bytes", out, 20<<20)
			}
		})
		t.Run("refused "+server, func(t *testing.T) {
			for port, why := range map[string]string{"9": "by the host", "8081": "by the policy"} {
				started := time.Now()
				out, err := s.Office.Run(t.Context(), "curl", "-sS", "--max-time", "5", "http://"+urlHost(server)+":"+port+"/")
				var exit *exec.ExitError
				if !errors.As(err, &exit) || exit.ExitCode() != 7 && exit.ExitCode() != 56 || time.Since(started) > 3*time.Second {
					t.Errorf("%s: want a refusal at once, got %v: %s", why, err, out)
				}
			}
		})
		t.Run("ping "+server, func(t *testing.T) {
			out := run(t, s.Office, "ping", "-c", "3", "-i", "0.2", server)
			if !strings.Contains(out, " 0% packet loss") {
				t.Error(out)
			}
			// In IPv6 the first one may hear of the VPC's MTU.
			if out, _ := s.Office.Run(t.Context(), "ping", "-c", "3", "-i", "0.3", "-s", "4000", server); !regexp.MustCompile(` [123] received`).Match(out) {
				t.Errorf("%s", out)
			}
		})
		t.Run("traceroute "+server, func(t *testing.T) {
			first := map[bool]string{true: "fd77:100::1", false: "10.0.0.1"}[strings.Contains(server, ":")]
			for _, kind := range []string{"-I", "-U", "-T"} {
				out := run(t, s.Office, "traceroute", "-n", "-q", "1", "-w", "2", "-m", "6", kind, server)
				lines := strings.Split(strings.TrimSpace(out), "\n")
				if len(lines) < 3 || !strings.Contains(lines[1], first) || !strings.Contains(lines[len(lines)-1], server) {
					t.Errorf("traceroute %s: want the gateway first and the server last:\n%s", kind, out)
				}
			}
		})
		t.Run("iperf3 "+server, func(t *testing.T) {
			for _, m := range []lab.Iperf{{}, {Reverse: true, Streams: 4}, {UDP: true, Bitrate: "10M", Length: 1200}, {UDP: true, Bitrate: "10M", Length: 1200, Reverse: true}} {
				m.Duration = time.Second
				got, err := lab.RunIperf(s.Context(), s.VPC, s.Office, netip.MustParseAddr(server), m)
				if err != nil || got.Bytes == 0 || got.LostPercent > 10 {
					t.Errorf("%+v: %+v, %v", m, got, err)
				}
				t.Logf("%+v: %.0f Mbit/s", m, got.BitsPerSecond/1e6)
			}
		})
	}
}

// explainIn asks about a packet from the office.
func explainIn(t *testing.T, s *lab.Scenario, from, to string) control.Explanation {
	t.Helper()
	x, err := s.GatewayAPI.Explain(context.Background(), control.Question{FromOverlay: true, Network: s.Network, Protocol: "tcp",
		Source: netip.AddrPortFrom(netip.MustParseAddr(from), 0), Destination: netip.MustParseAddrPort(to)})
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// TestNATAddress: a VPC host without a route back is reached behind an address that the
// gateway owns, where nothing of foreign addresses passes the link.
func TestNATAddress(t *testing.T) {
	for _, ingress := range []string{config.IngressTUN, config.IngressPacket} {
		t.Run(ingress, func(t *testing.T) {
			s := inbound(t, "nat"+ingress[:1], ingress, nat4+", \""+nat6+"\"", nat4, nat6)
			testInbound(t, s, map[string]string{server4: nat4, server6: nat6})
			if n := foreign(t, s); n != "packets 0" {
				t.Errorf("%s with addresses of others", n)
			}
			t.Run("the address is ours", func(t *testing.T) {
				for _, a := range []string{nat4, nat6} {
					if err := pings(s.VPC, a); err != nil {
						t.Error(err)
					}
					// A port that nobody uses is silent.
					_, err := s.VPC.Run(t.Context(), "curl", "-sS", "--max-time", "1", "http://"+urlHost(a)+"/")
					var exit *exec.ExitError
					if !errors.As(err, &exit) || exit.ExitCode() != 28 {
						t.Errorf("%s: want silence, got %v", a, err)
					}
				}
			})
			t.Run("explain", func(t *testing.T) {
				for from, to := range map[string]string{office: server4, office6: server6} {
					as := map[string]string{server4: nat4, server6: nat6}[to]
					if x := explainIn(t, s, from, netip.AddrPortFrom(netip.MustParseAddr(to), 80).String()); x.Verdict != "forward" || x.Source.Addr().String() != as || x.Translation != "masquerade" {
						t.Errorf("%+v", x)
					}
				}
				if x := explainIn(t, s, office, server4+":8081"); x.Verdict != "reject" || x.Reason != "policy" {
					t.Errorf("%+v", x)
				}
			})
			t.Run("status", func(t *testing.T) {
				out := string(ask(t, s, "status"))
				if want := "overlay hosts are seen in the VPC as: " + nat4 + ", " + nat6; !strings.Contains(out, want) {
					t.Errorf("%q isn't in\n%s", want, out)
				}
			})
			t.Run("the kernel has it", func(t *testing.T) { testKernelHasNATAddress(t, s) })
		})
	}
}

// testKernelHasNATAddress: an address that the kernel has can't be used: the gateway isn't
// ready, says what helps, and hides nobody behind something else.
func testKernelHasNATAddress(t *testing.T, s *lab.Scenario) {
	run(t, s.Gateway, "ip", "addr", "add", nat4+"/32", "dev", "eth-vpc")
	testwait.NoError(t, soon, func() error {
		h, err := s.GatewayAPI.Health(t.Context())
		if err != nil {
			return err
		}
		for _, c := range h.Failed() {
			if c.Name == "nat_address" && c.Severity == control.Down && strings.Contains(c.String(), "ip address del "+nat4+" dev eth-vpc") {
				return nil
			}
		}
		return fmt.Errorf("%+v", h.Failed())
	})
	if x := explainIn(t, s, office, server4+":80"); x.Verdict != "reject" || x.Reason != "no_address" {
		t.Errorf("%+v", x)
	}
	run(t, s.Gateway, "ip", "addr", "del", nat4+"/32", "dev", "eth-vpc")
	testwait.NoError(t, soon, func() error {
		h, err := s.GatewayAPI.Health(t.Context())
		if err == nil && !h.Ready {
			err = fmt.Errorf("%+v", h.Failed())
		}
		return err
	})
	if out := run(t, s.Office, "curl", "-sS", "--max-time", "5", "http://"+server4+"/"); !strings.Contains(out, nat4) {
		t.Error(out)
	}
}

// TestNATHost: the same without an address to spare, by sockets of the gateway's host.
func TestNATHost(t *testing.T) {
	for _, ingress := range []string{config.IngressTUN, config.IngressPacket} {
		t.Run(ingress, func(t *testing.T) {
			s := inbound(t, "hst"+ingress[:1], ingress, "host")
			testInbound(t, s, map[string]string{server4: gw4, server6: gw6})
			if n := foreign(t, s); n != "packets 0" {
				t.Errorf("%s with addresses of others", n)
			}
			t.Run("explain", func(t *testing.T) {
				for from, to := range map[string]string{office: server4, office6: server6} {
					if x := explainIn(t, s, from, netip.AddrPortFrom(netip.MustParseAddr(to), 80).String()); x.Verdict != "forward" || x.Translation != "host" {
						t.Errorf("%+v", x)
					}
				}
				for _, to := range []string{gw4 + ":9002", "203.0.113.10:22"} { // the gateway itself
					if x := explainIn(t, s, office, to); x.Verdict != "drop" {
						t.Errorf("%s: %+v", to, x)
					}
				}
			})
			t.Run("the gateway's host", func(t *testing.T) {
				l, err := s.Gateway.Listen("tcp", gw4+":7777")
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				_, err = s.Office.Run(t.Context(), "curl", "-sS", "--max-time", "1", "http://"+gw4+":7777/")
				var exit *exec.ExitError
				if !errors.As(err, &exit) || exit.ExitCode() != 28 {
					t.Errorf("want silence, got %v", err)
				}
			})
			t.Run("a host that is off", func(t *testing.T) {
				for _, host := range []string{"172.31.0.77", "fd31:1::77"} {
					started := time.Now()
					out, err := s.Office.Run(t.Context(), "curl", "-sS", "--max-time", "8", "http://"+urlHost(host)+"/")
					var exit *exec.ExitError
					if !errors.As(err, &exit) || exit.ExitCode() != 7 || time.Since(started) > 6*time.Second {
						t.Errorf("want an error in time, got %v: %s", err, out)
					}
					if out, err := s.Office.Run(t.Context(), "ping", "-c", "1", "-W", "6", host); err == nil || !strings.Contains(strings.ToLower(string(out)), "unreachable") {
						t.Errorf("%s", out)
					}
				}
			})
			for _, server := range []string{server4, server6} {
				l, err := s.VPC.Listen("tcp", netip.AddrPortFrom(netip.MustParseAddr(server), 7).String())
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = l.Close() })
				t.Run("ends "+server, func(t *testing.T) {
					labtest.Ends(t, func(t *testing.T) (client, host *net.TCPConn) {
						from := map[bool]string{true: office6, false: office}[strings.Contains(server, ":")]
						client, err := dialFrom(s.Office, from, l.Addr().String())
						if err != nil {
							t.Fatal(err)
						}
						c, err := l.Accept()
						if err != nil {
							t.Fatal(err)
						}
						host = c.(*net.TCPConn)
						_ = host.SetDeadline(time.Now().Add(10 * time.Second))
						t.Cleanup(func() { _ = client.Close(); _ = host.Close() })
						return client, host
					})
				})
			}
			t.Run("status", func(t *testing.T) {
				if out := string(ask(t, s, "status")); !strings.Contains(out, "overlay hosts are seen in the VPC as: host") {
					t.Error(out)
				}
				m, err := s.Metrics(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				for proto, result := range map[string]string{"tcp": "ok", "udp": "unreachable"} { // traceroute's
					if n := m.Sum("ztgate_inbound_connections_total", map[string]string{"protocol": proto, "result": result}); n == 0 {
						t.Errorf("no %s %s is counted", proto, result)
					}
				}
			})
		})
	}
}
