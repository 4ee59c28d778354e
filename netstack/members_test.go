package netstack

import (
	"bytes"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
)

var (
	officeMAC = [6]byte{2, 0, 0, 0, 0, 0x0f}
	rivalMAC  = [6]byte{2, 0, 0, 0, 0, 0x66}
	routerMAC = [6]byte{2, 0, 0, 0, 0, 0x22}
)

// claim says by ARP or neighbour discovery that an address is at a MAC, in a frame that
// comes from one.
func (r *rig) claim(a netip.Addr, from, says [6]byte, unasked bool) {
	r.t.Helper()
	if a.Is4() {
		h := ethernetHeader(ourMAC, from, false)
		h[12], h[13] = 0x08, 0x06
		f := append(h[:], 0, 1, 8, 0, 6, 4, 0, 2)
		f = append(append(f, says[:]...), a.AsSlice()...)
		target := netip.MustParseAddr("10.0.0.1")
		if unasked {
			target = a
		}
		r.e.Deliver(testNet, [][]byte{append(append(f, ourMAC[:]...), target.AsSlice()...)})
		return
	}
	flags := uint32(0x60000000)
	dst := netip.MustParseAddr("fd77:100::1")
	if unasked {
		flags, dst = 0x20000000, netip.MustParseAddr("ff02::1")
	}
	p := pkttest.Packet{Proto: ipkt.ICMPv6, Src: netip.AddrPortFrom(a, 0), Dst: netip.AddrPortFrom(dst, 0), TTL: 255, Type: 136, Seq: flags,
		Payload: append(append(a.AsSlice(), 2, 1), says[:]...)}
	h := ethernetHeader(ourMAC, from, true)
	if unasked {
		copy(h[:], []byte{0x33, 0x33, 0, 0, 0, 1})
	}
	r.e.Deliver(testNet, [][]byte{append(h[:], p.Bytes()...)})
}

// lastTo returns where the last packet on the overlay went.
func (r *rig) lastTo() [6]byte {
	if len(r.overlay.to) == 0 {
		return [6]byte{}
	}
	return r.overlay.to[len(r.overlay.to)-1]
}

var families = []struct{ name, client, office, inside, router, behind string }{
	{"IPv4", "172.31.0.10:4000", "10.0.0.10:80", "10.0.0.1:4000", "10.0.0.2", "10.9.0.10:80"},
	{"IPv6", "[fd77:1::50]:4000", "[fd77:100::50]:80", "[fd77:100::1]:4000", "fd77:100::2", "[fd77:9::10]:80"},
}

// masquerade6 has a route of IPv6 as the rig has one of IPv4, and translates both.
func (r *rig) masquerade6() {
	n := testNetwork()
	n.Masquerade6 = true
	n.Routes = append(n.Routes, Route{Target: netip.MustParsePrefix("fd77:9::/64"), Via: netip.MustParseAddr("fd77:100::2")})
	if err := r.e.SetNetworks([]Network{n}); err != nil {
		r.t.Fatal(err)
	}
}

