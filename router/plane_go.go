package router

import (
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/netstack"
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
		VPC: netstack.VPC{Sources: sources, MTU: cfg.VPC.MTU},
		NAT: natSettings(cfg.NAT, cfg.Seed), Forwards: forwards, Maps: maps, Mappings: mappings,
		Policy: compilePolicy(cfg.Policy), Logger: cfg.Logger, Registerer: cfg.Registerer,
	})
	if err != nil {
		return nil, err
	}
	return enginePlane{e}, nil
}

func natSettings(c NATConfig, seed [32]byte) netstack.NAT {
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

func translation(forwards []Forward, maps []AddressMap) (fs []netstack.PortForward, ms []netstack.AddressMap) {
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
		if m.Hosts == SideOverlay {
			hosts = netstack.OverlaySide
		}
		ms = append(ms, netstack.AddressMap{Network: uint64(m.Network), Hosts: hosts, Real: m.Real, Alias: m.Alias})
	}
	return fs, ms
}

func (p enginePlane) SetPolicy(c PolicyConfig) { p.Engine.SetPolicy(compilePolicy(c)) }

func (p enginePlane) SetTranslation(forwards []Forward, maps []AddressMap) error {
	fs, ms := translation(forwards, maps)
	return p.Engine.SetTranslation(fs, ms)
}

func (p enginePlane) Explain(q Question) Explanation {
	x := p.Engine.Explain(netstack.Question{FromOverlay: q.FromOverlay, Network: uint64(q.Network), Protocol: q.proto(), Src: q.Source, Dst: q.Destination})
	out := Explanation{Verdict: x.Verdict, Reason: x.Reason, Established: x.Established, Rule: x.Rule, Network: NetworkID(x.Network),
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

func (p enginePlane) MulticastGroups(id NetworkID) []Group {
	var out []Group
	for _, g := range p.Engine.MulticastGroups(uint64(id)) {
		out = append(out, Group{MAC: g.MAC, ADI: g.ADI})
	}
	return out
}

func (p enginePlane) Flows(f FlowFilter) []Flow {
	list := p.Engine.Flows(netstack.FlowFilter{To: f.To, From: f.From, Protocol: f.Protocol, State: f.State, Network: uint64(f.Network)})
	now := time.Now()
	out := make([]Flow, len(list))
	for i, x := range list {
		direction := "overlay_to_vpc"
		if x.FromVPC {
			direction = "vpc_to_overlay"
		}
		out[i] = Flow{Protocol: x.Protocol, State: x.State, Network: NetworkID(x.Network), Direction: direction,
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
func (p enginePlane) Neighbour(id NetworkID, a netip.Addr) (MAC, bool) {
	mac, ok := p.Engine.Neighbour(uint64(id), a)
	return mac, ok
}
