package vl1_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/testvec"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/simnet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/ztnode"
)

type sealedVectors struct {
	Identities map[string]struct {
		Secret string `json:"identity_secret"`
	}
	Planet testvec.Hex
	Cases  []sealedCase
}

type sealedCase struct {
	Name, Sender, Receiver, From, Required string
	Knows                                  bool `json:"receiver_knows_sender"`
	Intro                                  testvec.Hex
	Session                                testvec.Hex `json:"session_key"`
	Datagrams                              []testvec.Hex
}

// sealedScene is the scene of the vectors: R is the only root, L a leaf. Nothing is at S.
type sealedScene struct {
	*simnet.Net
	vec   sealedVectors
	hosts map[string]*host
	out   map[netip.Addr][][]byte // sent by R and L
}

func slashed(t *testing.T, s string) netip.AddrPort {
	addr, port, _ := strings.Cut(s, "/")
	if strings.Contains(addr, ":") {
		addr = "[" + addr + "]"
	}
	return ap(addr + ":" + port)
}

func newSealedScene(t *testing.T, set func(*vl1.Config)) *sealedScene {
	s := &sealedScene{Net: simnet.New(), hosts: make(map[string]*host), out: make(map[netip.Addr][][]byte)}
	testvec.Load(t, "sealed-hello.json", &s.vec)
	planet, n, err := vl1.ParseWorld(s.vec.Planet)
	if err != nil || n != len(s.vec.Planet) {
		t.Fatal(err)
	}
	for i, name := range []string{"R", "L"} {
		id, err := identity.Parse(s.vec.Identities[name].Secret)
		if err != nil {
			t.Fatal(err)
		}
		s.hosts[name] = newHostWith(t, s.Net, nil, id, func(c *vl1.Config) {
			c.Planet = planet
			if set != nil {
				set(c)
			}
		}, ap(fmt.Sprintf("192.0.2.%d:9993", i+1)), ap(fmt.Sprintf("[2001:db8::%d]:9993", i+1)))
	}
	s.Run(2 * time.Second)
	s.Drop = func(_, to netip.AddrPort, d []byte) bool {
		s.out[to.Addr()] = append(s.out[to.Addr()], bytes.Clone(d))
		return false
	}
	return s
}

// Each packet of the vectors is taken or refused as chapter 06 asks for, whatever we send
// ourselves; and what is refused leaves no trace.
func TestSealedVectors(t *testing.T) {
	count := testvec.Count(t, "sealed-hello.json", "cases")
	vec := newSealedScene(t, nil).vec
	for _, c := range vec.Cases {
		count.Judge()
		t.Run(c.Name, func(t *testing.T) {
			s := newSealedScene(t, nil)
			h := s.hosts[c.Receiver]
			at := h.port.Endpoints()[0]
			from := slashed(t, c.From)
			if from.Addr().Is6() {
				at = h.port.Endpoints()[1]
			}
			if c.Knows {
				s.Inject(from, at, c.Intro)
				s.Run(10 * time.Second)
			}
			clear(s.out)
			before, peers := h.core.Stats(), len(h.core.Peers())
			size := 0
			for _, d := range c.Datagrams {
				size += len(d)
				s.Inject(from, at, bytes.Clone(d))
			}
			s.Run(time.Second)
			k, scratch := packet.NewKeys([identity.SessionLen]byte(c.Session)), new(packet.Scratch)
			answered, sent := false, 0
			for _, d := range s.out[from.Addr()] {
				sent += len(d)
				p := packet.Packet(bytes.Clone(d))
				switch {
				case k.Open(p, scratch) != nil:
				case p.Verb() == packet.VerbOK:
					answered = answered || bytes.Equal(p.Payload()[1:9], c.Datagrams[0][:8])
				case p.Verb() == packet.VerbEcho: // an ECHO is answered once ours is
					answered = answered || packet.Packet(c.Datagrams[0]).Suite() != packet.SuitePoly1305
				}
			}
			want := c.Required == "accept" || c.Name == "hello_suite3" // chapter 06 §3.7: better than the reference
			if answered != want && (c.Required != "either" || want) {
				t.Errorf("answered: %v, required: %s", answered, c.Required)
			}
			if sent > size {
				t.Errorf("%d bytes for %d to an address that proved nothing", sent, size)
			}
			if c.Required == "drop" && len(h.core.Peers()) != peers {
				t.Error("a peer was made")
			}
			after := h.core.Stats()
			if c.Required == "drop" && after.HeldQueue != 0 {
				t.Error("the packet is held")
			}
			if in := after.SealedHellosIn - before.SealedHellosIn; c.Required == "drop" && in != 0 {
				t.Errorf("%d counted as opened", in)
			}
		})
	}
}

