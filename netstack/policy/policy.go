// Package policy decides which new flows may pass: an ordered list of rules, of
// which the first that matches counts.
package policy

import (
	"net/netip"
	"sync/atomic"
)

// Action is what a rule does with a new flow.
type Action uint8

const (
	Accept Action = iota
	Drop          // silently
	Reject        // the sender is told
)

// String returns the word used in configuration files.
func (a Action) String() string { return [...]string{"accept", "drop", "reject"}[a] }

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// Direction is the way a flow is opened.
type Direction uint8

const (
	Any Direction = iota
	Out           // from the VPC
	In            // from the overlay
)

// String returns the word used in configuration files.
func (d Direction) String() string { return [...]string{"any", "out", "in"}[d] }

// Rule is one rule. Empty fields match everything.
type Rule struct {
	Action    Action
	Proto     uint8 // IP protocol number, 0 = any; 1 also matches ICMPv6
	From, To  []netip.Prefix
	Ports     []PortRange // destination ports; a rule with ports never matches without
	Direction Direction
	Network   uint64
}

// Flow is what a new flow is judged by. Addresses are those of the hosts
// themselves, before and behind any translation.
type Flow struct {
	Proto     uint8
	Src, Dst  netip.Addr
	Port      uint16 // of the destination
	Direction Direction
	Network   uint64
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

// Match returns the action for a new flow and which rule decides, -1 for the
// default. It doesn't count.
func (p *Policy) Match(f *Flow) (Action, int) {
	for i := range p.rules {
		if p.rules[i].matches(f) {
			return p.rules[i].Action, i
		}
	}
	return p.def, -1
}

// Count counts a flow that a rule decided.
func (p *Policy) Count(rule int) {
	if rule < 0 {
		rule = len(p.rules)
	}
	p.hits[rule].Add(1)
}

// Rule returns a rule.
func (p *Policy) Rule(i int) Rule { return p.rules[i] }

// Len returns the number of rules.
func (p *Policy) Len() int { return len(p.rules) }

// Hits returns how often a rule decided, -1 for the default.
func (p *Policy) Hits(rule int) uint64 {
	if rule < 0 {
		rule = len(p.rules)
	}
	return p.hits[rule].Load()
}

func (r *Rule) matches(f *Flow) bool {
	const icmp, tcp, udp, icmpv6 = 1, 6, 17, 58
	switch {
	case r.Proto != 0 && r.Proto != f.Proto && !(r.Proto == icmp && f.Proto == icmpv6),
		r.Direction != Any && r.Direction != f.Direction,
		r.Network != 0 && r.Network != f.Network,
		!contains(r.From, f.Src), !contains(r.To, f.Dst):
		return false
	case len(r.Ports) == 0:
		return true
	case f.Proto != tcp && f.Proto != udp:
		return false
	}
	for _, p := range r.Ports {
		if p.First <= f.Port && f.Port <= p.Last {
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
