//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/admin"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/lab"
)

// Clients of the public side.
const (
	publicA, publicB = "198.51.100.5", "198.51.100.6"
	routedAddress    = "192.168.50.5" // that the VPC routes to the gateway
	balancer         = "172.31.0.10"
)

const clientAddresses = `
forwards:
  - {listen: "tcp/8080", to: "10.0.0.10:8080", proxy_protocol: v2}
  - {listen: "tcp/8082", to: "10.0.0.10:8080", proxy_protocol: v1}
  - {listen: "tcp/192.168.50.5:8083", to: "10.0.0.10:8080", proxy_protocol: v2}
  - {listen: "tcp/8084", to: "10.0.0.10:8080", proxy_protocol: v2, accept_proxy: 172.31.0.10}
  - {listen: "tcp/8085", to: "10.0.0.10:8081", accept_proxy: 172.31.0.10}
  - {listen: "tcp/192.168.50.5:80", to: "10.0.0.10:8081", masquerade: false}
  - {listen: "udp/192.168.50.5:53", to: "10.0.0.10:5353", masquerade: false}
  - {listen: "tcp/8086", to: "10.0.0.10:8081"}
  - {listen: "tcp/25", to: "10.0.0.10:25", proxy_protocol: v2}
  - {listen: "tcp/2525", to: "10.0.0.10:25", proxy_protocol: v1}
`

// TestClientAddresses: the office learns who the clients of forwards are, by PROXY headers
// or by their own addresses, from programs that others wrote at both ends.
func TestClientAddresses(t *testing.T) {
	t.Parallel()
	o := options(t)
	o.Prefix += "who"
	testClientAddresses(t, o)
}

// TestPacketClientAddresses: the same where packets are taken from the interface.
func TestPacketClientAddresses(t *testing.T) {
	t.Parallel()
	testClientAddresses(t, packetOptions(t, "pwho"))
}

