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
	addr identity.Address

	record   atomic.Pointer[vl2.Membership] // immutable; nil = nothing yet
	gateOpen atomic.Uint64                  // state generation in which its packets pass, 0 = unknown
	sendOpen atomic.Uint64                  // state generation in which it may be sent to, 0 = unknown
	lastPush atomic.Int64                   // instant, see Layer.instant: credentials sent
	used     atomic.Int64                   // instant
	removed  atomic.Bool
	greeting bool // in the list of those to be told our groups; guarded by joined.mu

	mu    sync.Mutex // guards changes of record, gateOpen and sendOpen, and what follows
	likes announcing // our groups, to it
	stale time.Time  // since when its certificate is out of the window
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
// §3.11). In the common case it reads what the worker remembers.
func (n *joined) gate(w *vl1.Worker, s *state, a identity.Address) bool {
	if !s.open {
		return false
	}
	cache, _ := w.User.(*Worker)
	if cache != nil {
		if m := cache.sender; m != nil && m.addr == a && cache.senderOf == n && !m.removed.Load() && m.gateOpen.Load() == s.generation {
			return true
		}
	}
	m := n.member(a)
	if m == nil || m.gateOpen.Load() != s.generation {
		if !n.gateSlow(w, s, m, a) {
			return false
		}
		if m == nil {
			m = n.member(a)
		}
	}
	if cache != nil {
		cache.sender, cache.senderOf = m, n
	}
	return true
}

func (n *joined) gateSlow(w *vl1.Worker, s *state, m *member, a identity.Address) bool {
	if s.cfg.Public {
		if m = n.ensureMember(a, w.Now()); m == nil {
			return true // no room for a record: let it pass without one
		}
	}
	p := n.l.peers.Peer(a)
	if m == nil || p == nil {
		return false
	}
	m.mu.Lock()
	rec := m.record.Load()
	ok := s.cfg.Public || rec != nil && rec.Agrees(s.cfg, p.Identity())
	if ok {
		m.gateOpen.Store(s.generation) // under the lock, so that a revocation can't be overwritten
	}
	m.mu.Unlock()
	if !ok {
		return false
	}
	m.used.Store(n.l.instant(w.Now()))
	n.greet(m)
	return true
}

// staleGrace is how long frames still go to a member whose certificate left the
// window: it is asked for a newer one meanwhile.
const staleGrace = 10 * time.Second

// maySend reports whether frames may be sent to a member: not if it was revoked,
// nor if its certificate expired and it doesn't show a newer one. One that has
// shown none yet may be sent to, else nobody would begin.
func (n *joined) maySend(w *vl1.Worker, s *state, m *member) bool {
	return m.sendOpen.Load() == s.generation || n.maySendSlow(w, s, m)
}

func (n *joined) maySendTo(w *vl1.Worker, s *state, a identity.Address) bool {
	m := n.member(a)
	return m == nil || n.maySend(w, s, m)
}

func (n *joined) maySendSlow(w *vl1.Worker, s *state, m *member) bool {
	p := n.l.peers.Peer(m.addr)
	m.mu.Lock()
	rec := m.record.Load()
	if s.cfg.Public || rec == nil || !rec.HasCOM() && !rec.Revoked() || p == nil && !rec.Revoked() || p != nil && rec.Agrees(s.cfg, p.Identity()) {
		if p != nil {
			m.sendOpen.Store(s.generation)
		}
		m.stale = time.Time{}
		m.mu.Unlock()
		return true
	}
	ok := false
	if !rec.Revoked() {
		if m.stale.IsZero() {
			m.stale = w.Now()
		}
		ok = w.Now().Sub(m.stale) < staleGrace
	}
	m.mu.Unlock()
	if n.l.needs.Take(m.addr, w.Now()) {
		b := appendU64([]byte{byte(packet.VerbFrame)}, 0)
		b = n.id.Append(append(b, byte(packet.ErrorNeedMembershipCertificate)))
		n.l.peers.Send(w, m.addr, packet.VerbError, b, vl1.SendOpts{})
	}
	return ok
}

// needCertificate tells a peer that its packet did not pass the gate, at most
// once a second. Nothing is remembered of a peer that isn't a member.
func (l *Layer) needCertificate(w *vl1.Worker, n *joined, from *vl1.Peer, p packet.Packet, src vl1.Source) {
	l.stats.gateClosed.Add(1)
	if l.needs.Take(from.Address(), w.Now()) {
		l.peers.SendError(w, from, src, p.Verb(), p.ID(), packet.ErrorNeedMembershipCertificate, n.id.Append(nil))
	}
}