// TestClaimedAddress: a member that claims another's address, asked or unasked, gets
// nothing of its traffic while that one answers; it gets the address when it doesn't.
func TestClaimedAddress(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			var logged bytes.Buffer
			r := newRig(t, func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&logged, nil)) })
			r.masquerade6()
			office := pkttest.Addr(f.office).Addr()
			r.overlay.macs[office] = officeMAC
			talk := func(what string, owner [6]byte) {
				t.Helper()
				o, _ := r.fromVPC(pkttest.UDP(f.client, f.office, "question"))
				r.want(what, o, "udp "+f.inside+" > "+f.office)
				if to := r.lastTo(); to != owner {
					t.Errorf("%s: to %x, want %x", what, to, owner)
				}
				_, v := r.fromMember(owner, pkttest.UDP(f.office, f.inside, "answer"))
				r.want(what+": answer", v, "udp "+f.office+" > "+f.client)
			}
			talk("first", officeMAC)
			for i := range 40 {
				r.claim(office, rivalMAC, rivalMAC, i%2 == 0)
				if r.sleep(time.Second); i%5 == 0 { // beyond what a flow remembers
					talk("while another claims it", officeMAC)
				}
			}
			if n := r.drops(OverlaySide, dropConflict); n != 40 {
				t.Errorf("%d claims counted, want 40", n)
			}
			if text := logged.String(); !strings.Contains(text, macText(rivalMAC)) || !strings.Contains(text, macText(officeMAC)) || strings.Count(text, "\n") > 6 {
				t.Errorf("logged: %s", text)
			}
			got := r.e.Refusals()
			if i := slices.IndexFunc(got, func(x Refusal) bool { return x.Reason == "address_conflict" }); i < 0 || got[i].MAC != rivalMAC || got[i].Source.Addr() != office {
				t.Errorf("refusals: %+v", got)
			}
			r.claim(office, rivalMAC, officeMAC, false) // in the other's name
			if n := r.drops(OverlaySide, dropNeighbour); n != 1 {
				t.Errorf("%d forged messages counted, want 1", n)
			}
			r.overlay.silent[office] = true
			for range 8 {
				r.claim(office, rivalMAC, rivalMAC, true)
				r.sleep(time.Second)
			}
			r.take()
			r.sleep(hopLifetime * time.Second)
			r.overlay.silent[office], r.overlay.macs[office] = false, rivalMAC
			talk("when the owner is gone", rivalMAC)
			if !strings.Contains(logged.String(), "has moved") {
				t.Errorf("logged: %s", logged.String())
			}
			r.drain()
			r.account()
		})
	}
}

// TestCertifiedAddress: who has a certificate gets its address at once, and keeps it
// even when it is silent.
func TestCertifiedAddress(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			office := pkttest.Addr(f.office).Addr()
			r := newRig(t, func(c *Config) {
				c.Owns = func(network uint64, mac [6]byte, a netip.Addr) bool {
					return network == testNet && mac == officeMAC && a == office
				}
			})
			r.masquerade6()
			r.overlay.macs[office] = rivalMAC // it was faster
			r.fromVPC(pkttest.UDP(f.client, f.office, "question"))
			if to := r.lastTo(); to != rivalMAC {
				t.Fatalf("to %x, want the first that answers", to)
			}
			r.claim(office, officeMAC, officeMAC, true)
			r.sleep(hopLifetime * time.Second)
			r.take()
			r.fromVPC(pkttest.UDP(f.client, f.office, "question"))
			if to := r.lastTo(); to != officeMAC {
				t.Errorf("to %x, want the one with the certificate", to)
			}
			r.overlay.silent[office] = true
			for range 20 {
				r.claim(office, rivalMAC, rivalMAC, true)
				r.sleep(time.Second)
			}
			r.fromVPC(pkttest.UDP(f.client, f.office, "question"))
			if mac, ok := r.e.set.Load().attachments[testNet].neigh.Owner(office); !ok || mac != officeMAC {
				t.Errorf("the address is %x's", mac)
			}
		})
	}
}

