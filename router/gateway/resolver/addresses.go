package resolver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/miekg/dns"
)

// ErrNoHost says that a server knows that there is no such name.
var ErrNoHost = errors.New("no such host")

// maxAliases is how long a chain of aliases is followed.
const maxAliases = 16

// Addresses asks one server for the addresses of a name, which has no dot at its end, and
// how long they hold. Both families must be answered: one that isn't would be taken for
// one that went away.
func Addresses(ctx context.Context, dial Dial, server netip.AddrPort, name string) (found []netip.Addr, ttl time.Duration, err error) {
	type part struct {
		list []netip.Addr
		ttl  uint32
		err  error
	}
	ask := func(qtype uint16) (p part) {
		q := Query{Name: dns.Fqdn(name), Type: qtype, EDNS: true}
		m, err := Ask(ctx, dial, "udp", server, q)
		if err == nil && m.Truncated {
			m, err = Ask(ctx, dial, "tcp", server, q)
		}
		if err != nil {
			return part{err: err}
		}
		p.list, p.ttl, p.err = addressesIn(m, q.Name)
		return p
	}
	six := make(chan part, 1)
	go func() { six <- ask(dns.TypeAAAA) }()
	a4, a6 := ask(dns.TypeA), <-six
	for _, p := range []part{a4, a6} {
		if _, said := errors.AsType[rcodeError](p.err); p.err != nil && !said && !errors.Is(p.err, ErrNoHost) {
			return nil, 0, p.err
		}
	}
	if found = append(a4.list, a6.list...); len(found) == 0 {
		return nil, 0, cmp.Or(a4.err, a6.err)
	}
	least := uint32(1<<31 - 1)
	for _, p := range []part{a4, a6} {
		if len(p.list) > 0 {
			least = min(least, p.ttl)
		}
	}
	return found, max(time.Duration(least)*time.Second, 1), nil
}

// rcodeError is an answer that says that there is none.
type rcodeError int

func (e rcodeError) Error() string { return fmt.Sprintf("it says %s", dns.RcodeToString[int(e)]) }

// addressesIn returns the addresses in an answer that are a name's, by way of aliases.
func addressesIn(m *dns.Msg, name string) (list []netip.Addr, ttl uint32, err error) {
	switch m.Rcode {
	case dns.RcodeSuccess:
	case dns.RcodeNameError:
		return nil, 0, ErrNoHost
	default:
		return nil, 0, rcodeError(m.Rcode)
	}
	ttl = 1<<31 - 1
	name = dns.CanonicalName(name)
	for range maxAliases {
		alias := ""
		for _, rr := range m.Answer {
			h := rr.Header()
			if dns.CanonicalName(h.Name) != name {
				continue
			}
			var a netip.Addr
			switch rr := rr.(type) {
			case *dns.A:
				a, _ = netip.AddrFromSlice(rr.A)
			case *dns.AAAA:
				a, _ = netip.AddrFromSlice(rr.AAAA)
			case *dns.CNAME:
				alias = dns.CanonicalName(rr.Target)
			default:
				continue
			}
			ttl = min(ttl, h.Ttl)
			if a.IsValid() {
				list = append(list, a.Unmap())
			}
		}
		if alias == "" || len(list) > 0 {
			break
		}
		name = alias
	}
	return list, ttl, nil
}
