package nat

import (
	"encoding/binary"
	"math"
	"slices"
	"time"

	"ztgate/netstack/internal/ipkt"
)

// States of a flow. All protocols use the first three; TCP goes on (after
// RFC 7857 §2):
//
//	new --answer--> opening --client goes on--> established --FIN--> closing --FIN--> closed
//	 any --RST in sequence--> reset --data--> where it was
//	 closed, reset --SYN from the client--> new
const (
	stateFree        uint32 = iota // never used
	stateNew                       // never answered
	stateOpening                   // answered, but the client hasn't sent anything since
	stateEstablished               //
	stateClosing                   // one FIN
	stateClosed                    // both FINs
	stateReset                     // RST, which may be forged
	stateRefused                   // RST in answer to the SYN
	stateDead                      // removed
	numStates
	stateMask = 0xff
)

const refusedFor = time.Second

var stateNames = [numStates]string{"", "new", "opening", "established", "closing", "closed", "reset", "closed", "dead"}

// stateAnswered is what an answered flow is called whose protocol has no handshake.
const stateAnswered = "answered"

// stateName returns the name of a flow's state.
func stateName(proto uint8, state uint32) string {
	if state == stateOpening && proto != ipkt.TCP {
		return stateAnswered
	}
	return stateNames[state]
}

