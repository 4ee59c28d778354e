package network

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

const (
	ethernetLen    = 14
	frameHeader    = packet.HeaderLen + 8 + 2             // FRAME: network ID, ethertype
	extFrameHeader = packet.HeaderLen + 8 + 1 + 6 + 6 + 2 // EXT_FRAME: network ID, flags, MACs, ethertype
	headroom       = 64
	maxBatch       = 128
	arenaSize      = 512 << 10
	maxFrame       = ethernetLen + packet.MaxPayload
)

// Worker collects the frames that one receiving goroutine got, so that they are
// delivered in batches.
type Worker struct {
	l      *Layer
	nwid   vl2.NetworkID
	arena  []byte
	frames [][]byte

	sender   *member // of the latest packet
	senderOf *joined
}

// NewWorker makes the collector of one more goroutine, to be put into
// [vl1.Worker.User].
func (l *Layer) NewWorker() *Worker {
	return &Worker{l: l, arena: make([]byte, 0, arenaSize), frames: make([][]byte, 0, maxBatch)}
}

// Flush delivers the frames collected so far.
func (l *Layer) Flush(w *Worker) {
	if len(w.frames) > 0 {
		l.cfg.Deliver(w.nwid, w.frames)
		clear(w.frames)
		w.frames = w.frames[:0]
		w.arena = w.arena[:0]
	}
}

// deliver hands a frame to the port. data is copied.
func (l *Layer) deliver(src vl1.Source, n *joined, s *state, dst, from vl2.MAC, etherType uint16, data []byte) {
	if len(data) > s.cfg.MTU {
		l.stats.tooLong.Add(1)
		return
	}
	l.stats.framesIn.Add(1)
	var w *Worker
	if src.Worker != nil {
		w, _ = src.Worker.User.(*Worker)
	}
	if w == nil { // a timer's worker: nothing flushes it
		w = &Worker{l: l}
		defer l.Flush(w)
	} else if w.nwid != n.id || len(w.frames) == maxBatch || len(w.arena)+ethernetLen+len(data) > cap(w.arena) {
		l.Flush(w)
	}
	w.nwid = n.id
	start := len(w.arena)
	w.arena = append(append(w.arena, dst[:]...), from[:]...)
	w.arena = binary.BigEndian.AppendUint16(w.arena, etherType)
	w.arena = append(w.arena, data...)
	w.frames = append(w.frames, w.arena[start:len(w.arena):len(w.arena)])
}

// receiveFrame handles FRAME (chapter 03 §4.1).
func (l *Layer) receiveFrame(out vl1.Out, now time.Time, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
	b := p.Payload()
	if len(b) < 10 {
		l.stats.malformed.Add(1)
		return vl1.Result{Skip: true}
	}
	n := l.net(vl2.NetworkIDFromBytes(b))
	if n == nil {
		return vl1.Result{}
	}
	s := n.snap.Load()
	if !s.open {
		l.stats.notOpen.Add(1)
		return vl1.Result{}
	}
	if !n.gate(src.Worker, s, from.Address(), now) {
		l.needCertificate(n, out, now, from, p, src)
		return vl1.Result{Retry: true}
	}
	etherType, data := binary.BigEndian.Uint16(b[8:]), b[10:]
	if len(data) == 0 {
		return vl1.Result{Trust: true}
	}
	mac := vl2.MACOf(n.id, from.Address())
	if n.filterIn(s, src, out, now, from.Address(), n.mac, mac, etherType, data) != vl2.FilterDrop {
		l.deliver(src, n, s, n.mac, mac, etherType, data)
	} else {
		l.stats.filtered.Add(1)
	}
	return vl1.Result{Trust: true}
}

