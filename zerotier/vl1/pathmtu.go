package vl1

import (
	"cmp"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// What a path carries is found by asking (RFC 8899): an ECHO padded to a size comes
// back as an OK nine bytes longer, so that one answer proves the size in both
// directions. No ICMP is needed, and none believed.
//
// A path starts with what nearly every path carries. That costs large packets a second
// datagram for one round trip, and no packet its life. Only paths that large packets
// go over or that lead to members of our networks are asked about. A peer that
// answers no probe of any size, as very old ones don't, gets what it always got.
const (
	safeDatagram  = 1200 // UDP payload that nearly every path carries (RFC 8899 §5.1.2)
	leastDatagram = 519  // of the smallest links considered

	sizeTries     = 2                      // unanswered probes mean too large
	sizeGap       = 200 * time.Millisecond // after another ECHO: the reference answers none within 166 ms
	sizePatience  = 250 * time.Millisecond // for an answer, if the path isn't known to take longer
	sizeBusy      = 900 * time.Millisecond // between probes of a size that many datagrams use
	sizeIdle      = 10 * time.Second       // and that few use
	sizeBusyAfter = 20                     // batches with large datagrams since the last probe are many
	sizeUsed      = 20 * time.Second       // a path counts as used after a packet
	sizeRaise     = 10 * time.Second       // until larger sizes are tried again; four times as long each time
	sizeRaiseMost = 10 * time.Minute
	sizeWarnEvery = 10 * time.Minute
	sizePaths     = 4 // of a peer asked about at once: what it answers is limited
	sizeTick      = 100 * time.Millisecond
)

// linkSizes are the sizes of IP packets that links have, from jumbo frames over tunnels
// to the least of IPv4.
var linkSizes = [...]int{9001, 1500, 1492, 1480, 1472, 1460, 1454, 1420, 1400, 1380, 1350, 1300, 1280, 1000, 576}

// linkDatagram returns the largest ECHO whose answer fits a packet of a link.
func linkDatagram(link int, v6 bool) int {
	if v6 {
		return link - 40 - 8 - replyLen
	}
	return link - 20 - 8 - replyLen
}

// datagramSize is the largest datagram that a path carries.
//
//	searching --nothing between answered and unanswered--> known --too long unanswered--> searching
//	    `-----no size answered--> assumed                    `---time for larger ones---> searching
//	                                 `--------------------------------------------------> searching
type datagramSize struct {
	now   atomic.Int32  // what is used
	large atomic.Int64  // time of the latest batch with a packet above safeDatagram
	count atomic.Uint32 // of such batches, if they had datagrams above it, since the last probe
	known atomic.Int32  // what was found, 0 = nothing yet

	// Guarded by Core.mu.
	most      int   // as configured, or the default
	low, high int   // answered and unanswered, 0 = none
	searching bool  // for the largest size between low and high
	begun     bool  // a probe was sent
	probe     int   // size that an answer is awaited for, 0 = none
	tries     int   // of it without an answer
	sent      int64 // time of the latest probe
	raise     int64 // when to search for more, 0 = never
	pause     time.Duration
	warned    int64
}

func (d *datagramSize) begin(most int) {
	most = min(most, packet.MaxPacket-replyLen)
	d.most, d.searching, d.pause = most, true, sizeRaise
	d.now.Store(int32(min(most, safeDatagram)))
}

// get returns the largest datagram to send.
func (d *datagramSize) get() int { return int(d.now.Load()) }

// noteSent notes a packet of n bytes that was sent in datagrams of at most size.
func (d *datagramSize) noteSent(n, size int, t int64) {
	if n <= safeDatagram || d.large.Load() == t {
		return
	}
	d.large.Store(t)
	if n/packet.Datagrams(n, size) > safeDatagram {
		d.count.Add(1)
	}
}

// nextLocked returns the size to ask for, 0 if the search is over.
func (d *datagramSize) nextLocked(v6 bool) int {
	switch {
	case d.low == d.most:
		return 0
	case d.high == 0:
		return d.most
	case d.low > 0:
		return d.middleLocked(v6)
	case d.high > safeDatagram:
		return safeDatagram
	case d.high > leastDatagram:
		return leastDatagram
	}
	return 0
}

// middleLocked returns the size in the middle of those between low and high, 0 without.
func (d *datagramSize) middleLocked(v6 bool) int {
	var list [len(linkSizes)]int
	n := 0
	for _, link := range linkSizes {
		if s := linkDatagram(link, v6); s > d.low && s < d.high {
			list[n] = s
			n++
		}
	}
	return list[n/2]
}

// stepLocked moves on and returns the size of the probe to send now, 0 for none. busy
// says how often a size in use is proven again, 0 = that it isn't.
func (d *datagramSize) stepLocked(t int64, patience, busy time.Duration, v6 bool) int {
	if d.probe != 0 {
		if since(t, d.sent) < patience {
			return 0
		}
		d.unansweredLocked()
	} else if since(t, d.sent) < sizeGap {
		return 0
	}
	if d.probe == 0 {
		d.probe = d.wantedLocked(t, busy, v6)
	}
	if d.probe != 0 {
		d.sent, d.begun = t, true
		d.count.Store(0)
	}
	return d.probe
}

// wantedLocked returns the size to ask for, 0 if nothing is to be asked.
func (d *datagramSize) wantedLocked(t int64, busy time.Duration, v6 bool) int {
	if !d.searching {
		switch {
		case busy == 0:
			return 0
		case d.raise != 0 && t >= d.raise:
			d.searching, d.low, d.high = true, int(d.known.Load()), 0
		case d.known.Load() != 0 && since(t, d.sent) >= busy:
			return d.get()
		default:
			return 0
		}
	}
	n := d.nextLocked(v6)
	if n == 0 {
		d.finishLocked(t)
	}
	return n
}

// unansweredLocked gives a probe up. One is enough to use less meanwhile.
func (d *datagramSize) unansweredLocked() {
	if d.tries++; d.probe <= d.get() {
		less := leastDatagram
		if d.probe > safeDatagram {
			less = safeDatagram
		}
		d.now.Store(int32(min(less, d.probe)))
	}
	if d.tries < sizeTries {
		return
	}
	if !d.searching {
		d.searching, d.low, d.pause = true, 0, sizeRaise
	}
	d.high, d.probe, d.tries = d.probe, 0, 0
}

// finishLocked ends a search. Without any answer it isn't size that ails the path.
func (d *datagramSize) finishLocked(t int64) {
	d.searching, d.raise = false, 0
	if d.low == 0 {
		d.now.Store(cmp.Or(d.known.Load(), int32(d.most)))
	}
	if d.low < d.most {
		d.raise = t + int64(d.pause)
		d.pause = min(4*d.pause, sizeRaiseMost)
	}
}

// find makes n the size that is used.
func (d *datagramSize) find(n int) {
	d.now.Store(int32(n))
	d.known.Store(int32(n))
}

// answeredLocked notes that the path carries n bytes. It reports whether that shows a
// black hole: a larger datagram vanished before.
func (d *datagramSize) answeredLocked(n int) (hole bool) {
	if n == d.probe {
		d.probe, d.tries = 0, 0
	}
	if !d.searching {
		d.find(max(d.get(), n))
		return false
	}
	if n >= d.high {
		d.high = 0 // it was only late
	}
	hole = d.low == 0 && d.high != 0
	d.low = max(d.low, n)
	d.find(d.low)
	return hole
}

// sizePathsLocked asks what the paths of a peer carry, as far as that matters.
func (c *Core) sizePathsLocked(w *Worker, p *Peer) {
	if !p.knowsEcho() {
		if p.ProtocolVersion() != 0 {
			for _, pa := range p.paths {
				pa.size.now.Store(int32(pa.size.most))
			}
		}
		return
	}
	r := p.route.Load()
	data := p.lastData.Load()
	asking := 0
	for _, pa := range p.paths {
		if pa.size.probe != 0 {
			asking++
		}
	}
	for _, pa := range p.paths {
		d := &pa.size
		large := d.large.Load()
		used := large != 0 && since(w.t, large) < sizeUsed ||
			r != nil && r.path == pa && data != 0 && since(w.t, data) < sizeUsed
		if pa.silent(w.t) || pa.doubtedLocked(w.t) || !d.begun && !used && !p.trusted(w.t) || d.probe == 0 && since(w.t, pa.probed) < sizeGap {
			continue
		}
		if d.probe == 0 {
			if asking == sizePaths {
				continue
			}
			asking++
		}
		var again time.Duration
		switch {
		case used && d.count.Load() >= sizeBusyAfter && !c.cfg.LowBandwidth:
			again = sizeBusy
		case used:
			again = sizeIdle
		}
		patience := max(sizePatience, 2*time.Duration(pa.latency.Load()))
		if n := d.stepLocked(w.t, patience, again, pa.ep.Addr().Is6()); n != 0 {
			c.askSizeLocked(w, p, pa, n)
		}
		if d.probe != 0 || d.searching {
			c.nextSize = min(c.nextSize, d.sent+int64(patience))
		}
	}
}

// askSizeLocked sends an ECHO of n bytes in one datagram.
func (c *Core) askSizeLocked(w *Worker, p *Peer, pa *path, n int) {
	b := packet.Packet(make([]byte, n))
	id := c.emit(w, p, &way{sock: pa.sock, ep: pa.ep, size: n}, packet.VerbEcho, b, p.suite())
	pa.lastOut.Store(w.t)
	c.replies.expect(id, &expectation{peer: p.addr, verb: packet.VerbEcho, ep: pa.ep, sent: w.t, size: n})
}

// noteSize notes an answer to a probe of a path's size.
func (c *Core) noteSize(w *Worker, p *Peer, src Source, e *expectation, payload int) {
	if e.size == 0 || payload < e.size-packet.HeaderLen {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.IndexFunc(p.paths, func(pa *path) bool { return pa.ep == src.Endpoint && pa.sock == src.Socket })
	if i < 0 {
		return
	}
	d := &p.paths[i].size
	if !d.answeredLocked(e.size) {
		return
	}
	c.stats.blackHoles.Add(1)
	if d.warned == 0 || since(w.t, d.warned) >= sizeWarnEvery {
		d.warned = w.t
		c.log.Warn("large datagrams vanish on a path, sending smaller ones", "peer", p.addr, "endpoint", src.Endpoint, "carried", e.size, "lost", d.high)
	}
}

// sizeTo returns the largest datagram to send to an endpoint of a peer.
func (c *Core) sizeTo(p *Peer, sock SocketID, ep netip.AddrPort) int {
	if r := p.route.Load(); r != nil && r.path.ep == ep && r.path.sock == sock {
		return r.path.size.get()
	}
	if pa := p.lastPath.Load(); pa != nil && pa.ep == ep && pa.sock == sock {
		return pa.size.get()
	}
	return min(c.mtu(ep.Addr()), safeDatagram)
}

// PacketLimit returns the size of the largest packet that reaches a node.
func (c *Core) PacketLimit(a identity.Address) int {
	size := safeDatagram
	if p := c.Peer(a); p != nil {
		if r := p.route.Load(); r != nil {
			size = r.path.size.get()
		}
	}
	return min(packet.MaxPacket, size+(packet.MaxFragments-1)*(size-packet.FragmentHeaderLen))
}

// PathMTU returns the largest datagram that the path to a node is known to carry, 0 if
// that isn't known.
func (c *Core) PathMTU(a identity.Address) int {
	if p := c.Peer(a); p != nil {
		if r := p.route.Load(); r != nil {
			return int(r.path.size.known.Load())
		}
	}
	return 0
}
