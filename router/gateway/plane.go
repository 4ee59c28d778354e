package gateway

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/netstack"
	"ztgate/netstack/policy"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/zerotier/ztnode"
)

// enginePlane is the forwarding plane of this module.
type enginePlane struct{ *netstack.Engine }

func newEngine(cfg PlaneConfig) (Plane, error) {
	sources := slices.Clone(cfg.VPC.Sources)
	if len(sources) > 0 {
		sources = append(sources, cfg.VPC.Address...) // what this host itself sends
	}
	forwards, maps := translation(cfg.Forwards, cfg.Maps)
	mappings := make([]netstack.Mapping, len(cfg.Mappings))
	for i, m := range cfg.Mappings {
		mappings[i] = netstack.Mapping{Proto: m.Protocol, Client: m.Client, External: m.External}
	}
	e, err := netstack.New(netstack.Config{
		Device: cfg.Device, Overlay: cfg.Overlay,
		// The address on the TUN is the kernel's, not one of the engine's own stack.
		VPC: netstack.VPC{Sources: sources, MTU: cmp.Or(cfg.VPC.MTU, config.DefaultMTU)},
		NAT: natSettings(cfg.NAT, cfg.Seed), Forwards: forwards, Maps: maps, Mappings: mappings,
		Policy: compilePolicy(cfg.Policy), Logger: cfg.Logger, Registerer: cfg.Registerer,
	})
	if err != nil {
		return nil, err
	}
	return enginePlane{e}, nil
}

func natSettings(c config.NATConfig, seed [32]byte) netstack.NAT {
	t := c.Timeouts
	s := netstack.NAT{MaxFlows: c.MaxFlows, MaxFlowsPerClient: c.MaxFlowsPerClient, MaxPortsPerClient: c.MaxPortsPerClient,
		MaxHalfOpen: c.MaxHalfOpen, FlowRatePerClient: c.FlowRatePerClient, NoPickup: !c.Pickup, NoWindow: !c.WindowCheck, PortQuarantine: c.PortRest, Seed: seed,
		Timeouts: netstack.Timeouts{TCPEstablished: t.TCPEstablished, TCPTransitory: t.TCPTransitory, TCPOpening: t.TCPOpening,
			TCPHalfClosed: t.TCPHalfClosed, TCPClosing: t.TCPClosing, TCPReset: t.TCPReset, UDP: t.UDP, UDPUnanswered: t.UDPUnanswered, ICMP: t.ICMP}}
	if c.PortSharing == "by_destination" {
		s.PortSharing = netstack.ByDestination
	}
	if c.Filtering == "endpoint_independent" {
		s.FilterTCP, s.FilterUDP = netstack.EndpointIndependent, netstack.EndpointIndependent
	}
	return s
}

func translation(forwards []config.Forward, maps []config.AddressMap) (fs []netstack.PortForward, ms []netstack.AddressMap) {
	for _, f := range forwards {
		proto := uint8(unix.IPPROTO_TCP)
		if f.Proto == "udp" {
			proto = unix.IPPROTO_UDP
		}
		from := netstack.VPCSide
		if f.Side == SideOverlay {
			from = netstack.OverlaySide
		}
		fs = append(fs, netstack.PortForward{From: from, Proto: proto, Listen: f.Listen, To: f.To, Masquerade: f.Masquerade})
	}
	for _, m := range maps {
		hosts := netstack.VPCSide
		if m.Hosts == config.SideOverlay {
			hosts = netstack.OverlaySide
		}
		ms = append(ms, netstack.AddressMap{Network: uint64(m.Network), Hosts: hosts, Real: m.Real, Alias: m.Alias})
	}
	return fs, ms
}

func (p enginePlane) SetPolicy(c config.PolicyConfig) { p.Engine.SetPolicy(compilePolicy(c)) }

func (p enginePlane) SetTranslation(forwards []config.Forward, maps []config.AddressMap) error {
	fs, ms := translation(forwards, maps)
	return p.Engine.SetTranslation(fs, ms)
}

