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
	maxGroups         = 16384
	maxGroupMembers   = 4096
	maxWaiting        = 32 // frames per group
	maxGroupsPerPeer  = 4096
	maxGatherTargets  = 16
	groupExpiry       = 600 * time.Second
	gatherEvery       = 60 * time.Second
	gatherEmptyEvery  = time.Second
	waitingLifetime   = 5 * time.Second
	maxLikesPerPacket = 400
	maxGatherAnswer   = 255 // addresses, so that the answer is one datagram
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
	payload []byte // of MULTICAST_FRAME
	sent    map[identity.Address]bool
	born    time.Time
}

// groupTable holds the groups of all networks, also of networks that we serve as
// a root without having joined them.
type groupTable struct {
	mu sync.Mutex
	m  map[groupKey]*group
}

func (t *groupTable) init() { t.m = make(map[groupKey]*group) }

// get returns a group, making it if there is room; nil without. t.mu is held.
func (t *groupTable) get(k groupKey) *group {
	g := t.m[k]
	if g == nil && len(t.m) < maxGroups {
		g = &group{members: make(map[identity.Address]time.Time)}
		t.m[k] = g
	}
	return g
}

func (t *groupTable) add(k groupKey, a identity.Address, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	g := t.get(k)
	if g == nil {
		return false
	}
	if _, ok := g.members[a]; !ok && len(g.members) >= maxGroupMembers {
		return false
	}
	g.members[a] = now
	return true
}

func (t *groupTable) remove(k groupKey, a identity.Address) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if g := t.m[k]; g != nil {
		delete(g.members, a)
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
	for a := range g.members {
		if a != skip {
			out = append(out, a)
		}
	}
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out[:min(limit, len(out))], len(g.members)
}

func (t *groupTable) expire(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, g := range t.m {
		for a, at := range g.members {
			if now.Sub(at) >= groupExpiry {
				delete(g.members, a)
			}
		}
		if len(g.members) == 0 && len(g.waiting) == 0 {
			delete(t.m, k)
		}
	}
}

// mayUseGroups reports whether a peer may register with us and ask us (chapter 03
// §5.2).
func (l *Layer) mayUseGroups(nwid vl2.NetworkID, from *vl1.Peer, now time.Time) (member, ok bool) {
	if n := l.net(nwid); n != nil && n.gate(n.snap.Load(), from.Address(), now) {
		return true, true
	}
	if l.peers.IsRoot() {
		return false, true
	}
	return false, l.cfg.Controller != nil && l.cfg.Controller.Authorized(nwid, from.Address(), now)
}