// receiveExtFrame handles EXT_FRAME (chapter 03 §4.2).
func (l *Layer) receiveExtFrame(out vl1.Out, now time.Time, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
	f, err := vl2.ParseExtFrame(p.Payload())
	if err != nil {
		l.stats.malformed.Add(1)
		return vl1.Result{Skip: true}
	}
	n := l.net(f.Network)
	if n == nil {
		return vl1.Result{}
	}
	if f.COM != nil {
		n.offer(src.Worker, out, now, from, f.COM)
	}
	s := n.snap.Load()
	if !s.open {
		l.stats.notOpen.Add(1)
		return vl1.Result{}
	}
	if !n.gate(src.Worker, s, from.Address(), now) {
		l.needCertificate(n, out, now, from, p, src)
		return vl1.Result{Retry: true}
	}
	ignored := len(f.Data) > 0 && !n.acceptExtFrame(out, now, from, s, &f, src)
	if f.Acknowledge && !ignored {
		l.peers.SendOK(src.Worker, out, now, from, src, packet.VerbExtFrame, p.ID(), n.id.Append(nil))
	}
	return vl1.Result{Trust: true}
}

// acceptExtFrame delivers the frame if it may be; false if it must be ignored
// without acknowledgement.
func (n *joined) acceptExtFrame(out vl1.Out, now time.Time, from *vl1.Peer, s *state, f *vl2.ExtFrame, src vl1.Source) bool {
	own := vl2.MACOf(n.id, from.Address())
	if f.Source.IsZero() || f.Source == n.mac || f.Source.IsMulticast() {
		n.l.stats.filtered.Add(1)
		return false
	}
	switch n.filterIn(s, src, out, now, from.Address(), f.Destination, f.Source, f.EtherType, f.Data) {
	case vl2.FilterDrop:
		n.l.stats.filtered.Add(1)
		return true
	case vl2.FilterSuperAccept:
	default:
		switch {
		case f.Source != own:
			if !s.cfg.IsBridge(from.Address()) {
				n.l.stats.filtered.Add(1)
				return false
			}
			n.learnBridge(f.Source, from.Address(), now)
		case f.Destination == n.mac, f.Destination.IsMulticast() && s.cfg.MulticastLimit > 0, s.bridge:
		default:
			n.l.stats.filtered.Add(1)
			return false
		}
	}
	n.l.deliver(src, n, s, f.Destination, f.Source, f.EtherType, f.Data)
	return true
}

// bridgeRoute says behind which member a MAC is.
type bridgeRoute struct {
	via identity.Address
	at  time.Time
}

const (
	maxBridgeRoutes     = 16384
	bridgeRouteLifetime = 300 * time.Second
	maxBridgesTried     = 32
)

func (n *joined) learnBridge(mac vl2.MAC, via identity.Address, now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.bridges == nil {
		n.bridges = make(map[vl2.MAC]bridgeRoute)
	}
	if _, ok := n.bridges[mac]; ok || len(n.bridges) < maxBridgeRoutes {
		n.bridges[mac] = bridgeRoute{via, now}
	} else {
		n.l.stats.refusedRecords.Add(1)
	}
}

