package config

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Named is a host by name, with the addresses that are known of it.
type Named struct {
	Name      string
	Addresses []netip.Addr
}

func (n Named) String() string {
	if len(n.Addresses) == 0 {
		return n.Name
	}
	return n.Name + "(" + strings.Join(texts(n.Addresses), " ") + ")"
}

// written is what has names in it, as it was configured. The exported fields have
// addresses instead.
type written struct {
	forwards []Forward
	rules    []PolicyRule // without those of policy.allow
	targets  []Target
}

// nowhere matches no packet, since none is sent to or from it. A list of an accept
// rule holds it instead of nothing, which would match everything.
var nowhere = netip.PrefixFrom(netip.IPv6Unspecified(), 128)

// Names lists the names whose addresses [Config.Resolve] needs, sorted.
func (c *Config) Names() []string {
	var out []string
	for _, f := range c.written.forwards {
		out = append(out, f.Host)
	}
	for _, t := range c.written.targets {
		out = append(out, t.Host)
	}
	for _, r := range c.writtenRules() {
		for _, n := range slices.Concat(r.FromNames, r.ToNames) {
			out = append(out, n.Name)
		}
	}
	slices.Sort(out)
	return slices.DeleteFunc(slices.Compact(out), func(s string) bool { return s == "" })
}

// writtenRules returns the rules of policy.allow and policy.rules.
func (c *Config) writtenRules() []PolicyRule {
	var out []PolicyRule
	for _, a := range c.Policy.Allow {
		out = append(out, a.rule())
	}
	return append(out, c.written.rules...)
}

// Resolve returns the configuration with addresses in place of names. What has no
// address yet errs on the safe side: a forward is left out, a target stays without
// an address and counts as down, an accept rule matches only the addresses that are
// known, and a rule that refuses matches as if its list weren't there. [Load]
// returns the configuration as it is without any answer.
func (c *Config) Resolve(answers map[string][]netip.Addr) *Config {
	next := *c
	next.answers = maps.Clone(answers)
	next.Unresolved = nil
	miss := func(format string, args ...any) {
		next.Unresolved = append(next.Unresolved, fmt.Sprintf(format, args...))
	}
	next.Forwards = nil
	for _, f := range c.written.forwards {
		to, err := f.resolve(answers)
		if err != nil {
			miss("forward %s is not served: %v", f, err)
			continue
		}
		next.Forwards = append(next.Forwards, to)
	}
	next.Targets = nil
	for _, t := range c.written.targets {
		if t.Host != "" {
			a, err := pick(t.Host, answers[t.Host], netip.Addr{})
			if err != nil {
				miss("target %s: %v", t, err)
			}
			t.Addr = netip.AddrPortFrom(a, t.Addr.Port())
		}
		next.Targets = append(next.Targets, t)
	}
	next.Policy.Rules = nil
	for i, r := range c.writtenRules() {
		var lost, more []string
		accepts := r.Action == "accept"
		r.From, r.FromNames, lost = resolveList(r.From, r.FromNames, answers, accepts)
		r.To, r.ToNames, more = resolveList(r.To, r.ToNames, answers, accepts)
		for _, name := range append(lost, more...) {
			if accepts {
				miss("policy rule %d (%s) accepts nothing for %s: the name has no address yet", i, r, name)
			} else {
				miss("policy rule %d (%s) refuses more than it says: the name %s has no address yet", i, r, name)
			}
		}
		next.Policy.Rules = append(next.Policy.Rules, r)
	}
	return &next
}

func (f Forward) resolve(answers map[string][]netip.Addr) (Forward, error) {
	if f.Host == "" {
		return f, nil
	}
	a, err := pick(f.Host, answers[f.Host], f.Listen.Addr())
	if err != nil {
		return f, err
	}
	f.To = netip.AddrPortFrom(a, f.To.Port())
	if !f.Listen.Addr().IsValid() {
		f.Listen = netip.AddrPortFrom(unspecified(a), f.Listen.Port())
	}
	return f, nil
}

