package netstack

import (
	"net/netip"
	"time"

	"ztgate/internal/rate"
)

// limiter limits the ICMP errors we send: in total, and to each destination, but
// so that mtr sees every hop (RFC 1812 §4.3.2.8). Messages that a packet is too
// big have limits of their own, since connections wait for them (RFC 4443 §2.4 f).
type limiter struct {
	ordinary, size errorLimit
}

// errorLimit limits one kind of errors.
type errorLimit struct {
	total rate.Shared
	peers *rate.Table[netip.Addr]
}

const limiterPeers = 2048

func (l *limiter) init() {
	l.ordinary.peers = rate.NewTable[netip.Addr](limiterPeers)
	l.size.peers = rate.NewTable[netip.Addr](limiterPeers)
}

// allow takes a token for an error to an address.
func (l *limiter) allow(now int64, to netip.Addr, size bool) bool {
	if size {
		return l.size.allow(now, to, time.Second/5000, 1000, time.Second/200, 200)
	}
	return l.ordinary.allow(now, to, time.Second/1000, 250, time.Second/20, 50)
}

func (l *errorLimit) allow(now int64, to netip.Addr, totalEvery time.Duration, totalBurst int, peerEvery time.Duration, peerBurst int) bool {
	peer := l.peers.Of(to)
	if !peer.Take(now, 1, peerEvery, peerBurst) {
		return false
	}
	if !l.total.Take(now, 1, totalEvery, totalBurst) {
		peer.Put(1, peerEvery)
		return false
	}
	return true
}
