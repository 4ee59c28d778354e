package network

import (
	"bytes"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"ztgate/internal/rate"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
	"ztgate/zerotier/ztnode"
)

// joined is one joined network.
type joined struct {
	l    *Layer
	id   vl2.NetworkID
	mac  vl2.MAC
	snap atomic.Pointer[state]

	memberMu sync.RWMutex // guards members
	members  map[identity.Address]*member

	mu            sync.Mutex // guards what follows; methods named …Locked need it
	generation    uint64
	updates       vl2.Assembler
	lastRequest   time.Time
	outdated      bool  // the configuration: the controller's clock seems to have been set
	heardFrom     int64 // instant: the controller answered, or sent something by itself
	requests      int   // since the controller spoke
	refusedSince  time.Time
	hostGroups    []vl2.MulticastGroup
	groupsChanged bool
	announced     map[vl2.MulticastGroup]bool
	told          map[identity.Address]announcing // roots, controller, contacts
	bridges       map[vl2.MAC]bridgeRoute
	behind        map[vl2.MulticastGroup]time.Time // groups of hosts bridged behind us, last seen
	replies       []ndpReply
	pending       map[identity.Address]pendingPush
	greets        []*member // to be told our groups
	lastMembers   time.Time // all members looked at for announcements
	void          int64     // our own certificates up to this time are void
	duplicate     duplicate
	bridgeCopies  rate.Shared
}

// state is what packets are judged by. It is immutable.
type state struct {
	cfg        *vl2.NetworkConfig // nil: no frame passes
	status     Status
	login      vl2.SSO // if the controller wants one
	generation uint64
	updated    time.Time // when cfg came to be; zero for a cached one
	installed  int64     // the same as an instant, 0 for a cached one
	open       bool      // frames pass
	bridge     bool      // we are an active bridge

	acceptAll, acceptIPv4, acceptIPv6, acceptARP bool // the rules refuse nothing of the kind

	credentials [][]byte // packets that carry ours
	replicators []identity.Address
	contacts    []identity.Address // that groups are announced to
	bridges     map[identity.Address]bool
}

// newStateLocked makes the state that follows from a configuration. It needs no
// lock while n is not shared yet.
func (n *joined) newStateLocked(cfg *vl2.NetworkConfig, status Status, updated time.Time) *state {
	n.generation++
	s := &state{cfg: cfg, status: status, generation: n.generation, updated: updated, open: cfg != nil && status == StatusOK}
	if !updated.IsZero() {
		s.installed = n.l.instant(updated)
	}
	if cfg != nil {
		s.acceptAll = cfg.AcceptsAll()
		s.acceptIPv4 = cfg.AcceptsEtherType(vl2.EtherTypeIPv4)
		s.acceptIPv6 = cfg.AcceptsEtherType(vl2.EtherTypeIPv6)
		s.acceptARP = cfg.AcceptsEtherType(vl2.EtherTypeARP)
		s.bridges = make(map[identity.Address]bool)
		for _, a := range cfg.Bridges() {
			s.bridges[a] = true
		}
		s.bridge = s.bridges[n.l.self]
		if cfg.COM != nil {
			s.credentials = cfg.CredentialPackets()
		}
		s.replicators, s.contacts = cfg.Replicators(), cfg.Contacts()
		s.contacts = s.contacts[:min(len(s.contacts), maxContactsTold)]
	}
	return s
}

func (n *joined) snapshot() Snapshot {
	s := n.snap.Load()
	out := Snapshot{ID: n.id, MAC: n.mac, Status: s.status, SSO: s.login, Config: s.cfg, Stored: !n.id.AdHoc()}
	if s.cfg != nil && s.status == StatusOK {
		out.SSO = s.cfg.SSO
	}
	out.AuthURL = out.SSO.URL()
	n.mu.Lock()
	out.LastController, out.Unanswered = n.l.timeOf(n.heardFrom), n.requests
	out.Duplicate = n.duplicateLocked(s)
	n.mu.Unlock()
	if s.status != StatusOK {
		// After a refusal addresses and routes must go (chapter 03 §1.2).
		out.Config = nil
	}
	return out
}

// member returns the record of another member, nil if there is none.
func (n *joined) member(a identity.Address) *member {
	n.memberMu.RLock()
	m := n.members[a]
	n.memberMu.RUnlock()
	return m
}

