// Package policy decides which new flows may pass: an ordered list of rules, of
// which the first that matches counts.
package policy

import (
	"net/netip"
	"sync/atomic"
)

// Action is what a rule does with a new flow.
type Action uint8

// Actions.
const (
	Accept Action = iota
	Drop          // silently
	Reject        // the sender is told
)

// String returns the word used in configuration files.
func (a Action) String() string { return [...]string{"accept", "drop", "reject"}[a] }

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// Rule is one rule. Empty fields match everything.
type Rule struct {
	Action   Action
	Proto    uint8 // IP protocol number, 0 = any; 1 also matches ICMPv6
	From, To []netip.Prefix
	Ports    []PortRange // destination ports; a rule with ports never matches without
}

// Policy is a compiled list of rules. It is immutable but for its counters.
type Policy struct {
	rules []Rule
	def   Action
	hits  []atomic.Uint64 // per rule, and one for the default
}

// New makes a policy.
func New(def Action, rules []Rule) *Policy {
	return &Policy{rules: rules, def: def, hits: make([]atomic.Uint64, len(rules)+1)}
}

// Decide returns the action for a new flow and which rule decided, -1 for the
// default.
func (p *Policy) Decide(proto uint8, src, dst netip.Addr, dport uint16) (Action, int) {
	for i := range p.rules {
		if p.rules[i].matches(proto, src, dst, dport) {
			p.hits[i].Add(1)
			return p.rules[i].Action, i
		}
	}
	p.hits[len(p.rules)].Add(1)
	return p.def, -1
}

// Hits returns how often a rule decided, -1 for the default.
func (p *Policy) Hits(rule int) uint64 {
	if rule < 0 {
		rule = len(p.rules)
	}
	return p.hits[rule].Load()
}

func (r *Rule) matches(proto uint8, src, dst netip.Addr, dport uint16) bool {
	const icmp, tcp, udp, icmpv6 = 1, 6, 17, 58
	if r.Proto != 0 && r.Proto != proto && !(r.Proto == icmp && proto == icmpv6) {
		return false
	}
	if !contains(r.From, src) || !contains(r.To, dst) {
		return false
	}
	if len(r.Ports) == 0 {
		return true
	}
	if proto != tcp && proto != udp {
		return false
	}
	for _, p := range r.Ports {
		if p.First <= dport && dport <= p.Last {
			return true
		}
	}
	return false
}

func contains(list []netip.Prefix, a netip.Addr) bool {
	if len(list) == 0 {
		return true
	}
	for _, p := range list {
		if p.Contains(a) {
			return true
		}
	}
	return false
}
