package config

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"ztgate/zerotier/ztnode"
)

// sections is the one table of all records of the file.
var sections = []section{networkRecords, ruleRecords, forwardRecords, mapRecords, physicalRecords, virtualRecords, dnsHostRecords}

var networkRecords = &record[NetworkConfig]{
	key: "networks", example: `id: "8056c2e21c000001"`, live: true, plain: "id",
	fields: []field[NetworkConfig]{
		one("id", parseNetwork, func(n *NetworkConfig, v ztnode.NetworkID) { n.ID = v }),
		one("masquerade", parseBool, func(n *NetworkConfig, v bool) { n.Masquerade = &v }),
		one("allow_global", parseBool, func(n *NetworkConfig, v bool) { n.AllowGlobal = v }),
		one("allow_dns", parseBool, func(n *NetworkConfig, v bool) { n.AllowDNS = v }),
		one("allow_default", parseBool, func(n *NetworkConfig, v bool) { n.AllowDefault = v }),
	},
	check: func(n *NetworkConfig) error {
		if n.ID == 0 {
			return errors.New("an entry has no id: want 16 hex digits, as in 8056c2e21c000001")
		}
		return nil
	},
	list:   func(c *Config) *[]NetworkConfig { return &c.Networks },
	origin: func(n NetworkConfig) string { return "networks." + n.ID.String() },
	text: func(c *Config, n NetworkConfig) string {
		return fmt.Sprint(n.ID, " masquerade ", c.Masquerade(n.ID), " allow_global ", n.AllowGlobal, " allow_dns ", n.AllowDNS, " allow_default ", n.AllowDefault)
	},
}

var ruleRecords = &record[PolicyRule]{
	key: "policy.rules", example: "{action: accept, proto: tcp, ports: [443]}", live: true,
	fields: []field[PolicyRule]{
		one("action", oneOf(actions...), func(r *PolicyRule, v string) { r.Action = v }),
		one("proto", oneOf("tcp", "udp", "icmp"), func(r *PolicyRule, v string) { r.Proto = v }),
		many("from", parsePlace, func(r *PolicyRule, v []place) { r.From, r.FromNames = places(v) }),
		many("to", parsePlace, func(r *PolicyRule, v []place) { r.To, r.ToNames = places(v) }),
		many("ports", parsePorts, func(r *PolicyRule, v []PortRange) { r.Ports = v }),
		one("direction", oneOf("out", "in"), func(r *PolicyRule, v string) { r.Direction = v }),
		one("network", parseNetwork, func(r *PolicyRule, v ztnode.NetworkID) { r.Network = v }),
	},
	check: func(r *PolicyRule) error {
		if r.Action == "" {
			return fmt.Errorf("a rule has no action: use one of %s", strings.Join(actions, ", "))
		}
		return nil
	},
	list: func(c *Config) *[]PolicyRule { return &c.written.rules },
	text: func(_ *Config, r PolicyRule) string { return r.String() },
}

var forwardRecords = &record[Forward]{
	key: "forwards", example: `{listen: "tcp/8443", to: "10.0.0.10:443"}`, live: true,
	blank: Forward{Masquerade: true, Side: SideVPC},
	fields: []field[Forward]{
		one("listen", parseListen, func(f *Forward, v listenAt) { f.Proto, f.Listen = v.proto, v.at }),
		one("to", parseHostPort, func(f *Forward, v endpoint) { f.To, f.Host = v.at, v.name }),
		one("masquerade", parseBool, func(f *Forward, v bool) { f.Masquerade = v }),
		one("from", oneOf(SideVPC, SideOverlay), func(f *Forward, v Side) { f.Side = v }),
		one("proxy_protocol", oneOf("v1", "v2"), func(f *Forward, v string) { f.ProxyProtocol = v }),
		many("accept_proxy", ParsePrefix, func(f *Forward, v []netip.Prefix) { f.AcceptProxy = v }),
	},
	check: func(f *Forward) error {
		switch {
		case f.Proto == "":
			return fmt.Errorf("an entry has no listen: %w", errBadListen)
		case f.Relayed() && f.Proto != "tcp":
			return errors.New("proxy_protocol and accept_proxy are of TCP: a header stands at the beginning of a connection, which UDP has none; for udp set masquerade: false, and route the answers back here")
		case f.Relayed() && f.Side == SideOverlay:
			return errors.New("proxy_protocol and accept_proxy are of forwards from the vpc: set masquerade: false, so that the host in the VPC sees clients of the overlay themselves")
		case f.Relayed() && !f.Masquerade:
			return errors.New("proxy_protocol and accept_proxy let connections end here, so that the host can't see clients' own addresses: remove masquerade: false, or them")
		case f.Host != "":
			return nil // its families are those of the name's addresses
		case !f.To.IsValid():
			return fmt.Errorf("an entry has no to: %w", errBadTo)
		}
		if !f.Listen.Addr().IsValid() {
			f.Listen = netip.AddrPortFrom(unspecified(f.To.Addr()), f.Listen.Port())
		}
		if f.Listen.Addr().Is4() != f.To.Addr().Is4() {
			return fmt.Errorf("listen %s and to %s are of different families: give two addresses of the same", f.Listen, f.To)
		}
		return nil
	},
	list: func(c *Config) *[]Forward { return &c.written.forwards },
	text: func(_ *Config, f Forward) string {
		if f.Side == SideOverlay {
			return f.String() + " from overlay"
		}
		return f.String()
	},
}

