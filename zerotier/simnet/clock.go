package simnet

import (
	"time"
	"unsafe"
)

// SetWall returns t with the wall clock moved by whole seconds and the monotonic clock as it
// is, which is what a host's clock shows after it was set. t must have both. Package time
// offers no way to make such a time; its layout, a flag, 33 bits of seconds and 30 of
// nanoseconds, is checked here.
func SetWall(t time.Time, by time.Duration) time.Time {
	moved := t
	*(*uint64)(unsafe.Pointer(&moved)) += uint64(by/time.Second) << 30
	if moved.Sub(t) != 0 || moved.Round(0).Sub(t.Round(0)) != by.Truncate(time.Second) {
		panic("simnet: package time has changed, or a time without a monotonic clock")
	}
	return moved
}

// clock is a port's clocks. The zero value is right.
type clock struct {
	wall  time.Duration // by which the wall clock is wrong
	slept time.Duration
	until time.Time // the network's time at which the host awakes
}

// UseClocks gives all nodes clocks of their own, to be called before they are made. The
// network's time has a monotonic reading from then on.
func (n *Net) UseClocks() {
	now := time.Now()
	n.Now = SetWall(now, n.Now.Sub(now.Round(0)).Truncate(time.Second))
	n.start = n.Now
}

// Clock returns what the port's clock shows: wall clock and monotonic clock.
func (p *Port) Clock() time.Time {
	now := p.net.Now.Add(-p.clock.slept)
	if p.clock.wall+p.clock.slept == 0 {
		return now
	}
	return SetWall(now, p.clock.wall+p.clock.slept)
}

// Boot returns the time that the port's host runs, with the time it slept.
func (p *Port) Boot() time.Duration { return p.net.Now.Sub(p.net.start) + time.Hour }

// SetClock moves the wall clock of the port's host.
func (p *Port) SetClock(by time.Duration) { p.clock.wall += by }

// Sleep suspends the port's host: it hears and does nothing, and its monotonic clock stands
// still.
func (p *Port) Sleep(d time.Duration) {
	p.clock.until = p.net.Now.Add(d)
	p.clock.slept += d
}

func (p *Port) asleep() bool { return p.net.Now.Before(p.clock.until) }
