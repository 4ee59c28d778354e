package controller

import (
	"slices"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
)

func TestDeauthorize(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	r.authorize(n.ID, "alice", "bob", "carol")
	r.join("carol", n.ID)
	r.advance(onlineFor) // carol is offline now
	before := r.config(r.join("alice", n.ID), "alice", false)
	r.join("bob", n.ID)
	r.join("dave", n.ID) // never authorised

	m := r.update(n.ID, r.addr("alice"), func(m *Member) { m.Authorized = false })
	if m.LastDeauthorizedTime == 0 || len(m.IPAssignments) != 1 {
		t.Errorf("record %+v", m)
	}
	if r.c.Authorized(n.ID, r.addr("alice"), r.now) {
		t.Error("still authorized")
	}
	r.advance(pushInterval)
	out := r.take()
	for name, want := range map[string]int{"alice": 1, "bob": 1, "carol": 0, "dave": 0} {
		if got := r.revoked(out, name); len(got) != want || want == 1 && got[0] != r.addr("alice") {
			t.Errorf("%s was told %v", name, got)
		}
	}
	if len(out) != 2 || len(out[0].payload) != 161 || out[0].compress {
		t.Errorf("sent %v", out)
	}
	creds, _ := vl2.ParseCredentials(out[0].payload)
	if v := creds[0].(*vl2.Revocation); v.Threshold < before.Timestamp || v.Type != vl2.TypeCOM {
		t.Errorf("revocation %+v", v)
	}
	var known vl2.Membership
	known.Offer(nil, before.COM)
	if known.Offer(nil, creds[0]); !known.Revoked() {
		t.Error("the certificate is not void")
	}
	r.refused(r.join("alice", n.ID), "alice", packet.ErrorNetworkAccessDenied)

	// One that returns is told, also after a restart, once.
	r.restart()
	back := r.join("carol", n.ID)
	r.config(back, "carol", false)
	if got := r.revoked(back, "carol"); !slices.Equal(got, []identity.Address{r.addr("alice")}) {
		t.Errorf("carol was told %v", got)
	}
	if got := r.revoked(r.join("carol", n.ID), "carol"); len(got) != 0 {
		t.Errorf("carol was told again %v", got)
	}

	// Authorised again: a newer certificate, and no revocation any more.
	r.join("alice", n.ID)
	r.authorize(n.ID, "alice")
	r.advance(pushInterval)
	after := r.config(r.take(), "alice", true)
	if known.Offer(nil, after.COM) != vl2.OfferNew || known.Revoked() {
		t.Error("the new certificate is void")
	}
	if got := r.revoked(r.join("bob", n.ID), "bob"); len(got) != 0 {
		t.Errorf("bob was told %v", got)
	}
}

func TestRevocationsExpire(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	r.authorize(n.ID, "alice", "bob")
	r.update(n.ID, r.addr("alice"), func(m *Member) { m.Authorized = false })
	r.advance(defaultTimeDelta*time.Millisecond + time.Second)
	if got := r.revoked(r.join("bob", n.ID), "bob"); len(got) != 0 {
		t.Errorf("bob was told %v", got)
	}
}

// TestRevocationsAreSpaced: receivers drop a second packet within a second.
func TestRevocationsAreSpaced(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	r.authorize(n.ID, "alice", "bob", "carol")
	r.join("bob", n.ID)
	r.update(n.ID, r.addr("alice"), func(m *Member) { m.Authorized = false })
	r.advance(time.Millisecond)
	if got := r.revoked(r.take(), "bob"); len(got) != 1 {
		t.Fatalf("bob was told %v", got)
	}
	if err := r.c.DeleteMember(n.ID, r.addr("carol")); err != nil {
		t.Fatal(err)
	}
	for i := range identity.Address(100) {
		r.update(n.ID, 0x1000000000+i, func(m *Member) { m.Authorized = true })
		if err := r.c.DeleteMember(n.ID, 0x1000000000+i); err != nil {
			t.Fatal(err)
		}
	}
	r.advance(900 * time.Millisecond)
	if got := r.revoked(r.take(), "bob"); len(got) != 0 {
		t.Errorf("%d within a second", len(got))
	}
	r.advance(300 * time.Millisecond)
	if got := r.revoked(r.take(), "bob"); len(got) != maxPerPacket {
		t.Errorf("%d in the second packet", len(got))
	}
	r.advance(time.Second)
	if got := r.revoked(r.take(), "bob"); len(got) != 101-maxPerPacket {
		t.Errorf("%d in the third packet", len(got))
	}
	if r.advance(time.Minute); len(r.c.outboxes) != 0 {
		t.Error("an empty outbox stays")
	}
}

