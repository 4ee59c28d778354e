//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/lab"
	"ztgate/zerotier/ztnode"
)

// addressesOf returns a node's IPv6 addresses in a network by what they begin
// with: fc is 6PLANE, fd RFC 4193 (chapter 01 §6.5).
func addressesOf(s lab.NetworkState) (rfc4193, sixPlane, v4 netip.Addr) {
	for _, p := range s.Addresses {
		switch b := p.Addr().AsSlice(); {
		case len(b) == 4:
			v4 = p.Addr()
		case b[0] == 0xfc:
			sixPlane = p.Addr()
		case b[0] == 0xfd:
			rfc4193 = p.Addr()
		}
	}
	return rfc4193, sixPlane, v4
}

// Both forms of derived IPv6 addresses work between all kinds of members, and
// multicast and broadcast reach all of them.
func TestInteropAddresses(t *testing.T) {
	eachRoot(t, "6PLANE and RFC 4193, multicast, broadcast", func(t *testing.T, m *lab.Mesh) {
		for _, n := range m.Nodes {
			if err := n.NS.Sysctl("net/ipv4/icmp_echo_ignore_broadcasts", "0"); err != nil {
				t.Fatal(err)
			}
		}
		id := network(t, m, map[string]any{
			"v6AssignMode":      map[string]bool{"rfc4193": true, "6plane": true, "zt": false},
			"multicastLimit":    32,
			"enableBroadcast":   true,
			"ipAssignmentPools": []any{},
		})
		states := make([]lab.NetworkState, len(m.Nodes))
		extra := make([]netip.Addr, len(m.Nodes)) // another address out of a member's own 6PLANE /80
		for i, n := range m.Nodes {
			states[i] = joined(t, n, id)
			rfc4193, sixPlane, v4 := addressesOf(states[i])
			if !rfc4193.IsValid() || !sixPlane.IsValid() || v4 != overlayOf(i) {
				t.Fatalf("%s has %v", n.Name, states[i].Addresses)
			}
			b := sixPlane.As16()
			b[15] = 0x77
			extra[i] = netip.AddrFrom16(b)
			if err := n.NS.AddAddress(states[i].Device, netip.PrefixFrom(extra[i], 128)); err != nil {
				t.Fatal(err)
			}
		}
		pairs(t, m, func(from, to *lab.Node, _, j int) error {
			rfc4193, sixPlane, v4 := addressesOf(states[j])
			for _, a := range []netip.Addr{v4, rfc4193, sixPlane, extra[j]} {
				if err := testwait.Try(patience, func() error { return ping(from, a) }); err != nil {
					return err
				}
			}
			return nil
		})
		t.Log("IPv4, RFC 4193, 6PLANE and any address of a member's 6PLANE /80 answer")
		t.Run("all_nodes", func(t *testing.T) { // ff02::1
			everybodyAnswers(t, m, func(from *lab.Node, i int) []string { return []string{"-6", "ff02::1%" + states[i].Device} },
				func(answer netip.Addr, j int) bool { // from the link-local address of the MAC
					return answer.WithZone("") == linkLocal(t, m.Nodes[j], states[j].Device)
				})
		})
		t.Run("broadcast", func(t *testing.T) {
			everybodyAnswers(t, m, func(*lab.Node, int) []string { return []string{"-b", "10.77.0.255"} },
				func(answer netip.Addr, j int) bool { return answer == overlayOf(j) })
		})
		t.Run("group", func(t *testing.T) { testGroup(t, m, states) })
	})
}

func linkLocal(t *testing.T, n *lab.Node, device string) netip.Addr {
	for _, f := range strings.Fields(run(t, n.NS, "ip", "-6", "-o", "addr", "show", "dev", device, "scope", "link")) {
		if p, err := netip.ParsePrefix(f); err == nil {
			return p.Addr()
		}
	}
	return netip.Addr{}
}

