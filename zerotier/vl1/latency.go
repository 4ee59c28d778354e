package vl1

import "time"

// DirectLatency returns the latency of the direct path in use; false without one
// or while it is unknown.
func (p *Peer) DirectLatency() (time.Duration, bool) {
	r := p.route.Load()
	if r == nil || r.relay {
		return 0, false
	}
	l := time.Duration(r.path.latency.Load())
	return l, l > 0
}
