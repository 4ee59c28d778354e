// Package budget bounds the time that a node spends on dear work because others ask
// for it: signatures, key agreements, identities, decompression. Who shares a network
// with us has a budget of its own; all others share one, of which each has a small
// part. It counts time and not pieces of work, so that it means the same on every
// machine.
package budget

import (
	"sync/atomic"
	"time"

	"ztgate/internal/rate"
	"ztgate/zerotier/identity"
)

// Kind is a kind of dear work.
type Kind uint8

const (
	Signature Kind = iota // one Ed25519 signature checked
	Agreement             // one X25519 key agreement
	Identity              // an address checked against its keys, which takes much memory
	Inflation             // a packet decompressed
	kinds
)

// firstCosts are what work is taken to cost until it was measured.
func firstCosts() [kinds]time.Duration {
	return [...]time.Duration{85 * time.Microsecond, 100 * time.Microsecond, 15 * time.Millisecond, 10 * time.Microsecond}
}

// Shares are one part in so many of a core, in the long run; what may be done at once is
// given as time. Those who have not proven an identity and those who have, but
// share no network with us, have 5 % each, so that forged HELLOs don't keep
// newcomers from showing their certificates.
const (
	unprovenShare = 20
	unprovenBurst = time.Second
	provenShare   = 20
	provenBurst   = 250 * time.Millisecond
	oneShare      = 100 // of one of the latter
	oneBurst      = 20 * time.Millisecond
	memberShare   = 20 // of one member
	memberBurst   = 250 * time.Millisecond

	senders = 4096 // told apart
)

// Sender is for whom work is done.
type Sender struct {
	Address identity.Address // 0: nobody who has proven an identity
	Member  bool             // it shares a network with us, or we ask it ourselves
}

// Budget is safe for concurrent use.
type Budget struct {
	clock    func() time.Duration
	costs    [kinds]atomic.Int64 // running averages, ns
	unproven rate.Shared         // of all without a proven identity
	proven   rate.Shared         // of all others who are no members
	each     *rate.Table[identity.Address]
	members  *rate.Table[identity.Address]
}

// New makes a budget. clock tells how long work takes; nil = work costs what it is first
// taken to cost.
func New(clock func() time.Duration) *Budget {
	b := &Budget{clock: clock, each: rate.NewTable[identity.Address](senders), members: rate.NewTable[identity.Address](senders)}
	for i, c := range firstCosts() {
		b.costs[i].Store(int64(c))
	}
	return b
}

// Work is work that is being done. The zero value is work that nobody counts.
type Work struct {
	b       *Budget
	kind    Kind
	from    Sender
	pieces  int
	charged int
	began   time.Duration
}

// Take begins so many pieces of work at time t, in nanoseconds of the caller's clock. It
// reports false if the sender's time is used up: the work is not to be done then.
func (b *Budget) Take(t int64, from Sender, k Kind, pieces int) (Work, bool) {
	w := Work{b: b, kind: k, from: from, pieces: pieces, charged: pieces * int(b.costs[k].Load())}
	switch {
	case from.Member:
		if !b.members.Of(from.Address).Take(t, w.charged, memberShare, int(memberBurst)) {
			return Work{}, false
		}
	case from.Address == 0:
		if !b.unproven.Take(t, w.charged, unprovenShare, int(unprovenBurst)) {
			return Work{}, false
		}
	default:
		one := b.each.Of(from.Address)
		if !one.Take(t, w.charged, oneShare, int(oneBurst)) {
			return Work{}, false
		}
		if !b.proven.Take(t, w.charged, provenShare, int(provenBurst)) {
			one.Put(w.charged, oneShare)
			return Work{}, false
		}
	}
	if b.clock != nil {
		w.began = b.clock()
	}
	return w, true
}

// Cancel ends work that was not done: nothing is charged.
func (w Work) Cancel() {
	if w.b != nil {
		w.put(w.charged)
	}
}

// Done ends work: what it took is what is charged. A multiple of the average is cut, since
// then the goroutine waited for a processor.
func (w Work) Done() {
	if w.b == nil || w.b.clock == nil {
		return
	}
	avg := &w.b.costs[w.kind]
	old := avg.Load()
	took := min(int(w.b.clock()-w.began), 4*w.charged)
	avg.Store(max(old+(int64(took/w.pieces)-old)/16, 1000))
	w.put(w.charged - took)
}

// put gives time back; below zero it takes more.
func (w Work) put(back int) {
	switch {
	case w.from.Member:
		w.b.members.Of(w.from.Address).Put(back, memberShare)
	case w.from.Address == 0:
		w.b.unproven.Put(back, unprovenShare)
	default:
		w.b.each.Of(w.from.Address).Put(back, oneShare)
		w.b.proven.Put(back, provenShare)
	}
}