// A node comes online at a root whichever of the two seals, also where the reference doesn't
// since the root never met it, and its first HELLOs have the sizes of the reference's.
func TestSealedRuns(t *testing.T) {
	var v struct {
		Runs []struct {
			Seals     bool `json:"L_seals"`
			RootSeals bool `json:"R_seals"`
			Knows     bool `json:"R_knows_L"`
			First     []struct {
				Length int
				Flags  testvec.Hex `json:"flags_cipher_hops"`
			}
		}
	}
	testvec.Load(t, "sealed-hello.json", &v)
	count := testvec.Count(t, "sealed-hello.json", "runs")
	how := map[bool]ztnode.SealedHello{true: ztnode.SealedHelloAlways}
	for _, r := range v.Runs {
		count.Judge()
		n := newInternet(t, 1, nats{})
		n.Detach(n.root.port)
		n.Detach(n.b.port)
		n.root = sealing(t, n, n.ids[0], how[r.RootSeals], rootEndpoint)
		if r.Knows {
			n.Run(5 * time.Second)
		}
		n.Detach(n.a.port)
		var first packet.Packet
		n.Seen = func(_, to netip.AddrPort, d []byte) {
			if to == rootEndpoint && first == nil {
				first = bytes.Clone(d)
			}
		}
		n.a = sealing(t, n, n.ids[1], how[r.Seals], ap("8.0.0.1:9993"))
		if !n.RunUntil(time.Second, n.a.core.Online) {
			t.Errorf("%+v: not online after a second", r)
		}
		if len(first) != r.First[0].Length || first[18] != r.First[0].Flags[0] {
			t.Errorf("%+v: the first datagram has %d bytes, flags %02x", r, len(first), first[18])
		}
	}
}

// sealing is a host that seals.
func sealing(t testing.TB, n *internet, id *identity.Identity, how ztnode.SealedHello, socks ...netip.AddrPort) *host {
	return newHostWith(t, n.Net, nil, id, func(c *vl1.Config) { c.Planet, c.SealedHello = n.planet, how }, socks...)
}

// hellos counts the HELLOs of nodes, sealed and plain.
func (n *internet) hellos(of ...*host) (sealed, plain *int) {
	sealed, plain = new(int), new(int)
	n.Seen = func(_, _ netip.AddrPort, d []byte) {
		if packet.Classify(d) != packet.KindPacket {
			return
		}
		switch p := packet.Packet(d); {
		case !slices.ContainsFunc(of, func(h *host) bool { return h.id.Address() == p.Source() }):
		case p.Enveloped():
			*sealed++
		case p.Suite() == packet.SuitePoly1305 && p.Verb() == packet.VerbHello:
			*plain++
		}
	}
	return sealed, plain
}

