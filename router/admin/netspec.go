package admin

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"ztgate/router/config"
	"ztgate/router/fault"
)

// Bounds of the MTU of a network.
const (
	MinNetworkMTU = 1280
	MaxNetworkMTU = 10000
)

// NetworkSpec says in short how a controller's network shall be; empty fields
// keep what is there.
type NetworkSpec struct {
	Name    string
	Public  bool
	Private bool     // the opposite
	Subnet  string   // pool, route and automatic addresses in one
	Pools   []string // FIRST-LAST
	Routes  []string // TARGET or TARGET=VIA
	MTU     int
	RFC4193 bool
	SixPlan bool   // 6PLANE
	Rules   string // file in ZeroTier's rule language
	JSON    string // further keys of the record
}

// networkPatch are the keys of a network record (docs/protocol/04 §7) that a spec
// may set.
type networkPatch struct {
	Name    string        `json:"name,omitempty"`
	Private *bool         `json:"private,omitempty"`
	Rules   string        `json:"rulesSource,omitempty"`
	MTU     int           `json:"mtu,omitempty"`
	Routes  []routeRecord `json:"routes,omitempty"`
	Pools   []poolRecord  `json:"ipAssignmentPools,omitempty"`
	V4      *assignMode   `json:"v4AssignMode,omitempty"`
	V6      *assignMode   `json:"v6AssignMode,omitempty"`
}

type routeRecord struct {
	Target netip.Prefix `json:"target"`
	Via    *netip.Addr  `json:"via"` // nil = on the network itself
}

type poolRecord struct {
	First netip.Addr `json:"ipRangeStart"`
	Last  netip.Addr `json:"ipRangeEnd"`
}

type assignMode struct {
	Pools   bool `json:"zt,omitempty"`
	RFC4193 bool `json:"rfc4193,omitempty"`
	SixPlan bool `json:"6plane,omitempty"`
}

// Patch returns the keys of the network record that change, as a JSON object.
func (s NetworkSpec) Patch() (json.RawMessage, error) {
	p := networkPatch{Name: s.Name, MTU: s.MTU}
	if s.Public || s.Private {
		p.Private = &s.Private
	}
	if s.MTU != 0 && (s.MTU < MinNetworkMTU || s.MTU > MaxNetworkMTU) {
		return nil, fault.Usagef("--mtu %d: give a number from %d to %d", s.MTU, MinNetworkMTU, MaxNetworkMTU)
	}
	if s.RFC4193 || s.SixPlan {
		p.V6 = &assignMode{RFC4193: s.RFC4193, SixPlan: s.SixPlan}
	}
	for _, part := range []func(*networkPatch) error{s.rules, s.subnet, s.pools, s.routes} {
		if err := part(&p); err != nil {
			return nil, err
		}
	}
	return s.withJSON(p)
}

// withJSON adds the further keys; those of the flags win.
func (s NetworkSpec) withJSON(p networkPatch) (json.RawMessage, error) {
	own, err := json.Marshal(p)
	if err != nil || s.JSON == "" {
		return own, err
	}
	keys := map[string]json.RawMessage{}
	if err := json.Unmarshal([]byte(s.JSON), &keys); err != nil {
		return nil, fault.Usagef("--json-keys: %w", err)
	}
	if err := json.Unmarshal(own, &keys); err != nil {
		return nil, err
	}
	return json.Marshal(keys)
}

func (s NetworkSpec) rules(p *networkPatch) error {
	if s.Rules == "" {
		return nil
	}
	b, err := os.ReadFile(s.Rules)
	switch {
	case err != nil:
		return fault.Usagef("--rules: %w", err)
	case len(bytes.TrimSpace(b)) == 0:
		return fault.Usagef("--rules %s: the file is empty; write accept; to allow everything", s.Rules)
	}
	p.Rules = string(b)
	return nil
}

// addPool has addresses assigned from a range.
func (p *networkPatch) addPool(first, last netip.Addr) {
	p.Pools = append(p.Pools, poolRecord{first, last})
	mode := &p.V6
	if first.Is4() {
		mode = &p.V4
	}
	if *mode == nil {
		*mode = &assignMode{}
	}
	(*mode).Pools = true
}

