package netstack

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
	"ztgate/netstack/policy"
)

// restarts are the ways in which flows are translated. Clients are in the VPC unless the
// name says otherwise.
var restarts = []struct {
	name           string
	from           Side
	client, target string
	edit           func(*Config)
	routed         bool // without masquerading IPv6
}{
	{"masquerade", VPCSide, "172.31.0.10:4000", "10.0.0.10:80", nil, false},
	{"masquerade by a router", VPCSide, "172.31.0.10:4000", "10.9.0.10:80", nil, false},
	{"masquerade, IPv6", VPCSide, "[fd77:1::50]:4000", "[fd77:100::50]:80", nil, false},
	{"forward", VPCSide, "172.31.0.10:4000", "172.31.0.1:8080", func(c *Config) {
		c.Forwards = []PortForward{forward(VPCSide, ipkt.TCP, "172.31.0.1:8080", "10.0.0.10:80", false), forward(VPCSide, ipkt.UDP, "172.31.0.1:8080", "10.0.0.10:80", false)}
	}, false},
	{"forward, IPv6", VPCSide, "[fd77:1::50]:4000", "[fd77:1::1]:8080", func(c *Config) {
		c.Forwards = []PortForward{forward(VPCSide, ipkt.TCP, "[fd77:1::1]:8080", "[fd77:100::50]:80", false), forward(VPCSide, ipkt.UDP, "[fd77:1::1]:8080", "[fd77:100::50]:80", false)}
	}, false},
	{"forward from the overlay", OverlaySide, "10.0.0.10:4000", "10.0.0.1:8080", func(c *Config) {
		c.Forwards = []PortForward{forward(OverlaySide, ipkt.TCP, "10.0.0.1:8080", "172.31.0.10:80", false), forward(OverlaySide, ipkt.UDP, "10.0.0.1:8080", "172.31.0.10:80", false)}
		c.Policy = policy.New(policy.Drop, []policy.Rule{{Action: policy.Accept, Direction: policy.In}})
	}, false},
	{"masquerading forward from the overlay", OverlaySide, "10.0.0.10:4000", "10.0.0.1:8080", func(c *Config) {
		c.Forwards = []PortForward{forward(OverlaySide, ipkt.TCP, "10.0.0.1:8080", "172.31.0.10:80", true), forward(OverlaySide, ipkt.UDP, "10.0.0.1:8080", "172.31.0.10:80", true)}
	}, false},
	{"maps", VPCSide, "172.31.0.10:4000", "10.77.0.10:80", func(c *Config) {
		c.Maps = []AddressMap{{Hosts: OverlaySide, Real: netip.MustParsePrefix("10.0.0.0/24"), Alias: netip.MustParsePrefix("10.77.0.0/24")},
			{Hosts: VPCSide, Real: netip.MustParsePrefix("172.31.0.0/24"), Alias: netip.MustParsePrefix("10.88.0.0/24")}}
	}, false},
	{"routed, IPv6", VPCSide, "[fd77:1::51]:4000", "[fd77:100::50]:80", nil, true},
	{"by a rule, IPv6", OverlaySide, "[fd77:100::50]:4000", "[fd77:1::50]:80", func(c *Config) {
		c.Policy = policy.New(policy.Accept, []policy.Rule{{Action: policy.Accept, Direction: policy.In, Proto: ipkt.TCP}, {Action: policy.Accept, Direction: policy.In, Proto: ipkt.UDP}})
	}, true},
	{"hidden overlay host", OverlaySide, "10.0.0.10:4000", "172.31.0.20:80", hidden, false},
	{"hidden overlay host behind a router", OverlaySide, "10.9.0.10:4000", "172.31.0.20:80", hidden, false},
	{"hidden overlay host, IPv6", OverlaySide, "[fd77:100::50]:4000", "[fd77:1::50]:80", hidden, false},
}

// ends sends a packet from a side and returns the ends of what came out on the other.
func (r *rig) ends(from Side, b []byte) (src, dst netip.AddrPort) {
	r.t.Helper()
	if from == VPCSide {
		r.fromVPCRaw(b)
	} else {
		h := ethernetHeader(ourMAC, hostMAC, b[0]>>4 == 6)
		r.e.Deliver(testNet, [][]byte{append(h[:], b...)})
	}
	o, v := r.takeRaw()
	out := v
	if from == VPCSide {
		out = o
	}
	var x ipkt.View
	if len(o)+len(v) != 1 || len(out) != 1 || ipkt.Parse(out[0], &x) != ipkt.OK {
		r.t.Fatalf("%s: %d packets on the overlay, %d in the VPC", pkttest.Describe(b), len(o), len(v))
	}
	return netip.AddrPortFrom(x.Source(), x.SPort), netip.AddrPortFrom(x.Destination(), x.DPort)
}

