//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/admin"
	"ztgate/router/control"
	"ztgate/router/lab"
)

// soon bounds what follows from a change at the controller or on the host.
const soon = 20 * time.Second

// ask runs a command of the program at the gateway.
func ask(t *testing.T, s *lab.Scenario, args ...string) []byte {
	t.Helper()
	cmd := command(t, append(args, "--socket", s.Dir+"/gw/ztgate.sock")...)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("ztgate %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// statusOf returns what `ztgate status -j` prints.
func statusOf(t *testing.T, s *lab.Scenario) control.Status {
	t.Helper()
	var st control.Status
	if err := json.Unmarshal(ask(t, s, "status", "-j"), &st); err != nil {
		t.Fatal(err)
	}
	return st
}

// problem returns the gateway's problem of a network that begins with a text, "" if
// there is none.
func problem(t *testing.T, s *lab.Scenario, network, begins string) string {
	t.Helper()
	var list control.Networks
	if err := json.Unmarshal(ask(t, s, "networks", "-j"), &list); err != nil {
		t.Fatal(err)
	}
	for _, n := range list.Networks {
		if n.ID.String() != network {
			continue
		}
		for _, p := range n.Problems {
			if strings.HasPrefix(p, begins) {
				return p
			}
		}
	}
	return ""
}

// push makes the network have exactly these routes, each as TARGET or TARGET=VIA,
// also such as the program's own commands refuse.
func push(t *testing.T, s *lab.Scenario, routes ...string) {
	t.Helper()
	list := []map[string]any{}
	for _, r := range routes {
		target, via, found := strings.Cut(r, "=")
		one := map[string]any{"target": target, "via": nil}
		if found {
			one["via"] = via
		}
		list = append(list, one)
	}
	if _, err := s.RootAPI.SetNetwork(context.Background(), s.Network.String(), map[string]any{"routes": list}); err != nil {
		t.Fatal(err)
	}
}

// assign makes a member have exactly these addresses.
func assign(t *testing.T, s *lab.Scenario, node string, ips ...string) {
	t.Helper()
	patch, err := admin.MemberSpec{IPs: ips}.Patch()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SetMember(context.Background(), node, patch); err != nil {
		t.Fatal(err)
	}
}

// conflicts returns the gateway's count of prefixes that it doesn't use.
func conflicts(t *testing.T, s *lab.Scenario) int {
	t.Helper()
	m, err := s.Metrics(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return int(m.Sum("ztgate_route_conflicts", nil))
}

// refused waits until the gateway uses none of the routes that the controller has
// just added to its good ones, and says why of each.
func refused(t *testing.T, s *lab.Scenario, why map[string]string) {
	t.Helper()
	testwait.NoError(t, soon, func() error {
		if n := conflicts(t, s); n != len(why) {
			return fmt.Errorf("ztgate_route_conflicts is %d, want %d", n, len(why))
		}
		return nil
	})
	table := run(t, s.Gateway, "ip", "route", "show", "table", "main", "dev", "ztg0") +
		run(t, s.Gateway, "ip", "-6", "route", "show", "table", "main", "dev", "ztg0")
	for target, reason := range why {
		got := problem(t, s, s.Network.String(), "managed route "+target+" is not used: ")
		if !strings.Contains(got, reason) || !strings.Contains(got, "; ") {
			t.Errorf("%s: the problem is %q, want the reason %q and a remedy", target, got, reason)
		}
		shown := strings.TrimSuffix(netip.MustParsePrefix(target).Masked().String(), "/32")
		for line := range strings.Lines(table) {
			if strings.Fields(line)[0] == shown {
				t.Errorf("%s is in the kernel: %s", target, line)
			}
		}
	}
}

// settled waits until all is as the lab's network has it.
func settled(t *testing.T, s *lab.Scenario) {
	t.Helper()
	testwait.NoError(t, soon, func() error {
		if n := conflicts(t, s); n != 0 {
			return fmt.Errorf("ztgate_route_conflicts is %d", n)
		}
		if st := statusOf(t, s); !st.Health.Ready || len(st.Networks[0].Problems) > 0 {
			return fmt.Errorf("status %+v, %q", st.Health, st.Networks[0].Problems)
		}
		return fetch(s)
	})
}

// What a controller, or somebody who took it over, may not do to the VPC and to the
// gateway's host.
func TestHostileController(t *testing.T) {
	t.Parallel()
	o := options(t)
	o.Prefix += "ctl"
	o.Prepare = func(s *lab.Scenario) error {
		return s.Gateway.AddRoute(netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr("203.0.113.1"))
	}
	s := start(t, o)
	if err := s.Office.AddAddress("lo", netip.MustParsePrefix("10.60.0.1/32")); err != nil {
		t.Fatal(err)
	}
	run(t, s.VPC, "ip", "route", "add", "10.60.0.0/24", "via", "172.31.0.1")
	good := []string{"10.0.0.0/24", "10.60.0.0/24=" + office}
	push(t, s, good...)
	testwait.NoError(t, soon, func() error { return pings(s.VPC, "10.60.0.1") })

	restore := func() { // also after a failure, for the next one
		push(t, s, good...)
		assign(t, s, s.GatewayMember, "10.0.0.1")
	}

	t.Run("routes into the VPC", func(t *testing.T) {
		defer restore()
		ctx, stop := context.WithCancel(t.Context())
		var failed, fetched atomic.Int32
		var loop sync.WaitGroup
		loop.Go(func() {
			for ; ctx.Err() == nil; fetched.Add(1) {
				if err := fetch(s); err != nil {
					t.Log(err)
					failed.Add(1)
				}
			}
		})
		defer loop.Wait()
		defer stop()
		more := func() { // while things are as they are
			before := fetched.Load()
			testwait.For(t, soon, "fetches", func() bool { return fetched.Load() >= before+5 })
		}
		more()
		push(t, s, append(good, "172.31.0.0/28", "172.31.0.10/32", "172.31.0.0/17", "172.31.128.0/17="+office)...)
		refused(t, s, map[string]string{
			"172.31.0.0/28": "172.31.0.0/16 (vpc.sources)", "172.31.0.10/32": "172.31.0.0/16 (vpc.sources)",
			"172.31.0.0/17": "172.31.0.0/16 (vpc.sources)", "172.31.128.0/17": "172.31.0.0/16 (vpc.sources)",
		})
		for _, host := range []string{"172.31.0.10", "172.31.0.200"} {
			if out := run(t, s.Gateway, "ip", "route", "get", host); !strings.Contains(out, "dev eth-vpc") {
				t.Errorf("the way to %s: %s", host, out)
			}
		}
		if err := pings(s.VPC, "10.60.0.1"); err != nil {
			t.Errorf("another route of the network: %v", err)
		}
		if st := statusOf(t, s); !st.Health.Ready || len(st.Networks[0].Problems) != 4 {
			t.Errorf("status: %+v, problems %q", st.Health, st.Networks[0].Problems)
		}
		more()
		push(t, s, good...)
		settled(t, s)
		more()
		if n := failed.Load(); n > 0 {
			t.Errorf("%d of %d fetches failed", n, fetched.Load())
		}
	})

	t.Run("routes to the world", func(t *testing.T) {
		defer restore()
		push(t, s, append(good, "169.254.169.254/32", "169.254.0.0/16", "10.0.0.0/1", "22.0.0.0/7", "fc00::/6")...)
		refused(t, s, map[string]string{
			"169.254.169.254/32": "169.254.0.0/16", "169.254.0.0/16": "never forwarded",
			"10.0.0.0/1": "0.0.0.0/8", "22.0.0.0/7": "private", "fc00::/6": "fe80::/10",
		})
		fromVPC := map[string]string{"leg": "vpc", "direction": "rx"}
		before := readPackets(t, s, "ztgate_packets_total", fromVPC)
		for _, host := range []string{"169.254.169.254", "1.1.1.1", "100.100.100.200", "23.1.1.1", "9.9.9.9"} {
			if out := run(t, s.Gateway, "ip", "route", "get", host); !strings.Contains(out, "via 203.0.113.1 dev eth-inet") {
				t.Errorf("the way to %s: %s", host, out)
			}
			c, err := s.Gateway.Dial(t.Context(), "udp4", host+":53")
			if err != nil {
				t.Fatal(err)
			}
			_, _ = c.Write([]byte("anything"))
			_ = c.Close()
		}
		if _, err := s.Gateway.Dial(t.Context(), "udp6", "[fe00::1]:53"); err == nil {
			t.Error("fc00::/6 leads somewhere")
		}
		if n := readPackets(t, s, "ztgate_packets_total", fromVPC) - before; n > 2 { // a probe of the client's may come
			t.Errorf("%v packets went into the TUN", n)
		}
		push(t, s, good...)
		settled(t, s)
	})

	t.Run("assigned addresses", func(t *testing.T) {
		defer restore()
		for _, c := range []struct{ route, ip, says string }{
			{"172.31.0.0/24", "172.31.0.10", "assigned address 172.31.0.10/24 is not used: it lies inside the VPC's own 172.31.0.0/16 (vpc.sources)"},
			{"0.0.0.0/1", "10.0.0.1", "assigned address 10.0.0.1/1 is not used: 0.0.0.0/8"},
			{"203.0.113.0/24", "203.0.113.77", "assigned address 203.0.113.77/24 is not used: it covers this host's own address 203.0.113.10 on eth-inet"},
		} {
			push(t, s, c.route)
			assign(t, s, s.GatewayMember, c.ip)
			testwait.NoError(t, soon, func() error {
				if got := problem(t, s, s.Network.String(), "assigned address "); !strings.HasPrefix(got, c.says) {
					return fmt.Errorf("the problem is %q, want %q", got, c.says)
				}
				return nil
			})
			if st := statusOf(t, s); st.Health.Ready || !strings.Contains(strings.Join(st.Health.Reasons, " "), c.says) {
				t.Errorf("%s: health %+v", c.ip, st.Health)
			}
			if out := run(t, s.Gateway, "ip", "route", "get", "172.31.0.10"); !strings.Contains(out, "dev eth-vpc") {
				t.Errorf("%s: the way to the client: %s", c.ip, out)
			}
			connected(t, s, c.ip)
			push(t, s, good...)
			assign(t, s, s.GatewayMember, "10.0.0.1")
			settled(t, s)
		}
	})

	t.Run("a second network", func(t *testing.T) {
		ctx := context.Background()
		patch, err := admin.NetworkSpec{Name: "second", Subnet: "10.9.0.0/24", Routes: []string{office + "/32"}}.Patch()
		if err != nil {
			t.Fatal(err)
		}
		rec, err := s.RootAPI.CreateNetwork(ctx, patch)
		if err != nil {
			t.Fatal(err)
		}
		var second struct{ ID string }
		if err := json.Unmarshal(rec.Record, &second); err != nil {
			t.Fatal(err)
		}
		yes := true
		member, err := admin.MemberSpec{Authorized: &yes}.Patch()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.RootAPI.SetMember(ctx, second.ID, s.GatewayMember, member); err != nil {
			t.Fatal(err)
		}
		ask(t, s, "join", second.ID)
		var says string
		testwait.NoError(t, soon, func() error {
			if says = problem(t, s, second.ID, "managed route 10.0.0.10/32 is not used: "); says == "" {
				return fmt.Errorf("no problem of network %s is shown", second.ID)
			}
			return nil
		})
		if !strings.Contains(says, "10.0.0.0/24 of network "+s.Network.String()) {
			t.Errorf("the problem doesn't name the first network: %q", says)
		}
		if err := fetch(s); err != nil {
			t.Errorf("the first network's host: %v", err)
		}
		if out := run(t, s.Gateway, "ip", "route", "show", "dev", "ztg0"); !strings.Contains(out, "10.9.0.0/24") || strings.Contains(out, office) {
			t.Errorf("routes:\n%s", out)
		}
		ask(t, s, "leave", second.ID)
		settled(t, s)
	})

	t.Run("large packets", func(t *testing.T) { testLargeMTU(t, s) })
}

// connected checks that the node keeps its sockets and direct paths when it looks
// through the host's addresses, as it does when one is added.
func connected(t *testing.T, s *lab.Scenario, what string) {
	t.Helper()
	bound := func(address string) bool {
		out := run(t, s.Gateway, "ss", "-Hulpn", "src", address)
		return strings.Contains(out, fmt.Sprintf("pid=%d,", s.GatewayProcess.PID))
	}
	another := netip.MustParsePrefix("203.0.113.99/32")
	if err := s.Gateway.AddAddress("eth-inet", another); err != nil {
		t.Fatal(err)
	}
	testwait.For(t, soon, "sockets at the host's new address", func() bool { return bound("203.0.113.99") })
	if err := s.Gateway.RemoveAddress("eth-inet", another); err != nil {
		t.Fatal(err)
	}
	testwait.For(t, soon, "the end of sockets", func() bool { return !bound("203.0.113.99") })
	if !bound("203.0.113.10") {
		t.Errorf("%s: the node has closed its sockets", what)
	}
	peers, err := s.GatewayAPI.Peers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range peers.Peers {
		if slices.Contains([]string{s.OfficeAddr, s.RootAddress}, p.Address) && p.Link != "DIRECT" {
			t.Errorf("%s: peer %s is %s", what, p.Address, p.Link)
		}
	}
}

// readPackets returns the sum of a counter of the gateway. Measurements of the host's
// firewall go through the TUN too, and are in none.
func readPackets(t *testing.T, s *lab.Scenario, name string, labels map[string]string) float64 {
	t.Helper()
	m, err := s.Metrics(s.Context())
	if err != nil {
		t.Fatal(err)
	}
	return m.Sum(name, labels)
}

// pings sends one echo request, with further arguments of ping.
func pings(n *lab.Namespace, host string, more ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	out, err := n.Run(ctx, "ping", append([]string{"-c", "1", "-W", "1", host}, more...)...)
	if err != nil {
		return fmt.Errorf("ping %s: %w\n%s", host, err, out)
	}
	return nil
}

// testLargeMTU: both sides follow a network's MTU, unless it is set.
func testLargeMTU(t *testing.T, s *lab.Scenario) {
	ctx := context.Background()
	setMTU := func(mtu int) {
		if _, err := s.RootAPI.SetNetwork(ctx, s.Network.String(), map[string]any{"mtu": mtu}); err != nil {
			t.Fatal(err)
		}
	}
	has := func(n *lab.Namespace, ifname string, mtu int) error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		out, err := n.Run(ctx, "ip", "-o", "link", "show", ifname)
		if want := fmt.Sprintf(" mtu %d ", mtu); err != nil || !strings.Contains(string(out), want) {
			return fmt.Errorf("want %q: %s, %w", want, out, err)
		}
		return nil
	}
	run(t, s.Gateway, "ip", "link", "set", "eth-vpc", "mtu", "9001")
	run(t, s.VPC, "ip", "link", "set", "eth0", "mtu", "9001")
	if err := pings(s.VPC, office, "-M", "do", "-s", "8000"); err == nil {
		t.Error("8000 bytes passed the default MTU")
	}
	setMTU(9000)
	testwait.NoError(t, soon, func() error {
		if err := has(s.Office, "zt0", 9000); err != nil {
			return err
		}
		return has(s.Gateway, "ztg0", 9000)
	})
	run(t, s.VPC, "ip", "route", "flush", "cache")
	if err := pings(s.VPC, office, "-M", "do", "-s", "8000"); err != nil {
		t.Error(err)
	}
	s.GatewayProcess.Stop()
	if err := s.WriteConfig("vpc: {mtu: 3000}\n"); err != nil {
		t.Fatal(err)
	}
	restart(t, s)
	if err := has(s.Gateway, "ztg0", 3000); err != nil {
		t.Error(err)
	}
	setMTU(2800)
	testwait.NoError(t, soon, func() error { return has(s.Office, "zt0", 2800) })
	if err := has(s.Gateway, "ztg0", 3000); err != nil {
		t.Error(err)
	}
}
