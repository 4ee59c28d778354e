package vl1

import (
	"net/netip"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// expectation is a request whose reply we wait for.
type expectation struct {
	peer      identity.Address
	verb      packet.Verb
	ep        netip.AddrPort // where a HELLO or ECHO went
	sent      int64
	timestamp int64 // of a HELLO
	asked     identity.Address
	size      int // of an ECHO that asks what the path carries
}

// replies are the requests that replies are accepted to.
type replies struct {
	m   map[packet.ID]*expectation
	log []packet.ID // in order of time
}

// expect remembers a request, and forgets the oldest ones if there are too many.
func (r *replies) expect(id packet.ID, e *expectation) {
	r.expire(e.sent)
	for len(r.log) >= maxExpected {
		r.dropOldest()
	}
	r.m[id] = e
	r.log = append(r.log, id)
}

// find returns the request that a reply answers, nil if there is none.
func (r *replies) find(id packet.ID, from identity.Address, v packet.Verb, t int64) *expectation {
	e := r.m[id]
	if e == nil || e.peer != from || e.verb != v || since(t, e.sent) >= expectTimeout {
		return nil
	}
	return e
}

// expire forgets requests whose replies are overdue.
func (r *replies) expire(t int64) {
	for len(r.log) > 0 {
		if e := r.m[r.log[0]]; e != nil && since(t, e.sent) < expectTimeout {
			return
		}
		r.dropOldest()
	}
}

func (r *replies) dropOldest() {
	delete(r.m, r.log[0])
	r.log = r.log[1:]
}

// requests are the latest requests for configurations, whether they were answered or not. An
// answer to another one is meant for somebody else who has our identity.
type requests struct {
	m   map[packet.ID]struct{}
	log []packet.ID // in order of time
}

// add remembers a request, in place of the oldest one if there are too many.
func (r *requests) add(id packet.ID) {
	if len(r.log) >= maxRequests {
		delete(r.m, r.log[0])
		r.log = r.log[1:]
	}
	r.m[id] = struct{}{}
	r.log = append(r.log, id)
}

func (r *requests) has(id packet.ID) bool {
	_, ok := r.m[id]
	return ok
}