func (r *rig) fromVPCRaw(b []byte) {
	buf := make([]byte, vpcOffset+readSize)
	r.e.vpcBatch([][]byte{buf}, []int{copy(buf[vpcOffset:], b)})
}

// again starts an engine that goes on where that of r was, by what is written to disk.
func (r *rig) again(edit func(*Config)) *rig {
	r.t.Helper()
	nets := r.e.set.Load().networks
	var kept []Mapping
	for _, m := range r.e.Mappings() {
		b, err := json.Marshal(m)
		if err != nil {
			r.t.Fatal(err)
		}
		var back Mapping
		if err := json.Unmarshal(b, &back); err != nil || back != m {
			r.t.Fatalf("%s comes back as %+v, %v", b, back, err)
		}
		kept = append(kept, back)
	}
	n := newRig(r.t, func(c *Config) {
		c.Mappings = kept
		if edit != nil {
			edit(c)
		}
	})
	if err := n.e.SetNetworks(nets); err != nil {
		r.t.Fatal(err)
	}
	return n
}

// TestRestart: a connection goes on after a restart whichever end speaks first, and so do
// datagrams; the ends see each other as before.
func TestRestart(t *testing.T) {
	for _, x := range restarts {
		for _, proto := range []uint8{ipkt.TCP, ipkt.UDP} {
			for _, serverFirst := range []bool{true, false} {
				t.Run(fmt.Sprint(x.name, " ", protocolName(proto), " server first ", serverFirst), func(t *testing.T) {
					edit := x.edit
					r := newRig(t, func(c *Config) {
						if edit != nil {
							edit(c)
						}
					})
					if !x.routed {
						r.masquerade6()
					}
					to := VPCSide
					if x.from == VPCSide {
						to = OverlaySide
					}
					client, target := pkttest.Addr(x.client), pkttest.Addr(x.target)
					packet := func(src, dst netip.AddrPort, flags uint8, seq, ack uint32, data string) []byte {
						return pkttest.Packet{Proto: proto, Src: src, Dst: dst, Flags: flags, Seq: seq, Ack: ack, Payload: []byte(data)}.Bytes()
					}
					ext, server := r.ends(x.from, packet(client, target, ipkt.SYN, 1000, 0, ""))
					if proto == ipkt.TCP {
						r.ends(to, packet(server, ext, ipkt.SYN|ipkt.ACK, 5000, 1001, ""))
						r.ends(x.from, packet(client, target, ipkt.ACK, 1001, 5001, "question"))
					}
					r = r.again(edit)
					answer := func() {
						t.Helper()
						src, dst := r.ends(to, packet(server, ext, ipkt.ACK, 5001, 1009, "the answer, late"))
						if src != target || dst != client {
							t.Errorf("the answer goes from %v to %v, want %v to %v", src, dst, target, client)
						}
					}
					question := func() {
						t.Helper()
						src, dst := r.ends(x.from, packet(client, target, ipkt.ACK, 1009, 5017, "next"))
						if src != ext || dst != server {
							t.Errorf("the question goes from %v to %v, want %v to %v", src, dst, ext, server)
						}
					}
					if serverFirst {
						answer()
					}
					for range 2 {
						question()
						answer()
					}
					if n := len(r.e.Flows(FlowFilter{})); n != 1 {
						t.Errorf("%d flows, want 1", n)
					}
					if n := r.e.kept.n.Load(); n != 0 {
						t.Errorf("%d flows are still waited for", n)
					}
					r.account()
				})
			}
		}
	}
}

// TestRestartTwice: what nobody has sent anything of is kept for the next run, too, and is
// over some day.
func TestRestartTwice(t *testing.T) {
	r := newRig(t)
	r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "question"))
	r = r.again(nil).again(nil)
	late := r.again(nil)
	_, v := r.fromOverlay(pkttest.UDP("10.0.0.10:54", "10.0.0.1:4000", "unasked"))
	r.want("another port", v)
	_, v = r.fromOverlay(pkttest.UDP("10.0.0.10:53", "10.0.0.1:4000", "answer"))
	r.want("answer", v, "udp 10.0.0.10:53 > 172.31.0.10:4000")
	late.sleep(10 * time.Minute)
	_, v = late.fromOverlay(pkttest.UDP("10.0.0.10:53", "10.0.0.1:4000", "answer"))
	late.want("too late", v)
	if n := late.e.kept.n.Load(); n != 0 {
		t.Errorf("%d flows are still waited for", n)
	}
}

