package gateway

import (
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/netstack"
	"ztgate/netstack/policy"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

// plane is the forwarding plane, in the words of the control API.
type plane struct{ *netstack.Engine }

// frameOverhead is what a datagram with a FRAME has besides the IP packet, and
// directLimit the largest IP packet in one of the default size (docs/protocol/01 §4.2,
// 03 §4.2).
const (
	frameOverhead = 28 + 8 + 2
	directLimit   = 1432 - frameOverhead
)

// pathSizer is a node that finds out what its paths carry.
type pathSizer interface {
	PathMTU(id ztnode.NetworkID, member ztnode.MAC) int // UDP payload, 0 = unknown
}

// pathMTU tells the plane how large packets reach a member in one datagram, if the node
// knows.
func pathMTU(node Node) func(nwid uint64, member [6]byte) int {
	sizer, ok := node.(pathSizer)
	if !ok {
		return nil
	}
	return func(nwid uint64, member [6]byte) int {
		if n := sizer.PathMTU(ztnode.NetworkID(nwid), member); n > 0 {
			return n - frameOverhead
		}
		return 0
	}
}

// newEngine makes the forwarding plane of a gateway. What base leaves open comes
// from the configuration and the plan.
func newEngine(cfg *config.Config, p *plan.Plan, dev netstack.Device, overlay netstack.Overlay, base netstack.Config) (*netstack.Engine, error) {
	sources := slices.Clone(cfg.VPC.Sources)
	if len(sources) > 0 {
		sources = append(sources, cfg.VPC.Address...) // what this host itself sends
	}
	base.Device, base.Overlay = dev, overlay
	// The address on the TUN is the kernel's, not one of the engine's own stack.
	base.VPC = netstack.VPC{Sources: sources, MTU: p.MTU}
	base.NAT = natSettings(cfg.NAT, base.NAT.Seed)
	base.Forwards, base.Maps = translation(p.Forwards, p.Maps)
	base.Masquerade = masquerades(p)
	base.Policy = compilePolicy(cfg.Policy)
	return netstack.New(base)
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
		if f.Side == config.SideOverlay {
			from = netstack.OverlaySide
		}
		fs = append(fs, netstack.PortForward{From: from, Proto: proto, Listen: f.Listen, To: f.To, Masquerade: f.Masquerade, Relayed: f.Relayed()})
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

// masquerades are how the VPC sees overlay hosts.
func masquerades(p *plan.Plan) []netstack.Masquerade {
	out := make([]netstack.Masquerade, len(p.Masquerade))
	for i, m := range p.Masquerade {
		out[i] = netstack.Masquerade{To: m.To, Except: m.Except, Address: m.Address, ByHost: m.Host, Invites: m.Invites, Routed: m.Routed}
	}
	return out
}

// sides are the words for the plane's sides.
var sides = [...]config.Side{netstack.VPCSide: config.SideVPC, netstack.OverlaySide: config.SideOverlay}

// forwardOf and mapOf invert translation.
func forwardOf(f *netstack.PortForward) config.Forward {
	proto := "tcp"
	if f.Proto == unix.IPPROTO_UDP {
		proto = "udp"
	}
	return config.Forward{Proto: proto, Listen: f.Listen, To: f.To, Side: sides[f.From], Masquerade: f.Masquerade}
}

func mapOf(m *netstack.AddressMap) config.AddressMap {
	return config.AddressMap{Network: ztnode.NetworkID(m.Network), Hosts: sides[m.Hosts], Real: m.Real, Alias: m.Alias}
}

// planeNetworks are the networks that carry traffic.
func planeNetworks(cfg *config.Config, p *plan.Plan) []netstack.Network {
	out := make([]netstack.Network, len(p.Networks))
	for i, n := range p.Networks {
		out[i] = netstack.Network{ID: uint64(n.ID), MAC: n.MAC, MTU: n.MTU, Addresses: n.Addresses, Masquerade: cfg.Masquerade(n.ID),
			Masquerade6: cfg.NAT.Masquerade6, NAT: n.NAT, Exempt: cfg.NAT.Exempt, Direct: directLimit, Conflicts: n.Refused}
		for _, r := range n.Routes {
			out[i].Routes = append(out[i].Routes, netstack.Route(r))
		}
	}
	return out
}

func questionOf(q control.Question) netstack.Question {
	return netstack.Question{FromOverlay: q.FromOverlay, Network: uint64(q.Network), Protocol: q.Proto(), Src: q.Source, Dst: q.Destination}
}

// NoteRefusal shows what was refused for what Explain said.
func (p *plane) NoteRefusal(q control.Question, reason string) {
	p.Engine.NoteRefusal(questionOf(q), reason)
}

// Permits asks the policy alone.
func (p *plane) Permits(q control.Question) bool { return p.Engine.Permits(questionOf(q)) }

// Explain says what the plane would do with a packet.
func (p *plane) Explain(q control.Question) control.Explanation {
	x := p.Engine.Explain(questionOf(q))
	out := control.Explanation{Verdict: x.Verdict, Reason: x.Reason, Established: x.Established, Rule: x.Rule, Network: ztnode.NetworkID(x.Network),
		Route: x.Route, NextHop: x.NextHop, Source: x.Source, Destination: x.Destination, Translation: x.SourceHow,
		Redirected: x.Redirected, MTU: x.MTU}
	if x.Forward != nil {
		out.By = append(out.By, "forward "+forwardOf(x.Forward).String())
	}
	for _, m := range []*netstack.AddressMap{x.SourceMap, x.TargetMap} {
		if m != nil {
			out.By = append(out.By, "map "+mapOf(m).String())
		}
	}
	if x.NextHopMAC != [6]byte{} {
		out.Member = ztnode.AddressOf(out.Network, x.NextHopMAC).String()
	}
	return out
}

// multicastGroups are those in which others look for our addresses.
func (p *plane) multicastGroups(id ztnode.NetworkID) []ztnode.Group {
	var out []ztnode.Group
	for _, g := range p.Engine.MulticastGroups(uint64(id)) {
		out = append(out, ztnode.Group{MAC: g.MAC, ADI: g.ADI})
	}
	return out
}

// Flows lists flows.
func (p *plane) Flows(f control.FlowFilter) []control.Flow {
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

// drops lists the last refusals, at most so many; -1 = all.
func (p *plane) drops(most int) []control.Drop {
	list := p.Engine.Refusals()
	if most >= 0 {
		list = list[:min(most, len(list))]
	}
	meanings := make(map[string]netstack.Reason)
	for _, r := range netstack.Reasons() {
		meanings[r.Name] = r
	}
	out := make([]control.Drop, len(list))
	for i, x := range list {
		m := meanings[x.Reason]
		out[i] = control.Drop{Reason: x.Reason, Meaning: m.Meaning, Remedy: m.Remedy, Side: string(sides[x.Side]), Network: ztnode.NetworkID(x.Network),
			Protocol: x.Protocol, Source: x.Source, Destination: x.Destination, First: x.First, Last: x.Last, Count: x.Count}
		if x.MAC != [6]byte{} {
			out[i].Member = ztnode.AddressOf(out[i].Network, x.MAC).String()
		}
	}
	return out
}

// Neighbour tells [service.ping] who answers.
func (p *plane) Neighbour(id ztnode.NetworkID, a netip.Addr) (ztnode.MAC, bool) {
	mac, ok := p.Engine.Neighbour(uint64(id), a)
	return mac, ok
}

// compilePolicy compiles the configured rules, which are checked already.
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
