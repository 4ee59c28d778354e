package netstack

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
)

// pooled is the test network with addresses for clients.
func pooled(list ...string) Network {
	n := testNetwork()
	n.Masquerade6 = true
	n.Addresses = append(n.Addresses, netip.MustParsePrefix("10.0.0.2/24"), netip.MustParsePrefix("10.50.0.1/32"), netip.MustParsePrefix("10.50.0.2/32"),
		netip.MustParsePrefix("fd77:50::1/128"), netip.MustParsePrefix("fd77:50::2/128"))
	for _, a := range list {
		n.NAT = append(n.NAT, netip.MustParseAddr(a))
	}
	return n
}

func (r *rig) networks(n ...Network) {
	r.t.Helper()
	if err := r.e.SetNetworks(n); err != nil {
		r.t.Fatal(err)
	}
	r.take()
}

// leaves sends a datagram of a client and returns the endpoint it leaves from.
func (r *rig) leaves(client, server string) netip.AddrPort {
	r.t.Helper()
	o, v := r.fromVPC(pkttest.UDP(client, server, "x"))
	if len(o) != 1 {
		r.t.Fatalf("%s: %q, %q", client, o, v)
	}
	from, _, _ := strings.Cut(strings.TrimPrefix(o[0], "udp "), " > ")
	return pkttest.Addr(from)
}

// TestPool: clients leave from the network's addresses for them, each from one; all of
// them are ours: they are answered for, answer, and nobody else's.
func TestPool(t *testing.T) {
	for _, tt := range []struct {
		server, client string // of which the last byte is the client's number
		list           []string
	}{
		{"10.0.0.10:53", "172.31.0.%d:4000", []string{"10.0.0.2", "10.50.0.1", "10.50.0.2"}},
		{"[fd77:100::10]:53", "[fd77:1::%x]:4000", []string{"fd77:100::1", "fd77:50::1", "fd77:50::2"}},
	} {
		r := newRig(t)
		r.networks(pooled(tt.list...))
		of := map[string]int{}
		for i := range 30 {
			client := fmt.Sprintf(tt.client, 10+i)
			q := Question{Protocol: ipkt.UDP, Src: pkttest.Addr(client), Dst: pkttest.Addr(tt.server)}
			x := r.e.Explain(q)
			a := r.leaves(client, tt.server)
			if of[a.Addr().String()]++; x.Source.Addr() != a.Addr() || x.SourceHow != "masquerade" {
				t.Errorf("%s leaves from %v, explained is %+v", client, a, x)
			}
			_, v := r.fromOverlay(pkttest.UDP(tt.server, a.String(), "x"))
			r.want("answer", v, "udp "+tt.server+" > "+client)
			if b := r.leaves(strings.Replace(client, ":4000", ":4001", 1), tt.server); b.Addr() != a.Addr() {
				t.Errorf("%s leaves from %v and %v", client, a, b)
			}
		}
		for _, a := range tt.list {
			if of[a] != 10 || len(of) != 3 {
				t.Errorf("%d clients leave from %s: %v", of[a], a, of)
			}
		}
		r.drain()
		r.account()
	}
	r := newRig(t)
	r.networks(pooled("10.50.0.1", "10.50.0.2"))
	o, _ := r.fromOverlay(pkttest.Echo("10.0.0.10", "10.50.0.2", false, 7, "x"))
	r.e.local.sendAll()
	more, _ := r.take()
	r.want("ping", append(o, more...), "icmp 0/0 10.50.0.2 > 10.0.0.10 id 7")
	for _, b := range [][]byte{pkttest.UDP("10.50.0.2:4000", "10.0.0.1:53", "x")} {
		o, v := r.fromOverlay(b)
		r.want("in our name", append(o, v...))
	}
	if n := r.drops(OverlaySide, dropSpoofed); n != 1 {
		t.Errorf("%d spoofed packets counted", n)
	}
	if err := r.e.SetNetworks([]Network{pooled("10.50.0.9")}); err == nil {
		t.Error("an address that isn't ours is no error")
	}
}

