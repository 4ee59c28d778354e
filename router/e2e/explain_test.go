//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/admin"
	"ztgate/router/control"
	"ztgate/router/lab"
)

const (
	vpcClient = "172.31.0.10"
	greedy    = "172.31.0.66" // the client that reaches its limit
	maxFlows  = 40            // of one client
)

// between is a question about a packet; protocol "" is TCP with a port, else ICMP.
func between(protocol, from, to string) control.Question {
	at := func(s string) netip.AddrPort {
		if ap, err := netip.ParseAddrPort(s); err == nil {
			return ap
		}
		return netip.AddrPortFrom(netip.MustParseAddr(s), 0)
	}
	return control.Question{Protocol: protocol, Source: at(from), Destination: at(to)}
}

// agree checks that `ztgate explain` says of a packet what becomes of it: it has this
// verdict and reason, and send, which sends one and waits for the answer, succeeds if
// it should. A drop of the plane's is counted under the reason.
func agree(t *testing.T, s *lab.Scenario, q control.Question, verdict, reason string, send func() error) control.Explanation {
	t.Helper()
	x, err := s.GatewayAPI.Explain(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	if x.Verdict != verdict || x.Reason != reason {
		t.Errorf("%s %s to %s: explain says %s %q (%s), want %s %q", q.Protocol, q.Source, q.Destination, x.Verdict, x.Reason, x.Detail, verdict, reason)
	}
	before, counted := drops(t, s, reason)
	err = send()
	if arrives := verdict == "forward" || verdict == "local"; arrives != (err == nil) {
		t.Errorf("%s %s to %s: explain says %s %q (%s), but the packet: %v", q.Protocol, q.Source, q.Destination, x.Verdict, x.Reason, x.Detail, err)
	}
	if after, _ := drops(t, s, reason); counted && after <= before {
		t.Errorf("%s %s to %s: not counted as %s", q.Protocol, q.Source, q.Destination, reason)
	}
	return x
}

// drops returns how many packets were dropped for a reason, and whether the plane
// knows it.
func drops(t *testing.T, s *lab.Scenario, reason string) (n float64, known bool) {
	t.Helper()
	m, err := s.Metrics(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	n, known = m.By("ztgate_dropped_packets_total", "reason")[reason]
	return n, known
}

// authorize takes the gateway into the network or puts it out of it.
func authorize(t *testing.T, s *lab.Scenario, yes bool) {
	t.Helper()
	patch, err := admin.MemberSpec{Authorized: &yes}.Patch()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SetMember(context.Background(), s.GatewayMember, patch); err != nil {
		t.Fatal(err)
	}
}

// reading serves a page over HTTPS: it fails unless the office's comes.
func reading(n *lab.Namespace, address string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, err := n.Run(ctx, "curl", "-sSk", "--max-time", "2", "https://"+address+"/")
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	if !strings.Contains(string(out), "Office server") {
		return fmt.Errorf("another page: %s", out)
	}
	return nil
}

// raw sends a packet of an IP protocol from the VPC's client to the office.
func raw(s *lab.Scenario, protocol string) error {
	host, err := s.Office.ListenPacket("ip4:"+protocol, office)
	if err != nil {
		return err
	}
	defer host.Close()
	client, err := s.VPC.Dial(s.Context(), "ip4:"+protocol, office)
	if err != nil {
		return err
	}
	defer client.Close()
	if _, err := client.Write([]byte("sixteen bytes...")); err != nil {
		return err
	}
	_ = host.SetDeadline(time.Now().Add(time.Second))
	_, _, err = host.ReadFrom(make([]byte, 100))
	return err
}

// What `ztgate explain` says of a packet is what becomes of it, in a kernel that forwards
// to a TUN or past it.
func testExplain(t *testing.T, s *lab.Scenario, past bool) {
	ping := func() error { return pings(s.VPC, office) }
	page := func() error { return fetch(s) }
	icmp := between("", vpcClient, office)
	https := between("", vpcClient, office+":443")

	t.Run("forwarded", func(t *testing.T) {
		x := agree(t, s, https, "forward", "", page)
		if x.Member != s.OfficeAddr || x.Path != "DIRECT" || x.Translation != "masquerade" {
			t.Errorf("%+v", x)
		}
		agree(t, s, icmp, "forward", "", ping)
		text := string(ask(t, s, "explain", vpcClient, office+":443"))
		for _, want := range []string{"forward", "masquerade", "10.0.0.0/24", s.OfficeAddr, "DIRECT"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s isn't in\n%s", want, text)
			}
		}
	})
	t.Run("forwards", func(t *testing.T) {
		for _, at := range []string{"172.31.0.1:8443", "172.31.0.1:8445", "10.0.0.1:8443", "192.168.50.5:443"} {
			x := agree(t, s, between("", vpcClient, at), "forward", "", func() error { return reading(s.VPC, at) })
			if !x.Redirected || x.Destination.String() != office+":443" || x.Member != s.OfficeAddr {
				t.Errorf("%s: %+v", at, x)
			}
		}
		x, err := s.GatewayAPI.Explain(t.Context(), between("", vpcClient, "172.31.0.1:8499"))
		if err != nil || x.Verdict != "local" || !strings.Contains(x.Detail, "no forward") {
			t.Errorf("%+v, %v", x, err)
		}
		if err := pings(s.VPC, "172.31.0.1"); err != nil {
			t.Error(err)
		}
	})
	t.Run("other protocols", func(t *testing.T) {
		for p, reason := range map[string]string{"50": "protocol_esp", "47": "protocol_gre"} {
			agree(t, s, between(p, vpcClient, office), "drop", reason, func() error { return raw(s, p) })
		}
	})
	t.Run("from the overlay", func(t *testing.T) {
		run(t, s.Office, "ip", "route", "replace", "172.31.0.0/16", "via", "10.0.0.1")
		echoLines(t, s.VPC, vpcClient+":2210")
		x := agree(t, s, between("", office, vpcClient+":2210"), "drop", "no_flow", func() error {
			_, err := talk(s.Office, vpcClient+":2210")
			return err
		})
		if !x.Question.FromOverlay || x.Question.Network != s.Network {
			t.Errorf("question %+v", x.Question)
		}
		for at, verdict := range map[string]string{"10.0.0.1:2300": "drop", "10.0.0.1:2301": "drop", "10.0.0.1:2303": "forward"} {
			reason := map[string]string{"drop": "no_flow"}[verdict]
			agree(t, s, between("", office, at), verdict, reason, func() error {
				_, err := talk(s.Office, at)
				return err
			})
		}
	})
	device := "ztg0"
	if past {
		device = "eth-vpc"
	}
	t.Run("interface down", func(t *testing.T) {
		run(t, s.Gateway, "ip", "link", "set", device, "down")
		agree(t, s, icmp, "drop", "host_interface_down", ping)
		run(t, s.Gateway, "ip", "link", "set", device, "up")
		testwait.NoError(t, soon, ping)
		agree(t, s, icmp, "forward", "", ping)
	})
	if !past {
		testExplainKernel(t, s)
	}
	t.Run("network down", func(t *testing.T) {
		authorize(t, s, false)
		testwait.NoError(t, soon, func() error {
			if err := ping(); err == nil {
				return errors.New("the office answers")
			}
			return nil
		})
		x := agree(t, s, icmp, "drop", "network_down", ping)
		if x.Network != s.Network {
			t.Errorf("%+v", x)
		}
		authorize(t, s, true)
		testwait.NoError(t, soon, ping)
		agree(t, s, https, "forward", "", page)
	})
	t.Run("limits", func(t *testing.T) { testLimit(t, s) })
}

// testExplainKernel asks about packets that the kernel doesn't send to the TUN.
func testExplainKernel(t *testing.T, s *lab.Scenario) {
	ping := func() error { return pings(s.VPC, office) }
	icmp := between("", vpcClient, office)
	t.Run("forwarding off", func(t *testing.T) {
		if err := s.Gateway.Sysctl("net/ipv4/ip_forward", "0"); err != nil {
			t.Fatal(err)
		}
		x := agree(t, s, icmp, "drop", "host_forwarding_off", ping)
		if !strings.Contains(x.Detail, "ip_forward") {
			t.Errorf("because: %s", x.Detail)
		}
		// Connections that end in this host don't need it.
		agree(t, s, between("", vpcClient, "172.31.0.1:8443"), "forward", "", func() error { return reading(s.VPC, "172.31.0.1:8443") })
		if err := s.Gateway.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
			t.Fatal(err)
		}
		agree(t, s, icmp, "forward", "", ping)
	})
	t.Run("a route of somebody else", func(t *testing.T) {
		run(t, s.Gateway, "ip", "route", "add", office+"/32", "via", "203.0.113.1")
		echoes := map[string]string{"protocol": "icmp"}
		before := readPackets(t, s, "ztgate_forwarded_packets_total", echoes)
		x := agree(t, s, icmp, "elsewhere", "host_route", ping)
		if !strings.Contains(x.Detail, "203.0.113.1 on eth-inet") {
			t.Errorf("because: %s", x.Detail)
		}
		if readPackets(t, s, "ztgate_forwarded_packets_total", echoes) != before {
			t.Error("the gateway forwarded the packet")
		}
		run(t, s.Gateway, "ip", "route", "del", office+"/32", "via", "203.0.113.1")
		ask(t, s, "reload") // looks at once
		testwait.NoError(t, soon, ping)
		agree(t, s, icmp, "forward", "", ping)
	})
}

