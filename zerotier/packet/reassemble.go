package packet

import (
	"math/bits"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

const (
	reassemblyShards = 16
	maxShardSlots    = 64 // bits of shard.used
	// Two datagrams carry a full frame; longer packets grow the buffer once.
	assemblyBuffer = 2 * DefaultMTU

	// ReassemblySlots is how many incomplete packets are kept by default.
	ReassemblySlots = 512
	// ReassemblyAge is how long an incomplete packet is kept by default.
	ReassemblyAge = 5 * time.Second
)

// Reassembler joins fragments (chapter 01 §4.5). Its memory is bounded, one
// source can hold only half of it, and it is safe for concurrent use. Once its
// buffers have grown it does not allocate. The zero value has the default size
// and age.
type Reassembler struct {
	// Completed packets; incomplete ones given up because of age, to make room,
	// and because of their length.
	Completed, Expired, Displaced, TooLong atomic.Uint64

	slots  int // per shard
	maxAge time.Duration
	shards [reassemblyShards]shard
}

// NewReassembler returns a Reassembler that keeps about so many incomplete
// packets, 16 to 1024, for maxAge. Zero stands for [ReassemblySlots] and
// [ReassemblyAge].
func NewReassembler(slots int, maxAge time.Duration) *Reassembler {
	return &Reassembler{slots: (slots + reassemblyShards - 1) / reassemblyShards, maxAge: maxAge}
}

func (r *Reassembler) shardSlots() int {
	if r.slots <= 0 {
		return ReassemblySlots / reassemblyShards
	}
	return min(r.slots, maxShardSlots)
}

func (r *Reassembler) age() time.Duration {
	if r.maxAge <= 0 {
		return ReassemblyAge
	}
	return r.maxAge
}

// shard holds the packets with one remainder of the ID.
type shard struct {
	mu    sync.Mutex
	seq   uint64 // of the newest entry
	used  uint64 // bit per slot
	ids   []ID
	slots []assembly

	_ [64]byte // keeps neighbours off the cache line of the lock
}

// assembly is one incomplete packet. Parts lie in buf in order of arrival.
type assembly struct {
	seq   uint64
	src   netip.Addr
	born  time.Time
	total int   // 0 until a fragment told it
	have  uint8 // bit per part
	parts [MaxFragments]span
	buf   []byte
}

type span struct{ off, end int }

// AddHead adds the first part of a fragmented packet that came from src. If that
// completes the packet it is returned with true, in dst or in a buffer that is the
// caller's from then on, while dst isn't any more. dst must not overlap p.
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
	if s.slots == nil {
		s.ids, s.slots = make([]ID, r.shardSlots()), make([]assembly, r.shardSlots())
	}
	i := s.find(id)
	if i >= 0 && now.Sub(s.slots[i].born) >= r.age() {
		s.free(i)
		r.Expired.Add(1)
		i = -1
	}
	if i < 0 {
		i = r.slot(s, now, src)
		s.seq++
		s.used |= 1 << i
		s.ids[i] = id
		s.slots[i] = assembly{seq: s.seq, src: src, born: now, buf: s.slots[i].buf[:0]}
	}
	a := &s.slots[i]
	if a.have&(1<<n) != 0 {
		return nil, false // the first one wins
	}
	if len(a.buf)+len(data) > MaxPacket {
		s.free(i)
		r.TooLong.Add(1)
		return nil, false
	}
	if total != 0 {
		a.total = total
	}
	a.have |= 1 << n
	a.parts[n] = span{len(a.buf), len(a.buf) + len(data)}
	if a.buf == nil {
		a.buf = make([]byte, 0, max(assemblyBuffer, len(data)))
	}
	a.buf = append(a.buf, data...)
	if a.total == 0 || a.have != 1<<a.total-1 {
		return nil, false
	}
	if a.inOrder() {
		dst, a.buf = a.buf, dst[:0]
	} else {
		dst = dst[:0]
		for _, part := range a.parts[:a.total] {
			dst = append(dst, a.buf[part.off:part.end]...)
		}
	}
	s.free(i)
	r.Completed.Add(1)
	return dst, true
}

// inOrder reports whether the parts of a complete packet arrived in order, as they
// mostly do, so that buf is the packet.
func (a *assembly) inOrder() bool {
	end := 0
	for _, part := range a.parts[:a.total] {
		if part.off != end {
			return false
		}
		end = part.end
	}
	return true
}

func (s *shard) free(i int) { s.used &^= 1 << i }

// find returns the slot of a packet or -1.
func (s *shard) find(id ID) int {
	for u := s.used; u != 0; u &= u - 1 {
		if i := bits.TrailingZeros64(u); s.ids[i] == id {
			return i
		}
	}
	return -1
}

// slot returns the source's oldest slot if it holds its share, else a free one,
// else the oldest of all. It frees expired ones on the way.
func (r *Reassembler) slot(s *shard, now time.Time, src netip.Addr) int {
	oldest, own, held := -1, -1, 0
	for u := s.used; u != 0; u &= u - 1 {
		i := bits.TrailingZeros64(u)
		a := &s.slots[i]
		if now.Sub(a.born) >= r.age() {
			s.free(i)
			r.Expired.Add(1)
			continue
		}
		if oldest < 0 || a.seq < s.slots[oldest].seq {
			oldest = i
		}
		if a.src == src {
			held++
			if own < 0 || a.seq < s.slots[own].seq {
				own = i
			}
		}
	}
	if held >= max(len(s.slots)/2, 1) {
		r.Displaced.Add(1)
		return own
	}
	if free := bits.TrailingZeros64(^s.used); free < len(s.slots) {
		return free // the lowest, so that few buffers stay warm
	}
	r.Displaced.Add(1)
	return oldest
}
