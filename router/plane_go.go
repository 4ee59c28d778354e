package router

import (
	"net/netip"
	"slices"
	"time"

	"ztgate/netstack"
)

// enginePlane is the forwarding plane of this module.
type enginePlane struct{ *netstack.Engine }

func newEngine(cfg PlaneConfig) (Plane, error) {
	sources := slices.Clone(cfg.VPC.Sources)
	if len(sources) > 0 {
		sources = append(sources, cfg.VPC.Address...) // what this host itself sends
	}
	t := cfg.NAT.Timeouts
	e, err := netstack.New(netstack.Config{
		Device: cfg.Device, Overlay: cfg.Overlay,
		// The address on the TUN is the kernel's, not one of the engine's own stack.
		VPC:      netstack.VPC{Sources: sources, MTU: cfg.VPC.MTU},
		MaxFlows: cfg.NAT.MaxFlows,
		Timeouts: netstack.Timeouts{TCPEstablished: t.TCPEstablished, TCPTransitory: t.TCPTransitory, UDP: t.UDP, ICMP: t.ICMP},
		Policy:   compilePolicy(cfg.Policy), Logger: cfg.Logger, Registerer: cfg.Registerer,
	})
	if err != nil {
		return nil, err
	}
	return enginePlane{e}, nil
}

func (p enginePlane) SetNetworks(nets []PlaneNetwork) error {
	list := make([]netstack.Network, len(nets))
	for i, n := range nets {
		list[i] = netstack.Network{ID: uint64(n.ID), MAC: n.MAC, MTU: n.MTU, Addresses: n.Addresses, Masquerade: n.Masquerade, Direct: n.Direct}
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
	list := p.Engine.Flows(netstack.FlowFilter{To: f.To})
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
		if a := x.External.Addr(); a.IsValid() && !a.IsUnspecified() {
			out[i].Translated = x.External
		}
	}
	return out
}

// Neighbour tells [service.ping] who answers.
func (p enginePlane) Neighbour(id NetworkID, a netip.Addr) (MAC, bool) {
	mac, ok := p.Engine.Neighbour(uint64(id), a)
	return mac, ok
}