// push sends all our credentials to a member (chapter 03 §3.10): the first packet
// now, the others at intervals, since receivers look at one a second.
func (n *joined) push(w *vl1.Worker, m *member, s *state) {
	m.lastPush.Store(n.l.instant(w.Now()))
	if len(s.credentials) == 0 {
		return
	}
	n.sendCredentials(w, m.addr, s.credentials[0])
	if len(s.credentials) == 1 {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.pending[m.addr]; !ok && len(n.pending) >= maxPending {
		n.l.stats.refusedRecords.Add(1)
		return
	}
	if n.pending == nil {
		n.pending = make(map[identity.Address]pendingPush)
	}
	n.pending[m.addr] = pendingPush{list: s.credentials[1:], at: w.Now().Add(pushInterval)}
}

func (n *joined) sendCredentials(w *vl1.Worker, to identity.Address, payload []byte) {
	n.l.stats.pushes.Add(1)
	n.l.peers.Send(w, to, packet.VerbNetworkCredentials, payload, vl1.SendOpts{Compress: true})
}

// pendingPush is the rest of our credentials on their way to a member.
type pendingPush struct {
	list [][]byte
	at   time.Time
}

// continuePushes sends what is due of credentials in several packets.
func (n *joined) continuePushes(w *vl1.Worker) {
	type job struct {
		to      identity.Address
		payload []byte
	}
	var jobs []job
	n.mu.Lock()
	for a, p := range n.pending {
		if w.Now().Before(p.at) {
			continue
		}
		jobs = append(jobs, job{a, p.list[0]})
		if p.list, p.at = p.list[1:], w.Now().Add(pushInterval); len(p.list) == 0 {
			delete(n.pending, a)
		} else {
			n.pending[a] = p
		}
	}
	n.mu.Unlock()
	for _, j := range jobs {
		n.sendCredentials(w, j.to, j.payload)
	}
}

// pushDue reports whether a frame to m must be preceded by our credentials.
func (n *joined) pushDue(m *member, s *state, now time.Time) bool {
	last := m.lastPush.Load()
	return last == 0 || last < s.installed || since(n.l.instant(now), last) >= pushRefresh
}

func since(at, then int64) time.Duration { return time.Duration(at - then) }

// receiveCredentials handles NETWORK_CREDENTIALS (chapter 03 §3.9).
func (l *Layer) receiveCredentials(w *vl1.Worker, from *vl1.Peer, b []byte, src vl1.Source) vl1.Result {
	if !l.allowCredentials(from.Address(), w.Now()) {
		l.stats.credentialFlood.Add(1)
		return vl1.Result{}
	}
	good, deferred := l.acceptCredentials(w, from, b)
	if deferred {
		l.creds.Put(from.Address()) // it comes again when the signer is known
	}
	return vl1.Result{Trust: good, Retry: deferred}
}

// allowCredentials limits how often one peer's credentials are looked at. What a
// controller sends is not limited.
func (l *Layer) allowCredentials(from identity.Address, now time.Time) bool {
	for id := range *l.nets.Load() {
		if id.Controller() == from {
			return true
		}
	}
	return l.creds.Take(from, now)
}

// acceptCredentials offers credentials to the records of their holders. It
// reports whether at least one of the sender was good, and whether one could not be judged for
// lack of an identity. from is nil for our own controller.
func (l *Layer) acceptCredentials(w *vl1.Worker, from *vl1.Peer, b []byte) (good, deferred bool) {
	list, err := vl2.ParseCredentials(b)
	if err != nil {
		l.stats.malformed.Add(1)
	}
	bad := 0
	for _, c := range list {
		n := l.net(c.Network())
		if n == nil || n.id.AdHoc() {
			continue
		}
		switch n.offer(w, from, c) {
		case offerGood:
			good = good || from == nil || from.Address() == c.Holder() || from.Address() == n.id.Controller()
		case offerDeferred:
			deferred = true
		case offerForged:
			l.stats.rejectedCredentials.Add(1)
			if bad++; bad >= maxBadSignatures && from != nil {
				return good, deferred
			}
		case offerBad:
			l.stats.rejectedCredentials.Add(1)
		}
	}
	return good, deferred
}

type offerResult uint8

const (
	offerBad offerResult = iota
	offerGood
	offerDeferred // an identity is missing and was asked for
	offerForged   // the signature is bad
	offerLater    // not looked at: the sender's time for dear work is used up
)

// verify checks a credential's signatures, within the budget of the node that sent it.
func (n *joined) verify(w *vl1.Worker, from *vl1.Peer, c vl2.Credential) offerResult {
	signer := n.l.id
	if a := n.id.Controller(); a != n.l.self {
		p := n.l.peers.Peer(a)
		if p == nil {
			n.l.peers.Lookup(w, a)
			return offerDeferred
		}
		signer = p.Identity()
	}
	if c.SignedBy() != signer.Address() {
		return offerForged
	}
	x, ok := c.(*vl2.Capability)
	if !ok || len(x.Chain) <= 1 {
		work, ok := n.l.afford(w, from, 1)
		if !ok {
			return offerLater
		}
		ok = c.Verify(signer)
		work.Done()
		if ok {
			return offerGood
		}
		return offerForged
	}
	return n.verifyChain(w, from, signer, x)
}

// verifyChain checks a capability that was passed on.
func (n *joined) verifyChain(w *vl1.Worker, from *vl1.Peer, signer *identity.Identity, x *vl2.Capability) offerResult {
	work, ok := n.l.afford(w, from, 1+len(x.Chain))
	if !ok {
		return offerLater
	}
	defer work.Done()
	if !x.VerifyIssue(signer) {
		return offerForged
	}
	missing := identity.Address(0)
	if x.VerifyChain(signer, func(a identity.Address) *identity.Identity {
		if a == n.l.self {
			return n.l.id
		}
		if p := n.l.peers.Peer(a); p != nil {
			return p.Identity()
		}
		missing = a
		return nil
	}) {
		return offerGood
	}
	if missing != 0 && !missing.Reserved() {
		n.l.peers.Lookup(w, missing)
		return offerDeferred
	}
	return offerForged
}

// offer considers one credential (chapter 03 §3.7). The signature is checked
// before anything is remembered.
func (n *joined) offer(w *vl1.Worker, from *vl1.Peer, c vl2.Credential) offerResult {
	holder := c.Holder()
	if holder == n.l.self && !c.IsRevocation() || holder.Reserved() {
		return offerBad
	}
	if _, ok := c.(*vl2.Capability); ok && from != nil && from.Address() != holder && from.Address() != n.id.Controller() {
		return offerBad // the holder's address isn't signed (chapter 03 §3.4)
	}
	own := n.snap.Load().cfg
	if m := n.member(holder); m != nil {
		if rec := m.record.Load(); rec != nil {
			switch rec.Judge(own, c) {
			case vl2.OfferKnown:
				if from != nil && from.Address() == holder {
					m.used.Store(n.l.instant(w.Now()))
				}
				return offerGood
			case vl2.OfferRejected:
				n.older(w, from, own, c)
				return offerBad
			}
		}
	}
	if r, ok := c.(*vl2.Revocation); ok && holder == n.l.self && n.knowsRevocation(r) {
		return offerGood
	}
	if res := n.verify(w, from, c); res != offerGood {
		if res == offerForged {
			n.l.stats.badSignatures.Add(1)
		}
		return res
	}
	if holder == n.l.self {
		if n.revokedOurselves(c, w.Now()) {
			n.passOn(w, from, c)
		}
		return offerGood
	}
	m := n.ensureMember(holder, w.Now())
	if m == nil {
		return offerBad
	}
	if from != nil && from.Address() == holder {
		m.used.Store(n.l.instant(w.Now()))
	}
	m.mu.Lock()
	rec := m.record.Load().Clone()
	res := rec.Offer(own, c)
	if res == vl2.OfferNew {
		m.record.Store(rec)
		m.gateOpen.Store(0)
		m.sendOpen.Store(0)
		m.stale = time.Time{}
	}
	m.mu.Unlock()
	if res == vl2.OfferRejected {
		return offerBad
	}
	if com, ok := c.(*vl2.COM); ok && res == vl2.OfferNew {
		n.renew(own, com)
	}
	if res == vl2.OfferNew && c.IsRevocation() {
		n.l.log.Info("credential revoked", "network", n.id, "member", holder)
		n.passOn(w, from, c)
	}
	return offerGood
}

// older handles a certificate that is older than what we have of its holder. If the holder
// shows it itself, the controller's clock may have been set back, and ours is to be renewed.
func (n *joined) older(w *vl1.Worker, from *vl1.Peer, own *vl2.NetworkConfig, c vl2.Credential) {
	com, ok := c.(*vl2.COM)
	if ok && from != nil && from.Address() == com.Holder() && own != nil && !own.Near(com.Timestamp()) && n.verify(w, from, c) == offerGood {
		n.renew(own, com)
	}
}

// offerOwn considers the certificate that came with a frame: of its sender, else it proves
// nothing about the frame.
func (n *joined) offerOwn(w *vl1.Worker, from *vl1.Peer, com *vl2.COM) {
	if com.Holder() == from.Address() {
		n.offer(w, from, com)
	}
}

// passOn forwards a revocation that was new to us, if it asks for that.
func (n *joined) passOn(w *vl1.Worker, from *vl1.Peer, c vl2.Credential) {
	if c.FastPropagate() {
		n.l.propagate(w, n, from, packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, c))
	}
}

// knowsRevocation reports whether a revocation of one of our own credentials changes
// nothing.
func (n *joined) knowsRevocation(r *vl2.Revocation) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return r.Type != vl2.TypeCOM || r.Threshold <= n.void
}

// revokedOurselves notes that our own membership was revoked, so that frames stop in
// both directions at once and not only when the controller refuses the next
// request. It reports whether that is news.
func (n *joined) revokedOurselves(c vl2.Credential, now time.Time) bool {
	r, ok := c.(*vl2.Revocation)
	if !ok || r.Type != vl2.TypeCOM {
		return false
	}
	n.mu.Lock()
	if r.Threshold <= n.void {
		n.mu.Unlock()
		return false
	}
	n.void = r.Threshold
	n.lastRequest = time.Time{} // ask at once whether there is a newer configuration
	s := n.snap.Load()
	n.mu.Unlock()
	n.l.wake()
	if s.open && s.cfg.COM != nil && s.cfg.COM.Timestamp() <= r.Threshold {
		n.refuse(StatusAccessDenied, vl2.SSO{}, now)
	}
	return true
}
