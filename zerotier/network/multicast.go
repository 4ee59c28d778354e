package network

import (
	"encoding/binary"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// Bounds and times of multicast (chapter 03 §5).
const (
	maxGroups         = 65536
	maxGroupMembers   = 10000
	maxMemberships    = 262144 // in all groups
	maxPeerGroups     = 4096   // of one node, all networks
	maxWaiting        = 32     // frames per group
	maxWaitingGroups  = 1024   // groups with waiting frames
	maxBehind         = 1024   // groups of hosts bridged behind us, per network
	maxGatherTargets  = 16
	groupExpiry       = 600 * time.Second
	gatherEvery       = 60 * time.Second
	gatherEmptyEvery  = time.Second
	waitingLifetime   = 5 * time.Second
	maxLikesPerPacket = 400
	maxTimeDelta      = 7200000 // ms, what a controller may set
	maxGatherAnswer   = 255     // addresses, so that the answer is one datagram
)

// ndpReply is a made-up neighbour advertisement on its way to the port.
type ndpReply struct {
	to    vl2.MAC
	reply *vl2.NDPReply
}

const maxReplies = 64

type groupKey struct {
	nwid  vl2.NetworkID
	group vl2.MulticastGroup
}

// group is who wants a multicast group of a network.
type group struct {
	members    map[identity.Address]time.Time
	lastGather time.Time
	waiting    []waitingFrame
}

// waitingFrame is a multicast that has not reached as many members as it may.
type waitingFrame struct {
	frame *multicast
	sent  map[identity.Address]bool
	born  time.Time
}

// multicast is a frame for a group. It is immutable.
type multicast struct {
	group     vl2.MulticastGroup
	source    vl2.MAC
	foreign   bool // source isn't ours
	etherType uint16
	data      []byte
	payload   []byte // of MULTICAST_FRAME
}

// groupTable holds the groups of all networks, also of networks that we serve as
// a root without having joined them.
type groupTable struct {
	mu      sync.Mutex
	m       map[groupKey]*group
	waiting map[groupKey]*group      // those with waiting frames
	perPeer map[identity.Address]int // groups a node is in
	total   int                      // memberships

	gatherEvery time.Duration
}

func (t *groupTable) init(gatherEvery time.Duration) {
	t.gatherEvery = gatherEvery
	t.m = make(map[groupKey]*group)
	t.waiting = make(map[groupKey]*group)
	t.perPeer = make(map[identity.Address]int)
}

// get returns a group, making it if there is room; nil without. t.mu is held.
func (t *groupTable) get(k groupKey) *group {
	g := t.m[k]
	if g == nil && len(t.m) < maxGroups {
		g = &group{members: make(map[identity.Address]time.Time)}
		t.m[k] = g
	}
	return g
}

// add registers a node or refreshes its registration; false if there is no room.
func (t *groupTable) add(k groupKey, a identity.Address, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if g := t.m[k]; g != nil {
		if _, ok := g.members[a]; ok {
			g.members[a] = now
			return true
		}
		if len(g.members) >= maxGroupMembers {
			return false
		}
	}
	if t.perPeer[a] >= maxPeerGroups || t.total >= maxMemberships {
		return false
	}
	g := t.get(k)
	if g == nil {
		return false
	}
	g.members[a] = now
	t.perPeer[a]++
	t.total++
	return true
}

func (t *groupTable) remove(k groupKey, a identity.Address) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if g := t.m[k]; g != nil {
		t.drop(g, a)
	}
}

// drop takes a node out of a group. t.mu is held.
func (t *groupTable) drop(g *group, a identity.Address) {
	if _, ok := g.members[a]; !ok {
		return
	}
	delete(g.members, a)
	t.total--
	if t.perPeer[a]--; t.perPeer[a] <= 0 {
		delete(t.perPeer, a)
	}
}

// list returns up to limit members in random order, without skip, and how many
// there are.
func (t *groupTable) list(k groupKey, limit int, skip identity.Address) (out []identity.Address, total int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g := t.m[k]
	if g == nil {
		return nil, 0
	}
	out = make([]identity.Address, 0, len(g.members))
	for a := range g.members {
		if a != skip {
			out = append(out, a)
		}
	}
	n := min(limit, len(out))
	for i := range n { // only what is asked for needs to be shuffled
		j := i + rand.IntN(len(out)-i)
		out[i], out[j] = out[j], out[i]
	}
	return out[:n], len(g.members)
}

