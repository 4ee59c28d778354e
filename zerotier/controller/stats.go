package controller

import "sync/atomic"

// Stats are counters since the start.
type Stats struct {
	Requests    uint64 // for networks of ours
	TooSoon     uint64 // requests within a second of the one before
	Overflow    uint64 // requests, records or revocations beyond a bound
	Refused     uint64 // requests answered with ERROR
	Failed      uint64 // requests and pushes that couldn't be served
	Configs     uint64 // sent as replies
	Pushes      uint64 // sent unasked
	Revocations uint64 // sent
	Evicted     uint64 // records of unauthorised nodes removed
}

type counters struct {
	requests, tooSoon, overflow, refused, failed, configs, pushes, revocations, evicted atomic.Uint64
}

// Stats returns the counters.
func (c *Controller) Stats() Stats {
	s := &c.stats
	return Stats{
		Requests: s.requests.Load(), TooSoon: s.tooSoon.Load(), Overflow: s.overflow.Load(), Refused: s.refused.Load(),
		Failed: s.failed.Load(), Configs: s.configs.Load(), Pushes: s.pushes.Load(), Revocations: s.revocations.Load(),
		Evicted: s.evicted.Load(),
	}
}
