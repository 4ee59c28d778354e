package network_test

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"ztgate/zerotier/controller"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/network"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/simnet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

var frame = bytes.Repeat([]byte{0x45, 9}, 30)

// talk sends a frame each way and reports which arrived.
func talk(n *simnet.Net, a, b *host, id vl2.NetworkID) (atB, atA bool) {
	a.got, b.got = nil, nil
	a.write(n, id, vl2.MACOf(id, b.id.Address()), vl2.EtherTypeIPv4, frame)
	b.write(n, id, vl2.MACOf(id, a.id.Address()), vl2.EtherTypeIPv4, frame)
	n.Run(3 * time.Second)
	return b.count(frame) > 0, a.count(frame) > 0
}

func (h *host) send(n *simnet.Net, to *host, v packet.Verb, payload []byte) {
	h.core.Send(h.tx.Begin(h.port, h.port.Clock()), to.id.Address(), v, payload, vl1.SendOpts{})
}

func revocation(t *testing.T, ctl *host, id vl2.NetworkID, target identity.Address, typ uint8, cred uint32, threshold int64) *vl2.Revocation {
	r := &vl2.Revocation{ID: 7, NetworkID: id, Threshold: threshold, Flags: vl2.FlagPropagate, Target: target, Type: typ, CredentialID: cred}
	if err := r.Sign(ctl.id); err != nil {
		t.Fatal(err)
	}
	return r
}

// A revoked member is cut off both ways in the time a packet takes, although it
// asks the controller only once a minute.
func TestRevocationCutsBothWaysAtOnce(t *testing.T) {
	n, r, a, b, id := up(t)
	if x, y := talk(n, a, b, id); !x || !y {
		t.Fatal("no traffic before")
	}
	r.ctl.revoke = []identity.Address{a.id.Address()}
	if !n.RunUntil(2*time.Second, func() bool { return a.status(id) == network.StatusAccessDenied }) {
		t.Fatalf("the revoked member's status is %v", a.status(id))
	}
	if s, _ := a.layer.Network(id); s.Config != nil {
		t.Error("addresses and routes stay")
	}
	if x, y := talk(n, a, b, id); x || y {
		t.Errorf("traffic after the revocation: %v %v", x, y)
	}
	r.ctl.authorized[a.id.Address()] = true
	if !n.RunUntil(10*time.Second, func() bool { return a.status(id) == network.StatusOK }) {
		t.Fatal("not up again")
	}
	talk(n, a, b, id) // B, which still holds A's void certificate, asks for a new one
	if x, y := talk(n, a, b, id); !x || !y {
		t.Errorf("no traffic after re-authorisation: %v %v", x, y)
	}
}

// A member that is started anew between its revocation and its next authorisation, and has
// nothing to say by itself, is found again.
func TestRevokedAndStartedAnew(t *testing.T) {
	n, r, a, b, id := up(t)
	talk(n, a, b, id)
	r.ctl.revoke = []identity.Address{a.id.Address()}
	n.Run(2 * time.Second)
	at := a.port.Endpoints()[0]
	n.Detach(a.port)
	n.Run(time.Minute)
	a = newHost(t, n, a.id, r.core.Planet(), nil, at)
	r.ctl.authorized[a.id.Address()] = true
	a.join(t, n, id)
	if !n.RunUntil(10*time.Second, func() bool { return a.status(id) == network.StatusOK }) {
		t.Fatal("not up again")
	}
	n.Run(5 * time.Second)
	if !n.RunUntil(5*time.Second, func() bool {
		b.write(n, id, vl2.MACOf(id, a.id.Address()), vl2.EtherTypeIPv4, frame)
		return a.count(frame) > 0
	}) {
		t.Error("no frame of B arrives")
	}
}