// A node that seals all HELLOs is online at once at a root that never met it, and nodes find
// each other as they do with plain ones, whichever of them seals.
func TestSealingNodes(t *testing.T) {
	for _, how := range [][3]ztnode.SealedHello{
		{ztnode.SealedHelloOff, ztnode.SealedHelloAlways, ztnode.SealedHelloOff},
		{ztnode.SealedHelloOff, ztnode.SealedHelloAlways, ztnode.SealedHelloAlways},
		{ztnode.SealedHelloAlways, ztnode.SealedHelloAlways, ztnode.SealedHelloAlways},
		{ztnode.SealedHelloAlways, ztnode.SealedHelloOff, ztnode.SealedHelloOff},
		{ztnode.SealedHelloAuto, ztnode.SealedHelloAuto, ztnode.SealedHelloAuto},
		{ztnode.SealedHelloAlways, ztnode.SealedHelloAuto, ztnode.SealedHelloOff},
	} {
		t.Run(fmt.Sprint(how), func(t *testing.T) {
			t.Parallel()
			n := newInternet(t, 1, nats{})
			for _, h := range []*host{n.root, n.a, n.b} {
				n.Detach(h.port)
			}
			n.root = sealing(t, n, n.ids[0], how[0], rootEndpoint)
			n.a = sealing(t, n, n.ids[1], how[1], ap("8.0.0.1:9993"), ap("8.0.0.1:23456"))
			n.b = sealing(t, n, n.ids[2], how[2], ap("8.0.0.2:9993"), ap("8.0.0.2:23456"))
			sealed, plain := n.hellos(n.root, n.a, n.b)
			if !n.RunUntil(time.Second, func() bool { return n.a.core.Online() && n.b.core.Online() }) {
				t.Fatal("not online after a second")
			}
			n.connect(t, 5*time.Second)
			if gap := n.traffic(3 * time.Minute); gap > time.Second {
				t.Errorf("no traffic for %v", gap)
			}
			if !n.direct() {
				t.Error("not direct")
			}
			if how == [3]ztnode.SealedHello{ztnode.SealedHelloAlways, ztnode.SealedHelloAlways, ztnode.SealedHelloAlways} && *plain > 0 {
				t.Errorf("%d plain HELLOs", *plain)
			}
			if *sealed == 0 {
				t.Error("no sealed HELLO")
			}
			for _, h := range []*host{n.root, n.a, n.b} {
				st := h.core.Stats()
				for _, r := range []vl1.Reject{vl1.RejectSealed, vl1.RejectSealedRate, vl1.RejectMAC, vl1.RejectBudget} {
					if st.RejectedBy(r) != 0 {
						t.Errorf("%d packets refused because of %v", st.RejectedBy(r), r)
					}
				}
			}
		})
	}
}

// Release 1.16.0 takes none of our sealed HELLOs for a plain one, which would be lost.
func TestSealedHelloIsNotTakenForPlain(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.Detach(n.a.port)
	n.a = sealing(t, n, n.ids[1], ztnode.SealedHelloAlways, ap("8.0.0.1:9993"))
	sealed, taken := 0, 0
	n.Seen = func(_, _ netip.AddrPort, d []byte) {
		if p := packet.Packet(d); packet.Classify(d) == packet.KindPacket && p.Enveloped() {
			if sealed++; p.Verb() == packet.VerbHello {
				taken++
			}
		}
	}
	for i := range 200 {
		n.Move(n.a.port, nil, netip.AddrPortFrom(netip.AddrFrom4([4]byte{8, 0, 1, byte(i)}), 9993))
		n.Run(1500 * time.Millisecond)
	}
	if sealed < 200 || taken > 0 {
		t.Errorf("%d of %d taken for plain ones", taken, sealed)
	}
}

// Peers of any release are told their port.
func TestOldPeersHearTheirPort(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.Run(time.Second)
	v, at := newVoice(t, n.ids[2], n.ids[0]), ap("44.0.0.1:666")
	for _, protocol := range []byte{4, 13} {
		var told netip.AddrPort
		n.Drop = func(_, to netip.AddrPort, d []byte) bool {
			p := packet.Packet(bytes.Clone(d))
			if to == at && v.keys.Open(p, &v.s) == nil && p.Verb() == packet.VerbOK && told.Port() == 0 {
				told, _, _ = packet.ParseEndpoint(p.Payload()[9+8+5:])
			}
			return false
		}
		n.Inject(at, rootEndpoint, v.hello(protocol, n.planet))
		n.Run(time.Second)
		if told != at {
			t.Errorf("protocol %d: told %v", protocol, told)
		}
	}
}

// However often we say HELLO to a peer, envelopes are made for it once a minute.
func TestEnvelopesAreFew(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.Detach(n.a.port)
	n.a = sealing(t, n, n.ids[1], ztnode.SealedHelloAlways, ap("8.0.0.1:9993"))
	hellos, envelopes := 0, make(map[string]bool)
	n.Seen = func(_, _ netip.AddrPort, d []byte) {
		if p := packet.Packet(d); packet.Classify(d) == packet.KindPacket && p.Enveloped() {
			hellos++
			envelopes[string(d[len(d)-packet.EnvelopeLen:])] = true
		}
	}
	for i := range 100 {
		n.Move(n.a.port, nil, netip.AddrPortFrom(netip.AddrFrom4([4]byte{8, 0, 1, byte(i)}), 9993))
		n.Run(1500 * time.Millisecond)
	}
	if hellos < 100 || len(envelopes) > 3 {
		t.Errorf("%d envelopes for %d HELLOs in 150 s", len(envelopes), hellos)
	}
}

