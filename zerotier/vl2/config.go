package vl2

import (
	"bytes"
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/wire"
	"ztgate/zerotier/packet"
)

// Limits of a configuration (chapter 03 §10, chapter 06 §5).
const (
	MaxConfig       = 1 << 20 // bytes of a dictionary that is taken
	MaxConfigSent   = 484519  // that every receiver takes
	MaxRules        = 1024
	MaxRoutes       = 128
	MaxAddresses    = 32
	MaxSpecialists  = 512
	MaxCOOs         = 4
	MaxCapabilities = 128
	MaxTags         = 128
	MaxDNSServers   = 4
	DefaultMTU      = 2800
	MinMTU, MaxMTU  = 1280, 10000

	configVersion    = 7
	minConfigVersion = 6
	dnsDomainLen     = 128
)

// Flags of a configuration (chapter 03 §2.3).
const (
	FlagBroadcast           = 0x02
	FlagNDPEmulation        = 0x04
	FlagUnknownMatches      = 0x08
	FlagNoMulticastCompress = 0x10
)

// Roles of specialists (chapter 03 §2.4, chapter 06 §5.1). Newer controllers know relays
// and no anchors.
const (
	RoleBridge     = 0x0000020000000000
	RoleAnchor     = 0x0000040000000000
	RoleReplicator = 0x0000080000000000
	RoleRelay      = 0x0000100000000000
)

// Specialist is a member with a special role.
type Specialist struct {
	Address identity.Address
	Roles   uint64
}

// Route is a managed route.
type Route struct {
	Target        netip.Prefix
	Via           netip.Addr // invalid = directly on the network
	Flags, Metric uint16
}

// DNS are the name servers of a network.
type DNS struct {
	Domain  string
	Servers []netip.Addr
}

// SSO is what a network with single sign-on says about logging in.
type SSO struct {
	Version                                                 uint64
	Enabled                                                 bool
	AuthURL                                                 string
	Expiry                                                  uint64
	IssuerURL, CentralURL, Nonce, State, ClientID, Provider string
}

// NetworkConfig is a member's configuration of a network (chapter 03 §2.2). It is
// not changed after decoding.
type NetworkConfig struct {
	ID             NetworkID
	Timestamp      int64 // controller's clock, ms
	TimeDelta      int64 // credentials agree within so many ms
	Revision       uint64
	Member         identity.Address // for whom it is
	TraceTarget    identity.Address
	TraceLevel     uint64
	Flags          uint64
	MulticastLimit int
	Public         bool
	Name           string
	MTU            int
	COM            *COM
	Capabilities   []*Capability // ascending ID
	Tags           []*Tag        // ascending ID
	COOs           []*COO
	Specialists    []Specialist
	Routes         []Route
	Addresses      []netip.Prefix
	Rules          []Rule
	DNS            DNS
	SSO            SSO
}

// DecodeNetworkConfig decodes and checks a configuration.
func DecodeNetworkConfig(b []byte) (*NetworkConfig, error) {
	d := ParseDictionary(b)
	if v := d.Integer("v", 0); v < minConfigVersion {
		return nil, fmt.Errorf("network configuration: %w: version %d", ErrMalformed, v)
	}
	c := &NetworkConfig{
		ID: NetworkID(d.Integer("nwid", 0)), Timestamp: int64(d.Integer("ts", 0)), TimeDelta: int64(d.Integer("ctmd", 0)),
		Revision: d.Integer("r", 0), Member: identity.Address(d.Integer("id", 0)),
		TraceTarget: identity.Address(d.Integer("tt", 0)), TraceLevel: d.Integer("tl", 0),
		Flags: d.Integer("f", 0), MulticastLimit: int(min(d.Integer("ml", 0), 1<<20)), Public: d.Integer("t", 0) == 1,
		Name: cut(d.Text("n"), 127), MTU: int(min(max(d.Integer("mtu", DefaultMTU), MinMTU), MaxMTU)),
	}
	if c.ID == 0 || c.Member == 0 {
		return nil, fmt.Errorf("network configuration: %w: no network or member", ErrMalformed)
	}
	for _, f := range []func(Dictionary) error{c.decodeCredentials, c.decodeRoutes, c.decodeDNS, c.decodeSSO} {
		if err := f(d); err != nil {
			return nil, fmt.Errorf("network configuration: %w", err)
		}
	}
	for s := d["S"]; len(s) >= 8 && len(c.Specialists) < MaxSpecialists; s = s[8:] {
		v := be.Uint64(s)
		c.Specialists = append(c.Specialists, Specialist{identity.Address(v & (1<<40 - 1)), v &^ (1<<40 - 1)})
	}
	rules, err := ParseRules(d["R"], MaxRules)
	if err != nil {
		return nil, fmt.Errorf("network configuration: rules: %w", err)
	}
	c.Rules = rules
	return c, nil
}

