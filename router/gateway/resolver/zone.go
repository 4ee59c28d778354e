package resolver

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// TTL is how long others may keep what the zone says, also that there is nothing:
// members come, go and get other addresses.
const TTL = 15 // seconds

// Network is a joined network as its names are made of it.
type Network struct {
	ID    string
	Name  string // a label, "" = none
	Hosts []Host
	All   bool // there are no others: whoever isn't listed is nobody
	// Made returns the addresses that any member has because of its own, nil = none.
	Made func(id string) []netip.Addr
}

// Host is a member or another host of a network.
type Host struct {
	ID        string // the member's address, "" = it is no member
	Name      string // a label, "" = none
	Addresses []netip.Addr
}

// Zone has the names of the hosts of the networks: HOST.NETWORK.ORIGIN. It is
// immutable.
type Zone struct {
	origin   string // canonical, with the dot at its end
	networks map[string]*hosts
	reverse  map[netip.Addr]string // the name of an address
	servers  []netip.Addr          // of ns.ORIGIN
	hosts    int
}

// nsLabel is the name of the zone's name server, which is this one. It can't be a
// network's name.
const nsLabel = "ns"

// NewZone makes a zone whose name servers have some addresses. IDs come before names,
// which others choose. Of two networks with the same name the first has it; two hosts
// with the same name in a network both lose it, since nobody could say which one is
// meant. What was lost is told.
func NewZone(origin string, networks []Network, servers []netip.Addr) (z *Zone, lost []string) {
	z = &Zone{origin: dns.CanonicalName(origin), networks: map[string]*hosts{}, reverse: map[netip.Addr]string{}, servers: servers}
	taken := map[string]bool{nsLabel: true}
	for _, n := range networks {
		taken[n.ID] = true
	}
	for _, n := range networks {
		known, ambiguous := hostsOf(n.Hosts)
		hosts := &hosts{known, n.Made, n.All}
		z.networks[n.ID] = hosts
		shown := n.ID
		switch {
		case n.Name == "" || n.Name == n.ID:
		case taken[n.Name]:
			lost = append(lost, fmt.Sprintf("network %s isn't called %s.%s: that is another name", n.ID, n.Name, trim(z.origin)))
		default:
			taken[n.Name] = true
			z.networks[n.Name], shown = hosts, n.Name
		}
		for _, label := range ambiguous {
			lost = append(lost, fmt.Sprintf("nobody is called %s.%s.%s: several hosts of network %s would be", label, shown, trim(z.origin), n.ID))
		}
		z.hosts += len(n.Hosts)
		z.addReverse(n.Hosts, known, shown)
	}
	return z, lost
}

// hosts are those of a network.
type hosts struct {
	known map[string]*Host // by label
	made  func(id string) []netip.Addr
	all   bool
}

func (h *hosts) find(label string) ([]netip.Addr, bool) {
	if x := h.known[label]; x != nil {
		return x.Addresses, true
	}
	if h.made != nil {
		list := h.made(label)
		return list, len(list) > 0
	}
	return nil, false
}

// hostsOf finds hosts by their labels.
func hostsOf(list []Host) (hosts map[string]*Host, ambiguous []string) {
	hosts = make(map[string]*Host, 2*len(list))
	for i := range list {
		if id := list[i].ID; id != "" {
			hosts[id] = &list[i]
		}
	}
	for i := range list {
		name := list[i].Name
		if name == "" || name == list[i].ID {
			continue
		}
		if _, taken := hosts[name]; !taken {
			hosts[name] = &list[i]
		} else if !slices.Contains(ambiguous, name) {
			ambiguous = append(ambiguous, name)
		}
	}
	for _, name := range ambiguous {
		if h := hosts[name]; h.ID != name {
			delete(hosts, name)
		}
	}
	return hosts, ambiguous
}

// addReverse adds the names of addresses. The first network that uses an address has
// it, and of its hosts one with a name.
func (z *Zone) addReverse(list []Host, hosts map[string]*Host, network string) {
	for _, label := range []func(*Host) string{func(h *Host) string { return h.Name }, func(h *Host) string { return h.ID }} {
		for i := range list {
			h := &list[i]
			if hosts[label(h)] != h {
				continue
			}
			for _, a := range h.Addresses {
				if _, known := z.reverse[a]; !known {
					z.reverse[a] = label(h) + "." + network + "." + z.origin
				}
			}
		}
	}
}

// Covers reports whether a name, with any case and the dot at its end, is the zone's to
// answer.
func (z *Zone) Covers(name string) bool {
	name = dns.CanonicalName(name)
	if name == z.origin || strings.HasSuffix(name, "."+z.origin) {
		return true
	}
	a, ok := addressOf(name)
	return ok && z.reverse[a] != ""
}

