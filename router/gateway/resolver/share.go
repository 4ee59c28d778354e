package resolver

import (
	"net/netip"
	"sync"
)

// places are scarce things that clients hold for a short time: queries on their way,
// connections. When all are taken, the client that holds most gives up its oldest for
// one that holds less.
type places struct {
	max, each int // in all, and of one client

	mu   sync.Mutex
	held map[netip.Prefix][]*place // oldest first
	n    int
}

// place is one that a client holds.
type place struct {
	client netip.Prefix
	end    func() // called, once, when another client gets the place; doesn't block
}

func newPlaces(all, each int) *places {
	return &places{max: all, each: each, held: map[netip.Prefix][]*place{}}
}

// take gives a client one of the first places, nil if there is none of them for it.
func (p *places) take(client netip.Prefix, first int, end func()) *place {
	x := &place{client, end}
	var gone *place
	p.mu.Lock()
	have := len(p.held[client])
	full := p.n >= first
	if full && have < p.each {
		if who, most := p.greediestLocked(); most > have+1 {
			gone = p.held[who][0]
			p.removeLocked(gone)
			full = false
		}
	}
	ok := !full && have < p.each
	if ok {
		p.held[client] = append(p.held[client], x)
		p.n++
	}
	p.mu.Unlock()
	if gone != nil {
		gone.end()
	}
	if !ok {
		return nil
	}
	return x
}

func (p *places) greediestLocked() (who netip.Prefix, most int) {
	for c, list := range p.held {
		if len(list) > most {
			who, most = c, len(list)
		}
	}
	return who, most
}

// give gives a place back, false if it was taken from its client.
func (p *places) give(x *place) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.removeLocked(x)
}

func (p *places) removeLocked(x *place) bool {
	list := p.held[x.client]
	for i := range list {
		if list[i] != x {
			continue
		}
		if len(list) == 1 {
			delete(p.held, x.client)
		} else {
			p.held[x.client] = append(list[:i:i], list[i+1:]...)
		}
		p.n--
		return true
	}
	return false
}

// endAll ends all that is held.
func (p *places) endAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, list := range p.held {
		for _, x := range list {
			x.end()
		}
	}
}

// taken returns how many are.
func (p *places) taken() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.n
}

// clientOf returns what counts as one client: an IPv4 address or an IPv6 /64, of
// which any host may use all addresses (RFC 6177).
func clientOf(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, _ := a.Prefix(bits) // an address has so many bits
	return p
}