func (t *groupTable) expire(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, g := range t.waiting {
		if g.dropOld(now); len(g.waiting) == 0 {
			delete(t.waiting, k)
		}
	}
	for k, g := range t.m {
		for a, at := range g.members {
			if now.Sub(at) >= groupExpiry {
				t.drop(g, a)
			}
		}
		if len(g.members) == 0 && len(g.waiting) == 0 && now.Sub(g.lastGather) >= t.gatherEvery {
			delete(t.m, k)
		}
	}
}

// dropOld drops frames that waited long enough.
func (g *group) dropOld(now time.Time) {
	g.waiting = slices.DeleteFunc(g.waiting, func(f waitingFrame) bool { return now.Sub(f.born) >= waitingLifetime })
}

// wait keeps a frame for members of a group that turn up. It reports whether it is
// time to ask who they are.
func (t *groupTable) wait(k groupKey, f waitingFrame, now time.Time) (ask bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g := t.get(k)
	if g == nil {
		return false
	}
	every := t.gatherEvery
	if len(g.members) == 0 {
		every = gatherEmptyEvery
	}
	if ask = g.lastGather.IsZero() || now.Sub(g.lastGather) >= every; ask {
		g.lastGather = now
	}
	if len(g.waiting) == 0 && len(t.waiting) >= maxWaitingGroups {
		return ask
	}
	if len(g.waiting) >= maxWaiting {
		g.waiting = slices.Delete(g.waiting, 0, 1)
	}
	g.waiting = append(g.waiting, f)
	t.waiting[k] = g
	return ask
}

// delivery is one copy of a waiting frame.
type delivery struct {
	to    identity.Address
	frame *multicast
}

// due returns what can be sent of the frames of a network that wait, in one group or
// in all if only is nil.
func (t *groupTable) due(nwid vl2.NetworkID, only *groupKey, limit int, now time.Time) (out []delivery) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, g := range t.waiting {
		if k.nwid != nwid || only != nil && k != *only {
			continue
		}
		g.dropOld(now)
		g.waiting = slices.DeleteFunc(g.waiting, func(f waitingFrame) bool { return len(f.sent) >= limit })
		for i := range g.waiting {
			f := &g.waiting[i]
			for a := range g.members {
				if !f.sent[a] && len(f.sent) < limit {
					f.sent[a] = true
					out = append(out, delivery{a, f.frame})
				}
			}
		}
		if len(g.waiting) == 0 {
			delete(t.waiting, k)
		}
	}
	return out
}

// mayUseGroups reports whether a peer may register with us and ask us (chapter 03
// §5.2).
func (l *Layer) mayUseGroups(nwid vl2.NetworkID, from *vl1.Peer, now time.Time) (member, ok bool) {
	if n := l.net(nwid); n != nil && n.gate(nil, n.snap.Load(), from.Address(), now) {
		return true, true
	}
	if l.peers.IsRoot() {
		return false, true
	}
	return false, l.cfg.Controller != nil && l.cfg.Controller.Authorized(nwid, from.Address(), now)
}

// receiveLike handles MULTICAST_LIKE. One that overtook its sender's certificate is
// kept, and the certificate asked for: the next one would come in a minute.
func (l *Layer) receiveLike(out vl1.Out, now time.Time, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
	var res vl1.Result
	var nwid vl2.NetworkID
	var allowed bool
	b := p.Payload()
	for i := 0; len(b) >= 18; i++ {
		id := vl2.NetworkIDFromBytes(b)
		g, ok := vl2.ParseGroup(b[8:])
		b = b[18:]
		if id != nwid || i == 0 {
			nwid = id
			var member bool
			member, allowed = l.mayUseGroups(nwid, from, now)
			res.Trust = res.Trust || member
			if n := l.net(nwid); !allowed && n != nil && n.mayProve(from.Address()) {
				l.needCertificate(n, out, now, from, p, src)
				res.Retry = true
			}
		}
		if !ok || !allowed || !g.MAC.IsMulticast() {
			continue
		}
		if !l.groups.add(groupKey{nwid, g}, from.Address(), now) {
			l.stats.refusedRecords.Add(1)
		}
	}
	return res
}

