package netstack

import (
	"encoding/binary"
	"sync"
	"time"

	"ztgate/netstack/internal/frag"
	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
)

// fragment holds a fragment back. When its packet is complete all of them go on,
// each by itself.
func (w *worker) fragment(side Side, at *attachment, v *ipkt.View) {
	e := w.e
	if at != nil && !w.fromMember(at, nil, v) {
		w.drop(dropMember)
		return
	}
	if v.First && v.TTL <= 1 && !w.set.isOwnOn(at, v.Destination()) {
		w.refuse(at, dropTTL, ipkt.TimeExceeded, v)
		return
	}
	parts, res := e.frags.Add(w.now, uint32(at.nic()), w.member, v)
	switch res {
	case frag.Duplicate:
		w.drop(dropDuplicate)
	case frag.Overlap:
		w.drop(dropOverlap)
	case frag.TooMany:
		w.drop(dropFragment)
	}
	if len(parts) > 0 {
		w.forwardFragments(side, at, parts)
	}
}

// forwardFragments sends the fragments of one packet on. The first one decides.
func (w *worker) forwardFragments(side Side, at *attachment, parts [][]byte) {
	e := w.e
	var first, v ipkt.View
	var k nat.Key
	if ipkt.Parse(parts[0], &first) != ipkt.OK || !e.table.KeyOf(side, &first, &k) {
		w.dropN(dropICMPType, len(parts)) // a fragmented ICMP error
		return
	}
	f, dir := e.table.Find(w.now, &k)
	if f != nil && f.Generation.Load() != w.set.generation && !e.stillAllowed(w.set, f) {
		e.table.Remove(f)
		f = nil
	}
	if f == nil {
		t := tupleOf(&first)
		switch d := e.decide(w.set, side, at, &t); d.do {
		case actLocal:
			for _, b := range parts {
				if ipkt.Parse(b, &v) == ipkt.OK {
					w.toLocal(at, &v)
				}
			}
			return
		case actHost:
			views := make([]*ipkt.View, 0, len(parts))
			for _, b := range parts {
				if v := new(ipkt.View); ipkt.Parse(b, v) == ipkt.OK {
					views = append(views, v)
				}
			}
			w.handOver(at, views, &d)
			return
		}
		if f, dir = w.unknown(side, at, &first, &k); f == nil {
			w.dropN(dropFragment, len(parts)-1)
			return
		}
	}
	if at != nil && f.Slot != at.slot {
		w.dropN(dropSpoofed, len(parts))
		return
	}
	for _, b := range parts {
		if ipkt.Parse(b, &v) != ipkt.OK { // it did before
			w.drop(dropMalformed)
			continue
		}
		w.forward(side, f, dir, &v, nil)
	}
}

// idTable remembers whose fragmented packets lately used an IPv4 ID, so that two
// clients behind one address don't use the same at the same time (RFC 6864,
// RFC 7857 §11).
type idTable struct {
	mu    sync.Mutex
	slots [4096]idSlot
	next  uint16
}

type idSlot struct {
	src, dst [16]byte
	proto    uint8
	id       uint16
	owner    [16]byte
	original uint16
	at       int64
}

const idLifetime = int64(30 * time.Second)

// uniqueID gives a translated IPv4 packet that is in fragments, or will be,
// another ID if a different client uses it already.
func (e *Engine) uniqueID(now int64, f *nat.Flow, dir int, v *ipkt.View) {
	if v.V6 || dir != nat.FromClient || !f.Translated() {
		return
	}
	id := binary.BigEndian.Uint16(v.B[4:])
	new := e.ids.choose(now, f, id)
	if new != id {
		binary.BigEndian.PutUint16(v.B[4:], new)
		ipkt.Adjust16(v.B[10:], id, new)
	}
}

func (t *idTable) choose(now int64, f *nat.Flow, id uint16) uint16 {
	t.mu.Lock()
	defer t.mu.Unlock()
	want := idSlot{src: f.External(), dst: f.Server(), proto: f.Proto(), owner: f.Client(), original: id}
	// A packet that got another ID keeps it for all its fragments.
	for i, c := 0, id; i < 8; i++ {
		s := &t.slots[(uint32(c)*0x9e37+uint32(want.dst[15])*0x85eb+uint32(want.proto))%uint32(len(t.slots))]
		same := s.src == want.src && s.dst == want.dst && s.proto == want.proto && s.id == c
		if !same || now-s.at >= idLifetime || s.owner == want.owner && s.original == id {
			want.id, want.at = c, now
			*s = want
			return c
		}
		c = uint16(uint32(id)*0x6487 + uint32(i+1)*0x9e37 + uint32(t.next))
	}
	t.next++
	return id
}
