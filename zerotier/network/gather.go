package network

import (
	"encoding/binary"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// Bounds of MULTICAST_GATHER (chapter 03 §5.3).
const (
	maxGatherTargets = 16
	maxGatherAnswer  = 255 // addresses, so that the answer is one datagram
)

// mayUseGroups reports whether a peer may register with us and ask us (chapter 03
// §5.2).
func (l *Layer) mayUseGroups(w *vl1.Worker, nwid vl2.NetworkID, from *vl1.Peer) (member, ok bool) {
	if n := l.net(nwid); n != nil && n.gate(w, n.snap.Load(), from.Address()) {
		return true, true
	}
	if l.peers.IsRoot() {
		return false, true
	}
	return false, l.cfg.Controller != nil && l.cfg.Controller.Authorized(nwid, from.Address(), w.Now())
}

// receiveLike handles MULTICAST_LIKE. One that overtook its sender's certificate is
// kept, and the certificate asked for: the next one would come in a minute.
func (l *Layer) receiveLike(w *vl1.Worker, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
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
			member, allowed = l.mayUseGroups(w, nwid, from)
			res.Trust = res.Trust || member
			if n := l.net(nwid); !allowed && n != nil && n.mayProve(from.Address()) {
				l.needCertificate(w, n, from, p, src)
				res.Retry = true
			}
		}
		if !ok || !allowed || !g.MAC.IsMulticast() {
			continue
		}
		if !l.groups.add(groupKey{nwid, g}, from.Address(), w.Now()) {
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
func (l *Layer) receiveGather(w *vl1.Worker, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
	q, err := vl2.ParseGather(p.Payload())
	if err != nil {
		l.stats.malformed.Add(1)
		return vl1.Result{Skip: true}
	}
	if n := l.net(q.Network); n != nil && q.COM != nil {
		n.offerOwn(w, from, q.COM)
	}
	member, ok := l.mayUseGroups(w, q.Network, from)
	if ok && q.Limit > 0 && l.mayGather(from, w.Now()) {
		if b := l.gatherResult(groupKey{q.Network, q.Group}, int(min(q.Limit, maxGatherAnswer)), from.Address()); b != nil {
			answer := q.Group.Append(q.Network.Append(nil))
			l.peers.SendOK(w, from, src, packet.VerbMulticastGather, p.ID(), append(answer, b...))
		}
	}
	return vl1.Result{Trust: member}
}

// mayGather limits how many answers one node gets.
func (l *Layer) mayGather(from *vl1.Peer, now time.Time) bool {
	if l.gathers.Take(from.Address(), now) {
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
func (l *Layer) receiveGatherOK(w *vl1.Worker, from *vl1.Peer, verb packet.Verb, b []byte, src vl1.Source) vl1.Result {
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
			n.offerOwn(w, from, com)
		}
		if !has {
			return vl1.Result{}
		}
	}
	for _, a := range vl2.ParseGatherResult(b) {
		if a != l.self && !a.Reserved() {
			l.groups.add(groupKey{n.id, g}, a, w.Now())
		}
	}
	n.sendWaiting(w, &groupKey{n.id, g})
	return vl1.Result{}
}

// gather asks who is in a group.
func (n *joined) gather(w *vl1.Worker, s *state, k groupKey, missing uint32) {
	q := vl2.AppendGather(nil, k.nwid, k.group, missing, s.cfg.COM)
	targets := append([]identity.Address{n.l.peers.BestUpstream(), n.id.Controller()}, s.contacts...)
	asked := make(map[identity.Address]bool)
	for _, a := range targets {
		if a.Reserved() || a == n.l.self || asked[a] || len(asked) >= maxGatherTargets {
			continue
		}
		asked[a] = true
		n.l.peers.Send(w, a, packet.VerbMulticastGather, q, vl1.SendOpts{ExpectReply: true})
	}
}
