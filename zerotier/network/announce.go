package network

import (
	"maps"
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

const (
	maxLikesPerPacket = 400
	maxContactsTold   = 64 // specialists of a network, those that are kept in contact
)

// subscribed reports whether the host, or one bridged behind it, wants a group.
func (n *joined) subscribed(g vl2.MulticastGroup) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.behind[g]; ok {
		return true
	}
	return slices.Contains(n.hostGroups, g) || slices.Contains(n.resolutionGroups(), g)
}

// resolutionGroups are the groups in which others look for our addresses.
func (n *joined) resolutionGroups() (out []vl2.MulticastGroup) {
	for _, p := range n.snap.Load().ownAddresses() {
		out = append(out, vl2.ResolutionGroup(p.Addr()))
	}
	return out
}

// ownGroupsLocked lists everything we announce.
func (n *joined) ownGroupsLocked(s *state) map[vl2.MulticastGroup]bool {
	all := make(map[vl2.MulticastGroup]bool)
	for _, g := range n.hostGroups {
		all[g] = true
	}
	for _, g := range n.resolutionGroups() {
		all[g] = true
	}
	for g := range n.behind {
		all[g] = true
	}
	if s.cfg.Broadcast() {
		all[vl2.MulticastGroup{MAC: vl2.BroadcastMAC}] = true
	}
	return all
}

// announcing is when all our groups were and will be announced to a node.
type announcing struct{ last, due time.Time }

// hurry makes an announcement due soon, but for a node that wants them all the time.
func (a *announcing) hurry(now time.Time) {
	if a.last.IsZero() {
		return // it is due anyway
	}
	at := a.last.Add(announceGap)
	if at.Before(now) {
		at = now
	}
	if at.Before(a.due) {
		a.due = at
	}
}

// done notes an announcement. again says that it may have been in vain.
func (a *announcing) done(now time.Time, every time.Duration, again bool) {
	a.last, a.due = now, now.Add(every)
	if again {
		a.due = now.Add(announceAgain)
	}
}

// announceDue announces new groups at once and all groups every minute (chapter
// 03 §5.2).
func (n *joined) announceDue(w *vl1.Worker) {
	s := n.snap.Load()
	if !s.open {
		return
	}
	upstream := n.upstreamRecipients(s)
	n.mu.Lock()
	look := w.Now().Sub(n.lastMembers) >= memberCheck
	if look {
		n.lastMembers = w.Now()
	}
	var fresh []vl2.MulticastGroup
	if look || n.groupsChanged || n.announced == nil {
		own := n.ownGroupsLocked(s)
		for g := range own {
			if !n.announced[g] {
				fresh = append(fresh, g)
			}
		}
		n.groupsChanged, n.announced = false, own
	}
	every := slices.Collect(maps.Keys(n.announced))
	greets := n.greets
	n.greets = nil
	for _, m := range greets {
		m.greeting = false
	}
	maps.DeleteFunc(n.told, func(a identity.Address, _ announcing) bool { return !slices.Contains(upstream, a) })
	n.mu.Unlock()
	for _, a := range upstream {
		n.announceUpstream(w, s, a, fresh, every)
	}
	if look || len(fresh) > 0 {
		for _, a := range n.memberAddresses() {
			if m := n.member(a); m != nil && n.gate(w, s, a) {
				n.announceTo(w, s, m, upstream, fresh, every)
			}
		}
	}
	for _, m := range greets {
		if n.gate(w, s, m.addr) {
			n.announceTo(w, s, m, upstream, nil, every)
		}
	}
}