// receiveLike handles MULTICAST_LIKE.
func (l *Layer) receiveLike(now time.Time, from *vl1.Peer, b []byte) vl1.Result {
	var res vl1.Result
	var nwid vl2.NetworkID
	var allowed bool
	for n := 0; len(b) >= 18 && n < maxGroupsPerPeer; n++ {
		id := vl2.NetworkIDFromBytes(b)
		g, ok := vl2.ParseGroup(b[8:])
		b = b[18:]
		if id != nwid || n == 0 {
			nwid = id
			var member bool
			member, allowed = l.mayUseGroups(nwid, from, now)
			res.Trust = res.Trust || member
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
	if ok && q.Limit > 0 {
		if b := l.gatherResult(groupKey{q.Network, q.Group}, int(min(q.Limit, maxGatherAnswer)), from.Address()); b != nil {
			answer := q.Group.Append(q.Network.Append(nil))
			l.peers.SendOK(src.Worker, out, now, from, src, packet.VerbMulticastGather, p.ID(), append(answer, b...))
		}
	}
	return vl1.Result{Trust: member}
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
	l.groups.sendWaiting(n, src.Worker, out, now)
	return vl1.Result{}
}

// subscribed reports whether the host wants a group.
func (n *joined) subscribed(g vl2.MulticastGroup) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
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
	if s.cfg.Broadcast() {
		all[vl2.MulticastGroup{MAC: vl2.BroadcastMAC}] = true
	}
	return all
}

// announceDue announces new groups at once and all groups every minute (chapter
// 03 §5.2).
func (n *joined) announceDue(w *vl1.Worker, out vl1.Out, now time.Time) {
	s := n.snap.Load()
	if !s.open {
		return
	}
	n.mu.Lock()
	all := now.Sub(n.lastAnnounce) >= announceEvery
	var send []vl2.MulticastGroup
	if all || n.groupsChanged {
		own := n.ownGroups(s)
		for g := range own {
			if all || !n.announced[g] {
				send = append(send, g)
			}
		}
		if all {
			n.lastAnnounce = now
		}
		n.groupsChanged, n.announced = false, own
	}
	every := slices.Collect(maps.Keys(n.announced))
	n.mu.Unlock()
	upstream := n.upstreamRecipients(s)
	for _, a := range upstream {
		n.announce(w, out, now, a, send)
	}
	for _, a := range n.memberAddresses() {
		m := n.member(a)
		if m == nil || slices.Contains(upstream, a) || !n.gate(s, a, now) {
			continue
		}
		m.mu.Lock()
		due := now.Sub(m.lastLike) >= announceEvery
		if due {
			m.lastLike = now
		}
		m.mu.Unlock()
		if due {
			n.announce(w, out, now, a, every)
		} else {
			n.announce(w, out, now, a, send)
		}
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
	if !n.gate(s, from.Address(), now) {
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
		if source != own {
			if !s.cfg.IsBridge(from.Address()) {
				return vl1.Result{Trust: true}
			}
			n.learnBridge(source, from.Address(), now)
		}
		if s.acceptAll || n.filterIn(s, src, out, now, from.Address(), f.Group.MAC, source, f.EtherType, f.Data) != vl2.FilterDrop {
			l.deliver(src, n, s, f.Group.MAC, source, f.EtherType, f.Data)
		} else {
			l.stats.filtered.Add(1)
		}
	}
	if f.GatherLimit > 0 {
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
		return true
	}
	if s.cfg.MulticastLimit == 0 {
		n.l.stats.filtered.Add(1)
		return false
	}
	if !s.acceptAll && !n.filterOut(s, w, out, now, 0, dst, from, etherType, data, false) {
		n.l.stats.filtered.Add(1)
		return false
	}
	limit := s.cfg.MulticastLimit
	k := groupKey{n.id, g}
	source := (*vl2.MAC)(nil)
	if from != n.mac {
		source = &from
	}
	members, total := n.l.groups.list(k, limit, n.l.self)
	missing := uint32(1)
	if total < limit {
		missing = uint32(limit - total + 1)
	}
	payload := vl2.AppendMulticastFrame(nil, n.id, missing, source, g, etherType, data)
	frame := waitingFrame{payload: payload, sent: make(map[identity.Address]bool), born: now}
	for _, a := range append(s.cfg.Bridges(), members...) {
		if a != n.l.self && !frame.sent[a] && len(frame.sent) < limit {
			frame.sent[a] = true
			n.sendMulticast(w, out, now, s, a, payload, dst, from, etherType, data)
		}
	}
	if total < limit {
		n.gatherAndWait(w, out, now, s, k, missing, frame)
	}
	return true
}

// gatherAndWait asks for more members and keeps the frame for those that turn up.
func (n *joined) gatherAndWait(w *vl1.Worker, out vl1.Out, now time.Time, s *state, k groupKey, missing uint32, frame waitingFrame) {
	t := &n.l.groups
	t.mu.Lock()
	g := t.get(k)
	if g == nil {
		t.mu.Unlock()
		return
	}
	every := gatherEvery
	if len(g.members) == 0 {
		every = gatherEmptyEvery
	}
	ask := g.lastGather.IsZero() || now.Sub(g.lastGather) >= every
	if ask {
		g.lastGather = now
	}
	if len(g.waiting) >= maxWaiting {
		g.waiting = slices.Delete(g.waiting, 0, 1)
	}
	g.waiting = append(g.waiting, frame)
	t.mu.Unlock()
	if !ask {
		return
	}
	q := vl2.AppendGather(nil, k.nwid, k.group, missing, s.cfg.COM)
	targets := []identity.Address{n.l.peers.BestUpstream(), n.id.Controller()}
	targets = append(targets, s.cfg.Anchors()...)
	asked := make(map[identity.Address]bool)
	for _, a := range targets {
		if a.Reserved() || a == n.l.self || asked[a] || len(asked) >= maxGatherTargets {
			continue
		}
		asked[a] = true
		n.l.peers.Send(w, out, now, a, packet.VerbMulticastGather, q, vl1.SendOpts{ExpectReply: true})
	}
}

// sendWaiting sends waiting frames of a network to members they have not reached.
func (t *groupTable) sendWaiting(n *joined, w *vl1.Worker, out vl1.Out, now time.Time) {
	type job struct {
		to      identity.Address
		payload []byte
	}
	s := n.snap.Load()
	if !s.open {
		return
	}
	var jobs []job
	t.mu.Lock()
	for k, g := range t.m {
		if k.nwid != n.id || len(g.waiting) == 0 {
			continue
		}
		g.waiting = slices.DeleteFunc(g.waiting, func(f waitingFrame) bool {
			return now.Sub(f.born) >= waitingLifetime || len(f.sent) >= s.cfg.MulticastLimit
		})
		for i := range g.waiting {
			f := &g.waiting[i]
			for a := range g.members {
				if !f.sent[a] && len(f.sent) < s.cfg.MulticastLimit {
					f.sent[a] = true
					jobs = append(jobs, job{a, f.payload})
				}
			}
		}
	}
	t.mu.Unlock()
	for _, j := range jobs {
		if f, err := vl2.ParseMulticastFrame(j.payload); err == nil {
			source := n.mac
			if f.HasSource {
				source = f.Source
			}
			n.sendMulticast(w, out, now, s, j.to, j.payload, f.Group.MAC, source, f.EtherType, f.Data)
		}
	}
}

// sendMulticast sends one copy to one member.
func (n *joined) sendMulticast(w *vl1.Worker, out vl1.Out, now time.Time, s *state, to identity.Address, payload []byte, dst, from vl2.MAC, etherType uint16, data []byte) {
	if !s.acceptAll && !n.filterOut(s, w, out, now, to, dst, from, etherType, data, true) {
		n.l.stats.filtered.Add(1)
		return
	}
	if m := n.ensureMember(to, now); m != nil {
		if m.revoked.Load() && !s.cfg.Public {
			n.l.stats.gateClosed.Add(1)
			return
		}
		if m.pushDue(s, now) {
			n.push(w, out, now, m, s)
		}
	}
	n.l.peers.Send(w, out, now, to, packet.VerbMulticastFrame, payload,
		vl1.SendOpts{Compress: s.cfg.CompressMulticast(), ExpectReply: true})
}