func testClientAddresses(t *testing.T, o lab.Options) {
	o.Config = clientAddresses
	o.Sources = []string{"172.31.0.0/16", "198.51.100.0/24"}
	gw, vpc := netip.MustParseAddr("172.31.0.1"), netip.MustParseAddr(balancer)
	o.Prepare = func(s *lab.Scenario) error {
		return errors.Join(
			s.VPC.AddAddress("eth0", netip.MustParsePrefix(publicA+"/32")), s.VPC.AddAddress("eth0", netip.MustParsePrefix(publicB+"/32")),
			s.Gateway.AddRoute(netip.MustParsePrefix("198.51.100.0/24"), vpc),
			s.Gateway.Sysctl("net/ipv4/ip_unprivileged_port_start", "0"), // for a user's process
			s.VPC.AddRoute(netip.MustParsePrefix(routedAddress+"/32"), gw))
	}
	s := start(t, o)
	// The way back, of what isn't masqueraded.
	if err := s.Office.AddRoute(netip.MustParsePrefix("198.51.100.0/24"), netip.MustParseAddr("10.0.0.1")); err != nil {
		t.Fatal(err)
	}
	log := startNginx(t, s.Topology, s.Office, "web", `
http {
  log_format who '$remote_addr $proxy_protocol_addr $proxy_protocol_server_addr:$proxy_protocol_server_port $uri';
  access_log DIR/access.log who;
  server { listen 10.0.0.10:8080 proxy_protocol; location / { return 200 "seen\n"; } }
  server { listen 10.0.0.10:8081; location / { return 200 "seen\n"; } }
}`)
	startNginx(t, s.Topology, s.VPC, "nginx-lb", `
stream {
  server { listen 172.31.0.10:9001; proxy_pass 172.31.0.1:8084; proxy_protocol on; }
  server { listen 172.31.0.10:9002; proxy_pass 10.0.0.1:8084; proxy_protocol on; }
}`)
	startHAProxy(t, s.Topology, s.VPC, `
defaults
  mode tcp
  timeout connect 5s
  timeout client 10s
  timeout server 10s
listen one
  bind 172.31.0.10:9003
  server gw 172.31.0.1:8084 send-proxy-v2
listen two
  bind 172.31.0.10:9004
  server gw 10.0.0.1:8084 send-proxy
listen three
  bind 172.31.0.10:9005
  server gw 172.31.0.1:8085 send-proxy-v2
`)
	n := 0
	get := func(from, at string) (string, error) {
		n++
		path := fmt.Sprintf("/%d", n)
		out, err := s.VPC.Run(t.Context(), "curl", "-sS", "--max-time", "10", "--interface", from, "http://"+at+path)
		if err != nil || string(out) != "seen\n" {
			return "", fmt.Errorf("%w: %s", err, out)
		}
		var line string
		err = testwait.Try(10*time.Second, func() error {
			text, err := os.ReadFile(log)
			for l := range strings.Lines(string(text)) {
				if strings.HasSuffix(strings.TrimSpace(l), " "+path) {
					line = strings.TrimSuffix(strings.TrimSpace(l), " "+path)
				}
			}
			if line == "" {
				return errors.Join(err, errors.New("the office logged nothing"))
			}
			return nil
		})
		return line, err
	}
	for _, tt := range []struct{ name, from, at, want string }{
		{"v2 on the host's address", publicA, "172.31.0.1:8080", "10.0.0.1 198.51.100.5 172.31.0.1:8080"},
		{"v2 on our overlay address", publicA, "10.0.0.1:8080", "10.0.0.1 198.51.100.5 10.0.0.1:8080"},
		{"v2 on a routed address", publicB, "192.168.50.5:8083", "10.0.0.1 198.51.100.6 192.168.50.5:8083"},
		{"v1 on the host's address", publicB, "172.31.0.1:8082", "10.0.0.1 198.51.100.6 172.31.0.1:8082"},
		{"v1 on our overlay address", publicA, "10.0.0.1:8082", "10.0.0.1 198.51.100.5 10.0.0.1:8082"},
		{"behind nginx", publicA, "172.31.0.10:9001", "10.0.0.1 198.51.100.5 172.31.0.10:9001"},
		{"behind nginx, at our overlay address", publicB, "172.31.0.10:9002", "10.0.0.1 198.51.100.6 172.31.0.10:9002"},
		{"behind haproxy", publicA, "172.31.0.10:9003", "10.0.0.1 198.51.100.5 172.31.0.10:9003"},
		{"behind haproxy, v1 at our overlay address", publicB, "172.31.0.10:9004", "10.0.0.1 198.51.100.6 172.31.0.10:9004"},
		{"behind haproxy, without telling", publicA, "172.31.0.10:9005", "10.0.0.1 - -:-"},
		{"routed", publicA, "192.168.50.5:80", "198.51.100.5 - -:-"},
		{"masqueraded", publicA, "172.31.0.1:8086", "10.0.0.1 - -:-"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := get(tt.from, tt.at)
			if got != tt.want || err != nil {
				t.Errorf("the office saw %q, want %q: %v", got, tt.want, err)
			}
		})
	}
	t.Run("past the load balancer", func(t *testing.T) {
		for _, at := range []string{"172.31.0.1:8084", "10.0.0.1:8084"} {
			if got, err := get(publicA, at); err == nil {
				t.Errorf("%s is served at %s, seen as %s", publicA, at, got)
			}
			if got, err := get(balancer, at); err == nil {
				t.Errorf("the load balancer is served without a header at %s, seen as %s", at, got)
			}
		}
		d, err := s.GatewayAPI.Drops(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, reason := range []string{"proxy_source", "proxy_header"} {
			if !strings.Contains(fmt.Sprintf("%+v", d.Drops), reason) {
				t.Errorf("ztgate drops doesn't show %s: %+v", reason, d.Drops)
			}
		}
		out := run(t, s.Gateway, "curl", "-sS", "http://127.0.0.1:9002/metrics")
		for _, want := range []string{`ztgate_relayed_connections_total{protocol="tcp",result="untrusted"} 2`, `ztgate_relayed_connections_total{protocol="tcp",result="bad_header"} 2`} {
			if !strings.Contains(out, want+"\n") {
				t.Errorf("the metrics lack %s", want)
			}
		}
	})
	t.Run("shown", func(t *testing.T) { testShown(t, s) })
	t.Run("datagrams routed", func(t *testing.T) {
		l, err := s.Office.ListenPacket("udp4", "10.0.0.10:5353")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			b := make([]byte, 100)
			for {
				_, from, err := l.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = l.WriteTo([]byte(from.String()), from)
			}
		}()
		c, err := s.VPC.ListenPacket("udp4", publicA+":0")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		b := make([]byte, 100)
		to := netip.MustParseAddrPort(routedAddress + ":53")
		for range 3 {
			if _, err := c.WriteTo([]byte("who?"), net.UDPAddrFromAddrPort(to)); err != nil {
				t.Fatal(err)
			}
			n, from, err := c.ReadFrom(b)
			if err != nil || from.String() != to.String() || string(b[:n]) != c.LocalAddr().String() {
				t.Fatalf("%v says %q: %v", from, b[:n], err)
			}
		}
	})
	t.Run("mail", func(t *testing.T) { testMail(t, s) })
	t.Run("several addresses", func(t *testing.T) {
		yes := true
		patch, err := admin.MemberSpec{Authorized: &yes, IPs: []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}}.Patch()
		if err == nil {
			err = s.SetMember(t.Context(), s.GatewayMember, patch)
		}
		if err == nil {
			err = s.WriteConfig(clientAddresses + "nat: {addresses: [10.0.0.1, 10.0.0.2/31, 10.0.0.4]}\n")
		}
		if err == nil {
			_, err = s.GatewayAPI.Reload(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		testwait.NoError(t, soon, func() error {
			st := statusOf(t, s)
			if text := strings.Join(st.Problems, "\n"); strings.Count(text, "nat.addresses") != 1 || !strings.Contains(text, "nat.addresses 10.0.0.4 is not used: no network has given it to us") {
				return fmt.Errorf("problems %q", st.Problems)
			}
			return nil
		})
		var seen []string
		for _, from := range []string{publicA, publicB, publicA, publicB} {
			line, err := get(from, "10.0.0.10:8081")
			if err != nil {
				t.Fatal(err)
			}
			seen = append(seen, strings.Fields(line)[0])
		}
		// The first address has the gateway's probes.
		if seen[0] != seen[2] || seen[1] != seen[3] || seen[0] == seen[1] || min(seen[0], seen[1]) != "10.0.0.2" || max(seen[0], seen[1]) != "10.0.0.3" {
			t.Errorf("the office saw %q", seen)
		}
	})
	t.Run("refused", func(t *testing.T) {
		for text, says := range map[string]string{
			`forwards: [{listen: udp/53, to: "10.0.0.10:53", proxy_protocol: v2}]`:                                   "which UDP has none",
			`forwards: [{listen: tcp/25, to: "172.31.0.10:25", from: overlay, proxy_protocol: v2}]`:                  "from the vpc",
			`forwards: [{listen: "tcp/192.168.50.5:25", to: "10.0.0.10:25", masquerade: false, proxy_protocol: v2}]`: "remove masquerade: false",
			`forwards: [{listen: tcp/25, to: "10.0.0.10:25", proxy_protocol: v3}]`:                                   "use one of v1, v2",
			`forwards: [{listen: tcp/25, to: "10.0.0.10:25", accept_proxy: []}]`:                                     "is empty",
			`nat: {addresses: [10.0.0.0/24]}`:                                                                        "more than 64 addresses",
		} {
			if err := s.WriteConfig(text + "\n"); err != nil {
				t.Fatal(err)
			}
			if _, err := s.GatewayAPI.Reload(t.Context()); fault.ExitCode(err) != 2 || !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v", text, err)
			}
		}
	})
}