// announceUpstream tells a node that keeps groups for others all of ours if that is
// due, else the new ones. What is new is told again soon, lest one lost packet makes
// others wait for a minute; and nothing counts as told while it can't be.
func (n *joined) announceUpstream(w *vl1.Worker, s *state, a identity.Address, fresh, every []vl2.MulticastGroup) {
	n.mu.Lock()
	t := n.told[a]
	first, due := t.last.IsZero(), !w.Now().Before(t.due)
	reachable := n.l.peers.Reachable(a)
	switch {
	case !reachable && len(fresh) > 0:
		t.due = w.Now()
	case !reachable:
	case due:
		t.done(w.Now(), n.pace(s).announce, first || len(fresh) > 0)
		fresh = every
	case len(fresh) > 0 && t.due.Sub(w.Now()) > announceAgain:
		t.due = w.Now().Add(announceAgain)
	}
	if n.told == nil {
		n.told = make(map[identity.Address]announcing)
	}
	n.told[a] = t
	n.mu.Unlock()
	if !reachable || len(fresh) == 0 {
		return
	}
	if a != n.id.Controller() && !n.l.peers.IsUpstream(a) { // anyone else asks for a certificate
		if m := n.ensureMember(a, w.Now()); m != nil {
			m.used.Store(n.l.instant(w.Now()))
			n.prove(w, m, s)
		}
	}
	n.announce(w, a, fresh)
}

// announceTo tells a member that passed the gate all groups if that is due, else the
// new ones.
func (n *joined) announceTo(w *vl1.Worker, s *state, m *member, upstream []identity.Address, fresh, every []vl2.MulticastGroup) {
	if slices.Contains(upstream, m.addr) {
		return
	}
	m.mu.Lock()
	due := !w.Now().Before(m.likes.due)
	m.mu.Unlock()
	if due {
		fresh = every
	}
	proved := false
	if len(fresh) > 0 {
		proved = n.prove(w, m, s)
		n.announce(w, m.addr, fresh)
	}
	m.mu.Lock()
	if due {
		m.likes.done(w.Now(), n.pace(s).announce, proved)
	}
	soon := m.likes.due.Sub(w.Now()) < memberCheck
	m.mu.Unlock()
	if soon {
		n.greet(m) // again, until it is done
	}
}

// prove pushes our credentials to a node that may have none of us, or old ones: it
// ignores announcements without. It reports whether it did.
func (n *joined) prove(w *vl1.Worker, m *member, s *state) bool {
	last := m.lastPush.Load()
	lifetime := time.Duration(min(s.cfg.TimeDelta, maxTimeDelta)) * time.Millisecond
	if s.cfg.COM == nil || last != 0 && since(n.l.instant(w.Now()), last) < lifetime/4 {
		return false
	}
	n.push(w, m, s)
	return true
}

// inVain notes that a node may not have taken what was announced to it: for lack of a
// valid certificate, or because it was started anew.
func (n *joined) inVain(a identity.Address, now time.Time) {
	n.mu.Lock()
	if t, ok := n.told[a]; ok {
		t.hurry(now)
		n.told[a] = t
	}
	n.mu.Unlock()
	if m := n.member(a); m != nil {
		m.mu.Lock()
		m.likes.hurry(now)
		m.mu.Unlock()
		n.greet(m)
	}
}

// greet notes that a member passed the gate: it is told our groups (chapter 03
// §3.11).
func (n *joined) greet(m *member) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !m.greeting && len(n.greets) < maxGreets { // else the periodic check finds it
		m.greeting = true
		n.greets = append(n.greets, m)
	}
}

func (n *joined) announce(w *vl1.Worker, a identity.Address, groups []vl2.MulticastGroup) {
	for part := range slices.Chunk(groups, maxLikesPerPacket) {
		var b []byte
		for _, g := range part {
			b = g.Append(n.id.Append(b))
		}
		n.l.peers.Send(w, a, packet.VerbMulticastLike, b, vl1.SendOpts{Compress: true})
	}
}

// upstreamRecipients are the nodes that keep a network's groups for others.
func (n *joined) upstreamRecipients(s *state) []identity.Address {
	out := n.l.peers.Upstreams()
	add := func(a identity.Address) {
		if a != n.l.self && !a.Reserved() && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	add(n.id.Controller())
	for _, a := range s.contacts {
		add(a)
	}
	return out
}