// States lists the names of the states of flows.
func States() []string {
	var out []string
	for _, s := range stateNames[stateNew:stateDead] {
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return append(out, stateAnswered)
}

// finBit of a direction is beside the state.
func finBit(dir int) uint32 { return 0x100 << dir }

const (
	bothFins = 0x300
	// wasFirm is beside the state of a connection that has been established.
	wasFirm = 0x400
)

func isHalfOpen(s uint32) bool { s &= stateMask; return s == stateNew || s == stateOpening }
func isClosed(s uint32) bool {
	s &= stateMask
	return s == stateClosed || s == stateReset || s == stateRefused
}

// isFirm reports a flow that never makes room for others (decision D4).
func isFirm(s uint32) bool { return !isHalfOpen(s) && !isClosed(s) }

// Verdict says whether a packet of a flow may pass.
type Verdict uint8

const (
	Pass     Verdict = iota
	BadFlags         // a set of TCP flags that never occurs
	OutOfWindow
	Filtered // the other side hasn't sent anything yet
)

// Track keeps the state of a flow and says whether the packet may pass.
func (t *Table) Track(now int64, f *Flow, dir int, v *ipkt.View) Verdict {
	if f.Proto() == ipkt.TCP && v.First {
		return t.trackTCP(now, f, dir, v)
	}
	t.refresh(now, f)
	state := f.state.Load()
	switch {
	case !v.First:
	case state == stateNew && dir == FromServer:
		t.step(now, f, stateNew, stateOpening)
	case state == stateNew && f.flags&flagFiltered != 0:
		return Filtered
	case state == stateOpening && dir == FromClient:
		t.step(now, f, stateOpening, stateEstablished)
	}
	return Pass
}

func (t *Table) refresh(now int64, f *Flow) {
	if c := Coarse(now); int32(c-f.last.Load()) > 0 {
		f.last.Store(c)
	}
}

// step moves a flow on from a state, unless it has left that.
func (t *Table) step(now int64, f *Flow, from, to uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if old := f.state.Load(); old&stateMask == from {
		t.setState(now, f, old, old&^stateMask|to)
	}
}

// change moves a flow to a state, keeping the bits beside it.
func (t *Table) change(now int64, f *Flow, to uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := f.state.Load()
	if s := old & stateMask; s == stateDead || s == to || s == stateFree {
		return
	}
	t.setState(now, f, old, old&^stateMask|to)
}

// setState puts a flow into the lists of its new state. t.mu is held.
func (t *Table) setState(now int64, f *Flow, old, to uint32) {
	id, c := t.wheel.id(t, f), t.clientOf(f)
	halfOpen := isHalfOpen(old) && isHalfOpen(to)
	if halfOpen { // the client has as many as before
		t.unlist(&c.opening, f)
		t.enlist(&c.opening, id, f)
	} else {
		t.leaveLists(c, f, old)
	}
	if isClosed(old) && !isClosed(to) {
		t.addLive(c, 1)
	} else if !isClosed(old) && isClosed(to) {
		t.addLive(c, -1)
	}
	last, s, idle := Coarse(now), to&stateMask, &t.idle[ClassOf(f.Proto())]
	end := f.last.Load() + idle[old&stateMask]
	if (s == stateReset || s == stateRefused) && int32(end-last-idle[s]) < 0 {
		last = end - idle[s] // a RST may end a flow sooner, never later (RFC 7857 §8)
	}
	f.state.Store(to)
	f.last.Store(last)
	if !halfOpen {
		t.joinLists(c, id, f)
	}
	if f.Mapped() && isFirm(old) != isFirm(to) {
		t.rechain(c, id, f)
	}
	switch to & stateMask {
	case stateOpening:
		t.rise(c, answered)
	case stateEstablished, stateClosing:
		t.rise(c, exchanged)
	}
	if int32(last+idle[s]-end) < 0 {
		t.wheel.remove(t, f)
		t.wheel.add(t, id, f)
	}
}

// Bits of direction.window: 16 bits of window, 8 of scale, and these.
const (
	winSeen    = 1 << 24 // sequence numbers of this side are known
	winScaled  = 1 << 25 // it announced a scale
	winGranted = 1 << 26 // it acknowledged something: limit is valid
	winLiberal = 1 << 27 // picked up in the middle: the scale is unknown
	winSYN     = 1 << 28 // it sent a SYN of its own, not as an answer
)

const (
	tcpFIN, tcpSYN, tcpRST, tcpPSH, tcpACK, tcpURG = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
)

// validFlags are the sets of FIN, SYN, RST, ACK and URG that occur.
var validFlags = func() (ok [64]bool) {
	for _, f := range []uint8{tcpSYN, tcpSYN | tcpURG, tcpSYN | tcpACK, tcpRST, tcpRST | tcpACK, tcpFIN | tcpACK,
		tcpFIN | tcpACK | tcpURG, tcpACK, tcpACK | tcpURG} {
		ok[f], ok[f|tcpPSH] = true, true
	}
	return ok
}()

// segment is what the state machine needs of a TCP segment.
type segment struct {
	seq, end, ack uint32
	win           uint16
	flags         uint8
	data          bool
	part          bool // the first fragment: its end is not known
}

// segmentOf reads a segment that begins with its header; part means that it is
// only the first fragment.
func segmentOf(h []byte, part bool) segment {
	_ = h[19]
	s := segment{seq: binary.BigEndian.Uint32(h[4:]), ack: binary.BigEndian.Uint32(h[8:]), win: binary.BigEndian.Uint16(h[14:]), flags: h[13], part: part}
	n := uint32(len(h) - int(h[12]>>4)*4)
	s.data = n > 0
	if s.flags&tcpSYN != 0 {
		n++
	}
	if s.flags&tcpFIN != 0 {
		n++
	}
	s.end = s.seq + n
	return s
}

// after reports whether a lies behind b.
func after(a, b uint32) bool { return int32(a-b) > 0 }

func (t *Table) trackTCP(now int64, f *Flow, dir int, v *ipkt.View) Verdict {
	if !validFlags[v.Flags&0x3f] {
		return BadFlags
	}
	s := segmentOf(v.B[v.L4:], v.Fragment)
	state := f.state.Load()
	if v.Flags&(tcpSYN|tcpRST|tcpFIN) == 0 && state&stateMask == stateEstablished {
		if !t.inWindow(f, dir, &s) {
			return OutOfWindow
		}
		f.note(dir, &s)
		t.refresh(now, f)
		return Pass
	}
	switch {
	case v.Flags&tcpSYN != 0:
		return t.trackSYN(now, f, dir, v, &s, state)
	case v.Flags&tcpRST != 0:
		return t.trackRST(now, f, dir, &s, state)
	}
	if state&stateMask == stateNew && dir == FromClient && f.flags&flagFiltered != 0 {
		return Filtered
	}
	if !t.inWindow(f, dir, &s) {
		if state&stateMask == stateNew && dir == FromServer && s.flags&^tcpPSH == tcpACK && !s.data {
			// The server has an older connection from the same port, and asks: the
			// client's RST ends that one (RFC 5961 §4).
			return Pass
		}
		return OutOfWindow
	}
	if state&stateMask == stateOpening && dir == FromClient && !t.sawAnswer(f, &s) {
		return OutOfWindow
	}
	f.note(dir, &s)
	t.refresh(now, f)
	if next := nextState(state, dir, &s, f); next != state {
		t.advance(now, f, dir, &s)
	}
	return Pass
}

// nextState is the state after a segment without SYN and RST.
func nextState(state uint32, dir int, s *segment, f *Flow) uint32 {
	if s.flags&tcpFIN != 0 {
		state |= finBit(dir)
		if state&bothFins == bothFins {
			return state&^stateMask | stateClosed
		}
	}
	switch state & stateMask {
	case stateNew: // picked up in the middle
		if dir == FromClient {
			return state // also after a FIN: nobody has answered
		}
	case stateOpening:
		if dir == FromServer && f.dir[FromServer].window.Load()&winSYN == 0 {
			return state
		}
	case stateReset: // the RST was forged, or not for this connection
		switch {
		case !s.data || s.flags&tcpFIN != 0:
			return state
		case state&wasFirm != 0:
			return state&^stateMask | stateEstablished
		case f.dir[FromServer].window.Load()&winSeen != 0:
			return state&^stateMask | stateOpening
		}
		return state&^stateMask | stateNew
	case stateClosed, stateRefused:
		return state
	}
	if state |= wasFirm; state&bothFins != 0 {
		return state&^stateMask | stateClosing
	}
	return state&^stateMask | stateEstablished
}

// advance moves the flow on under the lock, judging by the state as it is then.
func (t *Table) advance(now int64, f *Flow, dir int, s *segment) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := f.state.Load()
	if old&stateMask == stateDead {
		return
	}
	to := nextState(old, dir, s, f)
	if to == old {
		return
	}
	t.setState(now, f, old, to)
	if old&stateMask == stateOpening && isFirm(to) && dir == FromClient && !t.blind(f) {
		t.rise(t.clientOf(f), proven)
	}
}

