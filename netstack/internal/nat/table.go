// Package nat is the flow table of the forwarding plane: which flows exist, how
// their packets are translated, and when they end. Mappings are endpoint
// independent and not shared, filtering is address and port dependent unless
// configured otherwise (RFC 4787, RFC 5382, RFC 5508).
//
// Packets of known flows take no lock: a hash table of chains is read with
// atomic loads, and what is removed from it is used again only when no reader
// can still see it (epochs, see [Reader]). Opening, closing and removing flows
// is ordered by one mutex that is held for less than a microsecond at a time.
//
// Everything is bounded: flows, flows of a client, ports of a client. Flows have
// no pointers and live in chunks, which keeps the garbage collector out.
package nat

import (
	crand "crypto/rand"
	"math/bits"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"ztgate/netstack/internal/fair"
	"ztgate/netstack/internal/ipkt"
)

const (
	chunkShift = 10
	chunkSize  = 1 << chunkShift
	// slack is how many removed flows may wait for readers while the table is full.
	slack = 8 << 10
	// maxMembers is how many overlay members are told apart.
	maxMembers = 256
	// The last part of ports and flows is kept for clients that have few.
	keptPart = 64
	fewPart  = 1024
	fewLeast = 8
	// Those who have less than 2 to the power of this in half-open flows, or ports of
	// these, are equal.
	equalShares = 4
)

// few is how much of something is so little that a client may have the last of it.
func few(all int) int { return max(all/fewPart, fewLeast) }

type chunk [chunkSize]Flow

// links are the neighbours of a flow in the ring of those of its mapping; zero if it
// is alone.
type links struct{ prev, next uint32 }

// Table is the flow table. Its methods are safe for concurrent use; those that
// take or return flows are called between Enter and Leave of a [Reader].
type Table struct {
	set        Settings
	seed       [6]uint64
	idle       [NumClasses][numStates]uint32 // coarse, by class and state
	quarantine uint32                        // coarse
	buckets    []atomic.Uint32               // references: flow number and direction, 0 = end
	chunks     []atomic.Pointer[chunk]
	epoch      atomic.Uint32
	readers    atomic.Pointer[[]*Reader]

	mu       sync.Mutex
	now      uint32 // latest time seen, coarse
	count    int
	used     uint32 // flow numbers in use or free, from 1
	free     uint32 // list of free flows
	limbo    list   // removed flows that readers may see
	wheel    wheel
	clients  map[clientKey]*client
	halfOpen ranks[client]       // half-open flows
	recent   [256]*client        // clients by a hash: most that is done is done for one of a few
	linked   []*[chunkSize]links // by chunk; nil as long as none of its flows shares a mapping
	members  [maxMembers]holding // what overlay members have, by a hash; 0 = the VPC
	pools    []*pool
	byAddr   map[poolKey]uint16
	groups   map[[16]byte]*group // by address
	latest   [NumClasses]uint16  // pools that were used
	closed   list                // closed flows without a pool

	memberFlows   int // most flows of a member, 0 = no limit
	kept, keepFor int // the last flows, for clients with less than so many
	places        fair.Hash
	spareClients  *client
	remembered    clientList // proven clients without flows
	spareShares   *portShare

	ownPorts portSet // what every pool leaves to the gateway

	stats Stats
}

// Stats are counters by protocol class.
type Stats struct {
	Live, Created [NumClasses]atomic.Int64
	Removed       [NumClasses][NumReasons]atomic.Int64
	Refused       [NumClasses][NumRefusals]atomic.Int64
	Connect       [NumSides]ConnectTimes // of clients of a side to servers of the other
}

// Reason is why a flow ended.
type Reason uint8

const (
	Idle       Reason = iota
	Closed            // by TCP
	Evicted           // half-open or closed, to make room
	Flushed           // no longer allowed, or its network is gone
	NumReasons = iota
)

// ReasonNames are the label values.
var ReasonNames = [NumReasons]string{"idle", "closed", "evicted", "flushed"}

