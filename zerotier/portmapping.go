package zerotier

import (
	"context"
	"net/netip"
	"slices"

	"ztgate/zerotier/portmap"
)

// portMapper keeps ports mapped at the routers in front of this host.
type portMapper interface {
	// Run works until ctx ends and then gives the mappings back.
	Run(ctx context.Context)
	NetworkChanged()
	Mappings() []portmap.Mapping
	Stats() portmap.Stats
}

func (n *Node) newPortMapper() portMapper {
	return portmap.New(portmap.Config{
		Gateways: n.gateways,
		OpenPort: n.openMappedPort,
		// As the reference's, so that it is known in the router's list.
		Description: "ZeroTier/" + n.id.Address().String(),
		OnChange: func() {
			n.kick() // peers are told
			n.notify()
		},
		Logger: n.log,
	})
}

// gateways lists the routers that our sockets send through.
func (n *Node) gateways() ([]portmap.Gateway, error) {
	list, err := portmap.Gateways()
	bound := n.udp.LocalEndpoints()
	return slices.DeleteFunc(list, func(g portmap.Gateway) bool {
		return !slices.ContainsFunc(bound, func(ep netip.AddrPort) bool { return ep.Addr() == g.Local })
	}), err
}

// ownPort returns the i-th of the ports that follow from our address, so that they
// are the same after a restart.
func (n *Node) ownPort(i int) int {
	const low, count, apart = 20000, 65536 - 20000, 15187
	return low + int((uint64(n.id.Address())+uint64(i)*apart)%count)
}

// openMappedPort opens the tertiary port, mostly the one of the last time: a node that
// was killed finds its mapping again instead of leaving one more behind.
func (n *Node) openMappedPort() (uint16, error) {
	port, err := n.udp.OpenTertiary(n.ownPort(0))
	return uint16(port), err
}

// localEndpoints lists where we can be reached: our sockets, and the ports that
// routers map to them.
func (n *Node) localEndpoints() []netip.AddrPort {
	eps := n.udp.LocalEndpoints()
	for _, m := range n.PortMappings() {
		eps = append(eps, m.External)
	}
	return eps
}

// PortMappings lists the ports that routers in front of this host map to it.
func (n *Node) PortMappings() []portmap.Mapping {
	if n.mapper == nil {
		return nil
	}
	return n.mapper.Mappings()
}