// mayProve reports whether a node that did not pass the gate may do so once it shows
// its certificate.
func (n *joined) mayProve(a identity.Address) bool {
	if !n.snap.Load().open {
		return false
	}
	m := n.member(a)
	if m == nil {
		return true
	}
	rec := m.record.Load()
	return rec == nil || !rec.Revoked()
}

// receiveGather handles MULTICAST_GATHER (chapter 03 §5.3).
func (l *Layer) receiveGather(out vl1.Out, now time.Time, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
	q, err := vl2.ParseGather(p.Payload())
	if err != nil {
		l.stats.malformed.Add(1)
		return vl1.Result{Skip: true}
	}
	if n := l.net(q.Network); n != nil && q.COM != nil {
		n.offer(src.Worker, out, now, from, q.COM)
	}
	member, ok := l.mayUseGroups(q.Network, from, now)
	if ok && q.Limit > 0 && l.mayGather(from, now) {
		if b := l.gatherResult(groupKey{q.Network, q.Group}, int(min(q.Limit, maxGatherAnswer)), from.Address()); b != nil {
			answer := q.Group.Append(q.Network.Append(nil))
			l.peers.SendOK(src.Worker, out, now, from, src, packet.VerbMulticastGather, p.ID(), append(answer, b...))
		}
	}
	return vl1.Result{Trust: member}
}

// mayGather limits how many answers one node gets.
func (l *Layer) mayGather(from *vl1.Peer, now time.Time) bool {
	if l.gathers.allow(from.Address(), now) {
		return true
	}
	l.stats.gatherFlood.Add(1)
	return false
}

// gatherResult encodes who is in a group, nil if nobody is (chapter 03 §5.4).
func (l *Layer) gatherResult(k groupKey, limit int, asker identity.Address) []byte {
	list, total := l.groups.list(k, limit, asker)
	if n := l.net(k.nwid); n != nil && n.subscribed(k.group) {
		list = append([]identity.Address{l.self}, list[:min(len(list), limit-1)]...)
		total++
	}
	if len(list) == 0 {
		return nil
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(total))
	b = binary.BigEndian.AppendUint16(b, uint16(len(list)))
	for _, a := range list {
		b = a.Append(b)
	}
	return b
}

// receiveGatherOK learns members of a group from the answer to our question.
func (l *Layer) receiveGatherOK(out vl1.Out, now time.Time, from *vl1.Peer, verb packet.Verb, b []byte, src vl1.Source) vl1.Result {
	if len(b) < 18 {
		l.stats.malformed.Add(1)
		return vl1.Result{}
	}
	n := l.net(vl2.NetworkIDFromBytes(b))
	g, ok := vl2.ParseGroup(b[8:])
	if n == nil || !ok || !g.MAC.IsMulticast() {
		return vl1.Result{}
	}
	b = b[18:]
	if verb == packet.VerbMulticastFrame {
		var com *vl2.COM
		var has bool
		if com, b, has = vl2.SplitFrameOK(b); com != nil {
			n.offer(src.Worker, out, now, from, com)
		}
		if !has {
			return vl1.Result{}
		}
	}
	for _, a := range vl2.ParseGatherResult(b) {
		if a != l.self && !a.Reserved() {
			l.groups.add(groupKey{n.id, g}, a, now)
		}
	}
	n.sendWaiting(src.Worker, out, now, &groupKey{n.id, g})
	return vl1.Result{}
}

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