// TestRestartOpen: with endpoint-independent filtering all may answer, as before.
func TestRestartOpen(t *testing.T) {
	open := func(c *Config) { c.NAT.FilterUDP = EndpointIndependent }
	r := newRig(t, open)
	r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "question"))
	r = r.again(open)
	_, v := r.fromOverlay(pkttest.UDP("10.0.0.11:54", "10.0.0.1:4000", "from elsewhere"))
	r.want("another host", v, "udp 10.0.0.11:54 > 172.31.0.10:4000")
}

// TestRestartRefused: where a connection can't go on both ends are told at once.
func TestRestartRefused(t *testing.T) {
	for _, f := range families {
		for name, edit := range map[string]func(*Config){
			"policy":    func(c *Config) { c.Policy = policy.New(policy.Drop, nil) },
			"no pickup": func(c *Config) { c.NAT.NoPickup = true },
		} {
			t.Run(f.name+" "+name, func(t *testing.T) {
				r := newRig(t)
				r.masquerade6()
				r.fromVPC(pkttest.TCP(f.client, f.office, ipkt.SYN, 1000, 0, ""))
				r.fromOverlay(pkttest.TCP(f.office, f.inside, ipkt.SYN|ipkt.ACK, 5000, 1001, ""))
				r.fromVPC(pkttest.TCP(f.client, f.office, ipkt.ACK, 1001, 5001, "question"))
				r = r.again(edit)
				r.masquerade6()
				late := pkttest.TCP(f.office, f.inside, ipkt.ACK, 5001, 1009, "answer")
				o, v := r.fromOverlay(late, pkttest.TCP(f.office, f.inside, ipkt.ACK, 5001, 1009, ""))
				r.want("server", o, "tcp "+f.inside+" > "+f.office)
				r.want("client", v, "tcp "+f.office+" > "+f.client)
				if n := r.drops(OverlaySide, dropNoFlow); n != 2 {
					t.Errorf("%d drops counted, want 2", n)
				}
				if r.e.stats.resets[VPCSide].Load() != 1 || r.e.stats.resets[OverlaySide].Load() != 1 {
					t.Error("the RSTs aren't counted")
				}
				r.account()
			})
		}
	}
}

// TestRestartPortTaken: a port that has another owner by now isn't taken back: the ends of
// the old connection are told, and the new one goes on.
func TestRestartPortTaken(t *testing.T) {
	r := newRig(t)
	r.fromVPC(pkttest.TCP("172.31.0.10:4000", "10.0.0.10:80", ipkt.SYN, 1000, 0, ""))
	r.fromOverlay(pkttest.TCP("10.0.0.10:80", "10.0.0.1:4000", ipkt.SYN|ipkt.ACK, 5000, 1001, ""))
	r.fromVPC(pkttest.TCP("172.31.0.10:4000", "10.0.0.10:80", ipkt.ACK, 1001, 5001, ""))
	r = r.again(nil)
	r.sleep(3 * time.Minute) // the port has rested
	o, _ := r.fromVPC(pkttest.TCP("172.31.0.11:4000", "10.0.0.11:80", ipkt.SYN, 1, 0, ""))
	r.want("another client", o, "tcp 10.0.0.1:4000 > 10.0.0.11:80")
	o, v := r.fromOverlay(pkttest.TCP("10.0.0.10:80", "10.0.0.1:4000", ipkt.ACK, 5001, 1001, "late"))
	r.want("server", o, "tcp 10.0.0.1:4000 > 10.0.0.10:80")
	r.want("client", v, "tcp 10.0.0.10:80 > 172.31.0.10:4000")
	_, v = r.fromOverlay(pkttest.TCP("10.0.0.11:80", "10.0.0.1:4000", ipkt.SYN|ipkt.ACK, 7, 2, ""))
	r.want("the new connection", v, "tcp 10.0.0.11:80 > 172.31.0.11:4000")
	if n := len(r.e.Flows(FlowFilter{})); n != 1 {
		t.Errorf("%d flows, want 1", n)
	}
	r.account()
}

