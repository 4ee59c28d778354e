// Package frag holds the fragments of IP packets back until all of a packet are
// there, in whatever order they come, so that a translator sees ports before it
// must decide and a packet with overlapping fragments never gets through in
// parts (RFC 4787 REQ-14, RFC 5722, RFC 1858). Packets leave as the fragments
// they came in.
//
// Bytes are bounded in total and per source; a source that has too much loses
// its oldest packet, and when all have too much the greediest loses it, judged also by
// network and sender, so that a flood of one doesn't stop the others.
package frag

import (
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"ztgate/netstack/internal/fair"
	"ztgate/netstack/internal/ipkt"
)

// Bounds and times.
const (
	maxBytes  = 4 << 20
	perSource = 1 << 20
	maxPieces = 256
	overhead  = 256 // of a packet, in the account of bytes
	lifetime4 = int64(30 * time.Second)
	lifetime6 = int64(60 * time.Second) // RFC 8200 §4.5
)

// Result is what became of a fragment.
type Result uint8

const (
	Held      Result = iota
	Complete         // all fragments of the packet are returned
	Duplicate        // there already
	Overlap          // the packet is refused as a whole, with what still comes of it
	TooMany          // pieces
)

type key struct {
	src, dst [16]byte
	id       uint32
	proto    uint8
	from     uint32
	member   uint64
}

type piece struct {
	from, to int // of the payload
	b        []byte
}

// packet is one that isn't complete. It is in the list of its source and in that of
// its family, oldest first.
type packet struct {
	key        key
	pieces     []piece // by place
	total      int     // bytes of payload, 0 = not known
	bytes      int
	born       int64
	refused    bool
	src        *source
	prev, next *packet

	older, newer *packet
}

// source is who sends fragments.
type source struct {
	key         sourceKey
	bytes       fair.Share[source]
	first, last *packet
}

type sourceKey struct {
	addr   [16]byte
	member uint64
}

// Store holds fragments. It is safe for concurrent use.
type Store struct {
	mu      sync.Mutex
	packets map[key]*packet
	sources map[sourceKey]*source
	bytes   fair.Tree[source]
	places  fair.Hash
	ages    [2]struct{ first, last *packet } // of IPv4 and IPv6
	lost    func(from uint32, fragments int)
}

// New makes an empty store. lost is told how many held fragments were given up;
// it must not call the store.
func New(lost func(from uint32, fragments int)) *Store {
	s := &Store{packets: make(map[key]*packet), sources: make(map[sourceKey]*source), places: fair.Hash{rand.Uint64(), rand.Uint64()}, lost: lost}
	s.bytes.Equal = 2 // three packets
	return s
}

// Add takes a copy of a fragment; from tells networks apart, member who sent it there, 0
// for the VPC. With [Complete] it returns all fragments of the packet in order.
func (s *Store) Add(now int64, from uint32, member uint64, v *ipkt.View) ([][]byte, Result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := key{v.Src, v.Dst, v.FragID, 0, from, member}
	if !v.V6 {
		k.proto = v.Proto
	}
	p := s.packets[k]
	if p != nil && now-p.born >= lifetime(v.V6) {
		s.give(p)
		p = nil
	}
	if p == nil {
		p = s.add(now, k)
	}
	if p.refused {
		return nil, Overlap
	}
	n := piece{from: v.FragOffset, to: v.FragOffset + len(v.B) - v.L4}
	at, res := p.place(&n, v.More)
	if res == Overlap || res == TooMany {
		s.refuse(p)
	}
	if res != Held {
		return nil, res
	}
	n.b = slices.Clone(v.B)
	p.pieces = slices.Insert(p.pieces, at, n)
	if !v.More {
		p.total = n.to
	}
	s.account(p, len(n.b), 0)
	if p.complete() {
		out := make([][]byte, len(p.pieces))
		for i := range p.pieces {
			out[i] = p.pieces[i].b
		}
		s.remove(p)
		return out, Complete
	}
	s.bound(p)
	return nil, Held
}

func lifetime(v6 bool) int64 {
	if v6 {
		return lifetime6
	}
	return lifetime4
}