// ensureMember returns the record of another member, making one if there is
// room; nil without.
func (n *joined) ensureMember(a identity.Address, now time.Time) *member {
	if m := n.member(a); m != nil {
		return m
	}
	s := n.snap.Load()
	n.memberMu.Lock()
	defer n.memberMu.Unlock()
	m := n.members[a]
	if m == nil {
		if len(n.members) >= maxMembers && !n.evictLocked(s) {
			n.l.stats.refusedRecords.Add(1)
			return nil
		}
		m = &member{addr: a}
		m.used.Store(n.l.instant(now))
		n.members[a] = m
	}
	return m
}

// evictLocked forgets one of some members that may be forgotten, the least used one.
// It needs memberMu.
func (n *joined) evictLocked(s *state) bool {
	const look = 64
	var oldest *member
	seen := 0
	for _, m := range n.members {
		if seen++; seen > look {
			break
		}
		if n.vital(s, m) || m.gateOpen.Load() == s.generation && !s.publicly() {
			continue
		}
		if oldest == nil || m.used.Load() < oldest.used.Load() {
			oldest = m
		}
	}
	if oldest == nil {
		return false
	}
	n.forgetLocked(oldest)
	n.l.stats.evicted.Add(1)
	return true
}

// publicly reports whether everybody is a member.
func (s *state) publicly() bool { return s.cfg != nil && s.cfg.Public }

// vital reports whether a record must stay: without it a revoked certificate would
// be taken again.
func (n *joined) vital(s *state, m *member) bool {
	rec := m.record.Load()
	return rec != nil && s.cfg != nil && rec.Vital(s.cfg)
}

// forgetLocked removes a record. It needs memberMu.
func (n *joined) forgetLocked(m *member) {
	m.removed.Store(true)
	delete(n.members, m.addr)
}

// expire forgets members that were not heard of for long.
func (n *joined) expire(now time.Time) {
	s := n.snap.Load()
	n.memberMu.Lock()
	for _, m := range n.members {
		if since(n.l.instant(now), m.used.Load()) >= recordLifetime && !n.vital(s, m) {
			n.forgetLocked(m)
			continue
		}
		if rec := m.record.Load(); rec == nil || s.cfg == nil || !rec.Outdated(s.cfg) {
			continue
		}
		m.mu.Lock()
		rec := m.record.Load().Clone()
		rec.Expire(s.cfg)
		m.record.Store(rec)
		m.mu.Unlock()
	}
	n.memberMu.Unlock()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.updates.Expire(now)
	for mac, r := range n.bridges {
		if now.Sub(r.at) >= bridgeRouteLifetime {
			delete(n.bridges, mac)
		}
	}
	for g, at := range n.behind {
		if now.Sub(at) >= behindLifetime {
			delete(n.behind, g)
		}
	}
}

// tick does what is due and returns when to call again.
func (n *joined) tick(w *vl1.Worker) time.Time {
	if n.id.AdHoc() {
		n.configureAdHoc(w.Now())
	} else if n.requestDue(w.Now()) {
		n.request(w)
	}
	n.announceDue(w)
	n.continuePushes(w)
	n.deliverReplies(w)
	n.sendWaiting(w, nil)
	return w.Now().Add(250 * time.Millisecond)
}

func (n *joined) pace(s *state) pace {
	delta := time.Duration(0)
	if s.cfg != nil {
		delta = time.Duration(min(s.cfg.TimeDelta, maxTimeDelta)) * time.Millisecond
	}
	return n.l.cfg.paceOf(delta)
}

// requestDue reports whether to ask the controller, and notes that we do
// (chapter 03 §1.3).
func (n *joined) requestDue(now time.Time) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.snap.Load()
	p := n.pace(s)
	wait := p.check
	switch {
	case n.lastRequest.IsZero():
		wait = 0
	case n.outdated:
		n.outdated = now.Sub(n.lastRequest) < wait
	case s.status == StatusOK && !s.updated.IsZero():
		// Pushes come only to who has asked lately, so they put off no request.
		if now.Sub(s.updated) < p.refresh && now.Sub(n.lastRequest) < p.refresh {
			return false
		}
	case s.status == StatusRequesting && n.requests < 4:
		wait = requestFirstWait // the controller ignores what comes within a second
	case !n.refusedSince.IsZero() && now.Sub(n.refusedSince) > requestPatience:
		wait = min(requestBackOff, now.Sub(n.refusedSince)/10+p.check)
	}
	if now.Sub(n.lastRequest) < wait {
		return false
	}
	n.lastRequest = now
	n.requests++
	return true
}

