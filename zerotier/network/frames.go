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

// deliver hands a frame to the attachment. Its data is copied.
func (l *Layer) deliver(vw *vl1.Worker, n *joined, s *state, f *vl2.FrameInfo) {
	if len(f.Data) > s.cfg.MTU {
		l.stats.tooLong.Add(1)
		return
	}
	l.stats.framesIn.Add(1)
	w, _ := vw.User.(*Worker)
	if w == nil { // a timer's worker: nothing flushes it
		w = &Worker{l: l}
		defer l.Flush(w)
	} else if w.nwid != n.id || len(w.frames) == maxBatch || len(w.arena)+ethernetLen+len(f.Data) > cap(w.arena) {
		l.Flush(w)
	}
	w.nwid = n.id
	start := len(w.arena)
	w.arena = append(append(w.arena, f.DestinationMAC[:]...), f.SourceMAC[:]...)
	w.arena = binary.BigEndian.AppendUint16(w.arena, f.EtherType)
	w.arena = append(w.arena, f.Data...)
	w.frames = append(w.frames, w.arena[start:len(w.arena):len(w.arena)])
}

// receiveFrame handles FRAME (chapter 03 §4.1).
func (l *Layer) receiveFrame(w *vl1.Worker, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
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
	if !n.gate(w, s, from.Address()) {
		l.needCertificate(w, n, from, p, src)
		return vl1.Result{Retry: true}
	}
	f := vl2.FrameInfo{
		Inbound: true, Source: from.Address(), Destination: l.self, DestinationMAC: n.mac, SourceMAC: vl2.MACOf(n.id, from.Address()),
		EtherType: binary.BigEndian.Uint16(b[8:]), Data: b[10:],
	}
	if len(f.Data) == 0 {
		return vl1.Result{Trust: true}
	}
	if n.filterIn(w, s, &f) != vl2.FilterDrop {
		l.deliver(w, n, s, &f)
	} else {
		l.stats.filtered.Add(1)
	}
	return vl1.Result{Trust: true}
}

// receiveExtFrame handles EXT_FRAME (chapter 03 §4.2).
func (l *Layer) receiveExtFrame(w *vl1.Worker, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
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
		n.offerOwn(w, from, f.COM)
	}
	s := n.snap.Load()
	if !s.open {
		l.stats.notOpen.Add(1)
		return vl1.Result{}
	}
	if !n.gate(w, s, from.Address()) {
		l.needCertificate(w, n, from, p, src)
		return vl1.Result{Retry: true}
	}
	ignored := len(f.Data) > 0 && !n.acceptExtFrame(w, from, s, &f)
	if f.Acknowledge && !ignored {
		l.peers.SendOK(w, from, src, packet.VerbExtFrame, p.ID(), n.id.Append(nil))
	}
	return vl1.Result{Trust: true}
}