// WriteFrames sends Ethernet frames into a network. Frame i is
// bufs[i][offset:offset+sizes[i]], with at least 64 bytes before it; both are
// overwritten. It returns how many frames were accepted.
func (l *Layer) WriteFrames(w *vl1.Worker, out vl1.Out, now time.Time, id vl2.NetworkID, bufs [][]byte, sizes []int, offset int) (accepted int) {
	n := l.net(id)
	if n == nil {
		l.stats.notOpen.Add(uint64(len(bufs)))
		return 0
	}
	s := n.snap.Load()
	if !s.open {
		l.stats.notOpen.Add(uint64(len(bufs)))
		return 0
	}
	var last *member // frames of a batch mostly go to one member
	var peer *vl1.Peer
	for i := range bufs {
		frame := bufs[i][offset : offset+sizes[i]]
		if len(frame) < ethernetLen {
			l.stats.malformed.Add(1)
			continue
		}
		dst, from := vl2.MAC(frame[:6]), vl2.MAC(frame[6:12])
		if dst.IsMulticast() || dst[0] != n.mac[0] || from != n.mac {
			if n.writeOdd(w, out, now, s, dst, from, frame) {
				accepted++
			}
			continue
		}
		a := vl2.AddressOf(n.id, dst)
		if a == l.self || a.Reserved() {
			l.stats.filtered.Add(1)
			continue
		}
		if last == nil || last.addr != a {
			last, peer = n.ensureMember(a, now), l.peers.Peer(a)
		}
		etherType := binary.BigEndian.Uint16(frame[12:])
		if last != nil {
			if !n.maySend(w, out, now, s, last) {
				l.stats.gateClosed.Add(1)
				continue
			}
			if !n.filterOut(s, w, out, now, a, dst, from, etherType, frame[ethernetLen:], false) {
				l.stats.filtered.Add(1)
				continue
			}
			if last.pushDue(s, now) {
				n.push(w, out, now, last, s)
			}
			last.used.Store(now.UnixNano())
		}
		buf := bufs[i][offset+ethernetLen-frameHeader : offset+sizes[i]]
		binary.BigEndian.PutUint64(buf[packet.HeaderLen:], uint64(n.id)) // the ethertype is in place already
		if peer == nil || !l.peers.SendData(w, out, now, peer, packet.VerbFrame, buf) {
			l.peers.Send(w, out, now, a, packet.VerbFrame, buf[packet.HeaderLen:], vl1.SendOpts{})
		}
		accepted++
	}
	l.stats.framesOut.Add(uint64(accepted))
	return accepted
}

// writeOdd sends a frame that isn't plain unicast between two members.
func (n *joined) writeOdd(w *vl1.Worker, out vl1.Out, now time.Time, s *state, dst, from vl2.MAC, frame []byte) bool {
	etherType, data := binary.BigEndian.Uint16(frame[12:]), frame[ethernetLen:]
	bridged := from != n.mac
	switch {
	case bridged && !s.bridge:
		n.l.stats.filtered.Add(1)
		return false
	case dst.IsMulticast():
		return n.writeMulticast(w, out, now, s, dst, from, etherType, data)
	case dst == n.mac:
		return false
	}
	known := vl2.AddressOf(n.id, dst)
	if dst[0] == n.mac[0] && !known.Reserved() && known != n.l.self {
		return n.filterOut(s, w, out, now, known, dst, from, etherType, data, false) && n.writeExt(w, out, now, s, known, dst, from, etherType, data)
	}
	if !n.filterOut(s, w, out, now, 0, dst, from, etherType, data, false) {
		n.l.stats.filtered.Add(1)
		return false
	}
	sent := false
	for _, a := range n.bridgesFor(s, dst) {
		if n.filterOut(s, w, out, now, a, dst, from, etherType, data, true) && n.writeExt(w, out, now, s, a, dst, from, etherType, data) {
			sent = true
		}
	}
	return sent
}

// writeExt sends a frame with its MACs to a member, if that may have it.
func (n *joined) writeExt(w *vl1.Worker, out vl1.Out, now time.Time, s *state, to identity.Address, dst, from vl2.MAC, etherType uint16, data []byte) bool {
	if m := n.ensureMember(to, now); m != nil {
		if !n.maySend(w, out, now, s, m) {
			n.l.stats.gateClosed.Add(1)
			return false
		}
		if m.pushDue(s, now) {
			n.push(w, out, now, m, s)
		}
		m.used.Store(now.UnixNano())
	}
	n.l.peers.Send(w, out, now, to, packet.VerbExtFrame, vl2.AppendExtFrame(nil, n.id, 0, dst, from, etherType, data), vl1.SendOpts{})
	return true
}

// bridgesFor returns the members behind which an unknown MAC may be.
func (n *joined) bridgesFor(s *state, dst vl2.MAC) []identity.Address {
	n.mu.Lock()
	r, ok := n.bridges[dst]
	n.mu.Unlock()
	if ok && s.cfg.IsBridge(r.via) && r.via != n.l.self {
		return []identity.Address{r.via}
	}
	out := slices.DeleteFunc(s.cfg.Bridges(), func(a identity.Address) bool { return a == n.l.self })
	if len(out) > maxBridgesTried {
		rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
		out = out[:maxBridgesTried]
	}
	return out
}