func (n *joined) deliverReplies(w *vl1.Worker) {
	n.mu.Lock()
	replies := n.replies
	n.replies = nil
	n.mu.Unlock()
	for _, r := range replies {
		n.l.deliver(w, n, n.snap.Load(), &vl2.FrameInfo{
			Inbound: true, DestinationMAC: r.to, SourceMAC: r.reply.From, EtherType: vl2.EtherTypeIPv6, Data: r.reply.Data,
		})
	}
}

func (n *joined) request(w *vl1.Worker) {
	s := n.snap.Load()
	var revision uint64
	var timestamp int64
	if s.cfg != nil {
		revision, timestamp = s.cfg.Revision, s.cfg.Timestamp
	}
	meta := vl2.RequestMetadata()
	controller := n.id.Controller()
	if controller == n.l.self {
		if n.l.cfg.Controller != nil {
			n.l.cfg.Controller.HandleRequest(n.l.id, ownRequest, n.id, meta)
		} else {
			n.refuse(StatusNotFound, vl2.SSO{}, w.Now())
		}
		return
	}
	n.l.stats.requests.Add(1)
	n.l.peers.Send(w, controller, packet.VerbNetworkConfigRequest,
		vl2.AppendConfigRequest(nil, n.id, meta, revision, timestamp), vl1.SendOpts{Compress: true, ExpectReply: true})
}

// ownRequest is the packet ID of requests that our own controller gets.
const ownRequest packet.ID = 1<<64 - 1

func (n *joined) configureAdHoc(now time.Time) {
	if s := n.snap.Load(); s.cfg != nil || s.status == StatusNotFound {
		return
	}
	cfg, ok := vl2.AdHocConfig(n.id, n.l.self, now.UnixMilli())
	switch {
	case cfg != nil:
		n.install(cfg, now)
	case !ok:
		n.refuse(StatusNotFound, vl2.SSO{}, now)
	}
}

// renew asks for a configuration before it is due if a genuine certificate of another member
// is of another time than ours: the controller's clock was set, or we slept.
func (n *joined) renew(own *vl2.NetworkConfig, theirs *vl2.COM) {
	if own == nil || own.Near(theirs.Timestamp()) {
		return
	}
	n.mu.Lock()
	n.outdated = true
	n.mu.Unlock()
	n.l.wake()
}

// heard notes that the controller spoke.
func (n *joined) heard(now time.Time) {
	at := n.l.instant(now)
	n.mu.Lock()
	n.heardFrom, n.requests = at, 0
	n.mu.Unlock()
}

// install makes cfg the current configuration.
func (n *joined) install(cfg *vl2.NetworkConfig, now time.Time) {
	n.mu.Lock()
	old := n.snap.Load()
	n.requests, n.refusedSince = 0, time.Time{}
	n.groupsChanged = true
	n.snap.Store(n.newStateLocked(cfg, StatusOK, now))
	n.mu.Unlock()
	if old.status != StatusOK {
		n.l.log.Info("network is up", "network", n.id, "name", ztnode.Text(cfg.Name), "addresses", cfg.Addresses)
	}
	n.l.changed(n)
}

// refuse notes a refusal by the controller.
func (n *joined) refuse(status Status, login vl2.SSO, now time.Time) {
	n.mu.Lock()
	old := n.snap.Load()
	if n.refusedSince.IsZero() {
		n.refusedSince = now
	}
	same := old.status == status && old.login == login
	if !same {
		s := n.newStateLocked(old.cfg, status, old.updated)
		s.login = login
		n.snap.Store(s)
	}
	n.mu.Unlock()
	if !same {
		n.l.log.Warn("network refused us", "network", n.id, "status", status)
		n.l.changed(n)
	}
}

// receiveConfigRequest passes a request to our controller.
func (l *Layer) receiveConfigRequest(w *vl1.Worker, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
	nwid, meta, err := vl2.ParseConfigRequest(p.Payload())
	if err != nil {
		l.stats.malformed.Add(1)
		return vl1.Result{Skip: true}
	}
	if l.cfg.Controller != nil {
		l.cfg.Controller.HandleRequest(from.Identity(), p.ID(), nwid, meta)
		return vl1.Result{}
	}
	l.peers.SendError(w, from, src, packet.VerbNetworkConfigRequest, p.ID(),
		packet.ErrorUnsupportedOperation, nwid.Append(nil))
	return vl1.Result{}
}

