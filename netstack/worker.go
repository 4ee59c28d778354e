package netstack

import (
	"encoding/binary"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
)

// worker is what one goroutine needs to handle a batch. It goes back to the
// engine afterwards.
type worker struct {
	e      *Engine
	reader *nat.Reader
	now    int64
	second uint16 // of now, and one
	set    *netSet
	view   ipkt.View // of the packet that takes the slow path
	key    nat.Key   // and its tuple
	member uint64    // and who sent it; 0 = the VPC
	// What the fast path needs of all this:
	table      *nat.Table
	coarse     uint32 // now
	generation uint32
	slots      []*attachment
	vpcMTU     int
	fast       [maxBatch]fastLookup
	run        run
	sink       uint32 // keeps the compiler from dropping loads that only warm the cache
	out        outBatch
	vpc        vpcBatch
	who        whose     // the packet that takes the slow path
	unread     ipkt.View // stands for one that has no header
	noted      noted
	rx         [numSides]struct{ packets, bytes uint64 }
	hits       uint64
}

// run is packets of one direction of a flow in a row, which are counted at once.
type run struct {
	f              *nat.Flow
	dir            int
	packets, bytes uint64
}

func (r *run) add(f *nat.Flow, dir, n int) {
	if f != r.f || dir != r.dir {
		r.flush()
		r.f, r.dir = f, dir
	}
	r.packets++
	r.bytes += uint64(n)
}

func (r *run) flush() {
	if r.f != nil {
		r.f.Count(r.dir, r.packets, r.bytes)
	}
	*r = run{}
}

func (e *Engine) worker() *worker {
	e.idleMu.Lock()
	var w *worker
	if n := len(e.idle); n > 0 {
		w, e.idle = e.idle[n-1], e.idle[:n-1]
	}
	e.idleMu.Unlock()
	if w == nil {
		w = &worker{e: e, table: e.table, reader: e.table.NewReader()}
		w.out.e, w.vpc.e = e, e
	}
	w.reader.Enter()
	w.now, w.set = e.clock(), e.set.Load()
	w.second = uint16(w.now/int64(time.Second) + 1)
	w.coarse, w.generation, w.slots, w.vpcMTU = nat.Coarse(w.now), w.set.generation, w.set.slots, w.set.vpc.MTU
	return w
}

// release ends a batch: everything is sent and counted.
func (e *Engine) release(w *worker) {
	w.run.flush()
	w.reader.Leave() // before system calls: removed flows wait for readers
	w.out.flush()
	w.vpc.flush()
	for l := range w.rx {
		if t := &w.rx[l]; t.packets > 0 {
			e.stats.traffic[l][rx].add(t.packets, t.bytes)
			t.packets, t.bytes = 0, 0
		}
	}
	if w.hits > 0 {
		e.stats.hits.Add(w.hits)
		w.hits = 0
	}
	e.ring.take(w)
	w.set, w.slots = nil, nil
	e.idleMu.Lock()
	e.idle = append(e.idle, w)
	e.idleMu.Unlock()
}

// vpcBatch handles packets from the VPC side, which lie at vpcOffset.
func (e *Engine) vpcBatch(bufs [][]byte, sizes []int) {
	for len(bufs) > maxBatch {
		e.vpcBatch(bufs[:maxBatch], sizes[:maxBatch])
		bufs, sizes = bufs[maxBatch:], sizes[maxBatch:]
	}
	e.stats.batches[VPCSide].observe(len(bufs))
	w := e.worker()
	r := &w.rx[VPCSide]
	r.packets += uint64(len(bufs))
	for i := range bufs {
		r.bytes += uint64(sizes[i])
		w.fast[i].begin(w.table, VPCSide, bufs[i][vpcOffset:vpcOffset+sizes[i]])
	}
	w.lookUp(len(bufs))
	for i, b := range bufs {
		if !w.fastOut(&w.fast[i], b) {
			w.packet(VPCSide, nil, b[vpcOffset:vpcOffset+sizes[i]], b)
		}
	}
	e.release(w)
}

// Deliver handles frames from a network. Several goroutines may call it at the
// same time; frames are changed in place and not kept.
func (e *Engine) Deliver(nwid uint64, frames [][]byte) {
	for len(frames) > maxBatch {
		e.deliver(nwid, frames[:maxBatch])
		frames = frames[maxBatch:]
	}
	e.deliver(nwid, frames)
}