// TestRevocationsAreRepeated: nobody acknowledges them.
func TestRevocationsAreRepeated(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	r.authorize(n.ID, "alice", "bob")
	r.join("bob", n.ID)
	r.update(n.ID, r.addr("alice"), func(m *Member) { m.Authorized = false })
	sent := 0
	for second := range 60 {
		for range 10 {
			r.advance(100 * time.Millisecond)
			for range r.revoked(r.take(), "bob") {
				if sent++; sent == 3 && second > 15 {
					t.Errorf("the third one after %d s", second)
				}
			}
		}
		if want := map[int]int{0: 1, 2: 2, 20: 3}[second]; want != 0 && sent != want {
			t.Errorf("after %d s it was sent %d times, want %d", second+1, sent, want)
		}
	}
	if sent != 3 || len(r.c.outboxes) != 0 {
		t.Errorf("sent %d times, %d outboxes are left", sent, len(r.c.outboxes))
	}
}

func TestDeleteNetwork(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	r.authorize(n.ID, "alice", "bob")
	r.join("alice", n.ID)
	if err := r.c.DeleteNetwork(n.ID); err != nil {
		t.Fatal(err)
	}
	r.advance(time.Millisecond)
	if got := r.revoked(r.take(), "alice"); len(got) != 2 {
		t.Errorf("alice was told %v", got)
	}
	r.refused(r.join("alice", n.ID), "alice", packet.ErrorObjectNotFound)
	r.restart()
	if len(r.c.Networks()) != 0 || r.c.Members(n.ID) != nil {
		t.Error("the network is back")
	}
	if _, err := r.c.CreateNetwork(Network{ID: n.ID, Private: true}); err != nil {
		t.Fatal(err)
	}
	if len(r.c.Members(n.ID)) != 0 {
		t.Error("members are back")
	}
}

func TestChangesArePushed(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	r.authorize(n.ID, "alice", "bob")
	r.join("alice", n.ID)
	r.join("bob", n.ID)
	if _, err := r.c.UpdateNetwork(n.ID, func(n *Network) error { n.MTU = 1400; return nil }); err != nil {
		t.Fatal(err)
	}
	r.advance(pushInterval)
	out := r.take()
	if a, b := r.config(out, "alice", true), r.config(out, "bob", true); a.MTU != 1400 || b.MTU != 1400 || a.Revision != 2 {
		t.Errorf("pushed %+v, %+v", a, b)
	}
	// All learn of a new bridge.
	r.update(n.ID, r.addr("alice"), func(m *Member) { m.ActiveBridge = true })
	r.advance(time.Second)
	if cfg := r.config(r.take(), "bob", true); !cfg.IsBridge(r.addr("alice")) {
		t.Error("bob doesn't know the bridge")
	}
	r.update(n.ID, r.addr("alice"), func(*Member) {})
	r.advance(onlineFor)
	if out := r.take(); len(out) != 0 {
		t.Errorf("sent %v for no change", out)
	}
	r.update(n.ID, r.addr("alice"), func(m *Member) { m.Name = "x" })
	r.advance(time.Second)
	if out := r.take(); len(out) != 0 {
		t.Errorf("sent %v to nodes that are offline", out)
	}
}

