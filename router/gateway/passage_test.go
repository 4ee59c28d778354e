package gateway

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"ztgate/internal/nettest"
	"ztgate/netstack"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/host"
)

// firewalled is a passage through a simulated kernel.
type firewalled struct {
	*passage
	drops func(src, dst netip.Addr) bool
	laid  string
	sent  []netip.Addr // sources
	rules host.Firewall
	known []netstack.FlowInfo
	fails error // of the redirection
}

func newFirewalled() *firewalled {
	f := &firewalled{passage: newPassage(), drops: func(netip.Addr, netip.Addr) bool { return false }}
	f.log = func(string, ...any) {}
	f.lay = func(_ host.Mark, device string) error { f.laid = device; return f.fails }
	f.from = func(c netip.Addr) (string, error) {
		if c.As4()[3] == 1 {
			return local, nil
		}
		return "eth0", nil
	}
	f.read = func(string) (*host.Firewall, error) { return &f.rules, nil }
	f.flows = func(netip.Addr) []netstack.FlowInfo { return f.known }
	f.write = func(b []byte) error {
		src, dst := netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		f.sent = append(f.sent, src)
		if f.laid == "eth0" && !f.drops(src, dst) {
			f.take(b)
		}
		return nil
	}
	return f
}

var vpcOfTest = config.VPCConfig{TUN: "ztg0", Interfaces: []string{"eth0"}, Sources: nettest.Prefixes("172.31.0.0/16")}

func crossingTo(name string, client netip.Addr) crossing {
	dst := netip.MustParseAddrPort("10.0.0.10:443")
	return crossing{name, dst.Addr(), []clientPacket{{"tcp", client, dst}}}
}

// TestPassageClients: a firewall that lets other clients through than the one that is
// imitated cuts nobody off; those are imitated then. Clients of before say nothing, nor does
// this host itself.
func TestPassageClients(t *testing.T) {
	f := newFirewalled()
	at := time.Unix(1e9, 0)
	list := []crossing{crossingTo("t", netip.MustParseAddr("172.31.0.2"))}
	look := func() bool {
		at = at.Add(evidenceEvery)
		return f.check(at, vpcOfTest, list).OK
	}
	flow := func(client string, fromVPC bool, created time.Time) netstack.FlowInfo {
		return netstack.FlowInfo{Protocol: "tcp", FromVPC: fromVPC, Client: netip.AddrPortFrom(netip.MustParseAddr(client), 40000),
			Server: netip.MustParseAddrPort("10.0.0.10:443"), Created: created}
	}
	if !look() {
		t.Fatal("nothing is dropped")
	}
	passed := at
	f.known = []netstack.FlowInfo{flow("172.31.0.9", true, passed.Add(-time.Minute)), flow("172.31.0.1", true, passed.Add(time.Second)),
		flow("10.0.0.10", false, passed.Add(time.Second))}
	f.drops = func(src, _ netip.Addr) bool { return src != netip.MustParseAddr("172.31.0.7") }
	if first, second := look(), look(); !first || second {
		t.Fatal("want it known with the second measurement that clients are cut off")
	}
	f.known = append(f.known, flow("172.31.0.7", true, at))
	if !look() {
		t.Fatal("a client passes")
	}
	f.known, f.sent = nil, nil
	if first, second := look(), look(); !first || !second || f.sent[0] != netip.MustParseAddr("172.31.0.7") {
		t.Errorf("that client isn't imitated: %v", f.sent)
	}
	f.drops = func(netip.Addr, netip.Addr) bool { return true }
	if look(); look() {
		t.Error("he is cut off, too")
	}
	f.drops = func(netip.Addr, netip.Addr) bool { return false }
	if !look() {
		t.Error("open again")
	}
}

// TestPassageFirst: what never passed is cut off at once, with one more try each time.
func TestPassageFirst(t *testing.T) {
	f := newFirewalled()
	f.drops = func(netip.Addr, netip.Addr) bool { return true }
	list := []crossing{crossingTo("t", netip.MustParseAddr("172.31.0.2"))}
	at := time.Unix(1e9, 0)
	if c := f.check(at, vpcOfTest, list); c.OK || c.Severity != control.Down || len(f.sent) != passageTries || !strings.Contains(c.String(), "from eth0 to ztg0: t;") {
		t.Errorf("%+v after %d packets", c, len(f.sent))
	}
	if c := f.check(at, vpcOfTest, list); c.OK || len(f.sent) != passageTries+1 {
		t.Errorf("%+v after %d packets", c, len(f.sent))
	}
	// A target that is left out is forgotten, and one of this host itself isn't measured.
	if c := f.check(at, vpcOfTest, []crossing{crossingTo("u", netip.MustParseAddr("172.31.0.1"))}); !c.OK || len(f.known) != 0 || len(f.passage.known) != 1 {
		t.Errorf("%+v", c)
	}
}