// A revocation reaches members that the controller could not tell.
func TestRevocationPropagates(t *testing.T) {
	n, r, a, b, id := up(t)
	talk(n, a, b, id)
	n.Drop = func(from, to netip.AddrPort, _ []byte) bool { // the controller can't reach B
		return from == r.port.Endpoints()[0] && to == b.port.Endpoints()[0]
	}
	r.ctl.revoke = []identity.Address{a.id.Address()}
	n.Run(2 * time.Second)
	b.got = nil
	// A modified member would go on sending: what counts is that B refuses.
	a.core.Send(a.tx.Begin(a.port, n.Now), b.id.Address(), packet.VerbFrame, append(append(id.Append(nil), 8, 0), frame...), vl1.SendOpts{})
	n.Run(6 * time.Second)
	if b.count(frame) != 0 {
		t.Error("B, told by A's propagation only, still accepts A's frames")
	}
	if got := b.write(n, id, vl2.MACOf(id, a.id.Address()), vl2.EtherTypeIPv4, frame); got != 0 {
		t.Error("B still sends to A")
	}
}

// A member that no longer gets configurations is cut off when its certificate
// leaves the window, in both directions.
func TestExpiryCutsBothWays(t *testing.T) {
	n, r, a, b, id := up(t)
	r.ctl.config = func(c *vl2.NetworkConfig) {
		c.TimeDelta = 300000
		for i := range c.COM.Qualifiers {
			if c.COM.Qualifiers[i].ID == 0 {
				c.COM.Qualifiers[i].MaxDelta = 300000
			}
		}
		com, err := vl2.NewCOM(r.id, c.ID, r.core.Peer(c.Member).Identity(), c.Timestamp, 300000)
		if err != nil {
			t.Error(err)
		}
		c.COM = com
	}
	n.Run(2 * time.Minute)
	if x, y := talk(n, a, b, id); !x || !y {
		t.Fatal("no traffic before")
	}
	n.Drop = func(from, to netip.AddrPort, _ []byte) bool { // A loses the controller
		c, m := r.port.Endpoints()[0], a.port.Endpoints()[0]
		return from == c && to == m || from == m && to == c
	}
	lost := n.Now
	var inbound, outbound time.Duration
	for n.Now.Sub(lost) < 8*time.Minute {
		atB, atA := talk(n, a, b, id)
		if atB {
			inbound = n.Now.Sub(lost)
		}
		if atA {
			outbound = n.Now.Sub(lost)
		}
		n.Run(5 * time.Second)
	}
	for name, d := range map[string]time.Duration{"A to B": inbound, "B to A": outbound} {
		if d < 3*time.Minute || d > 5*time.Minute+90*time.Second {
			t.Errorf("%s worked until %v after A lost the controller", name, d)
		}
	}
	n.Drop = nil
	n.Run(2 * time.Minute)
	talk(n, a, b, id)
	if x, y := talk(n, a, b, id); !x || !y {
		t.Errorf("no traffic after A found the controller: %v %v", x, y)
	}
}

// A revoked certificate does not come back when the record had time to be forgotten.
func TestRevocationOutlivesIdleRecord(t *testing.T) {
	n, r, a, b, id := up(t)
	talk(n, a, b, id)
	s, _ := a.layer.Network(id)
	old := s.Config.COM
	r.ctl.revoke = []identity.Address{a.id.Address()}
	n.Run(20 * time.Minute) // idle records go after 15
	a.send(n, b, packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, old))
	n.Run(2 * time.Second)
	b.got = nil
	a.send(n, b, packet.VerbFrame, append(append(id.Append(nil), 8, 0), frame...))
	n.Run(6 * time.Second)
	if b.count(frame) != 0 {
		t.Error("the revoked certificate, 20 minutes old, was taken again")
	}
}

// An old configuration can't undo a revocation.
func TestOldConfigurationStaysVoid(t *testing.T) {
	n, r, a, _, id := up(t)
	s, _ := a.layer.Network(id)
	chunks, err := vl2.AppendChunks(r.id, id, s.Config.Encode(), 4711, 0)
	if err != nil {
		t.Fatal(err)
	}
	r.ctl.revoke = []identity.Address{a.id.Address()}
	n.Run(3 * time.Second)
	r.send(n, a, packet.VerbNetworkConfig, chunks[0])
	n.Run(time.Second)
	if got := a.status(id); got != network.StatusAccessDenied {
		t.Errorf("status %v after an old configuration", got)
	}
}