// TestChangesPutOffRequests: who is told of changes again and again asks for nothing in
// between, and is told of the next one all the same.
func TestChangesPutOffRequests(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	r.authorize(n.ID, "alice", "bob")
	r.join("alice", n.ID)
	r.join("bob", n.ID)
	for i := range 4 {
		r.advance(onlineFor - time.Second)
		mtu := 1400 + i
		if _, err := r.c.UpdateNetwork(n.ID, func(n *Network) error { n.MTU = mtu; return nil }); err != nil {
			t.Fatal(err)
		}
		r.advance(pushInterval)
		if cfg := r.config(r.take(), "bob", true); cfg.MTU != mtu {
			t.Errorf("change %d: pushed %+v", i, cfg)
		}
	}
	r.update(n.ID, r.addr("alice"), func(m *Member) { m.Authorized = false })
	r.advance(time.Second)
	if got := r.revoked(r.take(), "bob"); !slices.Equal(got, []identity.Address{r.addr("alice")}) {
		t.Errorf("bob was told of revocations of %v", got)
	}
	// What was sent meanwhile may be lost: a node that didn't ask for so long is told again.
	back := r.join("bob", n.ID)
	if got := r.revoked(back, "bob"); !slices.Equal(got, []identity.Address{r.addr("alice")}) {
		t.Errorf("back, bob was told of revocations of %v", got)
	}
	r.advance(onlineFor)
	r.take() // the revocation, at its pace
	if _, err := r.c.UpdateNetwork(n.ID, func(n *Network) error { n.MTU = 1500; return nil }); err != nil {
		t.Fatal(err)
	}
	r.advance(time.Second)
	if out := r.take(); len(out) != 0 {
		t.Errorf("sent %v to nodes that are offline", out)
	}
}

func TestUnauthorizedRecordsAreBounded(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	base := identity.Address(0x2000000000)
	net := r.c.networks[n.ID]
	for i := range identity.Address(maxUnauthorized) {
		net.put(newMember(n.ID, base+i, r.now.UnixMilli()+int64(i)))
	}
	r.update(n.ID, base, func(m *Member) { m.Name = "kept" })
	r.update(n.ID, base+1, func(m *Member) { m.Authorized = true })
	r.join("alice", n.ID) // one was authorised, so there is room
	r.join("bob", n.ID)
	for a, want := range map[identity.Address]bool{
		base: true, base + 1: true, base + 2: false, base + 3: true, r.addr("alice"): true, r.addr("bob"): true,
	} {
		if _, ok := r.c.Member(n.ID, a); ok != want {
			t.Errorf("member %s: %v", a, ok)
		}
	}
	if net.strangers != maxUnauthorized || r.c.Stats().Evicted != 1 {
		t.Errorf("%d records, %+v", net.strangers, r.c.Stats())
	}
}

// A public network takes no more members by their requests than there may be records.
func TestRecordsAreBounded(t *testing.T) {
	r := newRig(t)
	n := r.create(func(n *Network) { n.Private = false })
	net := r.c.networks[n.ID]
	for i := range identity.Address(maxMembers) {
		net.members[0x2000000000+i] = &member{}
	}
	r.join("alice", n.ID)
	if _, ok := r.c.Member(n.ID, r.addr("alice")); ok || len(net.members) != maxMembers || r.c.Stats().Overflow != 1 {
		t.Errorf("taken %v, %d records, %+v", ok, len(net.members), r.c.Stats())
	}
}

func TestQueueIsBounded(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	for i := range identity.Address(2 * maxQueue) {
		r.c.asked[memberKey{n.ID, 0x3000000000 + i}] = r.now
	}
	r.c.queue = make([]request, maxQueue)
	r.c.HandleRequest(r.ids["alice"], 1, n.ID, nil)
	if len(r.c.queue) != maxQueue || r.c.Stats().Overflow != 1 {
		t.Errorf("%d in the queue, %+v", len(r.c.queue), r.c.Stats())
	}
	r.c.queue = nil
	r.now = r.now.Add(sweepInterval)
	r.advance(sweepInterval)
	if len(r.c.asked) != 0 {
		t.Errorf("%d gates stay", len(r.c.asked))
	}
}