// madeIDs makes identities whose addresses don't follow from their keys.
func madeIDs(t testing.TB, count int) (out []*identity.Identity) {
	for i := range count {
		id, err := identity.Parse(fmt.Sprintf("12345678%02x", i) + testIDs(t)[1].SecretString()[10:])
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, id)
	}
	return out
}

func unchecked(*identity.Identity) error { return nil }

// Nodes that a NAT gave other addresses all at once are heard at once, also if the root is
// started anew meanwhile.
func TestManySealingNodes(t *testing.T) {
	n := newInternet(t, 1, nats{})
	var leaves []*host
	at := func(net byte, i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{8, net, 0, byte(i + 1)}), 9993)
	}
	n.Detach(n.root.port)
	n.root = newHostWith(t, n.Net, nil, n.ids[0], func(c *vl1.Config) { c.Planet, c.Validate = n.planet, unchecked }, rootEndpoint)
	for i, id := range madeIDs(t, 60) {
		leaves = append(leaves, sealing(t, n, id, ztnode.SealedHelloAlways, at(1, i)))
		n.Run(3 * time.Second) // newcomers of one network
	}
	heard := func(since time.Time) (count int) {
		for _, h := range leaves {
			for _, p := range n.root.core.Peers() {
				if p.Address == h.id.Address() && p.LastReceive.After(since) {
					count++
				}
			}
		}
		return count
	}
	start := n.Now
	if !n.RunUntil(time.Minute, func() bool { return heard(start) == len(leaves) }) {
		t.Fatalf("%d of %d heard", heard(start), len(leaves))
	}
	n.Run(time.Minute)
	move := func(net byte) {
		start = n.Now
		for i, h := range leaves {
			n.Move(h.port, nil, at(net, i))
		}
		n.Run(3 * time.Second)
		if heard(start) != len(leaves) {
			t.Errorf("%d of %d heard 3 s after they moved", heard(start), len(leaves))
		}
		if lost := n.root.core.Stats().RejectedBy(vl1.RejectSealedRate); lost > 0 {
			t.Errorf("%d HELLOs over the budget", lost)
		}
	}
	move(2)
	n.Run(time.Minute)
	records := make(map[identity.Address]vl1.PeerRecord)
	for _, r := range n.root.core.PeerRecords() {
		records[r.Identity.Address()] = r
	}
	n.Detach(n.root.port)
	n.root = newHostWith(t, n.Net, nil, n.ids[0], func(c *vl1.Config) {
		c.Planet, c.Validate = n.planet, func(*identity.Identity) error { t.Error("an identity is checked again"); return nil }
		c.StoredPeer = func(a identity.Address) *vl1.PeerRecord {
			if r, ok := records[a]; ok {
				return &r
			}
			return nil
		}
	}, rootEndpoint)
	move(3)
}

// What is known of a peer is looked at only after the MAC of a sealed HELLO, and helps then:
// the identity isn't checked again.
func TestSealedHelloOfStoredPeer(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.Detach(n.root.port)
	looked, validated := 0, 0
	stored := n.ids[2]
	n.root = newHostWith(t, n.Net, nil, n.ids[0], func(c *vl1.Config) {
		c.Planet = n.planet
		c.StoredPeer = func(a identity.Address) *vl1.PeerRecord {
			if looked++; a == stored.Address() {
				return &vl1.PeerRecord{Identity: stored.Public(), ProtocolVersion: 13}
			}
			return nil
		}
		c.Validate = func(*identity.Identity) error { validated++; return nil }
	}, rootEndpoint)
	v := newVoice(t, stored, n.ids[0])
	say := func(p packet.Packet) {
		n.root.core.Receive(n.root.w.Begin(newMeter(), n.Now), 1, ap("44.0.0.1:1"), p)
	}
	bad := v.sealedHello(t, 13, n.planet, n.ids[0])
	bad[100] ^= 1
	say(bad)
	if looked != 0 || len(n.root.core.Peers()) != 0 {
		t.Errorf("looked up %d times for a forgery, %d peers", looked, len(n.root.core.Peers()))
	}
	say(v.sealedHello(t, 13, n.planet, n.ids[0]))
	if looked != 1 || validated != 0 || n.root.core.Stats().SealedHellosIn != 1 {
		t.Errorf("looked up %d times, validated %d times, %d opened", looked, validated, n.root.core.Stats().SealedHellosIn)
	}
}

