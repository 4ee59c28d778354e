package resolver

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// askTime is how long a question may take: a client asks again after 5 s.
	askTime = 4 * time.Second
	// maxTries is how many servers are asked one after the other, a single one twice.
	maxTries = 4
)

// Domain is what some name servers know.
type Domain struct {
	Name    string   // "" = everything
	Reverse []string // zones of addresses that they know, too
	Network string   // that they are reached by, "" = this host
	Servers []netip.AddrPort
}

func (d Domain) same(o Domain) bool {
	return d.Name == o.Name && d.Network == o.Network && slices.Equal(d.Servers, o.Servers) && slices.Equal(d.Reverse, o.Reverse)
}

// covers returns how much of a canonical name the domain has, -1 if the name doesn't lie
// in it.
func (d Domain) covers(name string) int {
	most := -1
	for _, zone := range append([]string{d.Name}, d.Reverse...) {
		if zone == "" || name == zone+"." || strings.HasSuffix(name, "."+zone+".") {
			most = max(most, len(zone))
		}
	}
	return most
}

// own leaves of an answer what its servers may say: of names in the domain, and of those that
// aliases in the answer lead to. The latter hold for this answer alone, since a client that
// keeps them would believe these servers about names of others.
func (d Domain) own(m *dns.Msg, name string) {
	led := map[string]bool{dns.CanonicalName(name): true}
	for range maxAliases {
		for _, rr := range m.Answer {
			if c, ok := rr.(*dns.CNAME); ok && led[dns.CanonicalName(c.Hdr.Name)] {
				led[dns.CanonicalName(c.Target)] = true
			}
		}
	}
	strange := func(rr dns.RR) bool {
		return rr.Header().Rrtype != dns.TypeOPT && d.covers(dns.CanonicalName(rr.Header().Name)) < 0
	}
	m.Answer = slices.DeleteFunc(m.Answer, func(rr dns.RR) bool {
		if !strange(rr) {
			return false
		}
		rr.Header().Ttl = 0
		return !led[dns.CanonicalName(rr.Header().Name)]
	})
	m.Ns, m.Extra = slices.DeleteFunc(m.Ns, strange), slices.DeleteFunc(m.Extra, strange)
}

// DomainState is a domain and how its servers do.
type DomainState struct {
	Domain
	LastAnswer time.Time
	Unanswered int // questions since
	Error      string
}

// pool asks the servers of a domain.
type pool struct {
	Domain
	dial Dial
	now  func() time.Time

	mu     sync.Mutex
	first  int // index of the server that answered last
	answer time.Time
	failed int
	err    string
}

// ask asks one server after the other. Who refuses is believed only if the others
// do no better.
func (p *pool) ask(ctx context.Context, q Query, tcp bool) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	p.mu.Lock()
	first := p.first
	p.mu.Unlock()
	if len(p.Servers) == 0 {
		p.note(0, errNoServer)
		return nil, errNoServer
	}
	tries := min(max(2, len(p.Servers)), maxTries)
	var refused *dns.Msg
	var last error
	for i := range tries {
		if ctx.Err() != nil {
			break
		}
		at := (first + i) % len(p.Servers)
		m, err := p.askOne(ctx, p.Servers[at], q, tcp, askTime/time.Duration(tries))
		switch {
		case err != nil:
			last = err
			continue
		case m.Rcode == dns.RcodeServerFailure || m.Rcode == dns.RcodeRefused || m.Rcode == dns.RcodeNotImplemented:
			refused = m
			if len(p.Servers) > 1 {
				continue
			}
		}
		p.note(at, nil)
		return m, nil
	}
	if refused != nil {
		p.note(first, nil)
		return refused, nil
	}
	if last == nil {
		last = errNoAnswer
	}
	if !errors.Is(ctx.Err(), context.Canceled) { // else nobody waits any more
		p.note(first, last)
	}
	return nil, last
}

// askOne asks by UDP, and by TCP for what doesn't fit, if the client can take it.
func (p *pool) askOne(ctx context.Context, server netip.AddrPort, q Query, tcp bool, timeout time.Duration) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	m, err := Ask(ctx, p.dial, "udp", server, q)
	if err == nil && m.Truncated && tcp {
		return Ask(ctx, p.dial, "tcp", server, q)
	}
	return m, err
}

func (p *pool) note(at int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		p.failed++
		p.err = err.Error()
		return
	}
	p.first, p.answer, p.failed, p.err = at, p.now(), 0, ""
}

func (p *pool) state() DomainState {
	p.mu.Lock()
	defer p.mu.Unlock()
	return DomainState{Domain: p.Domain, LastAnswer: p.answer, Unanswered: p.failed, Error: p.err}
}