// everybodyAnswers pings all members at once from each, until all others have
// answered.
func everybodyAnswers(t *testing.T, m *lab.Mesh, target func(from *lab.Node, i int) []string, is func(answer netip.Addr, j int) bool) {
	start := time.Now()
	for i, from := range m.Nodes {
		// Groups are announced, and asked for again, every 60 s (chapter 03 §5.6).
		if err := testwait.Try(3*patience, func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			args := append([]string{"-n", "-c", "2", "-i", "0.3", "-W", "1"}, target(from, i)...)
			out, _ := from.NS.Run(ctx, "ping", args...) // it counts answers of its own host too
			for j := range m.Nodes {
				answered := j == i
				for line := range strings.Lines(string(out)) {
					if f := strings.Fields(line); len(f) > 3 && f[1] == "bytes" {
						a, err := netip.ParseAddr(strings.TrimSuffix(f[3], ":"))
						answered = answered || err == nil && is(a, j)
					}
				}
				if !answered {
					return fmt.Errorf("%s: no answer from %s:\n%s", from.Name, m.Nodes[j].Name, out)
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		t.Logf("all answer %s within %v", from.Name, time.Since(start).Round(100*time.Millisecond))
	}
}

// testGroup sends to a multicast group that all members have subscribed to.
func testGroup(t *testing.T, m *lab.Mesh, states []lab.NetworkState) {
	group := netip.MustParseAddrPort("239.77.1.1:7000")
	inboxes := make([]*inbox, len(m.Nodes))
	for i, n := range m.Nodes {
		run(t, n.NS, "ip", "route", "replace", "239.0.0.0/8", "dev", states[i].Device)
		var c *net.UDPConn
		if err := n.NS.Do(func() error {
			dev, err := net.InterfaceByName(states[i].Device)
			if err == nil {
				c, err = net.ListenMulticastUDP("udp4", dev, net.UDPAddrFromAddrPort(group))
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		inboxes[i] = newInbox(t, c, group)
	}
	start := time.Now()
	pairs(t, m, func(from, to *lab.Node, _, j int) error {
		if err := testwait.Try(3*patience, func() error { return deliver(from, inboxes[j]) }); err != nil {
			return fmt.Errorf("at %s: %w", to.Name, err)
		}
		return nil
	})
	t.Logf("all members get datagrams of all others %v after they subscribed", time.Since(start).Round(100*time.Millisecond))
}

// Networks without a controller: all kinds of members make the same of the ID
// (chapter 03 §1.8).
func TestInteropAdHoc(t *testing.T) {
	t.Parallel()
	real := reference(t)
	recordTest(t, row{property: "ad-hoc networks, IPv6 and IPv4", root: version(t, real), controller: "-", member: memberNames(t), gateway: "-"})
	m := mesh(t, real, members(t))
	joinAll := func(t *testing.T, id ztnode.NetworkID) []lab.NetworkState {
		out := make([]lab.NetworkState, len(m.Nodes))
		for _, n := range m.Nodes {
			if err := n.Join(m.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		for i, n := range m.Nodes {
			out[i] = joined(t, n, id)
		}
		return out
	}
	t.Run("IPv6", func(t *testing.T) {
		const first, last = 7000, 7001
		id, err := ztnode.ParseNetworkID(fmt.Sprintf("ff%04x%04x000000", first, last))
		if err != nil {
			t.Fatal(err)
		}
		states := joinAll(t, id)
		at := func(j int, port uint16) netip.AddrPort {
			_, sixPlane, _ := addressesOf(states[j])
			return netip.AddrPortFrom(sixPlane, port)
		}
		for i, n := range m.Nodes {
			for _, port := range []uint16{first, last, last + 1} {
				accept(t, n, at(i, port))
			}
		}
		pairs(t, m, func(from, to *lab.Node, _, j int) error {
			if err := testwait.Try(patience, func() error { return ping(from, at(j, 0).Addr()) }); err != nil {
				return err
			}
			for _, port := range []uint16{first, last} {
				if err := testwait.Try(patience, func() error { return connect(from, at(j, port)) }); err != nil {
					return fmt.Errorf("%s to port %s of %s: %w", from.Name, strconv.Itoa(int(port)), to.Name, err)
				}
			}
			return not(connect(from, at(j, last+1)), "%s reaches a port of %s outside the range", from.Name, to.Name)
		})
	})
	t.Run("IPv4", func(t *testing.T) {
		states := joinAll(t, ztnode.NetworkID(0xff<<56|10<<48|1))
		pairs(t, m, func(from, _ *lab.Node, _, j int) error {
			_, sixPlane, v4 := addressesOf(states[j])
			for _, a := range []netip.Addr{v4, sixPlane} {
				if err := testwait.Try(patience, func() error { return ping(from, a) }); err != nil {
					return err
				}
			}
			return nil
		})
	})
}