// A sealed HELLO whose identity is checked in the background is answered when that is done.
func TestSealedHelloCheckedInBackground(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.Detach(n.root.port)
	var later []func()
	n.root = newHostWith(t, n.Net, nil, n.ids[0], func(c *vl1.Config) {
		c.Planet = n.planet
		c.Validate = unchecked
		c.Background = func(f func()) { later = append(later, f) }
	}, rootEndpoint)
	for i, id := range madeIDs(t, 17) { // as many as are checked at once, and one
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{44, 0, byte(i), 1}), 1)
		n.Inject(from, rootEndpoint, newVoice(t, id, n.ids[0]).sealedHello(t, 13, n.planet, n.ids[0]))
	}
	n.Run(100 * time.Millisecond)
	if got := n.root.core.Stats().SealedHellosIn; len(later) != 1 || got != 16 {
		t.Fatalf("%d checks in the background, %d opened", len(later), got)
	}
	later[0]()
	n.Run(time.Second)
	if got := n.root.core.Stats().SealedHellosIn; got != 17 {
		t.Errorf("%d opened", got)
	}
}

// In auto, who announced that it opens sealed HELLOs gets them; who does not answer them
// gets plain ones until it is heard again, which is logged once. In always, it goes on
// without an answer.
func TestSealedFallback(t *testing.T) {
	for _, how := range []ztnode.SealedHello{ztnode.SealedHelloAuto, ztnode.SealedHelloAlways} {
		t.Run(how.String(), func(t *testing.T) {
			n := newInternet(t, 1, nats{})
			n.Detach(n.a.port)
			var log strings.Builder
			n.a = newHostWith(t, n.Net, nil, n.ids[1], func(c *vl1.Config) {
				c.Planet, c.SealedHello, c.Logger = n.planet, ztnode.SealedHelloAuto, slog.New(slog.NewJSONHandler(&log, nil))
			}, ap("8.0.0.1:9993"))
			n.online(t)
			n.a.core.SetSealedHello(how)
			// The root goes away, and comes back as one that opens none.
			lose := true
			n.Drop = func(_, _ netip.AddrPort, d []byte) bool {
				return lose && packet.Classify(d) == packet.KindPacket && packet.Packet(d).Enveloped()
			}
			n.Detach(n.root.port)
			if !n.RunUntil(3*time.Minute, func() bool { return !n.a.core.Online() }) {
				t.Fatal("online without a root")
			}
			n.Run(time.Minute)
			sealed, plain := n.hellos(n.a)
			n.root = newHost(t, n.Net, n.ids[0], n.planet, rootEndpoint)
			back := n.RunUntil(30*time.Second, func() bool { return n.a.core.Online() })
			if want := how == ztnode.SealedHelloAuto; back != want {
				t.Errorf("online: %v, %d sealed, %d plain HELLOs", back, *sealed, *plain)
			}
			if how == ztnode.SealedHelloAlways && *plain > 0 {
				t.Errorf("%d plain HELLOs", *plain)
			}
			if got := strings.Count(log.String(), "answers no sealed HELLO"); how == ztnode.SealedHelloAuto && got != 1 {
				t.Errorf("logged %d times", got)
			}
			lose = false
			if !n.RunUntil(30*time.Second, func() bool { return n.a.core.Online() }) {
				t.Error("not online once sealed HELLOs pass")
			}
		})
	}
}

// sealedHello is [voice.hello] in an envelope.
func (v *voice) sealedHello(t testing.TB, protocol byte, planet *vl1.World, to *identity.Identity) packet.Packet {
	e, err := packet.NewEnvelope(to)
	if err != nil {
		t.Fatal(err)
	}
	return v.keys.SealHello(v.hello(protocol, planet), e, &v.s)
}