// TestFlowMember: packets of a flow pass only from the member they belong to, or from the
// router they come by, whole or in fragments.
func TestFlowMember(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			r := newRig(t)
			r.masquerade6()
			r.overlay.macs[pkttest.Addr(f.office).Addr()] = officeMAC
			r.overlay.macs[netip.MustParseAddr(f.router)] = routerMAC
			r.fromVPC(pkttest.UDP(f.client, f.office, "question"), pkttest.UDP(f.client, f.behind, "question"))
			for what, x := range map[string]struct {
				src string
				mac [6]byte
			}{"member": {f.office, officeMAC}, "router": {f.behind, routerMAC}} {
				for range 3 {
					_, v := r.fromMember(x.mac, pkttest.UDP(x.src, f.inside, "answer"))
					r.want(what, v, "udp "+x.src+" > "+f.client)
					before := r.drops(OverlaySide, dropMember)
					parts := [][]byte{pkttest.UDP(x.src, f.inside, "forged")}
					if f.name == "IPv4" {
						parts = append(parts, pkttest.Fragments(pkttest.UDP(x.src, f.inside, strings.Repeat("forged", 40)), 16, 16)...)
					}
					o, v := r.fromMember(rivalMAC, parts...)
					r.want(what+": another", append(o, v...))
					if n := r.drops(OverlaySide, dropMember) - before; n != uint64(len(parts)) {
						t.Errorf("%s: %d of %d counted", what, n, len(parts))
					}
				}
			}
			r.account()
		})
	}
}

// TestFlowMemberKinds: another member gets nothing into a flow, of whatever protocol and
// whoever opened it, by a packet of the flow, an end of it or an error about it.
func TestFlowMemberKinds(t *testing.T) {
	for _, f := range families {
		client, office, gateway := pkttest.Addr(f.client).Addr().String(), pkttest.Addr(f.office).Addr().String(), pkttest.Addr(f.inside).Addr().String()
		listen, outside := netip.AddrPortFrom(pkttest.Addr(f.inside).Addr(), 2222).String(), netip.AddrPortFrom(pkttest.Addr(f.office).Addr(), 5555).String()
		server := netip.AddrPortFrom(pkttest.Addr(f.client).Addr(), 22).String()
		for _, tt := range []struct {
			name    string
			open    func(r *rig) // by the office or to it
			forged  [][]byte     // in the name of the office
			seen    []byte       // a packet to the office, which errors quote
			genuine []byte       // of the office
		}{
			{name: "TCP", open: func(r *rig) {
				r.fromVPC(pkttest.TCP(f.client, f.office, ipkt.SYN, 1000, 0, ""))
				r.fromMember(officeMAC, pkttest.TCP(f.office, f.inside, ipkt.SYN|ipkt.ACK, 5000, 1001, ""))
				r.fromVPC(pkttest.TCP(f.client, f.office, ipkt.ACK, 1001, 5001, "question"))
			}, forged: [][]byte{pkttest.TCP(f.office, f.inside, ipkt.RST, 5001, 0, ""), pkttest.TCP(f.office, f.inside, ipkt.ACK, 5001, 1009, "x"),
				pkttest.TCP(f.office, f.inside, ipkt.FIN|ipkt.ACK, 5001, 1009, "")},
				seen: pkttest.TCP(f.inside, f.office, ipkt.ACK, 1001, 5001, "question"), genuine: pkttest.TCP(f.office, f.inside, ipkt.ACK, 5001, 1009, "y")},
			{name: "TCP before the answer", open: func(r *rig) {
				r.fromVPC(pkttest.TCP(f.client, f.office, ipkt.SYN, 1000, 0, ""))
			}, forged: [][]byte{pkttest.TCP(f.office, f.inside, ipkt.RST|ipkt.ACK, 0, 1001, ""), pkttest.TCP(f.office, f.inside, ipkt.SYN|ipkt.ACK, 5000, 1001, "")},
				seen: pkttest.TCP(f.inside, f.office, ipkt.SYN, 1000, 0, ""), genuine: pkttest.TCP(f.office, f.inside, ipkt.SYN|ipkt.ACK, 5000, 1001, "")},
			{name: "echo", open: func(r *rig) { r.fromVPC(pkttest.Echo(client, office, false, 4000, "x")) },
				forged: [][]byte{pkttest.Echo(office, gateway, true, 4000, "x")},
				seen:   pkttest.Echo(gateway, office, false, 4000, "x"), genuine: pkttest.Echo(office, gateway, true, 4000, "x")},
			{name: "UDP by a forward", open: func(r *rig) {
				r.fromMember(officeMAC, pkttest.UDP(outside, listen, "question"))
				r.fromVPC(pkttest.UDP(server, outside, "answer"))
			}, forged: [][]byte{pkttest.UDP(outside, listen, "x")},
				seen: pkttest.UDP(listen, outside, "answer"), genuine: pkttest.UDP(outside, listen, "y")},
			{name: "TCP by a forward", open: func(r *rig) {
				r.fromMember(officeMAC, pkttest.TCP(outside, listen, ipkt.SYN, 1000, 0, ""))
				r.fromVPC(pkttest.TCP(server, outside, ipkt.SYN|ipkt.ACK, 5000, 1001, ""))
				r.fromMember(officeMAC, pkttest.TCP(outside, listen, ipkt.ACK, 1001, 5001, "question"))
			}, forged: [][]byte{pkttest.TCP(outside, listen, ipkt.RST, 1009, 0, ""), pkttest.TCP(outside, listen, ipkt.ACK, 1009, 5001, "x")},
				seen: pkttest.TCP(listen, outside, ipkt.SYN|ipkt.ACK, 5000, 1001, ""), genuine: pkttest.TCP(outside, listen, ipkt.ACK, 1009, 5001, "y")},
		} {
			t.Run(f.name+"/"+tt.name, func(t *testing.T) {
				r := newRig(t)
				r.masquerade6()
				r.overlay.macs[pkttest.Addr(f.office).Addr()] = officeMAC
				if err := r.e.SetTranslation([]PortForward{
					{From: OverlaySide, Proto: ipkt.TCP, Listen: pkttest.Addr(listen), To: pkttest.Addr(server)},
					{From: OverlaySide, Proto: ipkt.UDP, Listen: pkttest.Addr(listen), To: pkttest.Addr(server)}}, nil); err != nil {
					t.Fatal(err)
				}
				tt.open(r)
				r.take()
				errors := [][2]uint8{{3, 0}, {3, 1}, {3, 3}, {3, 4}, {3, 13}, {4, 0}, {5, 1}, {11, 0}, {11, 1}, {12, 0}}
				if f.name == "IPv6" {
					errors = [][2]uint8{{1, 0}, {1, 1}, {1, 4}, {2, 0}, {3, 0}, {3, 1}, {4, 0}, {4, 1}, {137, 0}}
				}
				for _, e := range errors {
					for _, src := range []string{office, map[string]string{"IPv4": "10.9.0.77", "IPv6": "fd77:9::77"}[f.name]} {
						_, v := r.fromMember(rivalMAC, pkttest.ICMPError(src, gateway, e[0], e[1], 1300, tt.seen, 100))
						r.want("error of another", v)
					}
				}
				for _, p := range tt.forged {
					_, v := r.fromMember(rivalMAC, p)
					r.want("forged "+pkttest.Describe(p), v)
				}
				if _, v := r.fromMember(officeMAC, tt.genuine); len(v) != 1 {
					t.Errorf("the office's own packet: %q", v)
				}
				r.account()
			})
		}
	}
}

