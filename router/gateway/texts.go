package gateway

import "ztgate/zerotier/ztnode"

// clean is a node whose texts from the network are fit for a terminal, a log and a
// page. All that is shown of a node comes through it.
type clean struct{ Node }

// Networks implements [Node].
func (c clean) Networks() []ztnode.Network {
	list := c.Node.Networks()
	for i := range list {
		list[i] = list[i].Clean()
	}
	return list
}

// Peers implements [Node].
func (c clean) Peers() []ztnode.Peer {
	list := c.Node.Peers()
	for i := range list {
		list[i] = list[i].Clean()
	}
	return list
}

// orbiter returns the node if it can use moons.
func (c clean) orbiter() (orbiter, bool) {
	o, ok := c.Node.(orbiter)
	return cleanOrbiter{o}, ok
}

// leftOut lists networks that home remembers but that are not joined.
func (c clean) leftOut() []ztnode.NetworkID {
	if n, ok := c.Node.(interface{ LeftOut() []ztnode.NetworkID }); ok {
		return n.LeftOut()
	}
	return nil
}

type cleanOrbiter struct{ orbiter }

// Moons implements [orbiter].
func (c cleanOrbiter) Moons() []ztnode.Moon {
	list := c.orbiter.Moons()
	for i := range list {
		list[i] = list[i].Clean()
	}
	return list
}