func capability(t *testing.T, ctl *host, id vl2.NetworkID, ts int64, chain uint8, to identity.Address) *vl2.Capability {
	c := &vl2.Capability{NetworkID: id, Timestamp: ts, ID: 5, Rules: []vl2.Rule{{Type: vl2.ActionAccept}}, MaxChain: chain}
	if err := c.Issue(ctl.id, to); err != nil {
		t.Fatal(err)
	}
	return c
}

// capLab is a network whose base table drops ethertype 0x1234 unless a capability
// allows it.
func capLab(t *testing.T) (n *simnet.Net, r, a, b *host, id vl2.NetworkID) {
	n, r, a, b, id = lab(t)
	r.ctl.authorized[a.id.Address()], r.ctl.authorized[b.id.Address()] = true, true
	r.ctl.config = func(c *vl2.NetworkConfig) {
		c.Rules = []vl2.Rule{{Type: vl2.MatchEtherType, Not: true, Field: []byte{0x12, 0x34}}, {Type: vl2.ActionAccept}}
		if c.Member == a.id.Address() {
			c.Capabilities = []*vl2.Capability{capability(t, r, id, c.Timestamp, 1, c.Member)}
		}
	}
	a.join(t, n, id)
	b.join(t, n, id)
	n.Run(3 * time.Second)
	return n, r, a, b, id
}

func TestCapabilityIsEnforcedBothWays(t *testing.T) {
	n, r, a, b, id := capLab(t)
	macA, macB := vl2.MACOf(id, a.id.Address()), vl2.MACOf(id, b.id.Address())
	talk(n, a, b, id)
	if a.write(n, id, macB, 0x1234, frame) != 1 || b.write(n, id, macA, 0x1234, frame) != 0 {
		t.Error("A, who has the capability, may send, and B may not")
	}
	a.got, b.got = nil, nil
	n.Run(2 * time.Second)
	if b.count(frame) != 1 {
		t.Errorf("B got %d frames", b.count(frame))
	}
	b.send(n, a, packet.VerbFrame, append(append(id.Append(nil), 0x12, 0x34), frame...)) // past B's own filter
	n.Run(2 * time.Second)
	if a.count(frame) != 0 {
		t.Error("A accepts from B what only A may send")
	}
	// Revoked, it is void at B at once.
	s, _ := a.layer.Network(id)
	v := revocation(t, r, id, a.id.Address(), vl2.TypeCapability, 5, s.Config.Timestamp)
	r.send(n, b, packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, v))
	n.Run(time.Second)
	b.got = nil
	a.write(n, id, macB, 0x1234, frame)
	n.Run(2 * time.Second)
	if b.count(frame) != 0 {
		t.Error("B accepts a revoked capability")
	}
	if x, _ := talk(n, a, b, id); !x {
		t.Error("the membership went with the capability")
	}
}

// The last holder's address is not signed: only the holder may present it.
func TestCapabilityOfAnotherIsRefused(t *testing.T) {
	n, r, a, b, id := capLab(t)
	talk(n, a, b, id)
	s, _ := a.layer.Network(id)
	before := b.layer.Stats().RejectedCredentials
	foreign := capability(t, r, id, s.Config.Timestamp, 1, r.id.Address())
	a.send(n, b, packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, foreign))
	n.Run(time.Second)
	if b.layer.Stats().RejectedCredentials != before+1 {
		t.Error("a capability offered by somebody else was taken")
	}
}