// Sealed HELLOs of strangers cost a bounded number of key agreements, and no question,
// no memory and no byte in answer; and known peers are heard meanwhile.
func TestSealedFlood(t *testing.T) {
	n := newInternet(t, 1, nats{})
	for _, h := range []*host{n.root, n.a, n.b} {
		n.Detach(h.port)
	}
	n.root = sealing(t, n, n.ids[0], ztnode.SealedHelloAlways, rootEndpoint)
	n.a = sealing(t, n, n.ids[1], ztnode.SealedHelloAlways, ap("8.0.0.1:9993"))
	n.b = sealing(t, n, n.ids[2], ztnode.SealedHelloAlways, ap("8.0.0.2:9993"))
	n.connect(t, 10*time.Second)
	for name, target := range map[string]*host{"root": n.root, "leaf": n.a} {
		before, peers := target.core.Stats(), len(target.core.Peers())
		out := newMeter()
		e, err := packet.NewEnvelope(target.id)
		if err != nil {
			t.Fatal(err)
		}
		junk := packet.NewKeys([48]byte{1})
		var s packet.Scratch
		var p packet.Packet
		const seconds, each = 20, 5000
		for i := range seconds * each {
			// Envelopes that open, with forged content, in the name of anybody.
			p = append(p[:0], make([]byte, packet.HeaderLen+109)...)
			from := identity.Address(0x1000000000 + i)
			if i%3 == 0 {
				from = n.b.id.Address()
			}
			packet.PutHeader(p, packet.ID(i), target.id.Address(), from, packet.VerbHello)
			p = junk.SealHello(p, e, &s)
			src := netip.AddrPortFrom(netip.AddrFrom4([4]byte{byte(60 + i%100), byte(i >> 8), byte(i), 1}), 1)
			target.core.Receive(target.w.Begin(out, n.Now), 1, src, p)
			if i%50 == 0 {
				n.Run(10 * time.Millisecond)
			}
		}
		st := target.core.Stats()
		opened := st.RejectedBy(vl1.RejectIdentity) + st.RejectedBy(vl1.RejectMalformed) + st.RejectedBy(vl1.RejectVersion) + st.RejectedBy(vl1.RejectMAC) + st.RejectedBy(vl1.RejectSealed) -
			before.RejectedBy(vl1.RejectIdentity) - before.RejectedBy(vl1.RejectMalformed) - before.RejectedBy(vl1.RejectVersion) - before.RejectedBy(vl1.RejectMAC) - before.RejectedBy(vl1.RejectSealed)
		over := st.RejectedBy(vl1.RejectSealedRate) - before.RejectedBy(vl1.RejectSealedRate)
		t.Logf("%s: %d of %d opened", name, opened, seconds*each)
		// A core's twentieth at 100 µs each, and a second's worth at once.
		if most := uint64(500*seconds + 10000); opened > most || opened == 0 || opened+over != seconds*each {
			t.Errorf("%s: %d opened, %d over budget, of %d", name, opened, over, seconds*each)
		}
		if out.total != 0 || st.HeldQueue != 0 || len(target.core.Peers()) != peers {
			t.Errorf("%s: %d bytes sent, %d packets held, %d new peers", name, out.total, st.HeldQueue, len(target.core.Peers())-peers)
		}
		// b is heard though all time of strangers is used up, and those who use its place
		// have little of its time.
		in := target.core.Stats().SealedHellosIn
		v := newVoice(t, n.ids[2], target.id)
		for range 100 {
			target.core.Receive(target.w.Begin(out, n.Now), 1, ap("8.0.0.2:9993"), v.keys.SealHello(v.hello(13, n.planet), e, &v.s))
		}
		if got := target.core.Stats().SealedHellosIn - in; got == 0 || got > 5 {
			t.Errorf("%s: %d HELLOs of a known peer opened under a flood", name, got)
		}
	}
}

// As [TestNoAmplification], for sealed HELLOs at nodes that seal their own.
func TestNoAmplificationSealed(t *testing.T) {
	t.Parallel()
	for _, how := range []ztnode.SealedHello{ztnode.SealedHelloOff, ztnode.SealedHelloAuto, ztnode.SealedHelloAlways} {
		for _, protocol := range []byte{4, 12, 13} {
			for _, sealed := range []bool{false, true} {
				n := newInternet(t, 1, nats{})
				n.Run(time.Second)
				n.root.core.SetSealedHello(how)
				b := newBalance(n, n.root)
				v := newVoice(t, n.ids[2], n.ids[0])
				say := func() packet.Packet {
					if sealed {
						return v.sealedHello(t, protocol, n.planet, n.ids[0])
					}
					return v.hello(protocol, n.planet)
				}
				again := say()
				for i := range 60 {
					relayed := say() // so it says, which nobody vouches for
					relayed.SetHops(uint8(1 + i%3))
					b.inject(netip.AddrPortFrom(netip.AddrFrom4([4]byte{44, 1, byte(i), 1}), 9), relayed)
					b.inject(ap("44.0.0.1:666"), say())
					b.inject(netip.AddrPortFrom(netip.AddrFrom4([4]byte{45, 0, byte(i), 1}), 9), say())
					b.inject(ap("46.0.0.1:666"), again)
					n.Run(100 * time.Millisecond)
				}
				n.Run(10 * time.Second)
				total := 0
				for a, out := range b.out {
					if first := a.As4()[0]; first >= 44 && first <= 46 {
						total += out
						if out > b.in[a] {
							t.Errorf("%v, protocol %d, sealed %v: %v got %d bytes for %d", how, protocol, sealed, a, out, b.in[a])
						}
					}
				}
				if total == 0 {
					t.Errorf("%v, protocol %d, sealed %v: not even an answer", how, protocol, sealed)
				}
			}
		}
	}
}

