package network

import (
	"sync"
	"time"

	"ztgate/zerotier/identity"
)

// limiter bounds how often something is done for each of many nodes: one per
// every, burst of them at once. Of more nodes than max it takes none on.
type limiter struct {
	every time.Duration
	burst int
	max   int

	mu   sync.Mutex
	free map[identity.Address]time.Time // when all of the burst is free again
}

// allow takes one.
func (l *limiter) allow(a identity.Address, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	at, ok := l.free[a]
	if !ok && len(l.free) >= l.max {
		l.sweep(now)
		if len(l.free) >= l.max {
			return false
		}
	}
	if at.Before(now) {
		at = now
	}
	if at = at.Add(l.every); at.Sub(now) > time.Duration(l.burst)*l.every {
		return false
	}
	if l.free == nil {
		l.free = make(map[identity.Address]time.Time)
	}
	l.free[a] = at
	return true
}

// refund gives one back.
func (l *limiter) refund(a identity.Address) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if at, ok := l.free[a]; ok {
		l.free[a] = at.Add(-l.every)
	}
}

func (l *limiter) sweep(now time.Time) {
	for a, at := range l.free {
		if !at.After(now) {
			delete(l.free, a)
		}
	}
}

// expire forgets idle nodes.
func (l *limiter) expire(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sweep(now)
}