func (s NetworkSpec) subnet(p *networkPatch) error {
	if s.Subnet == "" {
		return nil
	}
	subnet, err := config.ParsePrefix(s.Subnet)
	if err != nil || subnet.Bits() > subnet.Addr().BitLen()-2 {
		return fault.Usagef("--subnet %q: give ADDRESS/BITS with room for hosts, as in 10.147.17.0/24", s.Subnet)
	}
	p.Routes = append(p.Routes, routeRecord{Target: subnet})
	p.addPool(subnet.Addr().Next(), lastOf(subnet))
	return nil
}

func (s NetworkSpec) pools(p *networkPatch) error {
	for _, text := range s.Pools {
		a, b, _ := strings.Cut(text, "-")
		first, err1 := netip.ParseAddr(a)
		last, err2 := netip.ParseAddr(b)
		if err1 != nil || err2 != nil || first.BitLen() != last.BitLen() || last.Less(first) {
			return fault.Usagef("--pool %q: give FIRST-LAST, as in 10.147.17.10-10.147.17.99", text)
		}
		p.addPool(first, last)
	}
	return nil
}

func (s NetworkSpec) routes(p *networkPatch) error {
	for _, text := range s.Routes {
		target, via, hasVia := strings.Cut(text, "=")
		r := routeRecord{}
		var err error
		if r.Target, err = config.ParsePrefix(target); err == nil && hasVia {
			r.Via = new(netip.Addr)
			*r.Via, err = netip.ParseAddr(via)
		}
		if err != nil {
			return fault.Usagef("--route %q: give TARGET or TARGET=VIA, as in 10.0.0.0/24=10.147.17.5", text)
		}
		p.Routes = append(p.Routes, r)
	}
	return nil
}

// lastOf returns the last address of a prefix that a host may have: in IPv4 the
// very last is for broadcast.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	if a.Is4() {
		return a.Prev()
	}
	return a
}

// MemberSpec says how a member shall be.
type MemberSpec struct {
	Authorized *bool
	Name       string
	IPs        []string
	Bridge     *bool
	Tags       []string // ID=VALUE
	Caps       []uint   // IDs of capabilities
}

// memberPatch are the keys of a member record (docs/protocol/04 §8) that a spec may
// set.
type memberPatch struct {
	Authorized   *bool       `json:"authorized,omitempty"`
	Name         string      `json:"name,omitempty"`
	Bridge       *bool       `json:"activeBridge,omitempty"`
	IPs          []string    `json:"ipAssignments,omitempty"`
	Tags         [][2]uint32 `json:"tags,omitempty"`
	Capabilities []uint      `json:"capabilities,omitempty"`
}

// Patch returns the keys of the member record that change, as a JSON object.
func (s MemberSpec) Patch() (json.RawMessage, error) {
	p := memberPatch{Authorized: s.Authorized, Name: s.Name, Bridge: s.Bridge, IPs: s.IPs, Capabilities: s.Caps}
	for _, ip := range s.IPs {
		if _, err := netip.ParseAddr(ip); err != nil {
			return nil, fault.Usagef("--ip %q: give an IP address without bits", ip)
		}
	}
	for _, text := range s.Tags {
		id, value, _ := strings.Cut(text, "=")
		i, err1 := strconv.ParseUint(id, 10, 32)
		v, err2 := strconv.ParseUint(value, 10, 32)
		if err1 != nil || err2 != nil {
			return nil, fault.Usagef("--tag %q: give ID=VALUE, numbers of a tag and its value, as in 1000=100", text)
		}
		p.Tags = append(p.Tags, [2]uint32{uint32(i), uint32(v)})
	}
	for _, id := range s.Caps {
		if uint64(id) > 1<<32-1 {
			return nil, fault.Usagef("--capability %d: give the number of a capability", id)
		}
	}
	return json.Marshal(p)
}
