package vl1

import (
	"net/netip"

	"ztgate/zerotier/ztnode"
)

// PlanetRoots describes the roots of a world.
func (w *World) PlanetRoots() []ztnode.PlanetRoot {
	var out []ztnode.PlanetRoot
	for _, r := range w.Roots {
		out = append(out, ztnode.PlanetRoot{Address: r.Identity.Address().String(), Identity: r.Identity.String(), Endpoints: r.Endpoints})
	}
	return out
}

// Describe describes a moon.
func (m MoonInfo) Describe() ztnode.Moon {
	if m.World == nil {
		return ztnode.Moon{ID: ztnode.MoonID(m.ID), Waiting: true, Seed: m.Seed.String(), Roots: []ztnode.PlanetRoot{}}
	}
	return ztnode.Moon{ID: ztnode.MoonID(m.ID), Timestamp: m.World.Timestamp, Roots: m.World.PlanetRoots()}
}

// Endpoints returns where a world says that its roots are.
func (w *World) Endpoints() []netip.AddrPort {
	var out []netip.AddrPort
	for _, r := range w.Roots {
		out = append(out, r.Endpoints...)
	}
	return out
}