func (e *Engine) deliver(nwid uint64, frames [][]byte) {
	e.stats.batches[OverlaySide].observe(len(frames))
	w := e.worker()
	at := w.set.attachments[nwid]
	r := &w.rx[OverlaySide]
	r.packets += uint64(len(frames))
	for i, f := range frames {
		r.bytes += uint64(max(len(f)-ethernetLen, 0))
		if at != nil && at.takes(f) {
			w.fast[i].begin(w.table, OverlaySide, f[ethernetLen:])
		} else {
			w.fast[i].size = 0
		}
	}
	w.lookUp(len(frames))
	for i, f := range frames {
		if !w.fastIn(at, &w.fast[i], f) {
			w.frame(at, f)
		}
	}
	e.release(w)
}

// frame judges an Ethernet frame.
func (w *worker) frame(at *attachment, f []byte) {
	w.who = whose{side: OverlaySide, at: at}
	switch {
	case at == nil:
		w.drop(dropNetwork)
		return
	case len(f) < ethernetLen:
		w.drop(dropMalformed)
		return
	}
	w.who.mac = macAt(f[6:])
	if macAt(f) != at.mac && f[0]&1 == 0 {
		w.drop(dropNotForUs)
		return
	}
	switch uint16(f[12])<<8 | uint16(f[13]) {
	case 0x0800, 0x86dd:
		w.packet(OverlaySide, at, f[ethernetLen:], f)
	case 0x0806:
		ready, from, v := at.neigh.HandleARP(w.now, [6]byte(f[6:]), f[ethernetLen:])
		w.neighbour(at, 0x0806, len(f)-ethernetLen, ready, from, v)
	default:
		w.drop(dropEtherType)
	}
}

// packet handles a packet of any kind. buf is as in known.
func (w *worker) packet(side Side, at *attachment, b, buf []byte) {
	if ours := w.e.cfg.Ours; side == VPCSide && ours != nil && ours(b) {
		w.rx[VPCSide].packets--
		w.rx[VPCSide].bytes -= uint64(len(b))
		return
	}
	v := &w.view
	w.member = 0
	if at != nil {
		w.member = macAt(buf[6:])<<16 | uint64(at.slot)
	}
	r := ipkt.Parse(b, v)
	if side == VPCSide {
		w.who = whose{side: VPCSide}
	}
	if r != ipkt.OK {
		w.drop(drop(r))
		return
	}
	w.who.view = v
	switch {
	case at != nil && (buf[0]&1 != 0 || isNDP(v)):
		w.group(at, v)
	case v.Fragment || !w.table.KeyOf(side, v, &w.key):
		w.untupled(side, at, v)
	default:
		w.known(side, at, v, &w.key, buf)
	}
}

// known handles a packet that has a tuple. It lies in buf: at vpcOffset if it is
// from the VPC, behind its Ethernet header if it is from a network.
func (w *worker) known(side Side, at *attachment, v *ipkt.View, k *nat.Key, buf []byte) {
	e := w.e
	f, dir := e.table.Find(w.now, k)
	if at != nil && (f == nil || f.Hop.Load()>>16 != w.who.mac) && !w.fromMember(at, f, v) {
		w.drop(dropMember)
		return
	}
	if f != nil && f.Generation.Load() != w.set.generation && !e.stillAllowed(w.set, f) {
		e.table.Remove(f)
		f = nil
	}
	if f == nil {
		e.stats.misses.Add(1)
		if f, dir = w.unknown(side, at, v, k); f == nil {
			return
		}
	} else {
		w.hits++
	}
	if at != nil && f.Slot != at.slot {
		w.drop(dropSpoofed)
		return
	}
	w.forward(side, f, dir, v, buf)
}

var verdictDrops = [...]drop{nat.BadFlags: dropFlags, nat.OutOfWindow: dropWindow, nat.Filtered: dropNoFlow}