// A member that is off is named as soon as the gateway knows.
func TestMemberOff(t *testing.T) {
	t.Parallel()
	o := options(t)
	o.Prefix += "off"
	s := start(t, o)
	if err := fetch(s); err != nil {
		t.Fatal(err)
	}
	icmp := between("", vpcClient, office)
	s.OfficeProcess.Kill()
	// The gateway asks for a host that is in use every 30 s.
	testwait.NoError(t, time.Minute, func() error {
		_ = pings(s.VPC, office)
		if x, err := s.GatewayAPI.Explain(t.Context(), icmp); err != nil || x.Reason != "unresolved" {
			return fmt.Errorf("%+v, %w", x, err)
		}
		return nil
	})
	// "Host unreachable" comes when the gateway has asked again.
	x := agree(t, s, icmp, "reject", "unresolved", func() error { return pings(s.VPC, office, "-W", "10") })
	if x.Member != s.OfficeAddr || !strings.Contains(x.Detail, "member "+s.OfficeAddr+" was last heard") {
		t.Errorf("%+v", x)
	}
}

// testLimit: a client that has reached its limit gets no more, others go on.
func testLimit(t *testing.T, s *lab.Scenario) {
	echoDatagrams(t, s.Office, office+":7007")
	echo := func(from string) error {
		var c net.Conn
		err := s.VPC.Do(func() (err error) {
			d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}
			c, err = d.Dial("udp4", office+":7007")
			return err
		})
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(time.Second))
		for range 2 { // who doesn't go on after an answer makes room
			if _, err := c.Write([]byte("hello")); err != nil {
				return err
			}
			if _, err := c.Read(make([]byte, 100)); err != nil {
				return err
			}
		}
		return nil
	}
	for i := range maxFlows {
		if err := echo(greedy); err != nil {
			t.Fatalf("flow %d: %v", i, err)
		}
	}
	agree(t, s, between("udp", greedy, office+":7007"), "reject", "client_limit", func() error { return echo(greedy) })
	agree(t, s, between("udp", vpcClient, office+":7007"), "forward", "", func() error { return echo(vpcClient) })
	var flows control.Flows
	if err := json.Unmarshal(ask(t, s, "flows", "--from", greedy, "-j"), &flows); err != nil || flows.Total != maxFlows {
		t.Errorf("%d flows, %v", flows.Total, err)
	}
}