// blind reports a connection whose sequence numbers aren't checked.
func (t *Table) blind(f *Flow) bool {
	return t.set.NoWindow || (f.dir[FromClient].window.Load()|f.dir[FromServer].window.Load())&winLiberal != 0
}

// sawAnswer reports whether a client's segment acknowledges what the server sent before it
// could know the client's window but from the SYN, which has no scale (RFC 7323 §2.2). Who
// guesses has one chance in 65,000.
func (t *Table) sawAnswer(f *Flow, s *segment) bool {
	return t.blind(f) || f.dir[FromServer].end.Load()-s.ack <= math.MaxUint16
}

func (t *Table) trackSYN(now int64, f *Flow, dir int, v *ipkt.View, s *segment, state uint32) Verdict {
	d := &f.dir[dir]
	other := &f.dir[1-dir]
	switch st := state & stateMask; {
	case s.flags&tcpACK == 0 && dir == FromClient:
		switch {
		case isClosed(state):
			t.reopen(now, f)
			fallthrough
		case isHalfOpen(state):
			f.noteSYN(now)
			d.announce(v, s)
			t.refresh(now, f)
			if f.flags&flagFiltered != 0 && st == stateNew {
				return Filtered
			}
		}
		// Otherwise the client has forgotten the connection; the server's challenge
		// will tell it how to reset it (RFC 5961 §4).
		return Pass
	case s.flags&tcpACK == 0: // both open at the same time
		if !isHalfOpen(state) {
			return OutOfWindow
		}
		d.announce(v, s)
		d.window.Or(winSYN)
		t.step(now, f, stateNew, stateOpening)
		t.refresh(now, f)
		return Pass
	}
	if isHalfOpen(state) {
		w := other.window.Load()
		if !t.set.NoWindow && w&winSeen != 0 && w&winLiberal == 0 && s.ack != other.end.Load() {
			return OutOfWindow
		}
		if dir == FromServer && state&stateMask == stateNew {
			t.noteConnected(now, f)
		}
		syn := d.window.Load() & winSYN
		d.announce(v, s)
		d.window.Or(syn)
		d.grant(s, 0)
		if dir == FromServer && state&stateMask == stateNew {
			t.step(now, f, stateNew, stateOpening)
		}
		t.refresh(now, f)
		return Pass
	}
	if !t.inWindow(f, dir, s) {
		return OutOfWindow
	}
	return Pass
}

// reopen begins a flow anew whose tuple is used again.
func (t *Table) reopen(now int64, f *Flow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := f.state.Load()
	if !isClosed(old) {
		return
	}
	for i := range f.dir {
		f.dir[i].window.Store(0)
	}
	t.setState(now, f, old, stateNew)
	class := ClassOf(f.Proto())
	t.stats.Removed[class][Closed].Add(1)
	t.stats.Created[class].Add(1)
}