// testShown: who is behind relayed connections is shown as long as they last.
func testShown(t *testing.T, s *lab.Scenario) {
	l, err := s.Office.Listen("tcp", office+":8099")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := s.WriteConfig(clientAddresses + `  - {listen: "tcp/8099", to: "10.0.0.10:8099", accept_proxy: 172.31.0.10}` + "\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GatewayAPI.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	c, err := dialFrom(s.VPC, balancer, "10.0.0.1:8099")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("PROXY TCP6 2001:db8::5 2001:db8::7 4000 25\r\n")); err != nil {
		t.Fatal(err)
	}
	h, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	testwait.NoError(t, soon, func() error {
		out := string(ask(t, s, "flows"))
		status := string(ask(t, s, "status"))
		if !strings.Contains(out, "[2001:db8::5]:4000") || !strings.Contains(out, "behind 172.31.0.10") || !strings.Contains(status, "relayed connections: 1 of 2001:db8::5 behind 172.31.0.10") {
			return fmt.Errorf("flows:\n%s\nstatus:\n%s", out, status)
		}
		return nil
	})
	x, err := s.GatewayAPI.Explain(t.Context(), control.Question{Protocol: "tcp", Source: netip.MustParseAddrPort(balancer + ":4000"), Destination: netip.MustParseAddrPort("10.0.0.1:8080")})
	if err != nil || x.Verdict != "forward" || !strings.Contains(x.Detail, "PROXY v2") {
		t.Errorf("%+v, %v", x, err)
	}
	x, err = s.GatewayAPI.Explain(t.Context(), control.Question{Protocol: "tcp", Source: netip.MustParseAddrPort(publicA + ":4000"), Destination: netip.MustParseAddrPort("10.0.0.1:8084")})
	if err != nil || x.Verdict != "reject" || x.Reason != "proxy_source" {
		t.Errorf("%+v, %v", x, err)
	}
}

// testMail: a message for the office's mail server comes from its sender.
func testMail(t *testing.T, s *lab.Scenario) {
	mail := startPostfix(t, s.Topology, s.Office, "mail", "10.0.0.10", "smtp inet n - n - - smtpd\n  -o smtpd_upstream_proxy_protocol=haproxy\n")
	for _, c := range []struct{ from, at string }{{publicA, "172.31.0.1:25"}, {publicB, "10.0.0.1:25"}, {publicB, "172.31.0.1:2525"}} {
		if as := mail.seen(t, s.VPC, c.from, netip.MustParseAddrPort(c.at)); as != c.from {
			t.Errorf("a mail of %s at %s comes from %s", c.from, c.at, as)
		}
	}
}