// One source network has so many sealed HELLOs opened, and leaves the others theirs.
func TestSealedFloodOfOneNetwork(t *testing.T) {
	n := newInternet(t, 1, nats{})
	e, err := packet.NewEnvelope(n.root.id)
	if err != nil {
		t.Fatal(err)
	}
	junk, out := packet.NewKeys([48]byte{1}), newMeter()
	var s packet.Scratch
	say := func(i int, from string) {
		p := packet.Packet(make([]byte, packet.HeaderLen+109, 200))
		packet.PutHeader(p, packet.ID(i), n.root.id.Address(), identity.Address(0x1000000000+i), packet.VerbHello)
		n.root.core.Receive(n.root.w.Begin(out, n.Now), 1, ap(from), junk.SealHello(p, e, &s))
	}
	before := n.root.core.Stats().RejectedBy(vl1.RejectSealedRate)
	over := func() uint64 { return n.root.core.Stats().RejectedBy(vl1.RejectSealedRate) - before }
	const tries, burst, each = 400, 256, 50
	for i := range tries {
		say(i, fmt.Sprintf("70.1.2.%d:9", i%200))
	}
	if over() != tries-burst {
		t.Errorf("%d of %d refused at once, want %d", over(), tries, tries-burst)
	}
	if say(tries, "70.1.3.1:9"); over() != tries-burst {
		t.Error("another network is refused")
	}
	n.Run(time.Second)
	before = n.root.core.Stats().RejectedBy(vl1.RejectSealedRate)
	for i := range tries {
		say(1000+i, "70.1.2.3:9")
	}
	if got := tries - over(); got < each-1 || got > each+1 {
		t.Errorf("%d opened a second later, want %d", got, each)
	}
}

// Identities in sealed HELLOs of one source network are checked as rarely as those in plain ones.
func TestManySealedIdentitiesFromOneNetwork(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.Detach(n.root.port)
	validated := 0
	n.root = newHostWith(t, n.Net, nil, n.ids[0], func(c *vl1.Config) {
		c.Planet, c.Validate = n.planet, func(*identity.Identity) error { validated++; return nil }
	}, rootEndpoint)
	out := newMeter()
	for _, id := range madeIDs(t, 60) {
		n.root.core.Receive(n.root.w.Begin(out, n.Now), 1, ap("70.1.2.3:9"), newVoice(t, id, n.ids[0]).sealedHello(t, 13, n.planet, n.ids[0]))
	}
	if got := n.root.core.Stats().RejectedBy(vl1.RejectRate); validated != 8 || got != 52 {
		t.Errorf("%d identities of 60 were checked, %d refused", validated, got)
	}
}

// What a forged sealed HELLO costs is in the time of strangers, all of it: that of opening it, and that
// of the key agreement with the identity in it.
func TestSealedHelloIsPaidFor(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.Detach(n.root.port)
	asked := 0
	n.root = newHostWith(t, n.Net, nil, n.ids[0], func(c *vl1.Config) {
		c.Planet, c.Clock = n.planet, func() time.Duration { asked++; return 0 }
	}, rootEndpoint)
	e, err := packet.NewEnvelope(n.ids[0])
	if err != nil {
		t.Fatal(err)
	}
	v := newVoice(t, n.ids[2], n.ids[0])
	v.keys = packet.NewKeys([48]byte{1})
	asked = 0
	n.root.core.Receive(n.root.w.Begin(newMeter(), n.Now), 1, ap("70.1.2.3:9"), v.keys.SealHello(v.hello(13, n.planet), e, &v.s))
	if got := n.root.core.Stats().RejectedBy(vl1.RejectMAC); got != 1 || asked != 2*2 {
		t.Errorf("%d refused because of the MAC; the clock was asked %d times, want twice for each of two agreements", got, asked)
	}
}
