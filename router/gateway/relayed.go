package gateway

import (
	"cmp"
	"net/netip"
	"slices"

	"ztgate/router/control"
	"ztgate/router/gateway/hostproxy"
)

// relayedFlows lists what the host proxy carries, as flows.
func (s *service) relayedFlows(f control.FlowFilter) (out []control.Flow) {
	if s.relays == nil {
		return nil
	}
	states := map[string][2]string{"tcp": {"opening", "established"}, "udp": {"new", "answered"}}
	for _, c := range s.relays() {
		x := control.Flow{Protocol: c.Proto, State: states[c.Proto][0], Direction: "vpc_to_overlay", Relayed: true, Behind: c.Behind,
			Source: c.Client, Destination: c.At, Translated: c.Source, TranslatedDst: c.To,
			AgeSeconds: c.Age.Seconds(), IdleSeconds: c.Idle.Seconds(), BytesOut: c.Out, BytesIn: c.In}
		if c.Answered {
			x.State = states[c.Proto][1]
		}
		if r, ok := s.planned().Route(c.To.Addr()); ok {
			x.Network = r.Network
		}
		if f.To.IsValid() && !f.To.Contains(c.To.Addr()) || f.From.IsValid() && !f.From.Contains(c.Client.Addr()) ||
			f.Protocol != "" && f.Protocol != x.Protocol || f.State != "" && f.State != x.State || f.Network != 0 && f.Network != x.Network {
			continue
		}
		out = append(out, x)
	}
	return out
}

// maxRelayedClients are shown.
const maxRelayedClients = 10

// relayedClients counts what the host proxy carries by its clients.
func relayedClients(list []hostproxy.Connection) *control.Relayed {
	if len(list) == 0 {
		return nil
	}
	type who struct{ client, behind netip.Addr }
	counts := map[who]int{}
	for _, c := range list {
		counts[who{c.Client.Addr(), c.Behind}]++
	}
	out := &control.Relayed{Connections: len(list), All: len(counts)}
	for w, n := range counts {
		out.Clients = append(out.Clients, control.RelayedClient{Client: w.client, Behind: w.behind, Connections: n})
	}
	slices.SortFunc(out.Clients, func(a, b control.RelayedClient) int {
		return cmp.Or(cmp.Compare(b.Connections, a.Connections), a.Client.Compare(b.Client), a.Behind.Compare(b.Behind))
	})
	out.Clients = out.Clients[:min(len(out.Clients), maxRelayedClients)]
	return out
}