// pick returns the first address of the family of like, and if that is invalid,
// the first IPv4 address or else the first one.
func pick(name string, list []netip.Addr, like netip.Addr) (netip.Addr, error) {
	var best netip.Addr
	for _, a := range list {
		a = a.Unmap()
		switch {
		case like.IsValid() && a.Is4() != like.Is4():
		case !best.IsValid() || a.Is4() && !best.Is4():
			best = a
		}
	}
	switch {
	case best.IsValid():
		return best, nil
	case len(list) == 0:
		return best, fmt.Errorf("the name %s has no address yet", name)
	case like.Is4():
		return best, fmt.Errorf("the name %s has no IPv4 address", name)
	}
	return best, fmt.Errorf("the name %s has no IPv6 address", name)
}

// resolveList puts the addresses of names into a list of a rule. It returns the
// names that have none.
func resolveList(list []netip.Prefix, names []Named, answers map[string][]netip.Addr, accepts bool) (to []netip.Prefix, known []Named, lost []string) {
	if len(names) == 0 {
		return list, nil, nil
	}
	to = slices.Clone(list)
	for _, n := range names {
		n.Addresses = nil
		for _, a := range answers[n.Name] {
			a = a.Unmap()
			n.Addresses = append(n.Addresses, a)
			to = append(to, netip.PrefixFrom(a, a.BitLen()))
		}
		if len(n.Addresses) == 0 {
			lost = append(lost, n.Name)
		}
		known = append(known, n)
	}
	switch {
	case !accepts && len(lost) > 0:
		return nil, known, lost
	case len(to) == 0:
		return []netip.Prefix{nowhere}, known, lost
	}
	return to, known, lost
}

// writtenPrefixes returns the prefixes of a rule's list that no name brought.
func writtenPrefixes(list []netip.Prefix, names []Named) []string {
	var out []string
	for _, p := range list {
		named := slices.ContainsFunc(names, func(n Named) bool { return p.IsSingleIP() && slices.Contains(n.Addresses, p.Addr()) })
		if !named && p != nowhere {
			out = append(out, p.String())
		}
	}
	return append(out, texts(names)...)
}

// place is a prefix or the name of a host.
type place struct {
	prefix netip.Prefix
	name   string
}

// parsePlace reads a prefix, an address or a name.
func parsePlace(s string) (place, error) {
	if _, err := netip.ParseAddr(s); err == nil || strings.Contains(s, "/") {
		p, err := ParsePrefix(s)
		return place{prefix: p}, err
	}
	name, err := parseName(s)
	return place{name: name}, err
}

// places splits a list into prefixes and names.
func places(list []place) (prefixes []netip.Prefix, names []Named) {
	for _, p := range list {
		if p.name != "" {
			names = append(names, Named{Name: p.name})
		} else {
			prefixes = append(prefixes, p.prefix)
		}
	}
	return prefixes, names
}

// parseName reads the name of a host (RFC 1123 §2.1). What only looks like an
// address is none.
func parseName(s string) (string, error) {
	name := strings.ToLower(strings.TrimSuffix(s, "."))
	labels := strings.Split(name, ".")
	bad := func(label string) bool {
		return label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" ||
			label[0] == '-' || label[len(label)-1] == '-'
	}
	switch {
	case len(name) > 253 || slices.ContainsFunc(labels, bad):
		return "", errors.New("neither an address nor a name: give an address, or a name of letters, digits and hyphens between dots")
	case !strings.ContainsAny(labels[len(labels)-1], "abcdefghijklmnopqrstuvwxyz"):
		return "", errors.New("neither an address nor a name: an IPv4 address has four numbers up to 255, and the last part of a name has a letter")
	}
	return name, nil
}

// endpoint is an address and a port, or a name and a port.
type endpoint struct {
	at   netip.AddrPort // with an invalid address if there is a name
	name string
}

// parseHostPort reads HOST:PORT, where HOST is an address or a name.
func parseHostPort(s string) (endpoint, error) {
	if ap, err := netip.ParseAddrPort(s); err == nil {
		if ap.Port() == 0 {
			return endpoint{}, errBadTo
		}
		return endpoint{at: ap}, nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return endpoint{}, errBadTo
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return endpoint{}, errBadTo
	}
	name, err := parseName(host)
	if err != nil {
		return endpoint{}, fmt.Errorf("host %q: %w", host, err)
	}
	return endpoint{netip.AddrPortFrom(netip.Addr{}, uint16(n)), name}, nil
}