// TestUnknownSegments: segments of connections that nothing is known of are answered with
// RSTs, from either side and at a bounded rate; SYNs from outside, bare acknowledgements
// and RSTs aren't.
func TestUnknownSegments(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			r := newRig(t)
			r.masquerade6()
			for _, x := range []struct {
				flags uint8
				data  string
				told  bool
			}{{ipkt.ACK, "x", true}, {ipkt.FIN | ipkt.ACK, "", true}, {ipkt.SYN | ipkt.ACK, "", true}, {ipkt.ACK, "", false}, {ipkt.SYN, "", false}, {ipkt.RST | ipkt.ACK, "", false}, {0, "x", false}} {
				o, v := r.fromOverlay(pkttest.TCP(f.office, f.inside, x.flags, 1, 1, x.data))
				if len(v) > 0 || (len(o) == 1) != x.told {
					t.Errorf("flags %#x: %q, %q", x.flags, o, v)
				}
			}
			o, v := r.fromVPC(pkttest.TCP(f.client, f.office, ipkt.FIN|ipkt.ACK, 1, 1, ""))
			r.want("out", o)
			r.want("VPC", v, "tcp "+f.office+" > "+f.client)
			o, _ = r.fromOverlay(pkttest.TCP(f.office, f.client, ipkt.ACK, 1, 1, "x"))
			r.want("in the name of a VPC host", o)
			total := 0
			for range 1000 {
				o, _ := r.fromOverlay(pkttest.TCP(f.office, f.inside, ipkt.ACK, 1, 1, "x"))
				total += len(o)
			}
			if total < 10 || total > 100 {
				t.Errorf("%d RSTs for 1000 segments", total)
			}
		})
	}
}

// TestKeptAreBounded: flows of one client, and all of them, are kept for the next run up to a
// bound, and no longer than two hours.
func TestKeptAreBounded(t *testing.T) {
	list := func(clients, each int) (out []Mapping) {
		for c := range clients {
			for i := range each {
				host := netip.AddrFrom4([4]byte{172, 31, byte(c >> 8), byte(c)})
				port := uint16(1 + i)
				ext := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 1, byte(c)}), port)
				out = append(out, Mapping{Proto: ipkt.TCP, From: VPCSide, Network: testNet, Client: netip.AddrPortFrom(host, port),
					Target: pkttest.Addr("10.0.0.10:80"), Server: pkttest.Addr("10.0.0.10:80"), External: ext})
			}
		}
		return out
	}
	to := &Timeouts{TCPEstablished: 10 * time.Hour, UDP: time.Hour}
	for _, tt := range []struct{ clients, each, want int }{{1, 100, 100}, {1, maxKept / 2, maxKeptPerClient}, {8, maxKept / 4, maxKept}} {
		var k keptFlows
		if got := k.init(1, list(tt.clients, tt.each), to); got != tt.want {
			t.Errorf("%d clients with %d flows each: %d kept, want %d", tt.clients, tt.each, got, tt.want)
		}
	}
	var k keptFlows
	one := list(1, 1)
	k.init(1, one, to)
	key := k.list[0].key()
	for after, want := range map[time.Duration]bool{2 * time.Hour: true, maxKeptFor: false, 124*time.Minute + time.Second: false} {
		if _, ok := k.find(1+int64(after), key); ok != want {
			t.Errorf("after %v: kept %v", after, ok)
		}
	}
}

// TestKeptAgainAreBounded: what is kept for the next run is bounded together with what was
// kept for this one and nobody has sent anything of.
func TestKeptAgainAreBounded(t *testing.T) {
	flow := func(client netip.AddrPort, i int) Mapping {
		server := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, 10}), uint16(1+i))
		return Mapping{Proto: ipkt.UDP, From: VPCSide, Network: testNet, Client: client, Target: server, Server: server,
			External: netip.AddrPortFrom(pkttest.Addr("10.0.0.1:1").Addr(), client.Port())}
	}
	client := func(c int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{172, 31, 0, byte(10 + c)}), uint16(4000+c))
	}
	// count returns how many flows are kept, and of the client that has most.
	count := func(list []Mapping) (all, most int) {
		clients := map[netip.Addr]int{}
		for _, m := range list {
			if m.IsFlow() {
				all++
				clients[m.Client.Addr()]++
				most = max(most, clients[m.Client.Addr()])
			}
		}
		return all, most
	}
	for _, tt := range []struct {
		name        string
		kept, fresh int // flows of each of 4 clients, and of these and one more
		all, most   int
	}{
		{"new ones", 0, maxKeptPerClient + 100, maxKept, maxKeptPerClient},
		{"new ones of clients with old ones", maxKeptPerClient / 2, maxKeptPerClient, maxKept, maxKeptPerClient},
		{"new ones when there is no room", maxKeptPerClient, 100, maxKept, maxKeptPerClient},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, func(c *Config) {
				for i := range 4 {
					for j := range tt.kept {
						c.Mappings = append(c.Mappings, flow(client(i), 40000+j))
					}
				}
			})
			for i := range 5 {
				for j := range tt.fresh {
					m := flow(client(i), j)
					r.fromVPCRaw(pkttest.Packet{Proto: ipkt.UDP, Src: m.Client, Dst: m.Server, Payload: []byte("x")}.Bytes())
				}
			}
			if all, most := count(r.e.Mappings()); all != tt.all || most != tt.most {
				t.Errorf("%d flows are kept, %d of one client, want %d and %d", all, most, tt.all, tt.most)
			}
		})
	}
}