// TestErrorMember: an ICMP error about a flow is believed only from the member that the
// flow's packets go to, whatever source it names, and only if it can be true.
func TestErrorMember(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			r := newRig(t)
			r.masquerade6()
			office := pkttest.Addr(f.office).Addr()
			r.overlay.macs[office], r.overlay.macs[netip.MustParseAddr(f.router)] = officeMAC, routerMAC
			gateway := pkttest.Addr(f.inside).Addr().String()
			typ, code, big, bigCode := uint8(3), uint8(3), uint8(3), uint8(4)
			if f.name == "IPv6" {
				typ, code, big, bigCode = 1, 4, 2, 0
			}
			elsewhere := map[string]string{"IPv4": "10.9.0.77", "IPv6": "fd77:9::77"}[f.name]
			for what, x := range map[string]struct {
				dst string
				mac [6]byte
			}{"member": {f.office, officeMAC}, "router": {f.behind, routerMAC}} {
				r.fromVPC(pkttest.UDP(f.client, x.dst, "question"))
				seen := pkttest.UDP(f.inside, x.dst, "question")
				for _, src := range []string{pkttest.Addr(x.dst).Addr().String(), elsewhere} {
					_, v := r.fromMember(x.mac, pkttest.ICMPError(src, gateway, typ, code, 0, seen, 100))
					if len(v) != 1 {
						t.Errorf("%s as %s: %q", what, src, v)
					}
					_, v = r.fromMember(rivalMAC, pkttest.ICMPError(src, gateway, typ, code, 0, seen, 100))
					r.want(what+": another as "+src, v)
				}
				for _, mtu := range []uint32{1, 67, 1279, 1280} {
					_, v := r.fromMember(x.mac, pkttest.ICMPError(elsewhere, gateway, big, bigCode, mtu, seen, 100))
					if want := mtu >= 68 && f.name == "IPv4" || mtu >= 1280; (len(v) == 1) != want {
						t.Errorf("%s: too big, MTU %d: %q", what, mtu, v)
					}
				}
			}
			if n := r.drops(OverlaySide, dropErrorMember); n != 4 {
				t.Errorf("%d errors of others counted, want 4", n)
			}
			// TCP: only about what is under way.
			r.fromVPC(pkttest.TCP(f.client, f.office, ipkt.SYN, 1000, 0, ""))
			r.fromMember(officeMAC, pkttest.TCP(f.office, f.inside, ipkt.SYN|ipkt.ACK, 5000, 1001, ""))
			r.fromVPC(pkttest.TCP(f.client, f.office, ipkt.ACK, 1001, 5001, "question"))
			before := r.drops(OverlaySide, dropErrorUnlikely)
			for seq, ok := range map[uint32]bool{1001: true, 1009: true, 1010: false, 1 << 31: false, ^uint32(0) - 1<<20: false} {
				seen := pkttest.TCP(f.inside, f.office, ipkt.ACK, seq, 5001, "question")
				_, v := r.fromMember(officeMAC, pkttest.ICMPError(office.String(), gateway, typ, code, 0, seen, 100))
				if (len(v) == 1) != ok {
					t.Errorf("quoted sequence number %d: %q", seq, v)
				}
				// From the VPC, about what the office sent.
				seen = pkttest.TCP(f.office, f.client, ipkt.ACK, seq+4000, 1009, "")
				o, _ := r.fromVPC(pkttest.ICMPError(pkttest.Addr(f.client).Addr().String(), office.String(), typ, code, 0, seen, 100))
				if ok := seq == 1001; (len(o) == 1) != ok {
					t.Errorf("from the VPC: quoted sequence number %d: %q", seq+4000, o)
				}
			}
			if n := r.drops(OverlaySide, dropErrorUnlikely) - before; n != 3 {
				t.Errorf("%d errors counted, want 3", n)
			}
			r.account()
		})
	}
}

// TestErrorMemberLocal: the gateway's own connections believe others as little.
func TestErrorMemberLocal(t *testing.T) {
	r := newRig(t)
	r.overlay.macs[netip.MustParseAddr("10.0.0.10")] = officeMAC
	c, err := r.e.DialUDP(t.Context(), pkttest.Addr("10.0.0.10:53"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	r.e.local.sendAll()
	o, _ := r.takeRaw()
	if len(o) != 1 {
		t.Fatalf("%d packets", len(o))
	}
	refused := pkttest.ICMPError("10.0.0.10", "10.0.0.1", 3, 3, 0, o[0], 100)
	if r.fromMember(rivalMAC, refused); r.drops(OverlaySide, dropErrorMember) != 1 {
		t.Error("another's error is taken")
	}
	r.fromMember(officeMAC, refused)
	if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 10)); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("got %v, want the office's refusal", err)
	}
}