// acceptExtFrame delivers the frame if it may be; false if it must be ignored
// without acknowledgement.
func (n *joined) acceptExtFrame(w *vl1.Worker, from *vl1.Peer, s *state, f *vl2.ExtFrame) bool {
	own := vl2.MACOf(n.id, from.Address())
	if f.Source.IsZero() || f.Source == n.mac || f.Source.IsMulticast() {
		n.l.stats.filtered.Add(1)
		return false
	}
	info := vl2.FrameInfo{
		Inbound: true, Source: from.Address(), Destination: n.l.self, DestinationMAC: f.Destination, SourceMAC: f.Source,
		EtherType: f.EtherType, Data: f.Data,
	}
	switch n.filterIn(w, s, &info) {
	case vl2.FilterDrop:
		n.l.stats.filtered.Add(1)
		return true
	case vl2.FilterSuperAccept:
	default:
		switch {
		case f.Source != own:
			if !s.bridges[from.Address()] {
				n.l.stats.filtered.Add(1)
				return false
			}
			n.learnBridge(f.Source, from.Address(), w.Now())
		case f.Destination == n.mac, f.Destination.IsMulticast() && s.cfg.MulticastLimit > 0, s.bridge:
		default:
			n.l.stats.filtered.Add(1)
			return false
		}
	}
	n.l.deliver(w, n, s, &info)
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
func (l *Layer) WriteFrames(w *vl1.Worker, id vl2.NetworkID, bufs [][]byte, sizes []int, offset int) (accepted int) {
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
			if n.writeOther(w, s, &vl2.FrameInfo{
				Source: l.self, DestinationMAC: dst, SourceMAC: from, EtherType: binary.BigEndian.Uint16(frame[12:]), Data: frame[ethernetLen:],
			}) {
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
			last, peer = n.ensureMember(a, w.Now()), l.peers.Peer(a)
		}
		if last != nil {
			if !n.maySend(w, s, last) {
				l.stats.gateClosed.Add(1)
				continue
			}
			f := vl2.FrameInfo{
				Source: l.self, Destination: a, DestinationMAC: dst, SourceMAC: from, EtherType: binary.BigEndian.Uint16(frame[12:]), Data: frame[ethernetLen:],
			}
			if !n.filterOut(w, s, &f, false) {
				l.stats.filtered.Add(1)
				continue
			}
			if n.pushDue(last, s, w.Now()) {
				n.push(w, last, s)
			}
			last.used.Store(n.l.instant(w.Now()))
		}
		buf := bufs[i][offset+ethernetLen-frameHeader : offset+sizes[i]]
		binary.BigEndian.PutUint64(buf[packet.HeaderLen:], uint64(n.id)) // the ethertype is in place already
		if peer == nil || !l.peers.SendData(w, peer, packet.VerbFrame, buf) {
			l.peers.Send(w, a, packet.VerbFrame, buf[packet.HeaderLen:], vl1.SendOpts{})
		}
		accepted++
	}
	l.stats.framesOut.Add(uint64(accepted))
	return accepted
}

// writeOther sends a frame that isn't plain unicast between two members. It has no
// destination yet.
func (n *joined) writeOther(w *vl1.Worker, s *state, f *vl2.FrameInfo) bool {
	dst := f.DestinationMAC
	bridged := f.SourceMAC != n.mac
	switch {
	case bridged && !s.bridge:
		n.l.stats.filtered.Add(1)
		return false
	case dst.IsMulticast():
		return n.writeMulticast(w, s, f)
	case dst == n.mac:
		return false
	}
	known := vl2.AddressOf(n.id, dst)
	if dst[0] == n.mac[0] && !known.Reserved() && known != n.l.self {
		f.Destination = known
		return n.filterOut(w, s, f, false) && n.writeExt(w, s, f)
	}
	if !n.filterOut(w, s, f, false) {
		n.l.stats.filtered.Add(1)
		return false
	}
	sent := false
	for _, a := range n.bridgesFor(s, dst) {
		f.Destination = a
		if n.filterOut(w, s, f, true) && n.writeExt(w, s, f) {
			sent = true
		}
	}
	return sent
}

// writeExt sends a frame with its MACs to a member, if that may have it.
func (n *joined) writeExt(w *vl1.Worker, s *state, f *vl2.FrameInfo) bool {
	if m := n.ensureMember(f.Destination, w.Now()); m != nil {
		if !n.maySend(w, s, m) {
			n.l.stats.gateClosed.Add(1)
			return false
		}
		if n.pushDue(m, s, w.Now()) {
			n.push(w, m, s)
		}
		m.used.Store(n.l.instant(w.Now()))
	}
	n.l.peers.Send(w, f.Destination, packet.VerbExtFrame,
		vl2.AppendExtFrame(nil, n.id, 0, f.DestinationMAC, f.SourceMAC, f.EtherType, f.Data), vl1.SendOpts{})
	return true
}

// bridgesFor returns the members behind which an unknown MAC may be.
func (n *joined) bridgesFor(s *state, dst vl2.MAC) []identity.Address {
	n.mu.Lock()
	r, ok := n.bridges[dst]
	n.mu.Unlock()
	if ok && s.bridges[r.via] && r.via != n.l.self {
		return []identity.Address{r.via}
	}
	out := slices.DeleteFunc(s.cfg.Bridges(), func(a identity.Address) bool { return a == n.l.self })
	if len(out) > maxBridgesTried {
		rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
		out = out[:maxBridgesTried]
	}
	return out
}
