package netstack

import (
	"hash/maphash"
	"net/netip"
	"sync"
	"time"
)

// limiter limits the ICMP errors we send: in total, and to each destination, but
// so that mtr sees every hop (RFC 1812 §4.3.2.8). Messages that a packet is too
// big have limits of their own, since connections wait for them (RFC 4443 §2.4 f).
type limiter struct {
	mu    sync.Mutex
	seed  maphash.Seed
	total [2]bucket
	peers [2][limiterPeers]bucket // several may share one
}

type bucket struct {
	tokens float32
	last   int64 // ns; 0 = never used
}

const limiterPeers = 2048

// Rates a second and bursts, of ordinary errors and of those about size.
var (
	totalRate, totalBurst = [2]float32{1000, 5000}, [2]float32{250, 1000}
	peerRate, peerBurst   = [2]float32{20, 200}, [2]float32{50, 200}
)

func (l *limiter) init() { l.seed = maphash.MakeSeed() }

// allow takes a token for an error to an address.
func (l *limiter) allow(now int64, to netip.Addr, size bool) bool {
	i := 0
	if size {
		i = 1
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &l.peers[i][maphash.Comparable(l.seed, to)%limiterPeers]
	p.fill(now, peerRate[i], peerBurst[i])
	t := &l.total[i]
	t.fill(now, totalRate[i], totalBurst[i])
	if p.tokens < 1 || t.tokens < 1 {
		return false
	}
	p.tokens--
	t.tokens--
	return true
}

func (b *bucket) fill(now int64, rate, burst float32) {
	if b.last == 0 {
		b.tokens = burst
	} else {
		b.tokens = min(burst, b.tokens+float32(now-b.last)/float32(time.Second)*rate)
	}
	b.last = now
}