var mapRecords = &record[AddressMap]{
	key: "maps", example: `{hosts: vpc, real: 10.0.0.0/24, alias: 10.77.0.0/24}`, live: true,
	blank: AddressMap{Hosts: SideVPC},
	fields: []field[AddressMap]{
		one("network", parseNetwork, func(m *AddressMap, v ztnode.NetworkID) { m.Network = v }),
		one("hosts", oneOf(SideVPC, SideOverlay), func(m *AddressMap, v Side) { m.Hosts = v }),
		one("real", ParsePrefix, func(m *AddressMap, v netip.Prefix) { m.Real = v }),
		one("alias", ParsePrefix, func(m *AddressMap, v netip.Prefix) { m.Alias = v }),
	},
	check: func(m *AddressMap) error {
		switch {
		case !m.Real.IsValid() || !m.Alias.IsValid():
			return errors.New("give real and alias, two prefixes")
		case m.Real.Bits() != m.Alias.Bits() || m.Real.Addr().Is4() != m.Alias.Addr().Is4():
			return fmt.Errorf("%s and %s: want two prefixes of the same length", m.Real, m.Alias)
		}
		return nil
	},
	list: func(c *Config) *[]AddressMap { return &c.Maps },
	text: func(_ *Config, m AddressMap) string { return m.String() },
}

var physicalRecords = &record[PhysicalNetwork]{
	key: "physical", example: `{network: 10.0.0.0/8, mtu: 1400}`, max: maxPhysical,
	fields: []field[PhysicalNetwork]{
		one("network", ParsePrefix, func(p *PhysicalNetwork, v netip.Prefix) { p.Network = v }),
		one("mtu", parsePhysicalMTU, func(p *PhysicalNetwork, v int) { p.MTU = v }),
		one("blacklist", parseBool, func(p *PhysicalNetwork, v bool) { p.Blacklist = v }),
		one("trusted_path", parseTrustedPath, func(p *PhysicalNetwork, v uint64) { p.TrustedPath = v }),
	},
	check: func(p *PhysicalNetwork) error {
		if !p.Network.IsValid() {
			return errors.New("an entry has no network: give a prefix")
		}
		return nil
	},
	list: func(c *Config) *[]PhysicalNetwork { return &c.Underlay.Physical },
	text: func(_ *Config, p PhysicalNetwork) string { return p.String() },
}

var virtualRecords = &record[VirtualPeer]{
	key: "virtual", example: `{id: "a1b2c3d4e5", try: ["198.51.100.7:9993"]}`,
	fields: []field[VirtualPeer]{
		one("id", parseMember, func(p *VirtualPeer, v string) { p.Address = v }),
		many("try", ParseEndpoint, func(p *VirtualPeer, v []netip.AddrPort) { p.Try = v }),
		many("blacklist", ParsePrefix, func(p *VirtualPeer, v []netip.Prefix) { p.Blacklist = v }),
	},
	check: func(p *VirtualPeer) error {
		if p.Address == "" {
			return errors.New("an entry has no id: give the peer's address, 10 hex digits")
		}
		return nil
	},
	list: func(c *Config) *[]VirtualPeer { return &c.Underlay.Virtual },
	text: func(_ *Config, p VirtualPeer) string { return p.String() },
}
