package netstack

import (
	"cmp"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"ztgate/internal/rate"
	"ztgate/netstack/internal/ipkt"
)

// Refusal is packets that went no further for one reason, from one source to one
// destination.
type Refusal struct {
	Reason      string // as in the metrics, see [Reasons]
	Side        Side   // where they came from
	Network     uint64 // that they came from or were to leave by; 0 = none
	MAC         [6]byte
	Protocol    string         // "" where the packet has none
	Source      netip.AddrPort // of the last one; invalid where there is none
	Destination netip.AddrPort
	First, Last time.Time
	Count       uint64 // that were seen: under a flood of different packets not all are
}

// Bounds of what is kept of refusals. A worker notes the first few of a batch without
// looking at anything else, and hands them over once at its end.
const (
	maxRefusals  = 256
	refusalShare = maxRefusals / 8 // of one source
	notedInBatch = 8
	// How often a source gets a place for refusals of a kind that isn't there yet, and
	// all together do.
	refusalSources    = 256
	refusalEvery      = 50 * time.Millisecond
	refusalBurst      = refusalShare
	refusalTotalEvery = 5 * time.Millisecond
	refusalTotalBurst = maxRefusals
)

// whose is what is known of the packet that a worker handles. Its addresses are read only
// if it is dropped.
type whose struct {
	at   *attachment
	view *ipkt.View // nil = it isn't known
	mac  uint64     // of the frame; 0 = none
	side Side
}

// kind is what refusals have in common that are shown as one.
type kind struct {
	network, mac uint64
	src, dst     [16]byte // zero = it has none
	dport        uint16
	proto        uint8
	side         Side
	reason       drop
}

// noted is what a worker has noted in a batch.
type noted struct {
	n    int
	list [notedInBatch]struct {
		kind
		sport uint16
		count uint64
	}
}

// drop counts why the packet at hand goes no further, and notes whose it is.
func (w *worker) drop(d drop) {
	w.e.drop(w.who.side, d)
	w.note(d, 1)
}

func (w *worker) dropN(d drop, n int) {
	if n > 0 {
		w.e.dropN(w.who.side, d, n)
		w.note(d, uint64(n))
	}
}

func (w *worker) note(d drop, n uint64) {
	o, v, i := &w.who, w.who.view, w.noted.n
	if v == nil {
		v = &w.unread
	}
	network := uint64(0)
	if o.at != nil {
		network = o.at.ID
	}
	if i > 0 {
		if x := &w.noted.list[i-1]; x.reason == d && x.mac == o.mac && x.network == network && x.side == o.side && x.dport == v.DPort &&
			x.proto == v.Proto && x.src == v.Src && x.dst == v.Dst {
			x.count += n
			return
		}
	}
	if i == notedInBatch {
		return
	}
	x := &w.noted.list[i]
	x.kind = kind{network, o.mac, v.Src, v.Dst, v.DPort, v.Proto, o.side, d}
	x.sport, x.count = v.SPort, n
	w.noted.n++
}

// refusals are the last refusals of each kind.
type refusals struct {
	mu      sync.Mutex
	list    []refusal
	index   map[kind]int
	sources map[refusalSource]int // how many places each has
	reasons [numDrops]int
	places  *rate.Table[refusalSource]
	all     rate.Shared
}

type refusal struct {
	kind
	sport       uint16
	first, last int64
	count       uint64
}

// refusalSource is who is to have a fair share: a member, or a VPC host.
type refusalSource struct {
	mac uint64
	src [16]byte
}

func (k *kind) source() refusalSource {
	if k.mac != 0 {
		return refusalSource{mac: k.mac}
	}
	return refusalSource{src: k.src}
}

func (r *refusals) init() {
	r.index, r.sources = make(map[kind]int, maxRefusals), make(map[refusalSource]int, maxRefusals)
	r.places = rate.NewTable[refusalSource](refusalSources)
}

