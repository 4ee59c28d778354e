package network

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// member is what we know about another member of one network (chapter 03 §3.7).
type member struct {
	addr     identity.Address
	gateOpen atomic.Uint64 // state generation for which the gate is open, 0 = unknown
	lastPush atomic.Int64  // wall clock, ns: credentials sent
	used     atomic.Int64  // wall clock, ns
	revoked  atomic.Bool   // its certificate is void: send it nothing

	mu       sync.Mutex // guards what follows
	record   vl2.Membership
	lastLike time.Time // groups announced to it
	lastCred time.Time // credentials accepted from it
	lastNeed time.Time // told that we need its certificate
}

// splitReply reads the start of OK and ERROR payloads.
func splitReply(b []byte) (v packet.Verb, id packet.ID, rest []byte, ok bool) {
	if len(b) < 9 {
		return 0, 0, nil, false
	}
	return packet.Verb(b[0]), packet.ID(binary.BigEndian.Uint64(b[1:])), b[9:], true
}

func appendU64(b []byte, v uint64) []byte { return binary.BigEndian.AppendUint64(b, v) }

// gate reports whether a packet of a peer may concern the network (chapter 03
// §3.11). Its answer for the common case is one atomic load.
func (n *joined) gate(s *state, a identity.Address, now time.Time) bool {
	if !s.open {
		return false
	}
	m := n.member(a)
	if m != nil && m.gateOpen.Load() == s.generation {
		return true
	}
	return n.gateSlow(s, m, a, now)
}

func (n *joined) gateSlow(s *state, m *member, a identity.Address, now time.Time) bool {
	if s.cfg.Public {
		if m = n.ensureMember(a, now); m == nil {
			return true // no room for a record: let it pass without one
		}
	} else {
		p := n.l.peers.Peer(a)
		if m == nil || p == nil {
			return false
		}
		m.mu.Lock()
		ok := m.record.Agrees(s.cfg, p.Identity())
		m.mu.Unlock()
		if !ok {
			return false
		}
	}
	m.used.Store(now.UnixNano())
	m.gateOpen.Store(s.generation)
	return true
}

// needCertificate tells a peer that its packet did not pass the gate, at most
// once a second.
func (l *Layer) needCertificate(n *joined, out vl1.Out, now time.Time, from *vl1.Peer, p packet.Packet, src vl1.Source) {
	l.stats.gateClosed.Add(1)
	m := n.ensureMember(from.Address(), now)
	if m == nil {
		return
	}
	m.mu.Lock()
	due := now.Sub(m.lastNeed) >= needCertGate
	if due {
		m.lastNeed = now
	}
	m.mu.Unlock()
	if due {
		l.peers.SendError(src.Worker, out, now, from, src, p.Verb(), p.ID(), packet.ErrorNeedMembershipCertificate, n.id.Append(nil))
	}
}

// push sends all our credentials to a member (chapter 03 §3.10).
func (n *joined) push(w *vl1.Worker, out vl1.Out, now time.Time, m *member, s *state) {
	m.lastPush.Store(now.UnixNano())
	if s.cfg.COM == nil {
		return
	}
	for _, payload := range s.cfg.CredentialPackets() {
		n.l.stats.pushes.Add(1)
		n.l.peers.Send(w, out, now, m.addr, packet.VerbNetworkCredentials, payload, vl1.SendOpts{Compress: true})
	}
}

// pushDue reports whether a frame to m must be preceded by our credentials.
func (m *member) pushDue(s *state, now time.Time) bool {
	last := m.lastPush.Load()
	return last == 0 || !s.updated.IsZero() && last < s.updated.UnixNano() || now.UnixNano()-last >= int64(pushRefresh)
}

func (l *Layer) receiveCredentials(out vl1.Out, now time.Time, from *vl1.Peer, b []byte, src vl1.Source) vl1.Result {
	return vl1.Result{Trust: l.acceptCredentials(src.Worker, out, now, from, b)}
}

// acceptCredentials offers credentials to the records of their holders. It
// reports whether at least one was good. from is nil for our own controller.
func (l *Layer) acceptCredentials(w *vl1.Worker, out vl1.Out, now time.Time, from *vl1.Peer, b []byte) bool {
	creds, err := vl2.ParseCredentials(b)
	if err != nil {
		l.stats.malformed.Add(1)
	}
	good := false
	gated := make(map[vl2.NetworkID]bool)
	for i := range creds {
		c := creds[i]
		n := l.net(c.Network())
		if n == nil || n.id.AdHoc() {
			continue
		}
		if from != nil && c.Network().Controller() != from.Address() && !n.mayOffer(from, now, gated) {
			continue
		}
		if n.offer(w, out, now, from, c) {
			good = true
		}
	}
	return good
}

// mayOffer limits how often one peer's credentials are looked at.
func (n *joined) mayOffer(from *vl1.Peer, now time.Time, seen map[vl2.NetworkID]bool) bool {
	if ok, done := seen[n.id]; done {
		return ok
	}
	m := n.member(from.Address())
	ok := true
	if m != nil {
		m.mu.Lock()
		if ok = now.Sub(m.lastCred) >= credentialGate; ok {
			m.lastCred = now
		}
		m.mu.Unlock()
	}
	seen[n.id] = ok
	return ok
}

// offer considers one credential (chapter 03 §3.7). The signature is checked
// before anything is remembered.
func (n *joined) offer(w *vl1.Worker, out vl1.Out, now time.Time, from *vl1.Peer, c vl2.Credential) bool {
	signer := n.l.id
	if a := n.id.Controller(); a != n.l.self {
		p := n.l.peers.Peer(a)
		if p == nil {
			n.l.peers.Lookup(w, out, now, a)
			return false
		}
		signer = p.Identity()
	}
	if m := n.member(c.Holder()); m != nil {
		m.mu.Lock()
		known := m.record.Knows(c)
		m.mu.Unlock()
		if known {
			return true
		}
	}
	if !c.Verify(signer) {
		n.l.stats.badSignatures.Add(1)
		return false
	}
	if c.Holder() == n.l.self && !c.IsRevocation() {
		return false
	}
	m := n.ensureMember(c.Holder(), now)
	if m == nil {
		return false
	}
	if from != nil && from.Address() == c.Holder() {
		m.used.Store(now.UnixNano())
		m.mu.Lock()
		if m.lastCred.IsZero() {
			m.lastCred = now
		}
		m.mu.Unlock()
	}
	m.mu.Lock()
	res := m.record.Offer(c)
	m.revoked.Store(m.record.Revoked())
	m.mu.Unlock()
	if res == vl2.OfferRejected {
		n.l.stats.rejectedCredentials.Add(1)
		return false
	}
	if res == vl2.OfferNew {
		m.gateOpen.Store(0)
		if c.IsRevocation() {
			n.l.log.Info("credential revoked", "network", n.id, "member", c.Holder())
			if c.Holder() == n.l.self { // learn at once why
				n.mu.Lock()
				n.outdated = true
				n.mu.Unlock()
			}
			if c.FastPropagate() {
				n.l.propagate(w, out, now, n, from, packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, c))
			}
		}
	}
	return true
}
