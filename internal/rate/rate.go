// Package rate bounds how often something is done. A [Bucket] is a token bucket:
// one token comes back per interval, up to a burst of them. It is 8 bytes, holds no
// limits and reads no clock: callers pass both, the same each time, and a clock of
// their own in nanoseconds that does not go back and is not negative.
//
// [Bucket] is for callers that have a lock, [Shared] for those that have none, [Table]
// for many sources that may share buckets by chance, and [Map] for sources that must
// be told apart.
package rate

import (
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"
)

// Bucket is a token bucket. The zero value is full. It is not safe for concurrent
// use.
type Bucket struct {
	full int64 // when all tokens are back
}

// Take takes a token of a bucket that gets one back per interval, up to burst. It
// reports false, and takes nothing, if there is none.
func (b *Bucket) Take(now int64, every time.Duration, burst int) bool {
	next, ok := take(b.full, now, 1, every, burst)
	if ok {
		b.full = next
	}
	return ok
}

// put gives a token back.
func (b *Bucket) put(every time.Duration) { b.full -= int64(every) }

// take returns when a bucket is full again after n tokens were taken, and whether
// there were as many.
func take(full, now int64, n int, every time.Duration, burst int) (next int64, ok bool) {
	next = max(full, now) + int64(n)*int64(every)
	return next, next-now <= int64(burst)*int64(every)
}

// Shared is a [Bucket] that is safe for concurrent use.
type Shared struct {
	full atomic.Int64
}

// Take takes n tokens, see [Bucket.Take].
func (s *Shared) Take(now int64, n int, every time.Duration, burst int) bool {
	for {
		old := s.full.Load()
		next, ok := take(old, now, n, every, burst)
		if !ok || s.full.CompareAndSwap(old, next) {
			return ok
		}
	}
}

// Put gives n tokens back.
func (s *Shared) Put(n int, every time.Duration) { s.full.Add(-int64(n) * int64(every)) }

// Table has a fixed number of buckets for any number of sources: those that share
// one by chance share its rate. It is safe for concurrent use.
type Table[K comparable] struct {
	seed    maphash.Seed
	buckets []Shared
}

// NewTable makes a table of a number of buckets.
func NewTable[K comparable](buckets int) *Table[K] {
	return &Table[K]{seed: maphash.MakeSeed(), buckets: make([]Shared, buckets)}
}

// Of returns the bucket of a source.
func (t *Table[K]) Of(k K) *Shared {
	return &t.buckets[maphash.Comparable(t.seed, k)%uint64(len(t.buckets))]
}

// Map has a bucket for each source, and takes nothing from more than Max sources whose
// buckets are not full. Every, Burst and Max are set before its first use. It is
// safe for concurrent use.
type Map[K comparable] struct {
	Every time.Duration
	Burst int
	Max   int

	mu    sync.Mutex
	start time.Time // of the first call: what buckets reckon from
	m     map[K]Bucket
}

// Take takes a token of a source.
func (m *Map[K]) Take(k K, now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.m == nil {
		m.m, m.start = make(map[K]Bucket), now
	}
	b, ok := m.m[k]
	if !ok && len(m.m) >= m.Max {
		m.sweepLocked(now)
		if len(m.m) >= m.Max {
			return false
		}
	}
	if !b.Take(m.at(now), m.Every, m.Burst) {
		return false
	}
	m.m[k] = b
	return true
}

// Put gives a source a token back.
func (m *Map[K]) Put(k K) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if b, ok := m.m[k]; ok {
		b.put(m.Every)
		m.m[k] = b
	}
}

// Expire forgets sources whose buckets are full.
func (m *Map[K]) Expire(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sweepLocked(now)
}

func (m *Map[K]) sweepLocked(now time.Time) {
	t := m.at(now)
	for k, b := range m.m {
		if b.full <= t {
			delete(m.m, k)
		}
	}
}

// at turns a time into nanoseconds above 0 that a set clock does not move.
func (m *Map[K]) at(now time.Time) int64 { return int64(now.Sub(m.start)) + int64(time.Hour) }