func (t *Table) trackRST(now int64, f *Flow, dir int, s *segment, state uint32) Verdict {
	d, other := &f.dir[dir], &f.dir[1-dir]
	if state&stateMask == stateNew && dir == FromServer {
		// The answer to a SYN must acknowledge it (RFC 9293 §3.10.7.3).
		if !t.set.NoWindow && other.window.Load()&winLiberal == 0 && (s.flags&tcpACK == 0 || s.ack != other.end.Load()) {
			return OutOfWindow
		}
		t.change(now, f, stateRefused)
		return Pass
	}
	w := d.window.Load()
	if w&winSeen == 0 || (w|other.window.Load())&winLiberal != 0 || t.set.NoWindow {
		t.change(now, f, stateReset)
		return Pass
	}
	// Only a RST that is exactly in sequence ends the flow: others may be forged, and
	// the receiver asks back (RFC 5961 §3).
	if s.seq == d.end.Load() || other.window.Load()&winGranted != 0 && s.seq == other.limit.Load()-other.maxWindow(d) {
		t.change(now, f, stateReset)
		return Pass
	}
	if state&stateMask == stateNew && dir == FromClient {
		return Pass // for an older connection from the same port
	}
	r := *s
	r.flags &^= tcpACK
	if !t.inWindow(f, dir, &r) {
		return OutOfWindow
	}
	return Pass
}

// maxWindow is the largest window that a side announced, in bytes.
func (d *direction) maxWindow(other *direction) uint32 {
	w := d.window.Load()
	if w&winScaled != 0 && other.window.Load()&winScaled != 0 {
		return w & 0xffff << (w >> 16 & 15)
	}
	return w & 0xffff
}

// announce takes sequence number, window and scale from a SYN.
func (d *direction) announce(v *ipkt.View, s *segment) {
	w := uint32(s.win) | winSeen
	if s.part {
		w |= winLiberal
	}
	if scale, ok := v.WindowScale(); ok {
		w |= uint32(min(scale, 14))<<16 | winScaled
	}
	d.end.Store(s.end)
	d.window.Store(w)
}

// grant records up to where the other side may send.
func (d *direction) grant(s *segment, shift uint32) {
	limit := s.ack + max(uint32(s.win)<<shift, 1)
	for {
		w := d.window.Load()
		old := d.limit.Load()
		if w&winGranted != 0 && !after(limit, old) {
			return
		}
		if d.limit.CompareAndSwap(old, limit) {
			if w&winGranted == 0 {
				d.window.Or(winGranted)
			}
			return
		}
	}
}

// note takes over what an accepted segment says.
func (f *Flow) note(dir int, s *segment) {
	d, other := &f.dir[dir], &f.dir[1-dir]
	w := d.window.Load()
	if w&winSeen == 0 || s.part && w&winLiberal == 0 {
		// The first segment of this side that we see is no SYN.
		d.end.Store(s.end)
		d.window.Store(w&(winScaled|0xff<<16) | uint32(s.win) | winSeen | winLiberal)
		return
	}
	for old := d.end.Load(); after(s.end, old); old = d.end.Load() {
		if d.end.CompareAndSwap(old, s.end) {
			break
		}
	}
	if uint32(s.win) > w&0xffff && w&winLiberal == 0 {
		d.window.CompareAndSwap(w, w&^0xffff|uint32(s.win)) // a lost race only costs precision
	}
	if s.flags&tcpACK == 0 {
		return
	}
	shift := uint32(0)
	if w&winScaled != 0 && other.window.Load()&winScaled != 0 {
		shift = w >> 16 & 15
	}
	d.grant(s, shift)
}

// inWindow reports whether a segment can belong to the connection: within what
// the other side may receive, and acknowledging only what it sent.
func (t *Table) inWindow(f *Flow, dir int, s *segment) bool {
	d, other := &f.dir[dir], &f.dir[1-dir]
	w, ow := d.window.Load(), other.window.Load()
	if t.set.NoWindow || (w|ow)&winLiberal != 0 {
		return true
	}
	if ow&winGranted != 0 && after(s.seq, other.limit.Load()) {
		return false
	}
	if w&winSeen != 0 && ow&winSeen != 0 && after(d.end.Load()-other.maxWindow(d)-1, s.end) {
		return false
	}
	if s.flags&tcpACK == 0 || ow&winSeen == 0 {
		return true
	}
	end := other.end.Load()
	return !after(s.ack, end) && !after(end-max(d.maxWindow(other), 66000)-1, s.ack)
}
