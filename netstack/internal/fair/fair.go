// Package fair finds who has most of something scarce, so that whoever needs some of
// it takes it from there. Who has much is judged step by step: by where it comes from
// (the VPC, an overlay member), by /16 or /48, by /24 or /64, and by address. So one
// that uses many addresses counts as one, and takes from those near it last.
//
// Prefixes share counters by chance of a keyed hash, which bounds memory whatever
// comes; addresses don't. Nothing here is safe for concurrent use.
package fair

import (
	"encoding/binary"
	"math/bits"
)

const (
	origins = 16 // the first one is the VPC's
	fanout  = 32 // for /16 or /48 in each, and for /24 or /64 in each of these
	tries   = 24 // places that are looked at beside the greediest
	sizes   = 25 // 2 to the power of it is more than anybody has
)

// Place is where a holder is counted.
type Place uint16

// Hash has the keys by which places are found.
type Hash [2]uint64

// Place returns the place of an address, IPv4 in its mapped form. Origin 0 has
// counters of its own.
func (h *Hash) Place(origin uint64, a *[16]byte) Place {
	o := uint64(0)
	if origin != 0 {
		o = 1 + mix(origin^h[0], h[1])%(origins-1)
	}
	wide, narrow := binary.BigEndian.Uint64(a[:]), uint64(0)
	if wide == 0 { // IPv4
		wide = binary.BigEndian.Uint64(a[8:])
		wide, narrow = wide>>16, wide>>8
	} else {
		wide, narrow = wide>>16, wide
	}
	w := mix(wide^h[0], h[1]^origin) % fanout
	return Place((o*fanout+w)*fanout + mix(narrow^h[1], h[0]^origin)%fanout)
}

func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a, b|1)
	return hi ^ lo
}

// Share is what one holder has. The zero value, with Of and At set, has nothing.
type Share[T any] struct {
	Of         *T
	prev, next *Share[T]
	n, rank    int32
	At         Place
}

// Count returns how much it is.
func (s *Share[T]) Count() int { return int(s.n) }

// Tree has the shares of all holders. The zero value is empty.
type Tree[T any] struct {
	// Equal is how many bits of a share don't matter: holders of a place who have less
	// take turns. It is set before the first use.
	Equal int

	n      int
	turn   uint32 // of who is looked at
	origin [origins]int32
	wide   [origins]level
	below  [origins * fanout]*branch[T]
}

// level is how much each of some places has that are compared with each other.
type level struct {
	n    [fanout]int32
	live int // those that have anything
	all  int
}

// branch is what lies below a /16 or /48.
type branch[T any] struct {
	narrow level
	nodes  [fanout]*node[T]
}

// node has the holders of a place by the logarithm of their shares. In each list those
// who lately gave or came stand behind.
type node[T any] struct {
	some  uint32 // lists that aren't empty
	lists [sizes]struct{ first, last *Share[T] }
}

// Count returns how much all have.
func (t *Tree[T]) Count() int { return t.n }

// Add adds n, which may be negative, to a share.
func (t *Tree[T]) Add(s *Share[T], n int) { t.AddRanked(s, n, n) }

// AddRanked adds n to a share whose holder is compared with those of the same place by
// something else, of which it adds rank.
func (t *Tree[T]) AddRanked(s *Share[T], n, rank int) {
	p := int(s.At)
	t.n += n
	t.origin[p/(fanout*fanout)] += int32(n)
	t.wide[p/(fanout*fanout)].add(p/fanout%fanout, n)
	b := t.below[p/fanout]
	if b == nil {
		b = new(branch[T])
		t.below[p/fanout] = b
	}
	b.narrow.add(p%fanout, n)
	d := b.nodes[p%fanout]
	if d == nil {
		d = new(node[T])
		b.nodes[p%fanout] = d
	}
	if rank < 0 {
		t.turn++
	}
	from := t.list(s)
	s.n += int32(n)
	s.rank += int32(rank)
	to := t.list(s)
	if from == to && (rank >= 0 || s.next == nil) {
		return
	}
	if from > 0 {
		d.remove(from-1, s)
	}
	if to > 0 {
		d.append(to-1, s)
	}
}

// list returns the number of a share's list, and one.
func (t *Tree[T]) list(s *Share[T]) int {
	if s.rank == 0 {
		return 0
	}
	return max(bits.Len32(uint32(s.rank))-t.Equal, 1)
}

func (l *level) add(i, n int) {
	l.all += n
	if l.n[i] != 0 {
		l.live--
	}
	if l.n[i] += int32(n); l.n[i] != 0 {
		l.live++
	}
}

// greedy reports a place that has half as much as others have on average, or more.
func (l *level) greedy(i int) bool { return l.n[i] > 0 && 2*int(l.n[i])*l.live >= l.all }

// next returns the next such place from one on.
func (l *level) next(i int) int {
	for !l.greedy(i % fanout) {
		i++
	}
	return i % fanout
}

func (d *node[T]) append(i int, s *Share[T]) {
	l := &d.lists[i]
	s.prev, s.next = l.last, nil
	if l.last == nil {
		l.first = s
	} else {
		l.last.next = s
	}
	l.last = s
	d.some |= 1 << i
}

func (d *node[T]) remove(i int, s *Share[T]) {
	l := &d.lists[i]
	if s.prev == nil {
		l.first = s.next
	} else {
		s.prev.next = s.next
	}
	if s.next == nil {
		l.last = s.prev
	} else {
		s.next.prev = s.prev
	}
	s.prev, s.next = nil, nil
	if l.first == nil {
		d.some &^= 1 << i
	}
}

// Greediest returns a holder that has most, nil if nobody has anything. Of an origin's
// places that have as much as others some are looked at, and whose holder is older goes
// first: what came in a flood long ago before what came just now.
func (t *Tree[T]) Greediest(older func(a, b *T) bool) *T {
	if t.n == 0 {
		return nil
	}
	return t.of(most(t.origin[:]), older)
}

// CountNear returns how much those with the origin of a place have.
func (t *Tree[T]) CountNear(p Place) int { return int(t.origin[int(p)/(fanout*fanout)]) }

// Near is Greediest among those with the origin of a place.
func (t *Tree[T]) Near(p Place, older func(a, b *T) bool) *T {
	o := int(p) / (fanout * fanout)
	if t.origin[o] == 0 {
		return nil
	}
	return t.of(o, older)
}

func (t *Tree[T]) of(o int, older func(a, b *T) bool) *T {
	wide := &t.wide[o]
	b := t.below[o*fanout+most(wide.n[:])]
	best := b.nodes[most(b.narrow.n[:])].first()
	w, n := int(t.turn/fanout), int(t.turn)
	for range tries {
		w = wide.next(w)
		b := t.below[o*fanout+w]
		n = b.narrow.next(n)
		if h := b.nodes[n].first(); older(h, best) {
			best = h
		}
		w, n = w+1, n+1
	}
	return best
}

func (d *node[T]) first() *T { return d.lists[bits.Len32(d.some)-1].first.Of }

// most returns the index of the largest number.
func most(list []int32) (at int) {
	for i, n := range list {
		if n > list[at] {
			at = i
		}
	}
	return at
}
