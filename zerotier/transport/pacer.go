package transport

import "time"

// pacer decides how long a reader waits for more datagrams before it asks for
// them. A wake-up for each datagram costs more than the datagram itself, so under
// load a short pause, as network cards take too, saves most of the processor time.
type pacer struct {
	last time.Time
	gap  time.Duration // between datagrams, smoothed
}

const (
	// pacedGap is the longest gap between datagrams that counts as load.
	pacedGap = 100 * time.Microsecond
	// pacedBatch is how many datagrams a pause waits for.
	pacedBatch = 12
	// maxPause bounds what the pause adds to the delay of a datagram.
	maxPause = 150 * time.Microsecond
	gapShift = 3 // weight of the newest gap is 1/8
)

// pause notes a batch of n datagrams that was read at now and returns how long to
// wait before the next one, 0 without load.
func (p *pacer) pause(now time.Time, n int) time.Duration {
	if p.last.IsZero() {
		p.last, p.gap = now, 2*pacedGap
		return 0
	}
	elapsed := now.Sub(p.last)
	p.last = now
	if n == 0 {
		return 0
	}
	// A long silence must not outweigh the load that follows it.
	gap := min(elapsed/time.Duration(n), 2*pacedGap)
	p.gap += (gap - p.gap) >> gapShift
	if p.gap > pacedGap {
		return 0
	}
	return min(pacedBatch*p.gap, maxPause)
}