func (p enginePlane) Explain(q control.Question) control.Explanation {
	x := p.Engine.Explain(netstack.Question{FromOverlay: q.FromOverlay, Network: uint64(q.Network), Protocol: q.Proto(), Src: q.Source, Dst: q.Destination})
	out := control.Explanation{Verdict: x.Verdict, Reason: x.Reason, Established: x.Established, Rule: x.Rule, Network: ztnode.NetworkID(x.Network),
		Route: x.Route, NextHop: x.NextHop, Source: x.Source, Destination: x.Destination, Translation: x.SourceHow,
		Redirected: x.Redirected, MTU: x.MTU}
	if x.NextHopMAC != [6]byte{} {
		out.Member = addressOfMAC(x.NextHopMAC, out.Network)
	}
	return out
}

func (p enginePlane) SetNetworks(nets []PlaneNetwork) error {
	list := make([]netstack.Network, len(nets))
	for i, n := range nets {
		list[i] = netstack.Network{ID: uint64(n.ID), MAC: n.MAC, MTU: n.MTU, Addresses: n.Addresses, Masquerade: n.Masquerade,
			Masquerade6: n.Masquerade6, Exempt: n.Exempt, Direct: n.Direct, Conflicts: n.Conflicts}
		for _, r := range n.Routes {
			list[i].Routes = append(list[i].Routes, netstack.Route(r))
		}
	}
	return p.Engine.SetNetworks(list)
}

func (p enginePlane) MulticastGroups(id ztnode.NetworkID) []ztnode.Group {
	var out []ztnode.Group
	for _, g := range p.Engine.MulticastGroups(uint64(id)) {
		out = append(out, ztnode.Group{MAC: g.MAC, ADI: g.ADI})
	}
	return out
}

func (p enginePlane) Flows(f control.FlowFilter) []control.Flow {
	list := p.Engine.Flows(netstack.FlowFilter{To: f.To, From: f.From, Protocol: f.Protocol, State: f.State, Network: uint64(f.Network)})
	now := time.Now()
	out := make([]control.Flow, len(list))
	for i, x := range list {
		direction := "overlay_to_vpc"
		if x.FromVPC {
			direction = "vpc_to_overlay"
		}
		out[i] = control.Flow{Protocol: x.Protocol, State: x.State, Network: ztnode.NetworkID(x.Network), Direction: direction,
			Source: x.Client, Destination: x.Server,
			AgeSeconds: now.Sub(x.Created).Seconds(), IdleSeconds: now.Sub(x.LastSeen).Seconds(),
			BytesOut: x.BytesOut, BytesIn: x.BytesIn, PacketsOut: x.PacketsOut, PacketsIn: x.PacketsIn}
		if x.Target.IsValid() && x.Target != x.Server { // forwarded
			out[i].Destination, out[i].TranslatedDst = x.Target, x.Server
		}
		if a := x.External.Addr(); a.IsValid() && !a.IsUnspecified() {
			out[i].Translated = x.External
		}
	}
	return out
}

func (p enginePlane) Mappings() []Mapping {
	list := p.Engine.Mappings()
	out := make([]Mapping, len(list))
	for i, m := range list {
		out[i] = Mapping{m.Proto, m.Client, m.External}
	}
	return out
}

// Neighbour tells [service.ping] who answers.
func (p enginePlane) Neighbour(id ztnode.NetworkID, a netip.Addr) (ztnode.MAC, bool) {
	mac, ok := p.Engine.Neighbour(uint64(id), a)
	return mac, ok
}

// compilePolicy translates the configured rules, which are checked already.
func compilePolicy(c config.PolicyConfig) *policy.Policy {
	action := func(word string) policy.Action {
		switch word {
		case "accept":
			return policy.Accept
		case "reject":
			return policy.Reject
		}
		return policy.Drop
	}
	proto := map[string]uint8{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "icmp": unix.IPPROTO_ICMP}
	direction := map[string]policy.Direction{"out": policy.Out, "in": policy.In}
	rules := make([]policy.Rule, len(c.Rules))
	for i, r := range c.Rules {
		rules[i] = policy.Rule{Action: action(r.Action), Proto: proto[r.Proto], From: slices.Clone(r.From), To: slices.Clone(r.To),
			Direction: direction[r.Direction], Network: uint64(r.Network)}
		for _, p := range r.Ports {
			rules[i].Ports = append(rules[i].Ports, policy.PortRange(p))
		}
	}
	return policy.New(action(c.Default), rules)
}
