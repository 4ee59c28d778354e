package vl1

import (
	"net/netip"
	"testing"
	"time"

	"ztgate/zerotier/internal/budget"
	"ztgate/zerotier/ztnode"
)

// lengths notes how long datagrams are. It is an [Out] of which nothing else is used.
type lengths struct {
	Out
	list []int
}

func (l *lengths) Send(_ SocketID, _ netip.AddrPort, head, data []byte) {
	l.list = append(l.list, len(head)+len(data))
}

// What a HELLO is taken to have, where somebody who has proven nothing gets one, isn't less than it has.
func TestHelloSize(t *testing.T) {
	for _, how := range []ztnode.SealedHello{ztnode.SealedHelloOff, ztnode.SealedHelloAlways} {
		c, peers := boundsCore(t, func(cfg *Config) { cfg.SealedHello = how }, 1)
		for _, to := range []string{"192.0.2.1:9993", "[2001:db8::1]:9993"} {
			var sent lengths
			w := c.NewWorker().Begin(&sent, time.Unix(2, 0))
			c.mu.Lock()
			c.sendHelloLocked(w, peers[0], 1, netip.MustParseAddrPort(to))
			size := c.helloSizeLocked()
			c.mu.Unlock()
			if len(sent.list) != 1 || sent.list[0] > size {
				t.Errorf("%v, to %s: %v bytes, taken for %d", how, to, sent.list, size)
			}
		}
	}
}

// Envelopes are made in the time that a peer may cost: then there is no HELLO, not even a plain one.
func TestEnvelopesTakeTheTimeOfThePeer(t *testing.T) {
	c, peers := boundsCore(t, func(cfg *Config) { cfg.SealedHello = ztnode.SealedHelloAlways }, 2)
	var sent lengths
	w := c.NewWorker().Begin(&sent, time.Unix(2, 0))
	for ok := true; ok; {
		_, ok = c.Afford(w, peers[0], budget.Agreement, 1)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sendHelloLocked(w, peers[0], 1, netip.MustParseAddrPort("192.0.2.1:9993")); len(sent.list) != 0 {
		t.Errorf("datagrams of %v bytes to a peer whose time is used up", sent.list)
	}
	if c.sendHelloLocked(w, peers[1], 1, netip.MustParseAddrPort("192.0.2.2:9993")); len(sent.list) != 1 {
		t.Errorf("%d datagrams to another one", len(sent.list))
	}
}