// ownGroups lists everything we announce. n.mu is held.
func (n *joined) ownGroups(s *state) map[vl2.MulticastGroup]bool {
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
func (n *joined) announceDue(w *vl1.Worker, out vl1.Out, now time.Time) {
	s := n.snap.Load()
	if !s.open {
		return
	}
	upstream := n.upstreamRecipients(s)
	n.mu.Lock()
	look := now.Sub(n.lastMembers) >= memberCheck
	if look {
		n.lastMembers = now
	}
	var fresh []vl2.MulticastGroup
	if look || n.groupsChanged || n.announced == nil {
		own := n.ownGroups(s)
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
		n.announceUpstream(w, out, now, s, a, fresh, every)
	}
	if look || len(fresh) > 0 {
		for _, a := range n.memberAddresses() {
			if m := n.member(a); m != nil && n.gate(nil, s, a, now) {
				n.announceTo(w, out, now, s, m, upstream, fresh, every)
			}
		}
	}
	for _, m := range greets {
		if n.gate(nil, s, m.addr, now) {
			n.announceTo(w, out, now, s, m, upstream, nil, every)
		}
	}
}

// announceUpstream tells a node that keeps groups for others all of ours if that is
// due, else the new ones. What is new is told again soon, lest one lost packet makes
// others wait for a minute; and nothing counts as told while it can't be.
func (n *joined) announceUpstream(w *vl1.Worker, out vl1.Out, now time.Time, s *state, a identity.Address, fresh, every []vl2.MulticastGroup) {
	n.mu.Lock()
	t := n.told[a]
	first, due := t.last.IsZero(), !now.Before(t.due)
	reachable := n.l.peers.Reachable(a)
	switch {
	case !reachable && len(fresh) > 0:
		t.due = now
	case !reachable:
	case due:
		t.done(now, n.pace(s).announce, first || len(fresh) > 0)
		fresh = every
	case len(fresh) > 0 && t.due.Sub(now) > announceAgain:
		t.due = now.Add(announceAgain)
	}
	if n.told == nil {
		n.told = make(map[identity.Address]announcing)
	}
	n.told[a] = t
	n.mu.Unlock()
	if !reachable || len(fresh) == 0 {
		return
	}
	if a != n.id.Controller() && !n.l.peers.IsUpstream(a) { // an anchor asks for a certificate
		if m := n.ensureMember(a, now); m != nil {
			m.used.Store(now.UnixNano())
			n.prove(w, out, now, m, s)
		}
	}
	n.announce(w, out, now, a, fresh)
}

// announceTo tells a member that passed the gate all groups if that is due, else the
// new ones.
func (n *joined) announceTo(w *vl1.Worker, out vl1.Out, now time.Time, s *state, m *member, upstream []identity.Address, fresh, every []vl2.MulticastGroup) {
	if slices.Contains(upstream, m.addr) {
		return
	}
	m.mu.Lock()
	due := !now.Before(m.likes.due)
	m.mu.Unlock()
	if due {
		fresh = every
	}
	proved := false
	if len(fresh) > 0 {
		proved = n.prove(w, out, now, m, s)
		n.announce(w, out, now, m.addr, fresh)
	}
	m.mu.Lock()
	if due {
		m.likes.done(now, n.pace(s).announce, proved)
	}
	soon := m.likes.due.Sub(now) < memberCheck
	m.mu.Unlock()
	if soon {
		n.greet(m) // again, until it is done
	}
}

// prove pushes our credentials to a node that may have none of us, or old ones: it
// ignores announcements without. It reports whether it did.
func (n *joined) prove(w *vl1.Worker, out vl1.Out, now time.Time, m *member, s *state) bool {
	last := m.lastPush.Load()
	lifetime := time.Duration(min(s.cfg.TimeDelta, maxTimeDelta)) * time.Millisecond
	if s.cfg.COM == nil || last != 0 && now.UnixNano()-last < int64(lifetime/4) {
		return false
	}
	n.push(w, out, now, m, s)
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

func (n *joined) announce(w *vl1.Worker, out vl1.Out, now time.Time, a identity.Address, groups []vl2.MulticastGroup) {
	for part := range slices.Chunk(groups, maxLikesPerPacket) {
		var b []byte
		for _, g := range part {
			b = g.Append(n.id.Append(b))
		}
		n.l.peers.Send(w, out, now, a, packet.VerbMulticastLike, b, vl1.SendOpts{Compress: true})
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
	for _, a := range s.cfg.Anchors() {
		add(a)
	}
	return out
}

// receiveMulticast handles MULTICAST_FRAME (chapter 03 §4.3).
func (l *Layer) receiveMulticast(out vl1.Out, now time.Time, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
	f, err := vl2.ParseMulticastFrame(p.Payload())
	if err != nil {
		l.stats.malformed.Add(1)
		return vl1.Result{Skip: true}
	}
	n := l.net(f.Network)
	if n == nil {
		return vl1.Result{Skip: true}
	}
	if f.COM != nil {
		n.offer(src.Worker, out, now, from, f.COM)
	}
	s := n.snap.Load()
	if !s.open {
		return vl1.Result{}
	}
	if !n.gate(src.Worker, s, from.Address(), now) {
		l.needCertificate(n, out, now, from, p, src)
		return vl1.Result{Retry: true}
	}
	if s.cfg.MulticastLimit == 0 {
		return vl1.Result{}
	}
	own := vl2.MACOf(n.id, from.Address())
	source := own
	if f.HasSource {
		source = f.Source
	}
	if len(f.Data) > 0 && len(f.Data) <= packet.MaxPayload {
		if !f.Group.MAC.IsMulticast() || source.IsZero() || source.IsMulticast() || source == n.mac {
			return vl1.Result{Trust: true}
		}
		if f.Replicate && slices.Contains(s.replicators, l.self) {
			n.replicate(src.Worker, out, now, s, from.Address(), source, &f)
		}
		if source != own {
			if !s.cfg.IsBridge(from.Address()) {
				return vl1.Result{Trust: true}
			}
			n.learnBridge(source, from.Address(), now)
		}
		if n.filterIn(s, src, out, now, from.Address(), f.Group.MAC, source, f.EtherType, f.Data) != vl2.FilterDrop {
			l.deliver(src, n, s, f.Group.MAC, source, f.EtherType, f.Data)
		} else {
			l.stats.filtered.Add(1)
		}
	}
	if f.GatherLimit > 0 && l.mayGather(from, now) {
		if b := l.gatherResult(groupKey{n.id, f.Group}, int(min(f.GatherLimit, maxGatherAnswer)), from.Address()); b != nil {
			answer := append(f.Group.Append(n.id.Append(nil)), 0x02)
			l.peers.SendOK(src.Worker, out, now, from, src, packet.VerbMulticastFrame, p.ID(), append(answer, b...))
		}
	}
	return vl1.Result{Trust: true}
}

// writeMulticast sends a frame of the host to a group (chapter 03 §5.7, §5.5).
func (n *joined) writeMulticast(w *vl1.Worker, out vl1.Out, now time.Time, s *state, dst, from vl2.MAC, etherType uint16, data []byte) bool {
	g, ok := vl2.GroupOf(dst, etherType, data)
	if !ok && !s.cfg.Broadcast() {
		n.l.stats.filtered.Add(1)
		return false
	}
	if reply := vl2.EmulateNDP(s.cfg, etherType, data); reply != nil {
		n.mu.Lock()
		if len(n.replies) < maxReplies { // the caller is inside the port's write: deliver later
			n.replies = append(n.replies, ndpReply{to: from, reply: reply})
		}
		n.mu.Unlock()
		n.l.wake()
		return true
	}
	if s.cfg.MulticastLimit == 0 {
		n.l.stats.filtered.Add(1)
		return false
	}
	if from != n.mac {
		n.learnBehind(g, now)
	}
	if !n.filterOut(s, w, out, now, 0, dst, from, etherType, data, false) {
		n.l.stats.filtered.Add(1)
		return false
	}
	f := &multicast{group: g, source: from, foreign: from != n.mac, etherType: etherType, data: slices.Clone(data)}
	if !s.bridge && len(s.replicators) > 0 && !slices.Contains(s.replicators, n.l.self) {
		if a := n.nearestReplicator(s); a != 0 {
			n.l.peers.Send(w, out, now, a, packet.VerbMulticastFrame, vl2.AppendReplicate(nil, n.id, from, g, etherType, data),
				vl1.SendOpts{Compress: s.cfg.CompressMulticast()})
			return true
		}
	}
	n.sendGroup(w, out, now, s, f, 0)
	return true
}

// nearestReplicator returns the replicator with the lowest latency, 0 if none can be
// reached directly.
func (n *joined) nearestReplicator(s *state) (best identity.Address) {
	var least time.Duration
	for _, a := range s.replicators {
		if p := n.l.peers.Peer(a); p != nil {
			if d, ok := p.DirectLatency(); ok && (best == 0 || d < least) {
				best, least = a, d
			}
		}
	}
	return best
}

// replicate sends a member's multicast to the others, as a replicator does.
func (n *joined) replicate(w *vl1.Worker, out vl1.Out, now time.Time, s *state, origin identity.Address, source vl2.MAC, f *vl2.MulticastFrame) {
	if !n.l.spreads.allow(origin, now) {
		n.l.stats.gatherFlood.Add(1)
		return
	}
	n.sendGroup(w, out, now, s, &multicast{group: f.Group, source: source, foreign: true, etherType: f.EtherType, data: slices.Clone(f.Data)}, origin)
}

// learnBehind notes that a host bridged behind us uses a group.
func (n *joined) learnBehind(g vl2.MulticastGroup, now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.behind[g]; !ok {
		if len(n.behind) >= maxBehind {
			n.l.stats.refusedRecords.Add(1)
			return
		}
		if n.behind == nil {
			n.behind = make(map[vl2.MulticastGroup]time.Time)
		}
		n.groupsChanged = true
	}
	n.behind[g] = now
}

// sendGroup sends a frame to the members of its group (chapter 03 §5.5): to those
// known now, and to others as they turn up, until the network's limit is reached.
// origin, if not 0, has it already.
func (n *joined) sendGroup(w *vl1.Worker, out vl1.Out, now time.Time, s *state, f *multicast, origin identity.Address) {
	limit := s.cfg.MulticastLimit
	k := groupKey{n.id, f.group}
	members, total := n.l.groups.list(k, limit, n.l.self)
	missing := uint32(1)
	if total < limit {
		missing = uint32(limit - total + 1)
	}
	var source *vl2.MAC
	if f.foreign {
		source = &f.source
	}
	f.payload = vl2.AppendMulticastFrame(nil, n.id, missing, source, f.group, f.etherType, f.data)
	sent := make(map[identity.Address]bool)
	if origin != 0 {
		sent[origin] = true
		limit++
	}
	for _, a := range append(s.cfg.Bridges(), members...) {
		if a != n.l.self && !sent[a] && len(sent) < limit {
			sent[a] = true
			n.sendMulticast(w, out, now, s, a, f)
		}
	}
	if total < s.cfg.MulticastLimit && n.l.groups.wait(k, waitingFrame{f, sent, now}, now) {
		n.gather(w, out, now, s, k, missing)
	}
}

// gather asks who is in a group.
func (n *joined) gather(w *vl1.Worker, out vl1.Out, now time.Time, s *state, k groupKey, missing uint32) {
	q := vl2.AppendGather(nil, k.nwid, k.group, missing, s.cfg.COM)
	targets := append([]identity.Address{n.l.peers.BestUpstream(), n.id.Controller()}, s.cfg.Anchors()...)
	asked := make(map[identity.Address]bool)
	for _, a := range targets {
		if a.Reserved() || a == n.l.self || asked[a] || len(asked) >= maxGatherTargets {
			continue
		}
		asked[a] = true
		n.l.peers.Send(w, out, now, a, packet.VerbMulticastGather, q, vl1.SendOpts{ExpectReply: true})
	}
}

// sendWaiting sends waiting frames to members they have not reached, of one group or
// of all if only is nil.
func (n *joined) sendWaiting(w *vl1.Worker, out vl1.Out, now time.Time, only *groupKey) {
	s := n.snap.Load()
	if !s.open {
		return
	}
	for _, d := range n.l.groups.due(n.id, only, s.cfg.MulticastLimit, now) {
		n.sendMulticast(w, out, now, s, d.to, d.frame)
	}
}

// sendMulticast sends one copy to one member.
func (n *joined) sendMulticast(w *vl1.Worker, out vl1.Out, now time.Time, s *state, to identity.Address, f *multicast) {
	if !n.filterOut(s, w, out, now, to, f.group.MAC, f.source, f.etherType, f.data, true) {
		n.l.stats.filtered.Add(1)
		return
	}
	if m := n.ensureMember(to, now); m != nil {
		if !n.maySend(w, out, now, s, m) {
			n.l.stats.gateClosed.Add(1)
			return
		}
		if m.pushDue(s, now) {
			n.push(w, out, now, m, s)
		}
		m.used.Store(now.UnixNano())
	}
	n.l.peers.Send(w, out, now, to, packet.VerbMulticastFrame, f.payload,
		vl1.SendOpts{Compress: s.cfg.CompressMulticast(), ExpectReply: true})
}