func cut(s string, n int) string { return s[:min(len(s), n)] }

func (c *NetworkConfig) decodeCredentials(d Dictionary) error {
	if b := d["C"]; len(b) > 0 {
		com, _, err := ParseCOM(b)
		if err != nil {
			return err
		}
		c.COM = com
	}
	for b := d["COO"]; len(b) > 0; {
		coo, n, err := ParseCOO(b)
		if err != nil {
			return err
		}
		if b = b[n:]; len(c.COOs) < MaxCOOs {
			c.COOs = append(c.COOs, coo)
		}
	}
	for b := d["CAP"]; len(b) > 0 && len(c.Capabilities) < MaxCapabilities; {
		x, n, err := ParseCapability(b)
		if err != nil {
			break // the ones before it count
		}
		c.Capabilities, b = append(c.Capabilities, x), b[n:]
	}
	for b := d["TAG"]; len(b) > 0 && len(c.Tags) < MaxTags; {
		x, n, err := ParseTag(b)
		if err != nil {
			break
		}
		c.Tags, b = append(c.Tags, x), b[n:]
	}
	slices.SortStableFunc(c.Capabilities, func(a, b *Capability) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortStableFunc(c.Tags, func(a, b *Tag) int { return cmp.Compare(a.ID, b.ID) })
	return nil
}

// endpoint reads an address with a number where the port would be.
func (r *reader) endpoint() netip.AddrPort {
	if r.Failed {
		return netip.AddrPort{}
	}
	ep, n, err := packet.ParseEndpoint(r.Rest())
	if err != nil {
		r.Failed = true
	}
	r.Off += n
	return ep
}

func (c *NetworkConfig) decodeRoutes(d Dictionary) error {
	r := reader{Reader: wire.Reader{Buf: d["RT"]}}
	for r.Left() > 0 {
		target, via := r.endpoint(), r.endpoint()
		route := Route{Target: netip.PrefixFrom(target.Addr(), int(target.Port())), Via: via.Addr(), Flags: r.U16(), Metric: r.U16()}
		if r.Failed {
			return fmt.Errorf("routes: %w", ErrMalformed)
		}
		if route.Target.IsValid() && len(c.Routes) < MaxRoutes {
			c.Routes = append(c.Routes, route)
		}
	}
	r = reader{Reader: wire.Reader{Buf: d["I"]}}
	for r.Left() > 0 {
		ep := r.endpoint()
		if r.Failed {
			return fmt.Errorf("addresses: %w", ErrMalformed)
		}
		if p := netip.PrefixFrom(ep.Addr(), int(ep.Port())); p.IsValid() && len(c.Addresses) < MaxAddresses {
			c.Addresses = append(c.Addresses, p)
		}
	}
	return nil
}

func (c *NetworkConfig) decodeDNS(d Dictionary) error {
	b := d["DNS"]
	if len(b) == 0 {
		return nil
	}
	r := reader{Reader: wire.Reader{Buf: b}}
	domain := r.Bytes(dnsDomainLen)
	for range MaxDNSServers {
		if ep := r.endpoint(); ep.IsValid() {
			c.DNS.Servers = append(c.DNS.Servers, ep.Addr())
		}
	}
	if r.Failed {
		return fmt.Errorf("DNS: %w", ErrMalformed)
	}
	name, _, _ := bytes.Cut(domain, []byte{0})
	c.DNS.Domain = cut(string(name), dnsDomainLen-1)
	return nil
}

func (c *NetworkConfig) decodeSSO(d Dictionary) error {
	s := &c.SSO
	s.Version, s.Enabled = d.Integer("ssov", 0), d.Boolean("ssoe")
	if !s.Enabled {
		return nil
	}
	s.AuthURL = cut(d.Text("aurl"), 2047)
	switch s.Version {
	case 0:
		s.Expiry = d.Integer("aexpt", 0)
	case 1:
		s.IssuerURL, s.CentralURL = cut(d.Text("iurl"), 2047), cut(d.Text("ssoce"), 2047)
		s.Nonce, s.State, s.ClientID = cut(d.Text("sson"), 63), cut(d.Text("ssos"), 127), cut(d.Text("ssocid"), 255)
		if s.Provider = cut(d.Text("ssop"), 63); s.Provider == "" {
			s.Provider = "default"
		}
	}
	return nil
}

// Encode returns the dictionary, in the reference's order.
func (c *NetworkConfig) Encode() []byte {
	w := &dictWriter{}
	w.integer("v", configVersion)
	w.integer("nwid", uint64(c.ID))
	w.integer("ts", uint64(c.Timestamp))
	w.integer("ctmd", uint64(c.TimeDelta))
	w.integer("r", c.Revision)
	w.address("id", c.Member)
	w.address("tt", c.TraceTarget)
	w.integer("tl", c.TraceLevel)
	w.integer("f", c.Flags)
	w.integer("ml", uint64(c.MulticastLimit))
	typ := uint64(0)
	if c.Public {
		typ = 1
	}
	w.integer("t", typ)
	w.text("n", c.Name)
	w.integer("mtu", uint64(c.MTU))
	blob := func(key string, b []byte) {
		if len(b) > 0 {
			w.blob(key, b)
		}
	}
	if c.COM != nil {
		blob("C", c.COM.Append(nil))
	}
	blob("CAP", appendAll(c.Capabilities))
	blob("TAG", appendAll(c.Tags))
	blob("COO", appendAll(c.COOs))
	var b []byte
	for _, s := range c.Specialists {
		b = be.AppendUint64(b, uint64(s.Address)|s.Roles)
	}
	blob("S", b)
	b = nil
	for _, r := range c.Routes {
		b = appendPrefix(b, r.Target)
		b = packet.AppendEndpoint(b, netip.AddrPortFrom(r.Via, 0))
		b = be.AppendUint16(be.AppendUint16(b, r.Flags), r.Metric)
	}
	blob("RT", b)
	b = nil
	for _, p := range c.Addresses {
		b = appendPrefix(b, p)
	}
	blob("I", b)
	blob("R", AppendRules(nil, c.Rules))
	w.blob("DNS", c.DNS.append())
	c.SSO.write(w)
	return w.b
}

func appendPrefix(b []byte, p netip.Prefix) []byte {
	return packet.AppendEndpoint(b, netip.AddrPortFrom(p.Addr(), uint16(p.Bits())))
}

func appendAll[T interface{ Append([]byte) []byte }](list []T) (b []byte) {
	for _, x := range list {
		b = x.Append(b)
	}
	return b
}

func (d DNS) append() []byte {
	b := make([]byte, dnsDomainLen)
	copy(b[:dnsDomainLen-1], d.Domain)
	for i := range MaxDNSServers {
		var ep netip.AddrPort
		if i < len(d.Servers) {
			ep = netip.AddrPortFrom(d.Servers[i], 0)
		}
		b = packet.AppendEndpoint(b, ep)
	}
	return b
}

func (s SSO) write(w *dictWriter) {
	w.integer("ssov", s.Version)
	w.boolean("ssoe", s.Enabled)
	switch {
	case s.Version == 0 && s.Enabled:
		if s.AuthURL != "" {
			w.text("aurl", s.AuthURL)
		}
		w.integer("aexpt", s.Expiry)
	case s.Version == 1:
		for _, kv := range [][2]string{{"iurl", s.IssuerURL}, {"ssoce", s.CentralURL}, {"sson", s.Nonce},
			{"ssos", s.State}, {"ssocid", s.ClientID}, {"ssop", s.Provider}} {
			w.text(kv[0], kv[1])
		}
	}
}

// Broadcast reports whether broadcasts other than ARP are allowed.
func (c *NetworkConfig) Broadcast() bool { return c.Flags&FlagBroadcast != 0 }

// CompressMulticast reports whether multicast frames are compressed.
func (c *NetworkConfig) CompressMulticast() bool { return c.Flags&FlagNoMulticastCompress == 0 }

func (c *NetworkConfig) withRole(role uint64) (out []identity.Address) {
	for _, s := range c.Specialists {
		if s.Roles&role != 0 {
			out = append(out, s.Address)
		}
	}
	return out
}

// Bridges lists the active bridges.
func (c *NetworkConfig) Bridges() []identity.Address { return c.withRole(RoleBridge) }

// Contacts lists the nodes that are to be kept in contact, each once: the multicast
// replicators, then anchors and network relays.
func (c *NetworkConfig) Contacts() []identity.Address {
	all := append(c.Replicators(), c.withRole(RoleAnchor|RoleRelay)...)
	seen := make(map[identity.Address]bool, len(all))
	return slices.DeleteFunc(all, func(a identity.Address) bool {
		again := seen[a]
		seen[a] = true
		return again
	})
}

// Replicators lists the members that send multicasts on for others.
func (c *NetworkConfig) Replicators() []identity.Address { return c.withRole(RoleReplicator) }

// IsBridge reports whether a member is an active bridge.
func (c *NetworkConfig) IsBridge(a identity.Address) bool {
	for _, s := range c.Specialists {
		if s.Address == a && s.Roles&RoleBridge != 0 {
			return true
		}
	}
	return false
}

// CredentialPackets returns the payloads of NETWORK_CREDENTIALS that carry all
// our credentials (chapter 03 §3.10).
func (c *NetworkConfig) CredentialPackets() [][]byte {
	const limit = 9000 // bytes of payload, below the largest packet with room for one more
	var list, all []Credential
	if c.COM != nil {
		all = append(all, c.COM)
	}
	for _, x := range c.COOs {
		all = append(all, x)
	}
	for _, x := range c.Tags {
		all = append(all, x)
	}
	for _, x := range c.Capabilities {
		all = append(all, x)
	}
	var out [][]byte
	size := 0
	for _, x := range all {
		n := len(x.Append(nil))
		if n > limit {
			continue // a capability that fits into no packet
		}
		if size > 0 && size+n > limit {
			out = append(out, AppendCredentials(nil, list...))
			list, size = nil, 0
		}
		list, size = append(list, x), size+n
	}
	if len(list) > 0 {
		out = append(out, AppendCredentials(nil, list...))
	}
	return out
}

// AdHocConfig makes the configuration of an ad-hoc network (chapter 03 §1.8). ok
// is false if the ID is malformed; a nil configuration with ok means that the ID
// says nothing.
func AdHocConfig(n NetworkID, me identity.Address, now int64) (c *NetworkConfig, ok bool) {
	if !n.AdHoc() {
		return nil, false
	}
	c = &NetworkConfig{
		ID: n, Member: me, Timestamp: now, TimeDelta: 7200000, Revision: 1, Public: true, MTU: DefaultMTU,
		Flags: FlagNDPEmulation, Addresses: []netip.Prefix{SixPlane(n, me)},
	}
	switch {
	case n&0xffffff == 0:
		first, last := uint16(n>>40), uint16(n>>24)
		if last < first {
			return nil, false
		}
		c.Name = fmt.Sprintf("adhoc-%04x-%04x", first, last)
		c.Rules = adHocRules(first, last)
	case n&0xff == 1:
		net8 := byte(n >> 48)
		c.Name = fmt.Sprintf("adhoc-%d.0.0.0", net8)
		c.MulticastLimit = 1024
		c.Rules = []Rule{{Type: ActionAccept}}
		ip := netip.AddrFrom4([4]byte{net8, byte(me >> 16), byte(me >> 8), byte(me)})
		c.Addresses = append(c.Addresses, netip.PrefixFrom(ip, 8))
		if hub := identity.Address(n >> 8 & (1<<40 - 1)); hub != 0 {
			c.Specialists = []Specialist{{Address: hub}}
		}
	default:
		return nil, true
	}
	return c, true
}

func adHocRules(first, last uint16) []Rule {
	field := func(b ...byte) []byte { return b }
	ports := be.AppendUint16(be.AppendUint16(nil, first), last)
	const syn, ack = 0x02, 0x10
	mask := func(v uint64) []byte { return be.AppendUint64(nil, v) }
	return []Rule{
		{Type: MatchEtherType, Not: true, Field: field(0x86, 0xdd)},
		{Type: ActionDrop},
		{Type: MatchIPProtocol, Field: field(58)},
		{Type: ActionAccept},
		{Type: MatchIPProtocol, Field: field(17)},
		{Type: MatchIPProtocol, Or: true, Field: field(6)},
		{Type: MatchDestinationPort, Field: ports},
		{Type: ActionAccept},
		{Type: MatchCharacteristics, Not: true, Field: mask(syn)},
		{Type: ActionAccept},
		{Type: MatchCharacteristics, Field: mask(syn)},
		{Type: MatchCharacteristics, Field: mask(ack)},
		{Type: ActionAccept},
		{Type: ActionDrop},
	}
}