// receiveConfig handles one chunk of a configuration (chapter 03 §1.5). solicited
// says that it answers our request.
func (l *Layer) receiveConfig(w *vl1.Worker, from *vl1.Peer, p packet.Packet, src vl1.Source, b []byte, solicited bool) vl1.Result {
	chunk, err := vl2.ParseChunk(b)
	if err != nil {
		l.stats.malformed.Add(1)
		return vl1.Result{Skip: true}
	}
	n := l.net(chunk.Network)
	if n == nil || n.id.AdHoc() {
		return vl1.Result{}
	}
	signer := n.controllerIdentity()
	if signer == nil {
		return vl1.Result{}
	}
	if n.hasChunk(w.Now(), chunk) {
		return vl1.Result{}
	}
	work, ok := l.afford(w, from, 1)
	if !ok {
		return vl1.Result{}
	}
	genuine := chunk.Verify(signer)
	work.Done()
	if !genuine {
		l.stats.badSignatures.Add(1)
		return vl1.Result{}
	}
	cfg := n.assemble(w, from, chunk, b)
	if cfg == nil {
		return vl1.Result{}
	}
	if !solicited && from != nil {
		ack := n.id.Append(nil)
		l.peers.SendOK(w, from, src, packet.VerbEcho, p.ID(), appendU64(ack, chunk.UpdateID))
	}
	if solicited || from.Address() == n.id.Controller() {
		n.heard(w.Now())
	}
	if n.wants(cfg, solicited) {
		n.install(cfg, w.Now())
	}
	return vl1.Result{}
}

// controllerIdentity returns the identity that signs what concerns the network, nil
// while it isn't known.
func (n *joined) controllerIdentity() *identity.Identity {
	if n.id.Controller() == n.l.self {
		return n.l.id
	}
	if p := n.l.peers.Peer(n.id.Controller()); p != nil {
		return p.Identity()
	}
	return nil
}

// hasChunk reports whether a chunk is known, so that its signature need not be checked
// again.
func (n *joined) hasChunk(now time.Time, chunk vl2.Chunk) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.updates.Knows(now, chunk)
}

// assemble takes in a chunk that is genuine, and passes it on if it asks for that. It
// returns the configuration that it completes, nil if it doesn't.
func (n *joined) assemble(w *vl1.Worker, from *vl1.Peer, chunk vl2.Chunk, b []byte) *vl2.NetworkConfig {
	n.mu.Lock()
	dict, fresh := n.updates.Add(w.Now(), chunk)
	n.mu.Unlock()
	if fresh && chunk.FastPropagate() {
		n.l.propagate(w, n, from, packet.VerbNetworkConfig, b)
	}
	if dict == nil {
		return nil
	}
	cfg, err := vl2.DecodeNetworkConfig(dict)
	if err != nil {
		n.l.log.Warn("controller sent a configuration that cannot be used", "network", n.id, "error", err)
		n.l.stats.malformed.Add(1)
		return nil
	}
	return cfg
}

// wants reports whether a genuine configuration is for us and newer than what we
// have.
func (n *joined) wants(cfg *vl2.NetworkConfig, solicited bool) bool {
	cur := n.snap.Load()
	if cfg.ID != n.id || cfg.Member != n.l.self {
		return false
	}
	if n.isVoid(cfg) {
		n.l.stats.rejectedCredentials.Add(1)
		return false
	}
	if cur.cfg != nil && cfg.Timestamp < cur.cfg.Timestamp && !solicited {
		return false // an old one replayed
	}
	same := cur.status == StatusOK && !cur.updated.IsZero() && cfg.Timestamp == cur.cfg.Timestamp && bytes.Equal(cfg.Encode(), cur.cfg.Encode())
	return !same
}

// isVoid reports whether a configuration is from before our membership was revoked.
func (n *joined) isVoid(cfg *vl2.NetworkConfig) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.void != 0 && cfg.COM != nil && cfg.COM.Timestamp() <= n.void
}

// propagate sends a signed message on to all members we have records of.
func (l *Layer) propagate(w *vl1.Worker, n *joined, from *vl1.Peer, v packet.Verb, payload []byte) {
	for _, a := range n.memberAddresses() {
		if from != nil && a == from.Address() || a == n.id.Controller() {
			continue
		}
		l.peers.Send(w, a, v, payload, vl1.SendOpts{Compress: true})
	}
}

