package gatewaytest

import (
	"context"
	"net/netip"
	"testing"

	"ztgate/netstack"
	"ztgate/router/gateway"
	"ztgate/zerotier/ztnode"
)

// VPC is the subnet that may send through the engines of [NewEngine].
var VPC = netip.MustParsePrefix("172.31.0.0/16")

// NewEngine runs a forwarding plane between a VPC in memory and a node until the
// test ends. Its networks are those of [SetNetworks].
func NewEngine(t testing.TB, node *Node) (*netstack.Engine, *Device) {
	t.Helper()
	dev := NewDevice()
	e, err := netstack.New(netstack.Config{Device: dev, Overlay: node, VPC: netstack.VPC{Sources: []netip.Prefix{VPC}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := node.Start(gateway.NodeConfig{OnFrames: e.Deliver}); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("forwarding plane: %v", err)
		}
	})
	return e, dev
}

// SetNetworks gives networks to a forwarding plane as they are, without judging
// them. IPv4 is masqueraded.
func SetNetworks(t testing.TB, e *netstack.Engine, nets ...ztnode.Network) {
	t.Helper()
	var list []netstack.Network
	for _, n := range nets {
		x := netstack.Network{ID: uint64(n.ID), MAC: n.MAC, MTU: n.MTU, Addresses: n.Addresses, Masquerade: true}
		for _, r := range n.Routes {
			x.Routes = append(x.Routes, netstack.Route(r))
		}
		list = append(list, x)
	}
	if err := e.SetNetworks(list); err != nil {
		t.Fatal(err)
	}
}
