package admin

import (
	"bytes"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
)

// NetworkSpec says in short how a controller's network shall be; empty fields
// keep what is there.
type NetworkSpec struct {
	Name    string
	Public  bool
	Subnet  string   // pool, route and automatic addresses in one
	Pools   []string // FIRST-LAST
	Routes  []string // TARGET or TARGET=VIA
	MTU     int
	RFC4193 bool
	SixPlan bool   // 6PLANE
	Rules   string // file in ZeroTier's rule language
	JSON    string // further keys of the record
}

// Patch returns the keys of the network record (chapter 04 §7).
func (s NetworkSpec) Patch() (map[string]any, error) {
	out := map[string]any{}
	if s.JSON != "" {
		if err := json.Unmarshal([]byte(s.JSON), &out); err != nil {
			return nil, fault.Usagef("--json-keys: %w", err)
		}
	}
	if s.Name != "" {
		out["name"] = s.Name
	}
	if s.Public {
		out["private"] = false
	}
	if s.Rules != "" {
		b, err := os.ReadFile(s.Rules)
		if err != nil {
			return nil, fault.Usagef("--rules: %w", err)
		}
		if len(bytes.TrimSpace(b)) == 0 {
			return nil, fault.Usagef("--rules %s: the file is empty; write accept; to allow everything", s.Rules)
		}
		out["rulesSource"] = string(b)
	}
	if s.MTU != 0 {
		if s.MTU < 1280 || s.MTU > 10000 {
			return nil, fault.Usagef("--mtu %d: give a number from 1280 to 10000", s.MTU)
		}
		out["mtu"] = s.MTU
	}
	var routes, pools []map[string]any
	v6 := map[string]bool{}
	if s.RFC4193 {
		v6["rfc4193"] = true
	}
	if s.SixPlan {
		v6["6plane"] = true
	}
	addPool := func(first, last netip.Addr) {
		pools = append(pools, map[string]any{"ipRangeStart": first.String(), "ipRangeEnd": last.String()})
		if first.Is4() {
			out["v4AssignMode"] = map[string]bool{"zt": true}
		} else {
			v6["zt"] = true
		}
	}
	if s.Subnet != "" {
		p, err := config.ParsePrefix(s.Subnet)
		if err != nil || p.Bits() > p.Addr().BitLen()-2 {
			return nil, fault.Usagef("--subnet %q: give ADDRESS/BITS with room for hosts, as in 10.147.17.0/24", s.Subnet)
		}
		routes = append(routes, map[string]any{"target": p.String(), "via": nil})
		addPool(p.Addr().Next(), lastOf(p))
	}
	for _, text := range s.Pools {
		a, b, _ := strings.Cut(text, "-")
		first, err1 := netip.ParseAddr(a)
		last, err2 := netip.ParseAddr(b)
		if err1 != nil || err2 != nil || first.BitLen() != last.BitLen() || last.Less(first) {
			return nil, fault.Usagef("--pool %q: give FIRST-LAST, as in 10.147.17.10-10.147.17.99", text)
		}
		addPool(first, last)
	}
	for _, text := range s.Routes {
		target, via, hasVia := strings.Cut(text, "=")
		p, err := config.ParsePrefix(target)
		r := map[string]any{"target": p.String(), "via": nil}
		if err == nil && hasVia {
			var a netip.Addr
			a, err = netip.ParseAddr(via)
			r["via"] = a.String()
		}
		if err != nil {
			return nil, fault.Usagef("--route %q: give TARGET or TARGET=VIA, as in 10.0.0.0/24=10.147.17.5", text)
		}
		routes = append(routes, r)
	}
	if routes != nil {
		out["routes"] = routes
	}
	if pools != nil {
		out["ipAssignmentPools"] = pools
	}
	if len(v6) > 0 {
		out["v6AssignMode"] = v6
	}
	return out, nil
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
	Bridge     bool
	Tags       []string // ID=VALUE
	Caps       []uint   // IDs of capabilities
}

// Patch returns the keys of the member record (chapter 04 §8).
func (s MemberSpec) Patch() (map[string]any, error) {
	out := map[string]any{}
	if s.Authorized != nil {
		out["authorized"] = *s.Authorized
	}
	if s.Name != "" {
		out["name"] = s.Name
	}
	if s.Bridge {
		out["activeBridge"] = true
	}
	for _, ip := range s.IPs {
		if _, err := netip.ParseAddr(ip); err != nil {
			return nil, fault.Usagef("--ip %q: give an IP address without bits", ip)
		}
	}
	if len(s.IPs) > 0 {
		out["ipAssignments"] = s.IPs
	}
	var tags [][2]uint32
	for _, text := range s.Tags {
		id, value, _ := strings.Cut(text, "=")
		i, err1 := strconv.ParseUint(id, 10, 32)
		v, err2 := strconv.ParseUint(value, 10, 32)
		if err1 != nil || err2 != nil {
			return nil, fault.Usagef("--tag %q: give ID=VALUE, numbers of a tag and its value, as in 1000=100", text)
		}
		tags = append(tags, [2]uint32{uint32(i), uint32(v)})
	}
	if tags != nil {
		out["tags"] = tags
	}
	for _, id := range s.Caps {
		if uint64(id) > 1<<32-1 {
			return nil, fault.Usagef("--capability %d: give the number of a capability", id)
		}
	}
	if len(s.Caps) > 0 {
		out["capabilities"] = s.Caps
	}
	return out, nil
}

// ParsePingTarget reads HOST, HOST:PORT, an IPv6 address or [IPv6]:PORT.
func ParsePingTarget(s string) (control.PingRequest, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return control.PingRequest{Host: a.String()}, nil
	}
	if !strings.Contains(s, ":") {
		if s == "" {
			return control.PingRequest{}, fault.Usagef("give HOST or HOST:PORT")
		}
		return control.PingRequest{Host: s}, nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return control.PingRequest{}, fault.Usagef("%q: give HOST or HOST:PORT, IPv6 as [ADDRESS]:PORT", s)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || host == "" {
		return control.PingRequest{}, fault.Usagef("%q: give a port from 1 to 65535", s)
	}
	return control.PingRequest{Host: host, Port: int(n)}, nil
}