// forward sends a packet of a flow on, in place if it lies in buf as in known; buf
// is nil if it lies elsewhere.
func (w *worker) forward(side Side, f *nat.Flow, dir int, v *ipkt.View, buf []byte) {
	e := w.e
	exit := f.Exit(dir)
	var at *attachment
	if int(f.Slot) < len(w.set.slots) {
		at = w.set.slots[f.Slot]
	}
	from := at
	if side == VPCSide {
		from = nil
	}
	mtu := w.vpcMTU
	if exit == OverlaySide {
		if at == nil {
			w.drop(dropNetwork)
			return
		}
		mtu = at.MTU
	}
	if v.TTL <= 1 {
		w.refuse(from, dropTTL, ipkt.TimeExceeded, v)
		return
	}
	if len(v.B) > mtu && v.DontFrag {
		w.drop(dropTooBig)
		e.sendError(w.now, from, ipkt.TooBig, v, mtu)
		return
	}
	if verdict := e.table.Track(w.now, f, dir, v); verdict != nat.Pass {
		w.drop(verdictDrops[verdict])
		return
	}
	if v.Proto == ipkt.TCP && v.Flags&ipkt.SYN != 0 && at != nil {
		w.clamp(side, at, f, dir, v)
	}
	f.Rewrite(dir, v)
	v.DecrementTTL()
	w.run.add(f, dir, len(v.B))
	class := classOf(side, exit, v)
	if len(v.B) > mtu || v.Fragment {
		e.uniqueID(w.now, f, dir, v)
	}
	switch {
	case exit == VPCSide && side == VPCSide && buf != nil:
		w.toVPC(at, class, v, mtu, buf[vpcOffset-ethernetLen:])
	case exit == VPCSide:
		w.toVPC(at, class, v, mtu, buf)
	case side == VPCSide:
		w.toOverlay(at, f, dir, class, v, buf)
	default: // no room in front
		w.toOverlay(at, f, dir, class, v, nil)
	}
}

// toVPC appends a packet, in fragments if need be. It lies in buf behind ethernetLen
// bytes; nil if it lies elsewhere.
func (w *worker) toVPC(at *attachment, class uint8, v *ipkt.View, mtu int, buf []byte) {
	fwd := &w.e.stats.vpc
	if at != nil && class>>classShift != pathVPCToVPC {
		fwd = at.fwd
	}
	switch {
	case len(v.B) > mtu:
		ipkt.Fragment4(v, mtu, func(b []byte) {
			w.vpc.copy(fwd, class, b)
			class = noClass // counted once
		})
	case buf == nil:
		w.vpc.copy(fwd, class, v.B)
	default:
		w.vpc.add(fwd, class, buf[:ethernetLen+len(v.B)])
	}
}

// toOverlay appends a packet as a frame to the next hop. buf is the buffer it
// lies in, with room in front, nil if it has none.
func (w *worker) toOverlay(at *attachment, f *nat.Flow, dir int, class uint8, v *ipkt.View, buf []byte) {
	mac, ok := freshHop(w.second, f.Hop.Load())
	if !ok {
		hop := at.hop(serverOf(f, dir))
		if !hop.IsValid() {
			w.drop(dropNoRoute)
			return
		}
		owner, known := at.neigh.Lookup(w.now, hop)
		if !known {
			w.out.flush() // so that what comes later stays behind
			if !at.neigh.Resolve(w.now, hop, v.B, class) {
				w.drop(dropUnresolved)
			}
			return
		}
		f.Hop.Store(packHop(w.second, owner))
		mac = macNumber(owner)
	}
	if buf != nil && len(v.B) <= at.MTU {
		w.out.add(at, class, buf, len(v.B), mac, v.V6)
		return
	}
	w.out.flush()
	header := ethernetHeader(macBytes(mac), at.MAC, v.V6)
	each := func(b []byte) {
		if w.e.writeFrame(at.ID, append(header[:], b...)) {
			at.fwd.countClass(class, 1, uint64(len(b)))
		} else {
			w.drop(dropOverlay)
		}
		class = noClass
	}
	if len(v.B) <= at.MTU {
		each(v.B)
		return
	}
	ipkt.Fragment4(v, at.MTU, each)
}

// A flow's next hop is kept as its MAC with the second it was looked up in, so
// that the lookup is repeated from time to time.
const hopLifetime = 5 // s

func packHop(second uint16, mac [6]byte) uint64 { return macNumber(mac)<<16 | uint64(second) }

func freshHop(second uint16, h uint64) (mac uint64, ok bool) {
	return h >> 16, h != 0 && second-uint16(h) < hopLifetime
}

// A MAC in the lower 48 bits of a number is read and written in one step.
func macNumber(mac [6]byte) uint64 {
	return uint64(mac[0])<<40 | uint64(mac[1])<<32 | uint64(mac[2])<<24 | uint64(mac[3])<<16 | uint64(mac[4])<<8 | uint64(mac[5])
}

func macBytes(m uint64) [6]byte {
	return [6]byte{byte(m >> 40), byte(m >> 32), byte(m >> 24), byte(m >> 16), byte(m >> 8), byte(m)}
}

// macAt reads the MAC at the beginning of b, which has two bytes more.
func macAt(b []byte) uint64 { return binary.BigEndian.Uint64(b) >> 16 }