// New makes an empty table.
func New(s Settings) *Table {
	if s.MaxFlows == 0 {
		s.MaxFlows = DefaultMaxFlows
	}
	kept, keepFor, memberFlows := 0, 0, 0
	if s.MaxFlowsPerClient == 0 {
		s.MaxFlowsPerClient = max(s.MaxFlows/2, 1)
		kept, keepFor, memberFlows = s.MaxFlows/keptPart, few(s.MaxFlows), s.MaxFlowsPerClient
	}
	s.Timeouts.defaults()
	if s.Seed == [32]byte{} {
		crand.Read(s.Seed[:]) // never fails
	}
	t := &Table{set: s, clients: make(map[clientKey]*client), byAddr: make(map[poolKey]uint16), pools: []*pool{nil}, ownPorts: ownPorts(),
		kept: kept, keepFor: keepFor, memberFlows: memberFlows}
	stream := rand.NewChaCha8(s.Seed)
	for i := range t.seed {
		t.seed[i] = stream.Uint64()
	}
	t.places = fair.Hash{stream.Uint64(), stream.Uint64()}
	switch {
	case s.PortQuarantine == 0:
		t.quarantine = Coarse(int64(2 * time.Minute))
	case s.PortQuarantine > 0:
		t.quarantine = Coarse(int64(s.PortQuarantine))
	}
	t.setIdle(&s.Timeouts)
	t.buckets = make([]atomic.Uint32, max(1024, 1<<bits.Len(uint(s.MaxFlows*4-1))))
	t.chunks = make([]atomic.Pointer[chunk], (s.MaxFlows+slack)>>chunkShift+2)
	t.linked = make([]*[chunkSize]links, len(t.chunks))
	t.epoch.Store(1)
	t.readers.Store(new([]*Reader))
	return t
}

func (t *Table) setIdle(to *Timeouts) {
	for class := range NumClasses {
		for state := range numStates {
			d := to.Other
			switch class {
			case ClassTCP:
				d = [numStates]time.Duration{stateNew: to.TCPOpening, stateOpening: to.TCPOpening, stateEstablished: to.TCPEstablished,
					stateClosing: to.TCPHalfClosed, stateClosed: to.TCPClosing, stateReset: to.TCPReset, stateRefused: refusedFor}[state]
			case ClassUDP:
				if d = to.UDP; state == stateNew {
					d = to.UDPUnanswered
				}
			case ClassICMP:
				d = to.ICMP
			}
			t.idle[class][state] = Coarse(int64(d))
		}
	}
}

// Stats returns the counters.
func (t *Table) Stats() *Stats { return &t.stats }

// Limit returns the largest number of flows.
func (t *Table) Limit() int { return t.set.MaxFlows }

// Filter returns the filtering class of a protocol.
func (t *Table) Filter(proto uint8) Filtering {
	switch proto {
	case ipkt.TCP:
		return t.set.FilterTCP
	case ipkt.UDP:
		return t.set.FilterUDP
	}
	return AddressAndPortDependent
}

// Len returns the number of flows.
func (t *Table) Len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.count
}

// Reader is one goroutine's view of the table. Flows it found stay what they are
// until it leaves; it should do so often, since removed flows wait for it.
type Reader struct {
	t     *Table
	epoch atomic.Uint32 // in which it entered; 0 = outside
	_     [48]byte      // alone on its cache line
}

// NewReader makes a reader, which is kept for the life of the table.
func (t *Table) NewReader() *Reader {
	r := &Reader{t: t}
	t.mu.Lock()
	defer t.mu.Unlock()
	list := append(append([]*Reader(nil), *t.readers.Load()...), r)
	t.readers.Store(&list)
	return r
}

// Enter begins a batch.
func (r *Reader) Enter() { r.epoch.Store(r.t.epoch.Load()) }

// Leave ends it.
func (r *Reader) Leave() { r.epoch.Store(0) }

func (t *Table) flow(id uint32) *Flow {
	return &t.chunks[id>>chunkShift].Load()[id&(chunkSize-1)]
}

func (t *Table) links(id uint32) (l links) {
	if c := t.linked[id>>chunkShift]; c != nil {
		l = c[id&(chunkSize-1)]
	}
	return l
}

func (t *Table) setLinks(id uint32, l links) {
	c := &t.linked[id>>chunkShift]
	if *c == nil {
		if l == (links{}) {
			return
		}
		*c = new([chunkSize]links)
	}
	(*c)[id&(chunkSize-1)] = l
}

func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	return hi ^ lo
}

