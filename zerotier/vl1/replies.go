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
}

// expect remembers a request. Core.mu is held.
func (c *Core) expect(id packet.ID, e *expectation) {
	for len(c.expectLog) > 0 {
		old := c.expected[c.expectLog[0]]
		if len(c.expectLog) < maxExpected && (old != nil && since(e.sent, old.sent) < expectTimeout) {
			break
		}
		delete(c.expected, c.expectLog[0])
		c.expectLog = c.expectLog[1:]
	}
	c.expected[id] = e
	c.expectLog = append(c.expectLog, id)
}

// expectedReply returns the request that a reply answers, nil if there is none.
func (c *Core) expectedReply(id packet.ID, from *Peer, v packet.Verb, t int64) *expectation {
	e := c.expected[id]
	if e == nil || e.peer != from.addr || e.verb != v || since(t, e.sent) >= expectTimeout {
		return nil
	}
	return e
}