// Addresses returns the addresses of a name of the zone, and whether there is such a
// name.
func (z *Zone) Addresses(name string) ([]netip.Addr, bool) {
	name = dns.CanonicalName(name)
	rest, inside := strings.CutSuffix(name, "."+z.origin)
	if !inside {
		return nil, name == z.origin
	}
	labels := strings.Split(rest, ".")
	hosts, known := z.networks[labels[len(labels)-1]]
	switch {
	case rest == nsLabel:
		return z.servers, true
	case !known || len(labels) > 2:
		return nil, false
	case len(labels) == 1:
		return nil, true
	}
	return hosts.find(labels[0])
}

// Gone reports a name of a network whose hosts are all known, with nobody or no address
// behind it.
func (z *Zone) Gone(name string) bool {
	list, _ := z.Addresses(name)
	rest, _ := strings.CutSuffix(dns.CanonicalName(name), "."+z.origin)
	_, network, _ := strings.Cut(rest, ".")
	hosts := z.networks[network]
	return len(list) == 0 && hosts != nil && hosts.all
}

// answer answers a question that the zone covers.
func (z *Zone) answer(q dns.Question, to *dns.Msg) {
	to.Authoritative = true
	if a, ok := addressOf(q.Name); ok && !dns.IsSubDomain(z.origin, q.Name) {
		if q.Qtype == dns.TypePTR {
			to.Answer = append(to.Answer, &dns.PTR{Hdr: header(q.Name, dns.TypePTR), Ptr: z.reverse[a]})
		}
		return // the name is there, and nothing else at it; whose SOA could be shown isn't ours to say
	}
	list, known := z.Addresses(q.Name)
	apex := dns.CanonicalName(q.Name) == z.origin
	switch {
	case !known:
		to.Rcode = dns.RcodeNameError
	case apex && q.Qtype == dns.TypeSOA:
		to.Answer = append(to.Answer, z.soa(q.Name))
	case apex && q.Qtype == dns.TypeNS:
		to.Answer = append(to.Answer, &dns.NS{Hdr: header(q.Name, dns.TypeNS), Ns: nsLabel + "." + z.origin})
		to.Extra = append(to.Extra, records(nsLabel+"."+z.origin, dns.TypeA, z.servers)...)
		to.Extra = append(to.Extra, records(nsLabel+"."+z.origin, dns.TypeAAAA, z.servers)...)
	default:
		to.Answer = records(q.Name, q.Qtype, list)
	}
	if len(to.Answer) == 0 {
		to.Ns = append(to.Ns, z.soa(z.origin))
	}
}

// records returns the records of a type that a host has.
func records(name string, qtype uint16, list []netip.Addr) (out []dns.RR) {
	for _, a := range list {
		switch {
		case a.Is4() && qtype == dns.TypeA:
			out = append(out, &dns.A{Hdr: header(name, qtype), A: a.AsSlice()})
		case a.Is6() && qtype == dns.TypeAAAA:
			out = append(out, &dns.AAAA{Hdr: header(name, qtype), AAAA: a.AsSlice()})
		}
	}
	return out
}

func header(name string, qtype uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: qtype, Class: dns.ClassINET, Ttl: TTL}
}

// soa is the start of authority. Nobody copies the zone, so its serial never changes.
func (z *Zone) soa(name string) dns.RR {
	return &dns.SOA{Hdr: header(name, dns.TypeSOA), Ns: nsLabel + "." + z.origin, Mbox: "hostmaster." + z.origin,
		Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: TTL}
}

// addressOf returns the address that a name of the reverse zones stands for.
func addressOf(name string) (netip.Addr, bool) {
	name = dns.CanonicalName(name)
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa."); ok {
		labels := strings.Split(rest, ".")
		slices.Reverse(labels)
		a, err := netip.ParseAddr(strings.Join(labels, "."))
		return a, err == nil && a.Is4()
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa.")
	if !ok || len(rest) != 63 {
		return netip.Addr{}, false
	}
	var b [16]byte
	for i := range 32 {
		at := 62 - 2*i
		v := strings.IndexByte("0123456789abcdef", rest[at])
		if v < 0 || at > 0 && rest[at-1] != '.' {
			return netip.Addr{}, false
		}
		b[i/2] = b[i/2]<<4 | byte(v)
	}
	return netip.AddrFrom16(b), true
}

// Label makes a label of what people call networks and members, "" if nothing of it
// can stand in a name.
func Label(text string) string {
	var b strings.Builder
	for _, r := range strings.ToLower(text) {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			b.WriteRune(r)
		case b.Len() > 0 && !strings.HasSuffix(b.String(), "-"):
			b.WriteByte('-')
		}
		if b.Len() >= 63 {
			break
		}
	}
	return strings.Trim(b.String(), "-")
}

func trim(name string) string { return strings.TrimSuffix(name, ".") }
