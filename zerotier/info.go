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
)

// Info describes the node.
type Info struct {
	Address         string
	Identity        string // public text form
	Online          bool
	Version         string // announced to peers
	PrimaryPort     int    // UDP; this and the following: 0 = not open
	SecondaryPort   int
	TertiaryPort    int // the one that routers map
	PlanetID        uint64
	PlanetTimestamp int64 // ms
	Root            bool  // the planet lists us
	Controller      bool
	Surface         []netip.AddrPort // own external addresses as others see them
	Listening       []netip.AddrPort
	PortMapping     bool // routers are asked to map a port
	PortMappings    []portmap.Mapping
}

// Route is a managed route.
type Route struct {
	Target netip.Prefix
	Via    netip.Addr // invalid = directly on the network
}

// NetworkInfo describes a joined network.
type NetworkInfo struct {
	ID                uint64
	Name              string
	Status            string // chapter 04 §15.4: OK, REQUESTING_CONFIGURATION, ACCESS_DENIED, ...
	Type              string // PRIVATE or PUBLIC
	MAC               [6]byte
	MTU               int
	Addresses         []netip.Prefix
	Routes            []Route
	DNSDomain         string
	DNSServers        []netip.Addr
	Bridge, Broadcast bool
	Revision          uint64
	CertificateExpiry time.Time // zero without certificate
	AuthURL           string
}

// PeerInfo describes a peer.
type PeerInfo struct {
	Address     string
	Role        string        // LEAF, MOON or PLANET
	Version     string        // "-" if unknown
	Latency     time.Duration // of the preferred path, < 0 = unknown
	Relayed     bool
	Suite       int // cipher suite of what we send
	Paths       []PathInfo
	LastReceive time.Time
}

// PathInfo describes a path.
type PathInfo struct {
	Endpoint              netip.AddrPort
	Preferred, Expired    bool
	LastSend, LastReceive time.Time
	Latency               time.Duration // < 0 = unknown
}

// Stats are counters of the node's layers.
type Stats struct {
	Wire    transport.Stats
	VL1     vl1.Stats
	Network network.Stats
	PortMap portmap.Stats
}

// Info describes the node.
func (n *Node) Info() Info {
	planet := n.core.Planet()
	first, second, third := n.udp.PortNumbers()
	return Info{
		Address: n.id.Address().String(), Identity: n.id.String(), Online: n.core.Online(),
		Version:     fmt.Sprintf("%d.%d.%d", VersionMajor, VersionMinor, VersionRevision),
		PrimaryPort: first, SecondaryPort: second, TertiaryPort: third, PlanetID: planet.ID, PlanetTimestamp: planet.Timestamp,
		Root: n.core.IsRoot(), Controller: n.ctl != nil,
		Surface: n.core.Surface(), Listening: n.udp.LocalEndpoints(),
		PortMapping: n.mapper != nil, PortMappings: n.PortMappings(),
	}
}

// Peers describes all known peers, ordered by address.
func (n *Node) Peers() []PeerInfo {
	var out []PeerInfo
	for _, p := range n.core.Peers() {
		info := PeerInfo{
			Address: p.Address.String(), Role: p.Role.String(), Version: "-", Latency: p.Latency,
			Relayed: p.Relayed, Suite: int(p.Suite), LastReceive: p.LastReceive,
		}
		if p.ProtocolVersion != 0 {
			info.Version = fmt.Sprintf("%d.%d.%d", p.Version[0], p.Version[1], p.Version[2])
		}
		for _, pa := range p.Paths {
			info.Paths = append(info.Paths, PathInfo(pa))
		}
		out = append(out, info)
	}
	return out
}

func networkInfo(s network.Snapshot) NetworkInfo {
	info := NetworkInfo{ID: uint64(s.ID), Status: s.Status.String(), Type: "PRIVATE", MAC: s.MAC, MTU: vl2.DefaultMTU, AuthURL: s.AuthURL}
	c := s.Config
	if c == nil {
		return info
	}
	info.Name, info.MTU, info.Revision = c.Name, c.MTU, c.Revision
	info.Addresses = c.Addresses
	for _, r := range c.Routes {
		info.Routes = append(info.Routes, Route{Target: r.Target, Via: r.Via})
	}
	info.DNSDomain, info.DNSServers = c.DNS.Domain, c.DNS.Servers
	info.Broadcast = c.Broadcast()
	info.Bridge = c.IsBridge(c.Member)
	if c.Public {
		info.Type = "PUBLIC"
	}
	if c.COM != nil {
		info.CertificateExpiry = time.UnixMilli(c.COM.Timestamp() + c.COM.TimeDelta())
	}
	return info
}

// Networks describes the joined networks.
func (n *Node) Networks() []NetworkInfo {
	var out []NetworkInfo
	for _, s := range n.layer.Networks() {
		out = append(out, networkInfo(s))
	}
	return out
}

// Network describes one joined network.
func (n *Node) Network(nwid uint64) (NetworkInfo, bool) {
	s, ok := n.layer.Network(vl2.NetworkID(nwid))
	if !ok {
		return NetworkInfo{}, false
	}
	return networkInfo(s), true
}

// Stats returns the counters of all layers.
func (n *Node) Stats() Stats {
	s := Stats{Wire: n.udp.Stats(), VL1: n.core.Stats(), Network: n.layer.Stats()}
	if n.mapper != nil {
		s.PortMap = n.mapper.Stats()
	}
	return s
}
