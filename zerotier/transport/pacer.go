package transport

import "time"

// pacer decides how long a reader waits for more datagrams before it asks for
// them. Bulk transfers earn a pause: a wake-up for each message of the kernel's costs as
// much as the message, and the more of them come together, the more segments are
// merged on their way to an interface. Short connections don't. Their packets hardly
// merge, and they wait for each other: with pauses all connections move in step, and
// one processor idles while another works on the batch.
type pacer struct {
	last    time.Time
	gap     time.Duration // between datagrams
	size    int           // bytes of a datagram
	message int           // bytes of a message, in which the kernel merges datagrams
}

const (
	// pacedGap is the longest gap between datagrams that counts as load.
	pacedGap = 100 * time.Microsecond
	// Bulk is what comes in datagrams of this size, or in messages of that: most are full,
	// or cut from full frames. With answers of 2 kB and all that goes with them it is 460
	// and 900.
	pacedSize    = 1000
	pacedMessage = 8 << 10
	// pacedBatch is how many datagrams a pause waits for.
	pacedBatch = 12
	// maxPause bounds what the pause adds to the delay of a datagram.
	maxPause = 150 * time.Microsecond
	newest   = 3 // the newest batch has a weight of 1/8
)

// pause notes a batch that was read at now, and returns how long to wait before the
// next one: 0 unless that pays.
func (p *pacer) pause(now time.Time, messages, n, bytes int) time.Duration {
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
	p.gap += (gap - p.gap) >> newest
	p.size += (bytes/n - p.size) >> newest
	p.message += (bytes/messages - p.message) >> newest
	if p.gap > pacedGap || p.size < pacedSize && p.message < pacedMessage {
		return 0
	}
	return min(pacedBatch*p.gap, maxPause)
}