func (n *joined) memberAddresses() []identity.Address {
	n.memberMu.RLock()
	defer n.memberMu.RUnlock()
	out := make([]identity.Address, 0, len(n.members))
	for a := range n.members {
		out = append(out, a)
	}
	return out
}

// receiveOK handles an answer to one of our requests.
func (l *Layer) receiveOK(w *vl1.Worker, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
	verb, _, rest, ok := splitReply(p.Payload())
	if !ok {
		l.stats.malformed.Add(1)
		return vl1.Result{Skip: true}
	}
	switch verb {
	case packet.VerbNetworkConfigRequest:
		if src.Unasked {
			l.receiveForeign(w, from, rest)
			return vl1.Result{Skip: true}
		}
		return l.receiveConfig(w, from, p, src, rest, true)
	case packet.VerbMulticastGather, packet.VerbMulticastFrame:
		return l.receiveGatherOK(w, from, verb, rest, src)
	}
	return vl1.Result{}
}

// receiveError handles a refusal. The peer layer has matched those that answer a
// request.
func (l *Layer) receiveError(w *vl1.Worker, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
	_, _, rest, ok := splitReply(p.Payload())
	if !ok || len(rest) < 9 {
		l.stats.malformed.Add(1)
		return vl1.Result{Skip: true}
	}
	code, nwid := packet.ErrorCode(rest[0]), vl2.NetworkIDFromBytes(rest[1:])
	n := l.net(nwid)
	if n == nil {
		return vl1.Result{}
	}
	return vl1.Result{Trust: l.refused(w, n, from.Address(), code, rest[9:])}
}

func (l *Layer) refused(w *vl1.Worker, n *joined, from identity.Address, code packet.ErrorCode, data []byte) bool {
	byController := from == n.id.Controller()
	if byController {
		n.heard(w.Now())
	}
	switch code {
	case packet.ErrorNeedMembershipCertificate:
		s := n.snap.Load()
		switch m := n.member(from); {
		case !s.open || s.cfg.COM == nil:
		case m == nil:
			// We may have been started anew, and it knows us from before. It sends nothing
			// until it sees a valid certificate. No record is made for whoever asks.
			if len(s.credentials) > 0 && l.shows.Take(from, w.Now()) {
				n.sendCredentials(w, from, s.credentials[0])
			}
		default:
			last := m.lastPush.Load()
			if last < s.installed || last == 0 || since(l.instant(w.Now()), last) > pushOnRequest {
				n.push(w, m, s)
				n.inVain(from, w.Now())
			}
		}
	case packet.ErrorUnwantedMulticast:
		if g, ok := vl2.ParseGroup(data); ok && n.gate(w, n.snap.Load(), from) {
			l.groups.remove(groupKey{n.id, g}, from)
		}
	case packet.ErrorObjectNotFound, packet.ErrorUnsupportedOperation:
		if byController {
			n.refuse(StatusNotFound, vl2.SSO{}, w.Now())
		}
	case packet.ErrorNetworkAccessDenied:
		if byController {
			n.refuse(StatusAccessDenied, vl2.SSO{}, w.Now())
		}
	case packet.ErrorAuthenticationRequired:
		if byController {
			n.refuse(StatusAuthenticationRequired, vl2.ParseLogin(data), w.Now())
		}
	}
	return false
}

// HandleSelf handles what our own controller sends to our own node.
func (l *Layer) HandleSelf(out vl1.Out, now time.Time, v packet.Verb, payload []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := l.control.Begin(out, now)
	var src vl1.Source
	switch v {
	case packet.VerbOK:
		if verb, _, rest, ok := splitReply(payload); ok && verb == packet.VerbNetworkConfigRequest {
			l.receiveConfig(w, nil, nil, src, rest, true)
		}
	case packet.VerbNetworkConfig:
		l.receiveConfig(w, nil, nil, src, payload, true)
	case packet.VerbError:
		if _, _, rest, ok := splitReply(payload); ok && len(rest) >= 9 {
			if n := l.net(vl2.NetworkIDFromBytes(rest[1:])); n != nil {
				l.refused(w, n, l.self, packet.ErrorCode(rest[0]), rest[9:])
			}
		}
	case packet.VerbNetworkCredentials:
		l.acceptCredentials(w, nil, payload)
	}
}

// ownAddresses lists the assigned addresses.
func (s *state) ownAddresses() []netip.Prefix {
	if s.cfg == nil {
		return nil
	}
	return s.cfg.Addresses
}
