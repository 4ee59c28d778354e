package vl1_test

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
)

// Two nodes with one identity notice each other, wherever they are, and say where the other
// is; somebody else's root that leads everything to one of them is enough for that one.
func TestDuplicateIdentity(t *testing.T) {
	for name, behind := range map[string]nats{"open": {}, "behind NATs": portRestricted} {
		n := newInternet(t, 1, behind)
		n.connect(t, 10*time.Second)
		clone := newHostWith(t, n.Net, nil, n.ids[1], func(c *vl1.Config) { c.Planet = n.planet }, ap("8.0.0.50:9993"))
		if !n.RunUntil(3*time.Minute, func() bool {
			n.exchange(500 * time.Millisecond)
			return !n.a.core.Duplicate().At.IsZero() && !clone.core.Duplicate().At.IsZero()
		}) {
			t.Fatalf("%s: seen by A %+v, by the clone %+v", name, n.a.core.Duplicate(), clone.core.Duplicate())
		}
		if d := n.a.core.Duplicate(); d.Endpoint != ap("8.0.0.50:9993") || d.Collision || n.Now.Sub(d.At) > time.Minute {
			t.Errorf("%s: A sees %+v", name, d)
		}
		where := netip.MustParseAddr("8.0.0.1")
		if n.natA != nil {
			where = netip.MustParseAddr("9.0.0.1")
		}
		if d := clone.core.Duplicate(); d.Endpoint.Addr() != where {
			t.Errorf("%s: the clone sees %+v", name, d)
		}
		n.Detach(clone.port)
		n.Run(5 * time.Minute)
		last := n.a.core.Duplicate().At
		n.Run(5 * time.Minute)
		if n.a.core.Duplicate().At != last {
			t.Errorf("%s: still seen after it went", name)
		}
	}
}

// A node that is alone sees nobody: neither itself by its other socket or its former
// address, nor itself of before a restart, nor what was captured or forged.
func TestNoDuplicate(t *testing.T) {
	n := newInternet(t, 2, nats{})
	var captured [][]byte
	n.Drop = func(from, _ netip.AddrPort, d []byte) bool {
		if p := packet.Packet(d); packet.Classify(d) == packet.KindPacket && p.Source() == p.Destination() && len(captured) < 100 {
			captured = append(captured, bytes.Clone(d))
		}
		return false
	}
	n.connect(t, 10*time.Second)
	n.Run(10 * time.Minute)
	if len(captured) == 0 {
		t.Fatal("nobody spoke to itself")
	}
	n.Move(n.a.port, nil, ap("8.0.0.60:9993"), ap("8.0.0.60:1111"))
	n.Run(10 * time.Minute)
	n.Detach(n.a.port)
	a := newHostWith(t, n.Net, nil, n.ids[1], func(c *vl1.Config) { c.Planet = n.planet }, ap("8.0.0.1:9993"))
	for range 10 {
		for _, d := range captured {
			n.Inject(ap("77.0.0.1:9"), ap("8.0.0.1:9993"), d)
			n.Inject(rootEndpoint, ap("8.0.0.1:9993"), d)
			forged := bytes.Clone(d)
			forged[len(forged)-1] ^= 1
			n.Inject(ap("77.0.0.1:9"), ap("8.0.0.1:9993"), forged)
		}
		n.Run(time.Minute)
	}
	for _, h := range []*host{n.a, a, n.b} {
		if d := h.core.Duplicate(); !d.At.IsZero() {
			t.Errorf("%s sees %+v", h.id.Address(), d)
		}
	}
	if a.core.Stats().RejectedBy(vl1.RejectOwnAddress) == 0 {
		t.Error("forgeries are not counted")
	}
}

// What claims to be said by a node to itself makes a root send little.
func TestRelayedToItself(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.connect(t, 10*time.Second)
	out := newMeter()
	p := packet.Packet(make([]byte, 300))
	for range 1000 {
		packet.PutHeader(p, 1, n.a.id.Address(), n.a.id.Address(), packet.VerbHello)
		n.root.core.Receive(n.root.w.Begin(out, n.Now), 1, ap("77.0.0.1:9"), p)
		n.Run(10 * time.Millisecond)
	}
	if most := 7 * 2 * 300; out.total > most {
		t.Errorf("%d bytes sent in 10 s, want at most %d", out.total, most)
	}
}
