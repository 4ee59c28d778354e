package controller

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

const maxThings = 16 // of a certificate of ownership

// build makes a member's configuration (chapter 04 §3). Assigned addresses and the
// defaults of tags are added to rec.
func (c *Controller) build(n *network, rec *Member, s *session, ts int64) (*vl2.NetworkConfig, error) {
	net := &n.rec
	addresses, ndp := n.assign(rec)
	cfg := &vl2.NetworkConfig{
		ID: net.ID, Timestamp: ts, TimeDelta: net.timeDelta(), Revision: net.Revision, Member: rec.Address,
		MulticastLimit: net.MulticastLimit, Public: !net.Private, Name: net.Name[:min(len(net.Name), maxName)],
		MTU:         min(max(net.MTU, vl2.MinMTU), vl2.MaxMTU),
		Specialists: n.bridges(), Routes: net.routes(), Addresses: addresses,
		DNS: vl2.DNS{Domain: net.DNS.Domain, Servers: net.DNS.Servers[:min(len(net.DNS.Servers), vl2.MaxDNSServers)]},
		SSO: vl2.SSO{Enabled: net.SSOEnabled},
	}
	if net.SSOEnabled {
		cfg.SSO.Expiry = uint64(max(rec.AuthenticationExpiryTime, 0))
	}
	if net.EnableBroadcast {
		cfg.Flags |= vl2.FlagBroadcast
	}
	if ndp {
		cfg.Flags |= vl2.FlagNDPEmulation
	}
	cfg.TraceLevel = net.RemoteTraceLevel
	if target, err := identity.ParseAddress(rec.RemoteTraceTarget); err == nil {
		cfg.TraceTarget, cfg.TraceLevel = target, rec.RemoteTraceLevel
	} else if target, err := identity.ParseAddress(net.RemoteTraceTarget); err == nil {
		cfg.TraceTarget = target
	}
	rec.addDefaultTags(net)
	if vl2.ParseDictionary(s.metadata).Integer("revr", 0) == 0 {
		cfg.Rules = []vl2.Rule{{Type: vl2.ActionAccept}}
	} else {
		cfg.Rules = net.Rules[:min(len(net.Rules), vl2.MaxRules)]
		if err := c.issueRules(cfg, net, rec); err != nil {
			return nil, err
		}
	}
	return cfg, c.issue(cfg, s.identity)
}

// issue adds the certificates of membership and ownership (chapter 04 §4).
func (c *Controller) issue(cfg *vl2.NetworkConfig, holder *identity.Identity) (err error) {
	if cfg.COM, err = vl2.NewCOM(c.cfg.Identity, cfg.ID, holder, cfg.Timestamp, cfg.TimeDelta); err != nil {
		return fmt.Errorf("sign certificate of membership: %w", err)
	}
	for list := range slices.Chunk(cfg.Addresses, maxThings) {
		coo := &vl2.COO{
			NetworkID: cfg.ID, Timestamp: cfg.Timestamp, ID: uint32(len(cfg.COOs) + 1),
			IssuedTo: cfg.Member, Signer: c.self,
		}
		for _, p := range list {
			t := vl2.Thing{Type: vl2.ThingIPv6}
			if p.Addr().Is4() {
				t.Type = vl2.ThingIPv4
			}
			copy(t.Value[:], p.Addr().AsSlice())
			coo.Things = append(coo.Things, t)
		}
		if err := coo.Sign(c.cfg.Identity); err != nil {
			return fmt.Errorf("sign certificate of ownership: %w", err)
		}
		cfg.COOs = append(cfg.COOs, coo)
	}
	return nil
}

// issueRules adds capabilities and tags.
func (c *Controller) issueRules(cfg *vl2.NetworkConfig, net *Network, rec *Member) error {
	for _, id := range rec.Capabilities[:min(len(rec.Capabilities), vl2.MaxCapabilities)] {
		i := slices.IndexFunc(net.Capabilities, func(c Capability) bool { return c.ID == id })
		if i < 0 {
			continue
		}
		rules := net.Capabilities[i].Rules
		x := &vl2.Capability{
			NetworkID: cfg.ID, Timestamp: cfg.Timestamp, ID: id, MaxChain: 1,
			Rules: rules[:min(len(rules), maxCapRules)],
		}
		if err := x.Issue(c.cfg.Identity, cfg.Member); err != nil {
			return fmt.Errorf("sign capability: %w", err)
		}
		cfg.Capabilities = append(cfg.Capabilities, x)
	}
	for _, t := range rec.Tags[:min(len(rec.Tags), vl2.MaxTags)] {
		x := &vl2.Tag{
			NetworkID: cfg.ID, Timestamp: cfg.Timestamp, ID: t.ID, Value: t.Value, IssuedTo: cfg.Member, Signer: c.self,
		}
		if err := x.Sign(c.cfg.Identity); err != nil {
			return fmt.Errorf("sign tag: %w", err)
		}
		cfg.Tags = append(cfg.Tags, x)
	}
	return nil
}

// addDefaultTags gives a member the values that it has none of its own for.
func (m *Member) addDefaultTags(net *Network) {
	for _, t := range net.Tags {
		if t.Default == nil || slices.ContainsFunc(m.Tags, func(v TagValue) bool { return v.ID == t.ID }) {
			continue
		}
		m.Tags = append(m.Tags, TagValue{t.ID, *t.Default})
	}
	slices.SortStableFunc(m.Tags, func(a, b TagValue) int { return cmp.Compare(a.ID, b.ID) })
}

// bridges lists the active bridges. Unlike the reference's list it has none that
// aren't members.
func (n *network) bridges() (out []vl2.Specialist) {
	for a, m := range n.members {
		if m.rec.ActiveBridge && m.rec.Authorized {
			out = append(out, vl2.Specialist{Address: a, Roles: vl2.RoleBridge})
		}
	}
	slices.SortFunc(out, func(a, b vl2.Specialist) int { return cmp.Compare(a.Address, b.Address) })
	return out[:min(len(out), vl2.MaxSpecialists)]
}

func (n *Network) routes() (out []vl2.Route) {
	for _, r := range n.Routes {
		if !r.Target.IsValid() || len(out) == vl2.MaxRoutes {
			continue
		}
		route := vl2.Route{Target: r.Target}
		if r.Via.IsValid() && r.Via.Is4() == r.Target.Addr().Is4() {
			route.Via = r.Via
		}
		out = append(out, route)
	}
	return out
}

// inRoute returns an address with the prefix length of the longest route that
// contains it. The default route makes no address local.
func (n *Network) inRoute(a netip.Addr) (netip.Prefix, bool) {
	bits := 0
	for _, r := range n.Routes {
		if r.Target.Contains(a) {
			bits = max(bits, r.Target.Bits())
		}
	}
	return netip.PrefixFrom(a, bits), bits > 0
}