// sum computes the hash of a key with the table's seed: nobody outside can aim at
// one chain.
func (t *Table) sum(k *Key) {
	h := mix(le.Uint64(k.src[8:])^t.seed[0], le.Uint64(k.dst[8:])^t.seed[1])
	if s, d := le.Uint64(k.src[:]), le.Uint64(k.dst[:]); s|d != 0 {
		h ^= mix(s^t.seed[2], d^t.seed[3])
	}
	k.hash = t.sumPorts(h, uint64(k.sport)<<32|uint64(k.dport)<<16|uint64(k.proto)<<8|uint64(k.side))
}

// sumPorts adds all but the addresses to a hash.
func (t *Table) sumPorts(h, ports uint64) uint32 { return uint32(mix(h^t.seed[4], ports^t.seed[5])) }

// hashOf returns the hash of the tuple of packets of a direction, see sum.
func (t *Table) hashOf(f *Flow, dir int) uint32 {
	w, src, dst := &f.tuples[dir], &f.hi[2*dir], &f.hi[2*dir+1]
	h := mix((w.addrs<<32|uint64(le.Uint32(src[8:])))^t.seed[0], (w.addrs>>32<<32|uint64(le.Uint32(dst[8:])))^t.seed[1])
	if s, d := le.Uint64(src[:]), le.Uint64(dst[:]); s|d != 0 {
		h ^= mix(s^t.seed[2], d^t.seed[3])
	}
	return t.sumPorts(h, uint64(bits.ReverseBytes32(w.ports))<<16|uint64(w.proto())<<8|uint64(w.side()))
}

func (t *Table) bucket(hash uint32) *atomic.Uint32 {
	return &t.buckets[hash&uint32(len(t.buckets)-1)]
}

// KeyOf fills k from a packet of a side; false if it has no tuple.
func (t *Table) KeyOf(side Side, v *ipkt.View, k *Key) bool {
	if !keyOf(side, v, k) {
		return false
	}
	t.sum(k)
	return true
}

// Find returns the flow of a key and the packet's direction, nil if there is none.
func (t *Table) Find(now int64, k *Key) (*Flow, int) {
	f, ref := t.lookup(k)
	if f == nil {
		return nil, 0
	}
	if t.expired(Coarse(now), f) {
		t.mu.Lock()
		if f.state.Load() != stateDead && t.expired(Coarse(now), f) {
			t.remove(ref>>1, f, t.ending(f))
		}
		t.mu.Unlock()
		return nil, 0
	}
	return f, int(ref & 1)
}

// Peek is Find for those who only look: it leaves flows that are over where they are.
func (t *Table) Peek(now int64, k *Key) (*Flow, int) {
	f, ref := t.lookup(k)
	if f == nil || t.expired(Coarse(now), f) {
		return nil, 0
	}
	return f, int(ref & 1)
}

func (t *Table) lookup(k *Key) (*Flow, uint32) {
	for ref := t.bucket(k.hash).Load(); ref != 0; {
		f := t.flow(ref >> 1)
		if f.is(int(ref&1), k) {
			return f, ref
		}
		ref = f.next[ref&1].Load()
	}
	return nil, 0
}

// expired reports a flow that was idle for too long.
func (t *Table) expired(now uint32, f *Flow) bool {
	return int32(now-f.last.Load()) > int32(t.idle[ClassOf(f.Proto())][f.state.Load()&stateMask])
}

// ending returns why a flow ends that is idle for too long.
func (t *Table) ending(f *Flow) Reason {
	if isClosed(f.state.Load()) {
		return Closed
	}
	return Idle
}

// link makes a direction of a flow findable. t.mu is held.
func (t *Table) link(id uint32, f *Flow, dir int, hash uint32) {
	b := t.bucket(hash)
	f.next[dir].Store(b.Load())
	b.Store(id<<1 | uint32(dir))
}

// unlink is the inverse of link. Readers that stand on the flow go on from it.
func (t *Table) unlink(id uint32, f *Flow, dir int) {
	want := id<<1 | uint32(dir)
	at := t.bucket(t.hashOf(f, dir))
	for ref := at.Load(); ref != 0; ref = at.Load() {
		if ref == want {
			at.Store(f.next[dir].Load())
			return
		}
		at = &t.flow(ref >> 1).next[ref&1]
	}
}

