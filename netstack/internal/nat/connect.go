package nat

import (
	"sync/atomic"
	"time"
)

// connectBounds are the upper bounds of buckets, in microseconds: from a host on the same
// network to one that answers the third SYN.
var connectBounds = [...]uint32{200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 3_000_000}

// ConnectTimes are how long connections took to be answered, from the first SYN to
// the SYN-ACK as they passed.
type ConnectTimes struct {
	buckets [len(connectBounds)]atomic.Uint64
	count   atomic.Uint64
	micros  atomic.Uint64
}

func (c *ConnectTimes) add(micros uint32) {
	for i, bound := range connectBounds {
		if micros <= bound {
			c.buckets[i].Add(1)
			break
		}
	}
	c.count.Add(1)
	c.micros.Add(uint64(micros))
}

// Read returns how many there were, what they took in all, and how many took at most so
// many seconds.
func (c *ConnectTimes) Read() (count uint64, seconds float64, buckets map[float64]uint64) {
	buckets = make(map[float64]uint64, len(connectBounds))
	sum := uint64(0)
	for i, bound := range connectBounds {
		sum += c.buckets[i].Load()
		buckets[float64(bound)/1e6] = sum
	}
	return max(c.count.Load(), sum), float64(c.micros.Load()) / 1e6, buckets
}

func micros(now int64) uint32 { return uint32(now / int64(time.Microsecond)) }

// noteSYN notes when a client first asked. Until the server has said something, what it
// lets the client send isn't known, and its place is free.
func (f *Flow) noteSYN(now int64) {
	if f.dir[FromClient].window.Load()&winSeen == 0 && f.dir[FromServer].window.Load() == 0 {
		f.dir[FromServer].limit.Store(micros(now))
	}
}

// noteConnected counts how long the first answer took.
func (t *Table) noteConnected(now int64, f *Flow) {
	if f.From() != f.To() && f.dir[FromClient].window.Load()&winSeen != 0 && f.dir[FromServer].window.Load() == 0 {
		t.stats.Connect[f.From()].add(micros(now) - f.dir[FromServer].limit.Load())
	}
}