// take takes over what a worker noted.
func (r *refusals) take(w *worker) {
	n := w.noted.n
	if n == 0 {
		return
	}
	w.noted.n = 0
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range w.noted.list[:n] {
		x := &w.noted.list[i]
		if at, ok := r.index[x.kind]; ok {
			old := &r.list[at]
			old.sport, old.last = x.sport, w.now
			old.count += x.count
			continue
		}
		if at := r.place(w.now, x.source()); at >= 0 {
			r.put(at, refusal{x.kind, x.sport, w.now, w.now, x.count})
		}
	}
}

// place returns where a source's refusal may stand, -1 if it gets no place now.
func (r *refusals) place(now int64, of refusalSource) int {
	if !r.places.Of(of).Take(now, 1, refusalEvery, refusalBurst) || !r.all.Take(now, 1, refusalTotalEvery, refusalTotalBurst) {
		return -1
	}
	if r.sources[of] >= refusalShare {
		return r.oldest(func(x *refusal) int { return b2i(x.source() == of) })
	}
	if len(r.list) < maxRefusals {
		return len(r.list)
	}
	// The one that has most makes room, else the reason that has most.
	return r.oldest(func(x *refusal) int { return r.sources[x.source()]*maxRefusals + r.reasons[x.reason] })
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// oldest returns where the longest unseen one of those with the highest weight stands.
func (r *refusals) oldest(weight func(*refusal) int) (at int) {
	most := -1
	for i := range r.list {
		if x := &r.list[i]; weight(x) > most || weight(x) == most && x.last < r.list[at].last {
			at, most = i, weight(x)
		}
	}
	return at
}

func (r *refusals) put(at int, x refusal) {
	if at == len(r.list) {
		r.list = append(r.list, x)
	} else {
		old := &r.list[at]
		delete(r.index, old.kind)
		r.reasons[old.reason]--
		if s := old.source(); r.sources[s] == 1 {
			delete(r.sources, s)
		} else {
			r.sources[s]--
		}
		*old = x
	}
	r.index[x.kind] = at
	r.sources[x.source()]++
	r.reasons[x.reason]++
}

// Refusals lists the last refusals, the latest first: at most 256, of which one source
// has at most 32.
func (e *Engine) Refusals() []Refusal {
	e.ring.mu.Lock()
	list := slices.Clone(e.ring.list)
	e.ring.mu.Unlock()
	slices.SortStableFunc(list, func(a, b refusal) int { return cmp.Compare(b.last, a.last) })
	out := make([]Refusal, len(list))
	for i := range list {
		x := &list[i]
		r := Refusal{Reason: x.reason.String(), Side: x.side, Network: x.network, First: e.timeOf(x.first), Last: e.timeOf(x.last), Count: x.count}
		if x.mac != 0 {
			r.MAC = macBytes(x.mac)
		}
		if x.dst != [16]byte{} {
			r.Protocol = protocolName(x.proto)
			r.Destination = netip.AddrPortFrom(ipkt.Addr(x.dst), x.dport)
		}
		if x.src != [16]byte{} {
			r.Source = netip.AddrPortFrom(ipkt.Addr(x.src), x.sport)
		}
		out[i] = r
	}
	return out
}

// NoteRefusal puts a packet among the last refusals that somebody else refused for the
// reason that [Engine.Explain] gave. It never came here, so that nothing is counted.
func (e *Engine) NoteRefusal(q Question, reason string) {
	i := slices.IndexFunc(drops(), func(d drop) bool { return d.String() == reason })
	var v ipkt.View
	if i < 0 || !q.makesPacket() || ipkt.Parse(q.packet(), &v) != ipkt.OK {
		return
	}
	w := e.worker()
	defer e.release(w)
	w.who = whose{at: w.set.attachments[q.Network], view: &v}
	if q.FromOverlay {
		w.who.side = OverlaySide
	}
	w.note(drops()[i], 1)
}

// timeOf inverts [Engine.clock].
func (e *Engine) timeOf(t int64) time.Time { return e.start.Add(time.Duration(t)) }

func macText(m [6]byte) string { return net.HardwareAddr(m[:]).String() }
