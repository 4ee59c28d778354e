package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/gateway/resolver"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

const (
	// zoneEvery is how often the names of hosts are looked at: members come without a
	// word to us.
	zoneEvery = 5 * time.Second
	// idleRounds is how many times rarer that is while nobody needs it.
	idleRounds = 12
	// listenEvery is how often addresses are tried at which nobody could listen.
	listenEvery = time.Second
	// silentFor questions in a row nobody of a domain has answered when health says so.
	silentFor = 3
)

// clientNames answers clients' questions for names.
type clientNames struct {
	s     *service
	r     *resolver.Resolver
	own   atomic.Pointer[resolver.Zone] // with the hosts' own addresses
	lost  atomic.Pointer[[]string]      // names that nobody has
	asked atomic.Bool                   // the configuration itself has names of the zone
	again chan struct{}                 // a value makes run look at once

	updating sync.Mutex // one at a time
}

func newClientNames(s *service, dial resolver.Dial, reg prometheus.Registerer, log *slog.Logger) *clientNames {
	usable := func(a netip.Addr) bool { return plan.Unusable(a) == "" }
	return &clientNames{s: s, r: resolver.New(resolver.Dialers{Overlay: dial, Host: dialHost}, resolver.LimitsFor(openFiles()), usable, reg, log, s.now), again: make(chan struct{}, 1)}
}

// run keeps the names up to date until ctx ends.
func (c *clientNames) run(ctx context.Context) error {
	defer c.r.Close()
	names, listens := time.NewTicker(zoneEvery), time.NewTicker(listenEvery)
	defer names.Stop()
	defer listens.Stop()
	c.update()
	for idle := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-c.again:
			c.update()
		case <-names.C:
			if idle++; idle >= idleRounds || c.asked.Load() || len(c.s.config().DNS.Listen) > 0 {
				idle = 0
				c.update()
			}
		case <-listens.C:
			c.r.Retry()
		}
	}
}

// update takes what the networks, the controller and the configuration say now.
func (c *clientNames) update() {
	c.updating.Lock()
	defer c.updating.Unlock()
	cfg := c.s.config()
	c.refresh(cfg)
	c.r.Set(resolver.Settings{Listen: cfg.DNS.Listen, Sources: cfg.VPC.Sources, Rate: cfg.DNS.Rate})
}

// changed makes run look at once.
func (c *clientNames) changed() {
	if c == nil {
		return
	}
	select {
	case c.again <- struct{}{}:
	default:
	}
}

// refresh replaces the names.
func (c *clientNames) refresh(cfg *config.Config) {
	var servers []netip.Addr
	for _, at := range cfg.DNS.Listen {
		if !slices.Contains(servers, at.Addr()) {
			servers = append(servers, at.Addr())
		}
	}
	hosts := c.s.hostNames()
	own, _ := resolver.NewZone(cfg.DNS.Zone, hosts, servers)
	c.own.Store(own)
	zone, lost := resolver.NewZone(cfg.DNS.Zone, c.s.plane.seenByVPC(hosts), servers)
	if old := c.lost.Swap(&lost); old == nil || !slices.Equal(*old, lost) {
		for _, text := range lost {
			c.s.say(slog.LevelWarn, "problem", "problem", text)
		}
	}
	c.r.SetNames(resolver.Names{Zone: zone, Domains: c.domains(cfg)})
}

// domains are who is asked for what isn't in the zone. Of two networks with the same
// domain the one that was named first has it. A network's servers are asked in that
// network alone, and nobody in their place.
func (c *clientNames) domains(cfg *config.Config) (out []resolver.Domain) {
	add := func(d resolver.Domain) {
		if !slices.ContainsFunc(out, func(o resolver.Domain) bool { return o.Name == d.Name }) {
			out = append(out, d)
		}
	}
	for _, n := range plan.Order(cfg, c.s.networks(), c.s.remembered.joined()) {
		name := domainOf(n)
		if !cfg.Network(n.ID).AllowDNS || name == "" || len(n.DNSServers) == 0 {
			continue
		}
		d := resolver.Domain{Name: name, Reverse: c.reverseZones(n.ID), Network: n.ID.String()} // who knows the names knows whose the addresses are
		for _, a := range n.DNSServers {
			if a, ok := c.s.plane.SeenByVPC(uint64(n.ID), a); ok && n.Status == ztnode.StatusOK {
				d.Servers = append(d.Servers, netip.AddrPortFrom(a, dnsPort))
			}
		}
		add(d)
	}
	if len(cfg.DNS.Upstreams) > 0 {
		add(resolver.Domain{Servers: cfg.DNS.Upstreams})
	}
	return out
}

// domainOf returns the domain that a network has name servers for, as it is compared;
// "" = none.
func domainOf(n ztnode.Network) string { return strings.ToLower(strings.Trim(n.DNSDomain, ".")) }

// reverseZones returns the reverse zones of the prefixes of a network that are in use.
// Of a prefix that doesn't end at a label there would be many.
func (c *clientNames) reverseZones(id ztnode.NetworkID) (out []string) {
	for _, r := range c.s.planned().Routes {
		step := 8
		if r.Target.Addr().Is6() {
			step = 4
		}
		if r.Network != id || r.Target.Bits() == 0 || r.Target.Bits()%step != 0 {
			continue
		}
		name, err := dns.ReverseAddr(r.Target.Addr().String())
		if err != nil {
			continue
		}
		labels := dns.SplitDomainName(name)
		out = append(out, strings.Join(labels[(r.Target.Addr().BitLen()-r.Target.Bits())/step:], "."))
	}
	return out
}

