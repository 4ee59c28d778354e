package controller

import (
	"fmt"
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
	"ztgate/zerotier/ztnode"
)

// remindEvery is how often it is told again that a node waits to be authorised, since
// who was told may have been gone.
const remindEvery = 10 * time.Minute

// told is what was told last of a node that is online.
type told struct {
	kind string
	at   time.Time
}

// tell tells of a node that asked, once for each change while it is online. Of one that
// was removed nothing is told: that was a decision, and no question is left.
func (c *Controller) tell(n *network, m *member, code packet.ErrorCode, now time.Time) {
	if c.cfg.OnMember == nil || m.session == nil {
		return
	}
	kind := ztnode.MemberJoined
	switch {
	case code == packet.ErrorNetworkAccessDenied && !m.rec.removed():
		kind = ztnode.MemberRequested
	case code != 0: // it has to sign in, or is out
		return
	}
	s := m.session
	if s.told.kind == kind && (kind == ztnode.MemberJoined || now.Sub(s.told.at) < remindEvery) {
		return
	}
	d := vl2.ParseDictionary(s.metadata)
	e := ztnode.MemberEvent{Kind: kind, At: now, Network: n.rec.ID, NetworkName: n.rec.Name, Address: m.rec.Address, Identity: m.rec.Identity,
		Name: m.rec.Name, Version: fmt.Sprintf("%d.%d.%d", version(d, "majv"), version(d, "minv"), version(d, "revv")),
		Addresses: slices.Clone(m.rec.IPAssignments)}
	if c.cfg.OnMember(e) {
		s.told = told{kind, now}
	}
}

// removed reports whether an administrator took the membership away.
func (m *Member) removed() bool { return !m.Authorized && m.LastDeauthorizedTime != 0 }

// Admit changes a member that waits to be authorised, as [Controller.UpdateMember] does,
// if it is still the node that asked and nobody removed it meanwhile.
func (c *Controller) Admit(e ztnode.MemberEvent, f func(*Member) error) (Member, error) {
	return c.UpdateMember(e.Network, e.Address, func(m *Member) error {
		switch {
		case m.Identity != e.Identity:
			return fmt.Errorf("%w: another node than the one that asked", ErrInvalid)
		case m.removed():
			return fmt.Errorf("%w: it was de-authorized since it asked", ErrInvalid)
		case m.Authorized:
			return fmt.Errorf("%w: it was authorized since it asked", ErrInvalid)
		}
		return f(m)
	})
}

// Presence is how a member was seen last.
type Presence struct {
	Asked  bool      // it has asked for the network, now or ever
	Last   time.Time // when it asked last, if that is less than two minutes ago
	Served bool      // and got its configuration
}

// Online reports whether the node is there and a member.
func (p Presence) Online() bool { return !p.Last.IsZero() && p.Served }

// Presence returns how a member of a network was seen last.
func (c *Controller) Presence(nwid vl2.NetworkID, a identity.Address) Presence {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.networks[nwid]
	if n == nil || n.members[a] == nil {
		return Presence{}
	}
	m := n.members[a]
	p := Presence{Asked: m.rec.Identity != ""}
	if s := m.session; s.online(c.now()) {
		p.Last, p.Served = s.last, s.served && m.rec.Authorized
	}
	return p
}
