package network

import (
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

const (
	maxBehind    = 1024    // groups of hosts bridged behind us, per network
	maxTimeDelta = 7200000 // ms, what a controller may set

	// Bytes of copies for bridges besides those that a network's limit allows.
	bridgeCopyRate  = 1 << 20 // a second
	bridgeCopyTime  = time.Second / bridgeCopyRate
	bridgeCopyBurst = 1 << 20
)

// ndpReply is a made-up neighbour advertisement on its way to the attachment.
type ndpReply struct {
	to    vl2.MAC
	reply *vl2.NDPReply
}

const maxReplies = 64

// multicast is a frame for a group. It is immutable.
type multicast struct {
	group     vl2.MulticastGroup
	source    vl2.MAC
	foreign   bool // source isn't ours
	etherType uint16
	data      []byte
	payload   []byte // of MULTICAST_FRAME
}

// receiveMulticast handles MULTICAST_FRAME (chapter 03 §4.3).
func (l *Layer) receiveMulticast(w *vl1.Worker, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
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
		n.offerOwn(w, from, f.COM)
	}
	s := n.snap.Load()
	if !s.open {
		return vl1.Result{}
	}
	if !n.gate(w, s, from.Address()) {
		l.needCertificate(w, n, from, p, src)
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
			n.replicate(w, s, from.Address(), source, &f)
		}
		if source != own {
			if !s.bridges[from.Address()] {
				return vl1.Result{Trust: true}
			}
			n.learnBridge(source, from.Address(), w.Now())
		}
		info := vl2.FrameInfo{
			Inbound: true, Source: from.Address(), Destination: l.self, DestinationMAC: f.Group.MAC, SourceMAC: source,
			EtherType: f.EtherType, Data: f.Data,
		}
		if n.filterIn(w, s, &info) != vl2.FilterDrop {
			l.deliver(w, n, s, &info)
		} else {
			l.stats.filtered.Add(1)
		}
	}
	if f.GatherLimit > 0 && l.mayGather(from, w.Now()) {
		if b := l.gatherResult(groupKey{n.id, f.Group}, int(min(f.GatherLimit, maxGatherAnswer)), from.Address()); b != nil {
			answer := append(f.Group.Append(n.id.Append(nil)), 0x02)
			l.peers.SendOK(w, from, src, packet.VerbMulticastFrame, p.ID(), append(answer, b...))
		}
	}
	return vl1.Result{Trust: true}
}

// writeMulticast sends a frame of the host to a group (chapter 03 §5.7, §5.5).
func (n *joined) writeMulticast(w *vl1.Worker, s *state, f *vl2.FrameInfo) bool {
	g, ok := vl2.GroupOf(f.DestinationMAC, f.EtherType, f.Data)
	if !ok && !s.cfg.Broadcast() {
		n.l.stats.filtered.Add(1)
		return false
	}
	if reply := vl2.EmulateNDP(s.cfg, f.EtherType, f.Data); reply != nil {
		n.mu.Lock()
		if len(n.replies) < maxReplies { // the caller is inside the attachment's write: deliver later
			n.replies = append(n.replies, ndpReply{to: f.SourceMAC, reply: reply})
		}
		n.mu.Unlock()
		n.l.wake()
		return true
	}
	if s.cfg.MulticastLimit == 0 {
		n.l.stats.filtered.Add(1)
		return false
	}
	foreign := f.SourceMAC != n.mac
	if foreign {
		n.learnBehind(g, w.Now())
	}
	if !n.filterOut(w, s, f, false) {
		n.l.stats.filtered.Add(1)
		return false
	}
	if !s.bridge && len(s.replicators) > 0 && !slices.Contains(s.replicators, n.l.self) {
		if a := n.nearestReplicator(s); a != 0 {
			n.l.peers.Send(w, a, packet.VerbMulticastFrame, vl2.AppendReplicate(nil, n.id, f.SourceMAC, g, f.EtherType, f.Data),
				vl1.SendOpts{Compress: s.cfg.CompressMulticast()})
			return true
		}
	}
	n.sendGroup(w, s, &multicast{group: g, source: f.SourceMAC, foreign: foreign, etherType: f.EtherType, data: slices.Clone(f.Data)}, 0)
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
func (n *joined) replicate(w *vl1.Worker, s *state, origin identity.Address, source vl2.MAC, f *vl2.MulticastFrame) {
	if !n.l.spreads.Take(origin, w.Now()) {
		n.l.stats.gatherFlood.Add(1)
		return
	}
	n.sendGroup(w, s, &multicast{group: f.Group, source: source, foreign: true, etherType: f.EtherType, data: slices.Clone(f.Data)}, origin)
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
func (n *joined) sendGroup(w *vl1.Worker, s *state, f *multicast, origin identity.Address) {
	limit := s.cfg.MulticastLimit
	k := groupKey{n.id, f.group}
	bridges := s.cfg.Bridges()
	members, total := n.l.groups.list(k, limit+len(bridges), n.l.self)
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
	if total >= s.cfg.MulticastLimit && n.bridgeCopies.Take(n.l.instant(w.Now()), len(bridges)*len(f.payload), bridgeCopyTime, bridgeCopyBurst) {
		limit += len(bridges) // all of them, and as many others as the limit allows
	} else {
		members = members[:min(len(members), limit)]
	}
	for _, a := range append(bridges, members...) {
		if a != n.l.self && !sent[a] && len(sent) < limit {
			sent[a] = true
			n.sendMulticast(w, s, a, f)
		}
	}
	if total < s.cfg.MulticastLimit && n.l.groups.wait(k, waitingFrame{f, sent, w.Now()}, w.Now()) {
		n.gather(w, s, k, missing)
	}
}

// sendWaiting sends waiting frames to members they have not reached, of one group or
// of all if only is nil.
func (n *joined) sendWaiting(w *vl1.Worker, only *groupKey) {
	s := n.snap.Load()
	if !s.open {
		return
	}
	for _, d := range n.l.groups.due(n.id, only, s.cfg.MulticastLimit, w.Now()) {
		n.sendMulticast(w, s, d.to, d.frame)
	}
}

// sendMulticast sends one copy to one member.
func (n *joined) sendMulticast(w *vl1.Worker, s *state, to identity.Address, f *multicast) {
	info := vl2.FrameInfo{
		Source: n.l.self, Destination: to, DestinationMAC: f.group.MAC, SourceMAC: f.source, EtherType: f.etherType, Data: f.data,
	}
	if !n.filterOut(w, s, &info, true) {
		n.l.stats.filtered.Add(1)
		return
	}
	if m := n.ensureMember(to, w.Now()); m != nil {
		if !n.maySend(w, s, m) {
			n.l.stats.gateClosed.Add(1)
			return
		}
		if n.pushDue(m, s, w.Now()) {
			n.push(w, m, s)
		}
		m.used.Store(n.l.instant(w.Now()))
	}
	n.l.peers.Send(w, to, packet.VerbMulticastFrame, f.payload,
		vl1.SendOpts{Compress: s.cfg.CompressMulticast(), ExpectReply: true})
}