// place finds where a piece belongs, and whether it may.
func (p *packet) place(n *piece, more bool) (int, Result) {
	if p.total > 0 && (n.to > p.total || !more && n.to != p.total) || !more && len(p.pieces) > 0 && p.pieces[len(p.pieces)-1].to > n.to {
		return 0, Overlap
	}
	at, found := slices.BinarySearchFunc(p.pieces, n.from, func(a piece, from int) int { return a.from - from })
	switch {
	case found && p.pieces[at].to == n.to:
		return 0, Duplicate
	case found, at > 0 && p.pieces[at-1].to > n.from, at < len(p.pieces) && p.pieces[at].from < n.to:
		return 0, Overlap
	case len(p.pieces) >= maxPieces:
		return 0, TooMany
	}
	return at, Held
}

func (p *packet) complete() bool {
	if p.total == 0 {
		return false
	}
	end := 0
	for i := range p.pieces {
		if p.pieces[i].from != end {
			return false
		}
		end = p.pieces[i].to
	}
	return end == p.total
}

func (s *Store) add(now int64, k key) *packet {
	sk := sourceKey{k.src, k.member}
	src := s.sources[sk]
	if src == nil {
		src = &source{key: sk}
		src.bytes = fair.Share[source]{Of: src, At: s.places.Place(k.member, &k.src)}
		s.sources[sk] = src
	}
	p := &packet{key: k, born: now, src: src, prev: src.last}
	if src.last == nil {
		src.first = p
	} else {
		src.last.next = p
	}
	src.last = p
	age := &s.ages[p.family()]
	if p.older = age.last; p.older == nil {
		age.first = p
	} else {
		p.older.newer = p
	}
	age.last = p
	s.packets[k] = p
	s.account(p, overhead, 1)
	return p
}

// account adds bytes to a packet, which are as many packets more of its source. Sources
// near each other are compared by these: one large datagram isn't much.
func (s *Store) account(p *packet, n, packets int) {
	p.bytes += n
	s.bytes.AddRanked(&p.src.bytes, n, packets)
}

func (s *Store) remove(p *packet) {
	delete(s.packets, p.key)
	s.account(p, -p.bytes, -1)
	src := p.src
	if p.prev == nil {
		src.first = p.next
	} else {
		p.prev.next = p.next
	}
	if p.next == nil {
		src.last = p.prev
	} else {
		p.next.prev = p.prev
	}
	age := &s.ages[p.family()]
	if p.older == nil {
		age.first = p.newer
	} else {
		p.older.newer = p.newer
	}
	if p.newer == nil {
		age.last = p.older
	} else {
		p.newer.older = p.older
	}
	if src.first == nil {
		delete(s.sources, src.key)
	}
}

// refuse gives up what is held of a packet and remembers to take no more of it.
func (s *Store) refuse(p *packet) {
	s.lost(p.key.from, len(p.pieces))
	s.account(p, overhead-p.bytes, 0)
	p.pieces, p.refused = nil, true
}

// give gives a packet up.
func (s *Store) give(p *packet) {
	s.lost(p.key.from, len(p.pieces))
	s.remove(p)
}

// bound keeps the limits after p grew.
func (s *Store) bound(p *packet) {
	for src := p.src; src.bytes.Count() > perSource; {
		s.give(src.first)
	}
	for s.bytes.Count() > maxBytes {
		s.give(s.bytes.Greediest(older).first)
	}
}

// older reports whether a's oldest packet is older than b's.
func older(a, b *source) bool { return a.first.born < b.first.born }

// Expire gives up packets whose rest doesn't come. It holds the lock for short times
// only, however many there are.
func (s *Store) Expire(now int64) {
	const step = 64
	for more := true; more; {
		s.mu.Lock()
		more = false
		for family, l := range [...]int64{lifetime4, lifetime6} {
			n := 0
			for p := s.ages[family].first; p != nil && now-p.born >= l && n < step; p = s.ages[family].first {
				s.give(p)
				n++
			}
			more = more || n == step
		}
		s.mu.Unlock()
	}
}

// family is 0 for IPv4, 1 for IPv6.
func (p *packet) family() int {
	if p.key.proto == 0 {
		return 1
	}
	return 0
}

// Bytes returns how much is held.
func (s *Store) Bytes() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes.Count()
}