// checks tell why clients aren't answered. Without an address there are none.
func (c *clientNames) checks() []control.Check {
	const name = "dns"
	var reasons, remedies []string
	if c == nil {
		return nil
	}
	st := c.r.State()
	if len(st.Listen) == 0 {
		return nil
	}
	for _, l := range st.Listen {
		if l.Error != "" {
			reasons = append(reasons, fmt.Sprintf("questions for names are not answered at %s: %s", l.At, l.Error))
			remedies = append(remedies, "give that address to the gateway alone, or choose another one or port in dns.listen")
		}
	}
	for _, d := range st.Domains {
		if d.Unanswered >= silentFor {
			reasons = append(reasons, fmt.Sprintf("no name server for %s answers (%s)", domainText(d.Domain), cmp.Or(join(d.Servers), d.Error)))
			remedies = append(remedies, "see ztgate ping and ztgate resolve")
		}
	}
	if len(reasons) == 0 {
		return []control.Check{control.Passed(name)}
	}
	return []control.Check{control.Failed(name, control.Degraded, strings.Join(reasons, "; "), strings.Join(slices.Compact(remedies), "; "))}
}

func domainText(d resolver.Domain) string {
	if d.Name == "" {
		return "all other names"
	}
	return d.Name
}

func join[T fmt.Stringer](list []T) string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = v.String()
	}
	return strings.Join(out, ", ")
}

// view is what status shows, nil if nobody is answered.
func (c *clientNames) view() *control.DNS {
	st, cfg := c.r.State(), c.s.config()
	if len(st.Listen) == 0 {
		return nil
	}
	out := &control.DNS{Zone: cfg.DNS.Zone, Hosts: st.Hosts, Forwarded: st.Forwarded}
	for _, l := range st.Listen {
		out.Listen = append(out.Listen, control.DNSListen{Address: l.At, Error: l.Error})
	}
	for _, d := range st.Domains {
		out.Domains = append(out.Domains, control.DNSDomain{Domain: d.Name, Network: d.Network, Servers: d.Servers, LastAnswer: d.LastAnswer,
			Unanswered: d.Unanswered, Error: d.Error})
	}
	for _, n := range c.s.networks() {
		if domainOf(n) != "" && len(n.DNSServers) > 0 && !cfg.Network(n.ID).AllowDNS {
			out.Unused = append(out.Unused, fmt.Sprintf("network %s has name servers for %s, which clients' questions don't go to: set allow_dns for it", n.ID, n.DNSDomain))
		}
	}
	if lost := c.lost.Load(); lost != nil {
		out.Unused = append(out.Unused, *lost...)
	}
	return out
}

// errGone says that a name had addresses and has none any more, for sure.
var errGone = errors.New("the network's controller, which is this gateway, knows no such member with an address")

// hosts returns the hosts' own addresses, which rules are about, of a name that lies in
// the zone. It is for the names of the configuration.
func (c *clientNames) hosts(name string) (list []netip.Addr, inside bool, err error) {
	zone := c.s.config().DNS.Zone
	if name != zone && !strings.HasSuffix(name, "."+zone) {
		return nil, false, nil
	}
	if !c.asked.Swap(true) {
		c.changed()
	}
	z := c.own.Load()
	if z == nil {
		return nil, true, errors.New(notLookedUp)
	}
	list, known := z.Addresses(name)
	switch {
	case z.Gone(name):
		err = errGone
	case !known:
		err = fmt.Errorf("no such host in the zone %s: see ztgate networks and dns.hosts", zone)
	case len(list) == 0:
		err = errors.New("the host has no address in its network yet")
	}
	return list, true, err
}

// resolve says what a client would be told.
func (s *service) resolve(ctx context.Context, req control.ResolveRequest) (control.Resolved, error) {
	if s.dns == nil {
		return control.Resolved{}, fault.Usagef("this process is a %s and answers no clients: ask a gateway", s.mode)
	}
	qtype, ok := dns.StringToType[strings.ToUpper(cmp.Or(req.Type, "A"))]
	if _, valid := dns.IsDomainName(req.Name); !ok || !valid || req.Name == "" || qtype >= 128 && qtype < 256 {
		return control.Resolved{}, fault.Usagef("resolve %q, type %q: give a name, and a type as A, AAAA or PTR", req.Name, req.Type)
	}
	name := req.Name
	if a, err := netip.ParseAddr(name); err == nil {
		qtype = dns.TypePTR
		name, _ = dns.ReverseAddr(a.Unmap().WithZone("").String()) // it is one
	}
	s.dns.update()
	found, err := s.dns.r.Find(ctx, name, qtype)
	out := control.Resolved{Schema: control.Schema, Name: name, Type: dns.TypeToString[qtype], Off: len(s.config().DNS.Listen) == 0}
	switch {
	case found.From != nil && found.From.Network != "":
		out.From, out.Servers = "network "+found.From.Network, found.From.Servers
	case found.From != nil:
		out.From, out.Servers = "upstreams", found.From.Servers
	case err == nil:
		out.From = "zone " + s.config().DNS.Zone
	}
	if err != nil {
		text := fmt.Sprintf("resolve %s: %s", name, err)
		if len(out.Servers) > 0 {
			text = fmt.Sprintf("resolve %s: %s: %s of %s", name, err, join(out.Servers), out.From)
		}
		return out, errors.New(ztnode.Printable(text))
	}
	out.Code = dns.RcodeToString[found.Message.Rcode]
	for _, rr := range found.Message.Answer {
		h := rr.Header()
		out.Records = append(out.Records, control.DNSRecord{Name: ztnode.Printable(h.Name), Type: dns.TypeToString[h.Rrtype], TTL: h.Ttl,
			Value: ztnode.Printable(strings.TrimPrefix(rr.String(), h.String()))})
	}
	return out, nil
}
