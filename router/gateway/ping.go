package gateway

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

// dialer reaches overlay addresses.
type dialer interface {
	Ping(ctx context.Context, dst netip.Addr) (time.Duration, error)
	DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error)
}

// dial connects through the overlay.
func (s *service) dial(ctx context.Context, network string, dst netip.AddrPort) (net.Conn, error) {
	if network == "udp" {
		return s.plane.DialUDP(ctx, dst)
	}
	return s.plane.DialTCP(ctx, dst)
}

// pingTimeout bounds one ping unless the caller says otherwise.
const pingTimeout = 5 * time.Second

func (s *service) ping(ctx context.Context, req control.PingRequest) (control.Ping, error) {
	if s.mode == control.ModeNode {
		return control.Ping{}, fault.Usagef("this process is in no network: ask a gateway or a member")
	}
	if req.Port < 0 || req.Port > 65535 {
		return control.Ping{}, fault.Usagef("port %d: give a number from 1 to 65535", req.Port)
	}
	timeout := pingTimeout
	if limit := int(control.MaxPingTimeout.Milliseconds()); req.TimeoutMS < 0 || req.TimeoutMS > limit {
		return control.Ping{}, fault.Usagef("timeout of %d ms: give a number from 1 to %d", req.TimeoutMS, limit)
	} else if req.TimeoutMS > 0 {
		timeout = time.Duration(req.TimeoutMS) * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	addr, err := s.lookup(ctx, req.Host)
	if err != nil {
		return control.Ping{}, err
	}
	p := control.Ping{Schema: control.Schema, Address: addr, Port: req.Port}
	network, hop, ok := s.networkOf(addr)
	if !ok {
		return control.Ping{}, fmt.Errorf("ping %s: no joined network has a route to it: see ztgate networks", addr)
	}
	p.Network = network.String()
	began := time.Now()
	if req.Port == 0 {
		d, err := s.targets.dialer.Ping(ctx, addr)
		if err != nil {
			return control.Ping{}, fmt.Errorf("ping %s: %w", addr, err)
		}
		p.MS = milliseconds(d)
	} else {
		c, err := s.targets.dialer.DialTCP(ctx, netip.AddrPortFrom(addr, uint16(req.Port)))
		if err != nil {
			return control.Ping{}, fmt.Errorf("connect to %s: %w", netip.AddrPortFrom(addr, uint16(req.Port)), err)
		}
		p.MS = milliseconds(time.Since(began))
		_ = c.Close()
	}
	s.addPath(&p, network, hop)
	return p, nil
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// lookup returns the address of a host that somebody names: as in the configuration, the
// first one, IPv4 before IPv6.
func (s *service) lookup(ctx context.Context, host string) (netip.Addr, error) {
	if a, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return a.Unmap(), nil
	}
	find := s.find
	if find == nil {
		find = nameServers{networks: s.networks, allowed: s.allowsDNS, dial: dialHost}.lookup
	}
	list, _, err := find(ctx, strings.ToLower(strings.TrimSuffix(host, ".")))
	if err == nil {
		list, err = usableAnswer(list)
	}
	if err != nil {
		return netip.Addr{}, fmt.Errorf("look up %q: %w", host, err)
	}
	return list[0].Unmap(), nil
}

// allowsDNS reports whether a network's name servers are asked.
func (s *service) allowsDNS(id ztnode.NetworkID) bool { return s.config().Network(id).AllowDNS }

// networkOf returns the network that an address belongs to, and the next hop on it.
func (s *service) networkOf(a netip.Addr) (id ztnode.NetworkID, hop netip.Addr, ok bool) {
	r, ok := s.planned().Route(a)
	if !ok {
		return 0, a, false
	}
	if r.Via.IsValid() {
		return r.Network, r.Via, true
	}
	return r.Network, a, true
}

// neighbours is implemented by what can say which MAC an address has.
type neighbours interface {
	Neighbour(id ztnode.NetworkID, a netip.Addr) (ztnode.MAC, bool)
}

// addPath says which peer the frames to a next hop go to, and how.
func (s *service) addPath(p *control.Ping, id ztnode.NetworkID, hop netip.Addr) {
	if s.neighbours == nil {
		return
	}
	mac, ok := s.neighbours.Neighbour(id, hop)
	if !ok {
		return
	}
	p.Peer = ztnode.AddressOf(id, mac).String()
	for _, peer := range s.peers() {
		if peer.Address == p.Peer {
			p.Path = peer.Link
		}
	}
}