func ethernetHeader(dst, src [6]byte, v6 bool) (h [ethernetLen]byte) {
	copy(h[:], dst[:])
	copy(h[6:], src[:])
	h[12], h[13] = 0x08, 0x00
	if v6 {
		h[12], h[13] = 0x86, 0xdd
	}
	return h
}

// outBatch collects frames for one network.
type outBatch struct {
	e       *Engine
	at      *attachment
	bufs    [maxBatch][]byte
	sizes   [maxBatch]int
	classes [maxBatch]uint8
	n       int
}

// add appends the packet at vpcOffset in buf with an Ethernet header to mac.
func (b *outBatch) add(at *attachment, class uint8, buf []byte, size int, mac uint64, v6 bool) {
	if b.n == maxBatch || b.n > 0 && at != b.at {
		b.flush()
	}
	b.at = at
	typ := uint64(0x0800)
	if v6 {
		typ = 0x86dd
	}
	h := buf[vpcOffset-ethernetLen : vpcOffset]
	binary.BigEndian.PutUint64(h, mac<<16) // its last two bytes come next
	binary.BigEndian.PutUint64(h[6:], at.mac<<16|typ)
	b.bufs[b.n], b.sizes[b.n], b.classes[b.n] = buf, ethernetLen+size, class
	b.n++
}

func (b *outBatch) flush() {
	n := b.n
	if n == 0 {
		return
	}
	b.n = 0
	ok, err := b.e.cfg.Overlay.WriteFrames(b.at.ID, b.bufs[:n], b.sizes[:n], vpcOffset-ethernetLen)
	if err != nil {
		ok = 0
	}
	ok = min(max(ok, 0), n)
	t := tally{to: b.at.fwd}
	bytes := uint64(0)
	for i := range ok {
		size := uint64(b.sizes[i] - ethernetLen)
		bytes += size
		t.add(b.classes[i], size)
	}
	t.flush()
	b.e.stats.traffic[OverlaySide][tx].add(uint64(ok), bytes)
	b.e.dropN(VPCSide, dropOverlay, n-ok)
	clear(b.bufs[:n])
}

// vpcBatch collects packets for the device. Each has room for an Ethernet header
// in front.
type vpcBatch struct {
	e       *Engine
	fwd     *pathCounters
	out     [][]byte
	copies  [][]byte // full capacity
	copied  int
	classes [maxBatch]uint8
	lengths [maxBatch]uint16
}

// ready makes room for a packet.
func (b *vpcBatch) ready(fwd *pathCounters) {
	if n := len(b.out); n == maxBatch || n > 0 && fwd != b.fwd {
		b.flush()
	}
	b.fwd = fwd
}

// add appends the packet behind the first ethernetLen bytes of p, which has to stay
// valid until the batch ends; class is [noClass] for our own ones.
func (b *vpcBatch) add(fwd *pathCounters, class uint8, p []byte) {
	b.ready(fwd)
	b.classes[len(b.out)] = class
	b.out = append(b.out, p[:len(p):len(p)]) // the device may append, but not to others' memory
}

// copy appends a copy of a packet.
func (b *vpcBatch) copy(fwd *pathCounters, class uint8, p []byte) {
	b.ready(fwd)
	if b.copied == len(b.copies) {
		b.copies = append(b.copies, make([]byte, ethernetLen, 2048))
	}
	c := append(b.copies[b.copied][:ethernetLen], p...)
	b.copies[b.copied] = c
	b.copied++
	b.add(fwd, class, c)
}

func (b *vpcBatch) flush() {
	n := len(b.out)
	if n == 0 {
		return
	}
	for i, p := range b.out { // before Write, which may merge them
		b.lengths[i] = uint16(len(p) - ethernetLen)
	}
	ok, err := b.e.dev.Write(b.out, ethernetLen)
	clear(b.out)
	b.out, b.copied = b.out[:0], 0
	if err == nil {
		ok = n
	} else { // which ones are lost it doesn't say: the last count as that
		b.e.stats.deviceErrors.Add(1)
		ok = min(max(ok, 0), n)
	}
	t := tally{to: b.fwd}
	bytes := uint64(0)
	for i := range ok {
		size := uint64(b.lengths[i])
		bytes += size
		t.add(b.classes[i], size)
	}
	t.flush()
	b.e.stats.traffic[VPCSide][tx].add(uint64(ok), bytes)
	theirs := 0
	for _, class := range b.classes[ok:n] {
		if class != noClass {
			theirs++
		}
	}
	side := OverlaySide
	if b.fwd == &b.e.stats.vpc {
		side = VPCSide
	}
	b.e.dropN(side, dropDevice, theirs)
}
