package controller

import (
	"errors"
	"testing"
	"time"

	"ztgate/zerotier/ztnode"
)

// hearing is a controller whose news are heard.
type hearing struct {
	*rig
	heard []ztnode.MemberEvent
	deaf  bool
}

func newHearing(t *testing.T) *hearing {
	h := &hearing{rig: newRig(t)}
	h.c.cfg.OnMember = func(e ztnode.MemberEvent) bool {
		if h.deaf {
			return false
		}
		h.heard = append(h.heard, e)
		return true
	}
	return h
}

// told returns the kinds of what was told since the last call.
func (h *hearing) told() (kinds string) {
	for _, e := range h.heard {
		kinds += e.Kind + " " + e.Address.String() + ";"
	}
	h.heard = nil
	return kinds
}

func (h *hearing) expect(what, want string) {
	h.t.Helper()
	if got := h.told(); got != want {
		h.t.Errorf("%s: told %q, want %q", what, got, want)
	}
}

// TestMembersAreTold: once that a node asks, once that it is in, and again when it
// comes back.
func TestMembersAreTold(t *testing.T) {
	h := newHearing(t)
	n := h.create(nil)
	alice := h.addr("alice").String()
	requested, joined := ztnode.MemberRequested+" "+alice+";", ztnode.MemberJoined+" "+alice+";"
	h.join("alice", n.ID)
	if e := h.heard[0]; e.Network != n.ID || e.NetworkName != "test" || e.Identity != h.ids["alice"].Public().String() || e.Version != "1.16.0" || !e.At.Equal(h.now.Add(-time.Millisecond)) {
		t.Errorf("%+v", e)
	}
	h.expect("a request", requested)
	for range 20 {
		h.join("alice", n.ID)
	}
	h.expect("it goes on asking", "")
	for range 30 * int(remindEvery/time.Minute) {
		h.join("alice", n.ID)
	}
	h.expect("it still waits", requested)
	h.authorize(n.ID, "alice")
	h.advance(time.Second)
	h.expect("it is let in", joined)
	h.join("alice", n.ID)
	h.expect("it asks for news", "")
	h.now = h.now.Add(2 * onlineFor)
	h.advance(sweepInterval)
	h.join("alice", n.ID)
	h.expect("it comes back", joined)

	// Nobody is asked about a decision that was made.
	h.update(n.ID, h.addr("alice"), func(m *Member) { m.Authorized = false })
	h.join("alice", n.ID)
	h.expect("it was removed", "")
	if err := h.c.DeleteMember(n.ID, h.addr("alice")); err != nil {
		t.Fatal(err)
	}
	h.join("alice", n.ID)
	h.expect("it was forgotten", requested)

	// What nobody could take is told at the next request.
	h.deaf = true
	h.join("bob", n.ID)
	h.join("bob", n.ID)
	h.deaf = false
	h.join("bob", n.ID)
	h.expect("no room at first", ztnode.MemberRequested+" "+h.addr("bob").String()+";")

	// Another node with the address of a member is nobody's question.
	h.update(n.ID, h.addr("carol"), func(m *Member) { m.Name = "carol" })
	h.c.networks[n.ID].members[h.addr("carol")].rec.Identity = h.ids["bob"].Public().String()
	h.join("carol", n.ID)
	h.expect("another identity", "")
}

// TestAdmit: the answer is for the node that asked, and not against the administrator.
func TestAdmit(t *testing.T) {
	h := newHearing(t)
	n := h.create(nil)
	h.join("alice", n.ID)
	e := h.heard[0]
	let := func(e ztnode.MemberEvent) error {
		_, err := h.c.Admit(e, func(m *Member) error { return m.Patch([]byte(`{"authorized":true,"name":"laptop"}`)) })
		return err
	}
	other := e
	other.Identity = h.ids["bob"].Public().String()
	if err := let(other); !errors.Is(err, ErrInvalid) {
		t.Errorf("another node: %v", err)
	}
	if err := let(e); err != nil {
		t.Fatal(err)
	}
	if m, _ := h.c.Member(n.ID, e.Address); !m.Authorized || m.Name != "laptop" {
		t.Errorf("%+v", m)
	}
	if _, err := h.c.Admit(e, func(m *Member) error { return m.Patch([]byte(`{"authorized":false}`)) }); !errors.Is(err, ErrInvalid) {
		t.Errorf("a member that was let in meanwhile: %v", err)
	}
	if m, _ := h.c.Member(n.ID, e.Address); !m.Authorized {
		t.Error("the answer took away what an administrator gave")
	}
	h.update(n.ID, e.Address, func(m *Member) { m.Authorized = false })
	if err := let(e); !errors.Is(err, ErrInvalid) {
		t.Errorf("a removed member: %v", err)
	}
	if err := h.c.DeleteNetwork(n.ID); err != nil {
		t.Fatal(err)
	}
	if err := let(e); !errors.Is(err, ErrNotFound) {
		t.Errorf("a network that is gone: %v", err)
	}
}

func TestPresence(t *testing.T) {
	h := newHearing(t)
	n := h.create(nil)
	alice := h.addr("alice")
	expect := func(what string, want Presence) {
		t.Helper()
		if got := h.c.Presence(n.ID, alice); got != want {
			t.Errorf("%s: %+v, want %+v", what, got, want)
		}
	}
	expect("unknown", Presence{})
	h.authorize(n.ID, "alice")
	expect("not asked yet", Presence{})
	h.update(n.ID, alice, func(m *Member) { m.Authorized = false })
	h.join("alice", n.ID)
	last := h.now.Add(-time.Millisecond)
	expect("asked", Presence{Asked: true, Last: last})
	h.authorize(n.ID, "alice")
	expect("let in, and not told yet", Presence{Asked: true, Last: last})
	h.advance(time.Second)
	expect("in", Presence{Asked: true, Last: last, Served: true})
	if !h.c.Presence(n.ID, alice).Online() {
		t.Error("not online")
	}
	h.update(n.ID, alice, func(m *Member) { m.Authorized = false })
	expect("out", Presence{Asked: true, Last: last})
	h.now = h.now.Add(2 * onlineFor)
	expect("gone", Presence{Asked: true})
	if got := h.c.Presence(n.ID+1, alice); got != (Presence{}) {
		t.Errorf("no such network: %+v", got)
	}
}