// TestPoolHairpin: an external endpoint is reached from within, whichever of the
// addresses it has (RFC 4787 REQ-9).
func TestPoolHairpin(t *testing.T) {
	r := newRig(t)
	r.networks(pooled("10.50.0.1", "10.50.0.2"))
	one, two := r.leaves("172.31.0.10:4000", "10.0.0.10:53"), r.leaves("172.31.0.11:4000", "10.0.0.10:53")
	if one.Addr() == two.Addr() {
		t.Fatalf("both leave from %v", one)
	}
	_, v := r.fromVPC(pkttest.UDP("172.31.0.10:4000", two.String(), "x"))
	if len(v) != 0 {
		t.Errorf("passes before the other side has sent anything: %q", v)
	}
	_, v = r.fromVPC(pkttest.UDP("172.31.0.11:4000", one.String(), "x"))
	if len(v) != 1 || !strings.HasSuffix(v[0], " > 172.31.0.10:4000") {
		t.Errorf("from the other side: %q", v)
	}
}

// TestPoolReload: connections of an address that is taken out end, and both ends are told;
// others go on, and so do all when one is added.
func TestPoolReload(t *testing.T) {
	r := newRig(t)
	r.networks(pooled("10.0.0.2", "10.50.0.1"))
	ends := map[string]string{}
	const server = "10.0.0.10:80"
	for i := range 4 {
		client := fmt.Sprintf("172.31.0.%d:4000", 10+i)
		o, _ := r.fromVPC(pkttest.TCP(client, server, ipkt.SYN, 100, 0, ""))
		ends[client], _, _ = strings.Cut(strings.TrimPrefix(o[0], "tcp "), " > ")
		r.fromOverlay(pkttest.TCP(server, ends[client], ipkt.SYN|ipkt.ACK, 500, 101, ""))
		r.fromVPC(pkttest.TCP(client, server, ipkt.ACK, 101, 501, ""))
	}
	goesOn := func(what, client string) {
		t.Helper()
		o, _ := r.fromVPC(pkttest.TCP(client, server, ipkt.ACK, 101, 501, "more"))
		r.want(what, o, "tcp "+ends[client]+" > "+server)
		_, v := r.fromOverlay(pkttest.TCP(server, ends[client], ipkt.ACK, 501, 101, "more"))
		r.want(what+", back", v, "tcp "+server+" > "+client)
	}
	r.networks(pooled("10.0.0.2", "10.50.0.1", "10.50.0.2"))
	for client := range ends {
		goesOn("one more", client)
	}
	r.networks(pooled("10.50.0.1", "10.50.0.2")) // 10.0.0.2 stays ours
	byServer := true
	for client, end := range ends {
		if !strings.HasPrefix(end, "10.0.0.2:") {
			goesOn("one less", client)
			continue
		}
		if byServer { // the server speaks first
			o, v := r.fromOverlay(pkttest.TCP(server, end, ipkt.ACK, 501, 101, "more"))
			r.want("the server is told", o, "tcp "+end+" > "+server)
			r.want("the client is told", v, "tcp "+server+" > "+client)
			byServer = false
			continue
		}
		// What the client sends comes from another address, of which the server knows nothing.
		o, _ := r.fromVPC(pkttest.TCP(client, server, ipkt.ACK, 101, 501, "more"))
		if len(o) != 1 || strings.Contains(o[0], "10.0.0.2:") {
			t.Fatalf("it leaves as %q", o)
		}
		now, _, _ := strings.Cut(strings.TrimPrefix(o[0], "tcp "), " > ")
		_, v := r.fromOverlay(pkttest.TCP(server, now, ipkt.RST, 501, 0, ""))
		r.want("the client is told by the server", v, "tcp "+server+" > "+client)
	}
	// Datagrams go on from another address.
	if a := r.leaves("172.31.0.10:4000", "10.0.0.10:53"); a.Addr().String() == "10.0.0.2" {
		t.Errorf("a flow leaves from %v", a)
	}
	r.drain()
	r.account()
}