// alloc returns a flow that nobody sees, 0 if there is none. t.mu is held.
func (t *Table) alloc() uint32 {
	if t.free == 0 {
		t.reclaim()
	}
	if id := t.free; id != 0 {
		t.free = t.flow(id).lnext
		return id
	}
	id := t.used + 1
	if int(id) >= t.set.MaxFlows+slack {
		return 0
	}
	if c := &t.chunks[id>>chunkShift]; c.Load() == nil {
		c.Store(new(chunk))
	}
	t.used = id
	return id
}

// reclaim frees some of the removed flows that no reader sees any more. t.mu is
// held.
func (t *Table) reclaim() {
	if t.limbo.first == 0 {
		return
	}
	oldest := t.epoch.Add(1)
	for _, r := range *t.readers.Load() {
		if e := r.epoch.Load(); e != 0 && int32(e-oldest) < 0 {
			oldest = e
		}
	}
	for range 2 * sweepStep {
		id := t.limbo.first
		if id == 0 || int32(t.flow(id).dir[0].timer-oldest) >= 0 {
			return
		}
		f := t.flow(id)
		t.unlist(&t.limbo, f)
		f.lnext, t.free = t.free, id
	}
}

// list is a list of flows in the order they were added.
type list struct{ first, last uint32 }

func (t *Table) enlist(l *list, id uint32, f *Flow) {
	f.lprev, f.lnext = l.last, 0
	if l.last == 0 {
		l.first = id
	} else {
		t.flow(l.last).lnext = id
	}
	l.last = id
}

func (t *Table) unlist(l *list, f *Flow) {
	if f.lprev == 0 {
		l.first = f.lnext
	} else {
		t.flow(f.lprev).lnext = f.lnext
	}
	if f.lnext == 0 {
		l.last = f.lprev
	} else {
		t.flow(f.lnext).lprev = f.lprev
	}
	f.lprev, f.lnext = 0, 0
}

// Remove takes a flow out, because it may no longer pass.
func (t *Table) Remove(f *Flow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := f.key(FromClient)
	t.sum(&k)
	if found, ref := t.lookup(&k); found == f {
		t.remove(ref>>1, f, Flushed)
	}
}

// remove takes a flow out. t.mu is held.
func (t *Table) remove(id uint32, f *Flow, why Reason) {
	t.unlink(id, f, FromClient)
	t.unlink(id, f, FromServer)
	t.wheel.remove(t, f)
	state := f.state.Load()
	c := t.clientOf(f)
	t.leaveLists(c, f, state)
	if f.Mapped() {
		t.release(c, id, f, why)
	}
	if !isClosed(state) {
		t.addLive(c, -1)
	}
	if why == Evicted {
		c.evicted++
	}
	t.leave(c)
	f.state.Store(stateDead)
	class := ClassOf(f.Proto())
	t.count--
	t.stats.Live[class].Add(-1)
	t.stats.Removed[class][why].Add(1)
	f.dir[0].timer = t.epoch.Load() // out of the wheel, it has no other use
	t.enlist(&t.limbo, id, f)
}

// Info describes a flow.
type Info struct {
	*Flow
	State         string
	Created, Last int64 // ns
}

// Walk calls f for every flow until it returns false. Flows that open or end
// meanwhile may be missed. The caller's reader has entered.
func (t *Table) Walk(f func(Info) bool) {
	t.mu.Lock()
	used := t.used
	t.mu.Unlock()
	for first := uint32(0); first <= used; first += chunkSize {
		ids := t.live(first, min(first+chunkSize-1, used))
		for _, id := range ids {
			fl := t.flow(id)
			state := fl.state.Load() & stateMask
			if state == stateDead {
				continue // since it was listed; the caller's reader keeps it from being used again
			}
			if !f(Info{fl, stateName(fl.Proto(), state), int64(fl.created) << coarseShift, int64(fl.last.Load()) << coarseShift}) {
				return
			}
		}
	}
}

// live lists the flows in a range that exist now.
func (t *Table) live(first, last uint32) (out []uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id := max(first, 1); id <= last; id++ {
		if s := t.flow(id).state.Load() & stateMask; s != stateDead && s != stateFree {
			out = append(out, id)
		}
	}
	return out
}
