package hostproxy

import (
	"cmp"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"
)

const (
	// clientShare of all is what one client may hold, but never less than leastShare.
	clientShare = 8
	leastShare  = 16
	// spareAfter is how long a connection has to be idle to give way to another one of
	// its own client.
	spareAfter = 5 * time.Minute
	// maxBlamed bounds the clients whose refusals are counted by name.
	maxBlamed = 64
)

// client is who holds connections and sessions.
type client struct {
	prefix netip.Prefix // of an address of the VPC
	member member       // of a network, with whatever addresses it uses
}

// member is a member of a network, by its MAC.
type member struct {
	network uint64
	mac     [6]byte
}

// entry is a connection or session that a client holds.
type entry struct {
	client   client
	shown    netip.Prefix // by which a member is told of
	end      func()       // closes it, with a reset where there is one; doesn't block
	about    func() Connection
	began    time.Duration // since the start
	in, out  atomic.Uint64 // bytes to the client and to the host
	last     atomic.Int64  // when something passed, in ns since the start
	answered atomic.Bool   // the host has sent something, or accepted
}

func (e *entry) touch(now time.Duration) { e.last.Store(int64(now)) }

func (e *entry) idle(now time.Duration) time.Duration { return now - time.Duration(e.last.Load()) }

// clientOf returns what counts as one client of the VPC: an IPv4 address or an IPv6 /64, of
// which any host may use all addresses (RFC 6177).
func clientOf(a netip.Addr) client { return client{prefix: prefixOf(a)} }

func prefixOf(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, _ := a.Prefix(bits) // an address has so many bits
	return p
}

// shares bounds what clients hold, and shares it out when it is scarce. Its owner
// guards it.
type shares struct {
	max, each int // in all, and for one client
	open      map[*entry]struct{}
	held      map[client]int
}

func newShares(max, each int) *shares {
	return &shares{max: max, each: each, open: map[*entry]struct{}{}, held: map[client]int{}}
}

// fairShare is what one client may hold of so many.
func fairShare(all int) int { return min(all, max(all/clientShare, leastShare)) }

// admit gives an entry a place. When the client has all it may have, its own entry
// that was idle longest gives way if it was idle for long; when all is taken, that
// of the client that holds most, if that is more than the new one's client will
// have. Whoever calls ends the one that gave way, which has its place no more.
func (s *shares) admit(e *entry, now time.Duration) (gone *entry, ok bool) {
	switch have := s.held[e.client]; {
	case have >= s.each:
		if gone = s.idlest(e.client); gone.idle(now) < spareAfter {
			return nil, false
		}
	case len(s.open) >= s.max:
		greediest, most := s.greediest()
		if most <= have+1 {
			return nil, false
		}
		gone = s.idlest(greediest)
	}
	if gone != nil {
		s.remove(gone)
	}
	s.open[e] = struct{}{}
	s.held[e.client]++
	return gone, true
}

// remove gives a place back. It reports whether the entry still had it.
func (s *shares) remove(e *entry) bool {
	if _, ok := s.open[e]; !ok {
		return false
	}
	delete(s.open, e)
	if s.held[e.client]--; s.held[e.client] == 0 {
		delete(s.held, e.client)
	}
	return true
}

func (s *shares) greediest() (who client, most int) {
	for c, n := range s.held {
		if n > most {
			who, most = c, n
		}
	}
	return who, most
}

// idlest returns the entry of a client that was idle longest, an unanswered one
// before all others.
func (s *shares) idlest(who client) (found *entry) {
	for e := range s.open {
		if e.client != who {
			continue
		}
		if found == nil || !e.answered.Load() && found.answered.Load() ||
			e.answered.Load() == found.answered.Load() && e.last.Load() < found.last.Load() {
			found = e
		}
	}
	return found
}

// expired takes the places of entries that are idle for too long.
func (s *shares) expired(now, answered, unanswered time.Duration) (gone []*entry) {
	for e := range s.open {
		limit := answered
		if !e.answered.Load() {
			limit = unanswered
		}
		if e.idle(now) > limit {
			gone = append(gone, e)
		}
	}
	for _, e := range gone {
		s.remove(e)
	}
	return gone
}

// Refused says how often a client, an address or an IPv6 /64, was refused.
type Refused struct {
	Client netip.Prefix
	Count  uint64
}

// blame counts refusals by client, for those who are refused most: where there is
// no room a new client takes over the smallest count (Metwally, Agrawal and El
// Abbadi, "Efficient computation of frequent and top-k elements", 2005).
type blame map[netip.Prefix]uint64

func (b blame) add(client netip.Prefix) {
	n, known := b[client]
	if !known && len(b) >= maxBlamed {
		var least netip.Prefix
		for c, v := range b {
			if !least.IsValid() || v < n {
				least, n = c, v
			}
		}
		delete(b, least)
	}
	b[client] = n + 1
}

func (b blame) list() []Refused {
	out := make([]Refused, 0, len(b))
	for c, n := range b {
		out = append(out, Refused{c, n})
	}
	slices.SortFunc(out, func(a, b Refused) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), a.Client.Compare(b.Client))
	})
	return out
}