// TestPoolRestart: flows go on after a restart from the addresses they had, whoever speaks
// first, and clients keep theirs.
func TestPoolRestart(t *testing.T) {
	list := []string{"10.0.0.2", "10.50.0.1", "10.50.0.2"}
	r := newRig(t)
	r.networks(pooled(list...))
	at := map[string]netip.AddrPort{}
	for i := range 12 {
		client := fmt.Sprintf("172.31.0.%d:4000", 10+i)
		at[client] = r.leaves(client, "10.0.0.10:53")
		r.fromOverlay(pkttest.UDP("10.0.0.10:53", at[client].String(), "x"))
	}
	again := newRig(t, func(c *Config) { c.Mappings = r.e.Mappings() })
	again.networks(pooled(list...))
	i := 0
	for client, had := range at {
		switch i++; i % 3 {
		case 0: // the server speaks first
			_, v := again.fromOverlay(pkttest.UDP("10.0.0.10:53", had.String(), "x"))
			again.want("the server's", v, "udp 10.0.0.10:53 > "+client)
		case 1: // another endpoint of the client
			if a := again.leaves(strings.Replace(client, ":4000", ":5000", 1), "10.0.0.10:53"); a.Addr() != had.Addr() {
				t.Errorf("%s left from %v, now from %v", client, had, a)
			}
		}
		if a := again.leaves(client, "10.0.0.10:53"); a != had {
			t.Errorf("%s left from %v, now from %v", client, had, a)
		}
	}
	// Without the address they had, they get another one.
	less := newRig(t, func(c *Config) { c.Mappings = r.e.Mappings() })
	less.networks(pooled("10.50.0.1", "10.50.0.2"))
	for client, had := range at {
		if a := less.leaves(client, "10.0.0.10:53"); a.Addr().String() == "10.0.0.2" || had.Addr().String() != "10.0.0.2" && a != had {
			t.Errorf("%s left from %v, now from %v", client, had, a)
		}
	}
}

// TestPoolFlows: more flows to one host and port than an address has ports, each with an
// endpoint of its own, each client behind one address.
func TestPoolFlows(t *testing.T) {
	const clients, each = 1000, 120
	r := newRig(t, func(c *Config) { c.NAT.MaxFlows = 1 << 18 })
	r.networks(pooled("10.0.0.2", "10.50.0.1", "10.50.0.2"))
	seen, of := make(map[netip.AddrPort]netip.AddrPort, clients*each), map[netip.Addr]netip.Addr{}
	packet := pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "x")
	answer := pkttest.UDP("10.0.0.10:53", "10.0.0.2:4000", "x")
	for i := range each {
		for first := 0; first < clients; first += 100 {
			var batch [][]byte
			for c := first; c < first+100; c++ {
				b := append([]byte(nil), packet...)
				b[14], b[15] = byte(c/250), byte(2+c%250)
				binary.BigEndian.PutUint16(b[20:], uint16(2000+i))
				binary.BigEndian.PutUint16(b[26:], 0)
				ipkt.FixHeader(b)
				batch = append(batch, b)
			}
			for _, b := range batch {
				r.fromVPCRaw(append([]byte(nil), b...))
			}
			out, _ := r.takeRaw()
			if len(out) != 100 {
				t.Fatalf("of flows %d from client %d on %d leave", i, first, len(out))
			}
			for j, b := range out {
				client := netip.AddrFrom4([4]byte(batch[j][12:16]))
				from := netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[12:16])), binary.BigEndian.Uint16(b[20:]))
				if other, ok := seen[from]; ok {
					t.Fatalf("%v and %v both leave from %v", other, client, from)
				}
				seen[from] = netip.AddrPortFrom(client, uint16(2000+i))
				if a, ok := of[client]; ok && a != from.Addr() {
					t.Fatalf("%v leaves from %v and %v", client, a, from)
				}
				of[client] = from.Addr()
			}
		}
	}
	if n := r.e.table.Len(); n != clients*each {
		t.Errorf("%d flows, want %d", n, clients*each)
	}
	// Each answer finds its client.
	n := 0
	for from, client := range seen {
		if n++; n%97 != 0 {
			continue
		}
		b := append([]byte(nil), answer...)
		a := from.Addr().As4()
		copy(b[16:], a[:])
		binary.BigEndian.PutUint16(b[22:], from.Port())
		binary.BigEndian.PutUint16(b[26:], 0)
		ipkt.FixHeader(b)
		_, v := r.fromOverlay(b)
		r.want("answer to "+from.String(), v, "udp 10.0.0.10:53 > "+client.String())
	}
}
