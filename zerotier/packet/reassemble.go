package packet

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

const (
	reassemblyShards = 16
	shardSlots       = 32
	perSourceSlots   = 16 // of one shard
	// ReassemblySlots is how many incomplete packets are kept at most.
	ReassemblySlots = reassemblyShards * shardSlots
	// ReassemblyAge is how long an incomplete packet is kept.
	ReassemblyAge = 5 * time.Second
)

// Reassembler joins fragments (chapter 01 §4.5). Its memory is bounded, one
// source can hold only part of it, and it is safe for concurrent use.
type Reassembler struct {
	shards [reassemblyShards]shard

	Completed, Expired, Displaced, TooLong atomic.Uint64
}

type shard struct {
	mu    sync.Mutex
	seq   uint64 // of the newest entry
	slots [shardSlots]assembly
}

// assembly is one incomplete packet. Parts lie in buf in order of arrival.
type assembly struct {
	used  bool
	seq   uint64
	id    ID
	src   netip.Addr
	born  time.Time
	total int // 0 until a fragment told it
	have  uint8
	parts [MaxFragments]span
	buf   []byte
}

type span struct{ off, end int }

// AddHead adds the first part of a fragmented packet. If that completes the
// packet it is appended to dst and returned.
func (r *Reassembler) AddHead(now time.Time, src netip.Addr, p Packet, dst []byte) ([]byte, bool) {
	return r.add(now, src, p.ID(), 0, 0, p, dst)
}

// AddFragment adds a later part; see [Reassembler.AddHead].
func (r *Reassembler) AddFragment(now time.Time, src netip.Addr, f Fragment, dst []byte) ([]byte, bool) {
	return r.add(now, src, f.ID(), f.Number(), f.Total(), f.Data(), dst)
}

func (r *Reassembler) add(now time.Time, src netip.Addr, id ID, n, total int, data, dst []byte) ([]byte, bool) {
	s := &r.shards[id%reassemblyShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.find(id)
	if a == nil || now.Sub(a.born) >= ReassemblyAge {
		if a != nil {
			a.used = false
			r.Expired.Add(1)
		}
		a = r.slot(s, now, src)
		s.seq++
		*a = assembly{used: true, seq: s.seq, id: id, src: src, born: now, buf: a.buf[:0]}
	}
	if a.have&(1<<n) != 0 {
		return nil, false // the first one wins
	}
	if len(a.buf)+len(data) > MaxPacket {
		a.used = false
		r.TooLong.Add(1)
		return nil, false
	}
	if total != 0 {
		a.total = total
	}
	a.have |= 1 << n
	a.parts[n] = span{len(a.buf), len(a.buf) + len(data)}
	a.buf = append(a.buf, data...)
	if a.total == 0 || a.have != 1<<a.total-1 {
		return nil, false
	}
	for _, part := range a.parts[:a.total] {
		dst = append(dst, a.buf[part.off:part.end]...)
	}
	a.used = false
	r.Completed.Add(1)
	return dst, true
}

func (s *shard) find(id ID) *assembly {
	for i := range s.slots {
		if a := &s.slots[i]; a.used && a.id == id {
			return a
		}
	}
	return nil
}

// slot returns a free slot, else an expired one, else the source's own oldest if
// it holds its share, else the oldest of all.
func (r *Reassembler) slot(s *shard, now time.Time, src netip.Addr) *assembly {
	var free, oldest, own *assembly
	held := 0
	for i := range s.slots {
		a := &s.slots[i]
		if a.used && now.Sub(a.born) >= ReassemblyAge {
			a.used = false
			r.Expired.Add(1)
		}
		if !a.used {
			free = a
			continue
		}
		if oldest == nil || a.seq < oldest.seq {
			oldest = a
		}
		if a.src == src {
			held++
			if own == nil || a.seq < own.seq {
				own = a
			}
		}
	}
	switch {
	case held >= perSourceSlots:
		r.Displaced.Add(1)
		return own
	case free != nil:
		return free
	}
	r.Displaced.Add(1)
	return oldest
}
