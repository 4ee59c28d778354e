package zerotier

import (
	"fmt"
	"net/netip"
	"time"

	"ztgate/zerotier/network"
	"ztgate/zerotier/portmap"
	"ztgate/zerotier/transport"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
	"ztgate/zerotier/ztnode"
)

// Stats are counters of the node's layers.
type Stats struct {
	Wire    transport.Stats
	VL1     vl1.Stats
	Network network.Stats
	PortMap portmap.Stats
}

// Info describes the node.
func (n *Node) Info() ztnode.Info {
	planet := n.core.Planet()
	n.mu.Lock()
	jump := n.clock.Jump()
	n.mu.Unlock()
	first, second, third := n.udp.PortNumbers()
	return ztnode.Info{
		Address: n.id.Address().String(), Identity: n.id.String(), Online: n.core.Online(),
		Version:     fmt.Sprintf("%d.%d.%d", VersionMajor, VersionMinor, VersionRevision),
		PrimaryPort: first, SecondaryPort: second, TertiaryPort: third, PlanetID: planet.ID, PlanetTimestamp: planet.Timestamp,
		Root: n.core.IsRoot(), Controller: n.ctl != nil,
		Surface: n.core.Surface(), Listening: n.udp.LocalEndpoints(),
		PortMapping: n.mapper != nil, PortMappings: n.PortMappings(),
		Collision: n.core.Collision(),
		ClockSet:  jump.At, ClockSetBy: jump.By.Seconds(),
	}
}

// Peers describes all known peers, ordered by address.
func (n *Node) Peers() []ztnode.Peer {
	var out []ztnode.Peer
	for _, p := range n.core.Peers() {
		v := ztnode.Peer{
			Address: p.Address.String(), Role: p.Role.String(), Version: "-", Latency: ztnode.Milliseconds(p.Latency),
			Relayed: p.Relayed, Cipher: int(p.Suite), LastReceive: p.LastReceive, LastRelayed: p.LastRelayed, Paths: []ztnode.Path{},
		}
		if p.ProtocolVersion != 0 {
			v.Version = fmt.Sprintf("%d.%d.%d", p.Version[0], p.Version[1], p.Version[2])
		}
		for _, pa := range p.Paths {
			v.Paths = append(v.Paths, ztnode.Path{
				Endpoint: pa.Endpoint, Preferred: pa.Preferred, Expired: pa.Expired,
				LastSend: pa.LastSend, LastReceive: pa.LastReceive, Latency: ztnode.Milliseconds(pa.Latency), MTU: pa.MTU,
			})
		}
		out = append(out, v)
	}
	return out
}

// PathMTU returns the largest UDP payload that is known to reach a member of a network in
// one datagram, 0 if that isn't known.
func (n *Node) PathMTU(id ztnode.NetworkID, member ztnode.MAC) int {
	return n.core.PathMTU(vl2.AddressOf(id, member))
}

// Networks describes the joined networks.
func (n *Node) Networks() []ztnode.Network {
	out := []ztnode.Network{}
	for _, s := range n.layer.Networks() {
		out = append(out, describe(s))
	}
	return out
}

// Network describes one joined network.
func (n *Node) Network(id ztnode.NetworkID) (ztnode.Network, bool) {
	s, ok := n.layer.Network(id)
	if !ok {
		return ztnode.Network{}, false
	}
	return describe(s), true
}

func describe(s network.Snapshot) ztnode.Network {
	v := ztnode.Network{ID: s.ID, Status: s.Status.String(), Type: ztnode.TypePrivate, MAC: s.MAC, MTU: vl2.DefaultMTU, AuthURL: s.AuthURL,
		LastController: s.LastController, Unanswered: s.Unanswered, Duplicate: s.Duplicate}
	c := s.Config
	if c == nil {
		return v
	}
	v.Name, v.MTU, v.Revision = c.Name, c.MTU, c.Revision
	v.Addresses = c.Addresses
	for _, r := range c.Routes {
		v.Routes = append(v.Routes, ztnode.Route{Target: r.Target, Via: r.Via})
	}
	v.DNSDomain, v.DNSServers = c.DNS.Domain, c.DNS.Servers
	v.Broadcast = c.Broadcast()
	v.Bridge = c.IsBridge(c.Member)
	if c.Public {
		v.Type = ztnode.TypePublic
	}
	if c.COM != nil {
		v.Certificate = time.UnixMilli(c.COM.Timestamp() + c.COM.TimeDelta())
	}
	return v
}

// Moons describes the moons that are orbited.
func (n *Node) Moons() []ztnode.Moon {
	out := []ztnode.Moon{}
	for _, m := range n.core.Moons() {
		out = append(out, m.Describe())
	}
	return out
}

// RootEndpoints returns where the planet and the moons say that their roots are.
func (n *Node) RootEndpoints() []netip.AddrPort {
	out := n.core.Planet().Endpoints()
	for _, m := range n.core.Moons() {
		if m.World != nil {
			out = append(out, m.World.Endpoints()...)
		}
	}
	return out
}

// Stats returns the counters of all layers.
func (n *Node) Stats() Stats {
	s := Stats{Wire: n.udp.Stats(), VL1: n.core.Stats(), Network: n.layer.Stats()}
	if n.mapper != nil {
		s.PortMap = n.mapper.Stats()
	}
	return s
}
