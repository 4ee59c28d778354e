package gateway

import (
	"errors"
	"fmt"
	"net/netip"

	"ztgate/router/config"
	"ztgate/router/fault"
	"ztgate/zerotier"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/ztnode"
)

// goNode is the node in pure Go.
type goNode struct{ *zerotier.Node }

// newGoNode opens home and the UDP sockets.
func newGoNode(cfg NodeConfig) (Node, error) {
	zc := zerotier.Config{Home: cfg.Home, Port: cfg.Port, Planet: cfg.Planet, Networks: cfg.Networks, Controller: cfg.Controller,
		LowBandwidth: cfg.Underlay.LowBandwidth, SealedHello: cfg.Underlay.SealedHello, DefaultTCPRelay: cfg.Underlay.TCPRelay == "auto",
		PortMapping: cfg.Underlay.PortMapping, Mark: cfg.Mark, Logger: cfg.Logger, OnFrames: cfg.OnFrames, OnMember: cfg.OnMember}
	if ap, err := netip.ParseAddrPort(cfg.Underlay.TCPRelay); err == nil {
		zc.TCPRelay = ap
	}
	for _, p := range cfg.Underlay.Physical {
		zc.Physical = append(zc.Physical, vl1.PhysicalNetwork{Prefix: p.Network, MTU: p.MTU, Blacklist: p.Blacklist, TrustedPath: p.TrustedPath})
	}
	for _, p := range cfg.Underlay.Virtual {
		a, err := config.MemberAddress(p.Address)
		if err != nil {
			return nil, err
		}
		if zc.Virtual == nil {
			zc.Virtual = map[identity.Address]vl1.VirtualPeer{}
		}
		zc.Virtual[a] = vl1.VirtualPeer{Try: p.Try, Blacklist: p.Blacklist}
	}
	n, err := zerotier.New(zc)
	if err != nil {
		return nil, nodeError(err)
	}
	g := &goNode{n}
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(&wireCollector{n}); err != nil {
			return nil, errors.Join(err, n.Close())
		}
	}
	return g, nil
}

// nodeError marks what the operator can set right; besides what any node may complain
// of, the errors in more.
func nodeError(err error, more ...error) error {
	for _, usage := range append(more, ztnode.ErrHomeUnusable, ztnode.ErrIdentityPermissions, ztnode.ErrIdentityMismatch,
		ztnode.ErrIdentityInvalid, ztnode.ErrPlanetInvalid) {
		if errors.Is(err, usage) {
			return fault.Usage(err)
		}
	}
	if errors.Is(err, ztnode.ErrPortInUse) {
		return fmt.Errorf("%w: choose another with --port, or --port 0 for any free one", err)
	}
	return err
}

func (g *goNode) Controller() Controller {
	c := g.Node.Controller()
	if c == nil {
		return nil
	}
	return goController{c}
}
