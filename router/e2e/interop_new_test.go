//go:build e2e

package e2e

import (
	"testing"

	"ztgate/zerotier/ztnode"
)

// A zerotier-one of protocol 13 as the client of a root, as member and as gateway, with sealed
// HELLOs and without, together with ours and with older ones. Under a root that can't
// open sealed HELLOs of nodes that it never met, none of them seals all.
func TestInteropNew(t *testing.T) {
	t.Parallel()
	if newer() == "" {
		t.Skip("set ZT_ONE_NEW to the path of a zerotier-one of release 1.16 or later to test with it")
	}
	ours := implementation{name: nameOurs}
	old := implementation{name: version(t, reference(t)), path: reference(t)}
	recent := implementation{name: version(t, newer()), path: newer()}
	mixed := []implementation{ours, ours.sealing(), recent, recent.sealing()}
	careful := []implementation{ours, ours.auto(), old, recent}
	for _, c := range []struct {
		name    string
		root    implementation
		members []implementation
		all     bool
	}{
		{"n0", ours, mixed, true},
		{"n1", ours.sealing(), mixed, false},
		{"n2", recent, careful, true},
		{"n3", old, careful, false},
		{"n4", ours, []implementation{ours.sealing(), old, recent.sealing()}, false},
	} {
		t.Run("root_"+c.root.name+"_"+c.name, func(t *testing.T) {
			controller := ours
			if c.root.seals == ztnode.SealedHelloAlways {
				controller = ours.sealing()
			}
			e := startEvery(t, c.name, c.root, controller, c.members)
			e.traffic(t)
			if !c.all {
				return
			}
			e.access(t)
			e.deauthorise(t)
			flows := e.openFlows(t)
			e.killRoot(t, flows)
			e.roam(t, flows)
			e.adHoc(t)
		})
	}
}

// A node in Go that others wrote, as member and as gateway, with sealed HELLOs and without.
func TestInteropIndependent(t *testing.T) {
	t.Parallel()
	if independent() == "" {
		t.Skip("set ZT_GO to the path of a node that is neither ours nor a zerotier-one to test with it")
	}
	ours := implementation{name: nameOurs}
	other := implementation{name: version(t, independent()), path: independent()}
	for _, c := range []struct {
		name string
		root implementation
	}{{"i0", ours}, {"i1", ours.sealing()}} {
		t.Run("root_"+c.root.name+"_"+c.name, func(t *testing.T) {
			e := startEvery(t, c.name, c.root, c.root, []implementation{ours, ours.sealing(), other, other.sealing()})
			e.traffic(t)
			if c.root.seals == ztnode.SealedHelloAlways {
				return
			}
			e.access(t)
			e.deauthorise(t)
			flows := e.openFlows(t)
			e.killRoot(t, flows)
			e.roam(t, flows)
		})
	}
}