// A capability that its first holder passed on works for the second.
func TestCustodyChain(t *testing.T) {
	n, r, a, b, id := capLab(t)
	talk(n, a, b, id)
	s, _ := a.layer.Network(id)
	c := &vl2.Capability{NetworkID: id, Timestamp: s.Config.Timestamp, ID: 6, Rules: []vl2.Rule{{Type: vl2.ActionAccept}}}
	if err := c.IssueChain(2, r.id, a.id.Address()); err != nil {
		t.Fatal(err)
	}
	if err := c.PassOn(a.id, b.id.Address()); err != nil {
		t.Fatal(err)
	}
	b.send(n, a, packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, c))
	n.Run(time.Second)
	a.got = nil
	b.send(n, a, packet.VerbFrame, append(append(id.Append(nil), 0x12, 0x34), frame...))
	n.Run(2 * time.Second)
	if a.count(frame) != 1 {
		t.Error("the second holder's frame was not accepted")
	}
}

// Many tags and capabilities need several packets, of which receivers look at one a
// second: all arrive.
func TestLargePushArrives(t *testing.T) {
	n, r, a, b, id := lab(t)
	r.ctl.authorized[a.id.Address()], r.ctl.authorized[b.id.Address()] = true, true
	const tags = 120
	r.ctl.config = func(c *vl2.NetworkConfig) {
		c.Rules = nil // accept only what carries the last tag on both sides
		for i := range uint32(tags) {
			tag := &vl2.Tag{NetworkID: c.ID, Timestamp: c.Timestamp, ID: i, Value: 1, IssuedTo: c.Member}
			if err := tag.Sign(r.id); err != nil {
				t.Error(err)
			}
			c.Tags = append(c.Tags, tag)
		}
		for i := range uint32(20) {
			x := capability(t, r, c.ID, c.Timestamp, 1, c.Member)
			x.ID = 100 + i
			for range 40 {
				x.Rules = append(x.Rules, vl2.Rule{Type: vl2.MatchIPv6Source, Field: make([]byte, 17)}, vl2.Rule{Type: vl2.ActionDrop})
			}
			x.Rules = x.Rules[:60]
			if err := x.Issue(r.id, c.Member); err != nil {
				t.Error(err)
			}
			c.Capabilities = append(c.Capabilities, x)
		}
		c.Rules = []vl2.Rule{{Type: vl2.MatchTagsEqual, Field: []byte{0, 0, 0, tags - 1, 0, 0, 0, 1}}, {Type: vl2.ActionAccept}}
	}
	a.join(t, n, id)
	b.join(t, n, id)
	n.Run(3 * time.Second)
	s, _ := a.layer.Network(id)
	packets := s.Config.CredentialPackets()
	if len(packets) < 4 {
		t.Fatalf("the credentials fit %d packets", len(packets))
	}
	talk(n, a, b, id)
	n.Run(time.Duration(len(packets)+1) * 1100 * time.Millisecond)
	if x, y := talk(n, a, b, id); !x || !y {
		t.Errorf("tags did not arrive: %v %v", x, y)
	}
	if got := a.layer.Stats().CredentialPushes; got < uint64(len(packets)) {
		t.Errorf("%d of %d packets sent", got, len(packets))
	}
}

// Of a peer's credentials three packets are looked at at once, then one a second; a
// packet of forgeries ends at the fourth. The controller's are not limited.
func TestCredentialRate(t *testing.T) {
	n, r, a, b, id := up(t)
	talk(n, a, b, id)
	forged := func() []byte {
		var list []vl2.Credential
		for i := range uint32(50) {
			tag := &vl2.Tag{NetworkID: id, Timestamp: n.Now.UnixMilli(), ID: i, IssuedTo: a.id.Address()}
			if err := tag.Sign(a.id); err != nil {
				t.Fatal(err)
			}
			tag.Signer = r.id.Address()
			list = append(list, tag)
		}
		return vl2.AppendCredentials(nil, list...)
	}()
	checked := func(from *host, packets int, every time.Duration) int {
		n.Run(10 * time.Second)
		before := b.layer.Stats().BadSignatures
		for range packets {
			from.send(n, b, packet.VerbNetworkCredentials, forged)
			n.Run(every)
		}
		n.Run(100 * time.Millisecond)
		return int(b.layer.Stats().BadSignatures - before)
	}
	if got := checked(a, 1, 0); got != 4 {
		t.Errorf("%d signatures of a packet of forgeries were checked", got)
	}
	if got := checked(a, 10, 0); got != 3*4 {
		t.Errorf("%d signatures of ten packets at once were checked", got)
	}
	if got := checked(a, 100, 100*time.Millisecond); got != (3+9)*4 {
		t.Errorf("%d signatures of 100 packets in 10 s were checked", got)
	}
	if got := checked(r, 10, 0); got != 10*4 {
		t.Errorf("%d signatures of ten packets of the controller were checked", got)
	}
}

