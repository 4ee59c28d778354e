package network

import "sync/atomic"

type stats struct {
	framesIn, framesOut, filtered, notOpen, gateClosed, malformed, tooLong atomic.Uint64
	badSignatures, rejectedCredentials, refusedRecords, requests, pushes   atomic.Uint64
	evicted, credentialFlood, gatherFlood, diverted, divertsRefused        atomic.Uint64
	budget                                                                 atomic.Uint64
}

// Stats is a snapshot of counters.
type Stats struct {
	FramesIn, FramesOut uint64
	Filtered            uint64 // refused by rules or for their addresses
	NotOpen             uint64 // network not joined or not up
	GateClosed          uint64 // the other side has no valid certificate
	Malformed           uint64
	TooLong             uint64 // above the network's MTU
	BadSignatures       uint64
	RejectedCredentials uint64
	RefusedRecords      uint64 // a table was full
	ConfigRequests      uint64
	CredentialPushes    uint64
	EvictedRecords      uint64 // members forgotten to make room
	CredentialFlood     uint64 // credentials not looked at: too many of one sender
	GatherFlood         uint64 // gathers and replications refused: too many of one sender
	Diverted            uint64 // copies and redirections that rules ordered
	DivertsRefused      uint64 // those not sent: too many, or to nobody
	OverBudget          uint64 // signatures not checked: too much work for one sender, or for strangers
}

// Stats returns the counters.
func (l *Layer) Stats() Stats {
	s := &l.stats
	return Stats{
		FramesIn: s.framesIn.Load(), FramesOut: s.framesOut.Load(), Filtered: s.filtered.Load(), NotOpen: s.notOpen.Load(),
		GateClosed: s.gateClosed.Load(), Malformed: s.malformed.Load(), TooLong: s.tooLong.Load(),
		BadSignatures: s.badSignatures.Load(), RejectedCredentials: s.rejectedCredentials.Load(),
		RefusedRecords: s.refusedRecords.Load(), ConfigRequests: s.requests.Load(), CredentialPushes: s.pushes.Load(),
		EvictedRecords: s.evicted.Load(), CredentialFlood: s.credentialFlood.Load(), GatherFlood: s.gatherFlood.Load(),
		Diverted: s.diverted.Load(), DivertsRefused: s.divertsRefused.Load(), OverBudget: s.budget.Load(),
	}
}

// Tables says how much a layer remembers, over all networks.
type Tables struct {
	Members     int // records of other members
	Groups      int
	Memberships int // of nodes in groups
	Waiting     int // groups with frames that wait for members
	Bridges     int // routes to MACs behind bridges
	Pending     int // members with credentials on their way
}

// Tables counts what is remembered. Every number has a bound.
func (l *Layer) Tables() (t Tables) {
	for _, n := range *l.nets.Load() {
		n.memberMu.RLock()
		t.Members += len(n.members)
		n.memberMu.RUnlock()
		n.mu.Lock()
		t.Bridges += len(n.bridges)
		t.Pending += len(n.pending)
		n.mu.Unlock()
	}
	g := &l.groups
	g.mu.Lock()
	defer g.mu.Unlock()
	t.Groups, t.Memberships, t.Waiting = len(g.m), g.total, len(g.waiting)
	return t
}

// EachDrop calls f for everything refused, by reason.
func (s Stats) EachDrop(f func(reason string, n uint64)) {
	f("rules", s.Filtered)
	f("not_open", s.NotOpen)
	f("no_certificate", s.GateClosed)
	f("malformed", s.Malformed)
	f("too_long", s.TooLong)
	f("bad_signature", s.BadSignatures)
	f("credential", s.RejectedCredentials)
	f("credential_flood", s.CredentialFlood)
	f("gather_flood", s.GatherFlood)
	f("copy_limit", s.DivertsRefused)
	f("table_full", s.RefusedRecords)
	f("budget", s.OverBudget)
}