// TestPassageUnmeasured: where the kernel can't redirect, the rules alone are looked at.
func TestPassageUnmeasured(t *testing.T) {
	forward := func(family string, drops, mention bool) host.Chain {
		return host.Chain{Family: family, Table: "filter", Name: "FORWARD", Hook: "forward", Drops: drops, Mention: mention}
	}
	for name, tt := range map[string]struct {
		chains []host.Chain
		ok     bool
	}{
		"no rules":         {nil, true},
		"accepts":          {[]host.Chain{forward("ip", false, false)}, true},
		"drops":            {[]host.Chain{forward("ip", true, false)}, false},
		"drops, has rules": {[]host.Chain{forward("ip", true, true)}, true},
		"drops IPv6":       {[]host.Chain{forward("ip6", true, false)}, true},
		"drops both":       {[]host.Chain{forward("inet", true, false)}, false},
	} {
		f := newFirewalled()
		f.fails, f.rules.Chains = errors.New("no mirred"), tt.chains
		c := f.check(time.Unix(1e9, 0), vpcOfTest, []crossing{crossingTo("t", netip.MustParseAddr("172.31.0.2"))})
		if c.OK != tt.ok || !tt.ok && (c.Severity != control.Degraded || c.Remedy == "") {
			t.Errorf("%s: %+v", name, c)
		}
	}
}

// TestBlame: the remedy is in the words of who made the chain.
func TestBlame(t *testing.T) {
	chain := func(family, table, name, hook string, drops bool) host.Chain {
		return host.Chain{Family: family, Table: table, Name: name, Hook: hook, Drops: drops}
	}
	for name, tt := range map[string]struct {
		f       host.Firewall
		v6      bool
		why, do string
	}{
		"iptables":  {host.Firewall{Chains: []host.Chain{chain("ip", "filter", "FORWARD", "forward", true)}}, false, "chain ip filter FORWARD", "run iptables -I FORWARD -i eth0 -o ztg0 -j ACCEPT && iptables -I FORWARD -i ztg0 -o eth0 -j ACCEPT"},
		"ip6tables": {host.Firewall{Chains: []host.Chain{chain("ip", "filter", "FORWARD", "forward", true), chain("ip6", "filter", "FORWARD", "forward", true)}}, true, "chain ip6 filter FORWARD", "run ip6tables -I FORWARD"},
		"ufw": {host.Firewall{Chains: []host.Chain{chain("ip", "filter", "FORWARD", "forward", true)}, Names: []string{"ip filter ufw-user-forward"}}, false,
			"chain ip filter FORWARD", "run ufw route allow in on eth0 out on ztg0 && ufw route allow in on ztg0 out on eth0"},
		"firewalld": {host.Firewall{Chains: []host.Chain{chain("inet", "firewalld", "filter_FORWARD", "forward", false)}}, false, "starts at inet firewalld filter_FORWARD", "policy of firewalld"},
		"legacy":    {host.Firewall{Legacy: []string{"ip6tables-legacy", "iptables-legacy"}}, false, "a rule of iptables-legacy", "run iptables-legacy -I FORWARD"},
		"nobody":    {host.Firewall{}, false, "no chain", "bpftool net"},
	} {
		why, do := blame(&tt.f, "eth0", "ztg0", tt.v6)
		if !strings.Contains(why, tt.why) || !strings.Contains(do, tt.do) {
			t.Errorf("%s: %q, %q", name, why, do)
		}
	}
}

// TestPassagePackets: the kernel would forward them, and only they are taken.
func TestPassagePackets(t *testing.T) {
	p, q := newPassage(), newPassage()
	p.mark, q.mark = host.Mark{ID: 1, Word: 0x11223300}, host.Mark{ID: 1, Word: 0x11223400}
	for _, w := range []clientPacket{
		{"tcp", netip.MustParseAddr("172.31.0.2"), netip.MustParseAddrPort("10.0.0.10:443")},
		{"icmp", netip.MustParseAddr("172.31.0.2"), netip.MustParseAddrPort("10.0.0.10:0")},
		{"tcp", netip.MustParseAddr("fd00::2"), netip.MustParseAddrPort("[fd01::10]:443")},
		{"icmp", netip.MustParseAddr("fd00::2"), netip.MustParseAddrPort("[fd01::10]:0")},
	} {
		b := p.packet(w, 7)
		if q.take(b) || !p.take(b) || !p.came[7].Load() {
			t.Errorf("%v: not taken by its number", w)
		}
		for n := range b {
			if n < 24 && p.take(b[:n]) {
				t.Errorf("%v: %d bytes of it are taken", w, n)
			}
		}
		if p.take(p.packet(w, uint8(len(p.came)))) {
			t.Errorf("%v: a number that was never sent is taken", w)
		}
		if w.client.Is4() && (checksum(b[:20]) != 0 || w.proto == "icmp" && checksum(b[20:]) != 0) {
			t.Errorf("%v: wrong checksum", w)
		}
		if !w.client.Is4() || w.proto == "tcp" {
			at, proto := 20, byte(6)
			if w.client.Is6() {
				at = 40
				proto = b[6]
			}
			pseudo := slices.Concat(w.client.AsSlice(), w.dst.Addr().AsSlice(), []byte{0, proto, 0, byte(len(b) - at)})
			if checksum(pseudo, b[at:]) != 0 {
				t.Errorf("%v: wrong checksum", w)
			}
		}
	}
}
