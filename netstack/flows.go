package netstack

import (
	"fmt"
	"net/netip"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
)

func protocolName(proto uint8) string {
	switch proto {
	case ipkt.TCP:
		return "tcp"
	case ipkt.UDP:
		return "udp"
	case ipkt.ICMP, ipkt.ICMPv6:
		return "icmp"
	}
	return fmt.Sprint(proto)
}

// FlowStates lists the states that a flow can have.
func FlowStates() []string { return nat.States() }

func (q *FlowFilter) matches(i *FlowInfo) bool {
	return !(q.To.IsValid() && !q.To.Contains(i.Server.Addr()) || q.From.IsValid() && !q.From.Contains(i.Client.Addr()) ||
		q.Protocol != "" && q.Protocol != i.Protocol || q.State != "" && q.State != i.State || q.Network != 0 && q.Network != i.Network)
}

// Flows lists live flows.
func (e *Engine) Flows(q FlowFilter) (out []FlowInfo) {
	s := e.set.Load()
	networks := make([]uint64, len(s.numbers))
	for id, slot := range s.numbers {
		networks[slot] = id
	}
	w := e.worker()
	defer e.release(w)
	at := func(t int64) time.Time { return e.start.Add(time.Duration(t)) }
	e.table.Walk(func(i nat.Info) bool {
		f := FlowInfo{
			Protocol: protocolName(i.Proto()), State: i.State, FromVPC: i.From() == VPCSide,
			Client:   netip.AddrPortFrom(ipkt.Addr(i.Client()), i.ClientPort()),
			Server:   netip.AddrPortFrom(ipkt.Addr(i.Server()), i.ServerPort()),
			External: netip.AddrPortFrom(ipkt.Addr(i.External()), i.ExtPort()),
			Target:   netip.AddrPortFrom(ipkt.Addr(i.Target()), i.TargetPort()),
			Created:  at(i.Created), LastSeen: at(i.Last),
		}
		if int(i.Slot) < len(networks) {
			f.Network = networks[i.Slot]
		}
		f.PacketsOut, f.BytesOut = i.Counters(nat.FromClient)
		f.PacketsIn, f.BytesIn = i.Counters(nat.FromServer)
		if q.matches(&f) {
			out = append(out, f)
		}
		return true
	})
	return out
}

// Greedy lists the clients, and the networks of several clients, that have most flows: at
// most n of each, most first. It looks at all flows, so it is for people who ask, not
// for every scrape.
func (e *Engine) Greedy(n int) (clients, networks []Greedy) {
	s := e.set.Load()
	ids := make([]uint64, len(s.numbers))
	for id, slot := range s.numbers {
		ids[slot] = id
	}
	w := e.worker()
	defer e.release(w)
	list := func(in []nat.Greedy) []Greedy {
		out := make([]Greedy, 0, len(in))
		for _, g := range in {
			x := Greedy{Prefix: g.Prefix, FromVPC: g.Side == VPCSide, Flows: g.Flows, HalfOpen: g.HalfOpen,
				Ports: g.Ports, Clients: g.Clients, Evicted: g.Evicted, Refused: g.Refused}
			if !x.FromVPC && int(g.Slot) < len(ids) {
				x.Network = ids[g.Slot]
			}
			out = append(out, x)
		}
		return out
	}
	c, nets := e.table.Greedy(n)
	return list(c), list(nets)
}