// Strangers leave nothing behind: no record, one ERROR a second, and a bounded
// number of signatures to check.
func TestStrangersAreBounded(t *testing.T) {
	n, r, a, b, id := up(t)
	talk(n, a, b, id)
	r.ctl.revoke = []identity.Address{a.id.Address()} // A is a stranger now
	n.Run(2 * time.Second)
	n.Run(20 * time.Minute)
	b.peers.replies = nil
	before := b.layer.Stats()
	com, err := vl2.NewCOM(a.id, id, a.id, n.Now.UnixMilli(), 1)
	if err != nil {
		t.Fatal(err)
	}
	com.Signer = r.id.Address() // a forgery
	start := n.Now
	for range 200 {
		a.send(n, b, packet.VerbFrame, append(append(id.Append(nil), 8, 0), frame...))
		a.send(n, b, packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, com))
		n.Run(10 * time.Millisecond)
	}
	seconds := uint64(n.Now.Sub(start)/time.Second) + 1
	after := b.layer.Stats()
	if got := uint64(len(b.peers.replies)); got > seconds+1 {
		t.Errorf("%d errors in %d s", got, seconds)
	}
	if got := after.BadSignatures - before.BadSignatures; got == 0 || got > seconds+3 {
		t.Errorf("%d signatures checked in %d s", got, seconds)
	}
	if after.CredentialFlood == before.CredentialFlood {
		t.Error("nothing was counted as flood")
	}
}

// A network may name a node that is to be told what the filter does (chapter 03 §2.2).
// It is told nothing: there is no switch that turns remote trace on.
func TestNoRemoteTrace(t *testing.T) {
	b := newBoard(t, 3)
	x, y, observer := b.order[1], b.order[2], b.order[3]
	n := b.create(func(n *controller.Network) {
		n.RemoteTraceTarget, n.RemoteTraceLevel = observer.address().String(), 100
		if err := n.Patch([]byte(`{"rulesSource":"drop ethertype ipv6; accept;"}`)); err != nil {
			t.Fatal(err)
		}
	})
	told := 0
	b.drop = func(from, to identity.Address, v packet.Verb) bool {
		if v == packet.VerbRemoteTrace || to == observer.address() && from != b.root.address() {
			told++
		}
		return false
	}
	b.join(n, x, y)
	if c := x.config(n); c.TraceTarget != observer.address() || c.TraceLevel != 100 {
		t.Fatalf("the configuration names %s, level %d", c.TraceTarget, c.TraceLevel)
	}
	if at, back := b.talk(n, x, y); !at || !back {
		t.Fatal("no traffic")
	}
	x.write(n, y.mac(n), vl2.EtherTypeIPv6, frame)
	x.put(y.address(), packet.VerbFrame, append(append(n.Append(nil), 0x86, 0xdd), frame...))
	forged := &vl2.Tag{NetworkID: n, Timestamp: b.now.UnixMilli(), ID: 1, IssuedTo: x.address()}
	if err := forged.Sign(x.id); err != nil {
		t.Fatal(err)
	}
	x.put(y.address(), packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, forged))
	b.run(10*time.Second, time.Second)
	if s := y.layer.Stats(); s.Filtered == 0 || s.RejectedCredentials == 0 {
		t.Errorf("nothing to tell: %+v", s)
	}
	if told != 0 {
		t.Errorf("%d packets for the observer", told)
	}
}
