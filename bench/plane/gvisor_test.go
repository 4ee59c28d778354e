package plane

import (
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// gvisorRouter forwards between two links and masquerades, all by gVisor.
type gvisorRouter struct{ vpc, overlay *channel.Endpoint }

func newGvisorRouter(b *testing.B) *gvisorRouter {
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
		HandleLocal:        true,
	})
	b.Cleanup(s.Close)
	r := &gvisorRouter{vpc: channel.New(256, 2800, ""), overlay: channel.New(256, 2800, "")}
	must := func(err tcpip.Error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	must(s.CreateNICWithOptions(1, r.vpc, stack.NICOptions{Name: "vpc"}))
	must(s.CreateNICWithOptions(2, r.overlay, stack.NICOptions{Name: "overlay"}))
	for nic, a := range map[tcpip.NICID][4]byte{1: {172, 16, 255, 1}, 2: {10, 0, 0, 1}} {
		must(s.AddProtocolAddress(nic, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber,
			AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(a), PrefixLen: 24}}, stack.AddressProperties{}))
	}
	subnet := func(a, m [4]byte) tcpip.Subnet {
		n, err := tcpip.NewSubnet(tcpip.AddrFrom4(a), tcpip.MaskFromBytes(m[:]))
		if err != nil {
			b.Fatal(err)
		}
		return n
	}
	s.SetRouteTable([]tcpip.Route{
		{Destination: subnet([4]byte{10}, [4]byte{255, 255, 255, 0}), NIC: 2},
		{Destination: subnet([4]byte{172, 16}, [4]byte{255, 240, 0, 0}), NIC: 1},
	})
	must(s.SetForwardingDefaultAndAllNICs(ipv4.ProtocolNumber, true))
	accept := &stack.AcceptTarget{NetworkProtocol: header.IPv4ProtocolNumber}
	table := stack.Table{
		Rules: []stack.Rule{
			{Target: accept},
			{Filter: stack.IPHeaderFilter{OutputInterface: "overlay"}, Target: &stack.MasqueradeTarget{NetworkProtocol: header.IPv4ProtocolNumber}},
			{Target: accept},
		},
		BuiltinChains: [stack.NumHooks]int{stack.Prerouting: 0, stack.Input: 0, stack.Forward: stack.HookUnset, stack.Output: 0, stack.Postrouting: 1},
		Underflows:    [stack.NumHooks]int{stack.Prerouting: 0, stack.Input: 0, stack.Forward: stack.HookUnset, stack.Output: 0, stack.Postrouting: 2},
	}
	s.IPTables().ReplaceTable(stack.NATID, table, false)
	return r
}

// pass injects a packet and takes it out on the other side.
func pass(b *testing.B, from, to *channel.Endpoint, p []byte) *stack.PacketBuffer {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(p)})
	from.InjectInbound(ipv4.ProtocolNumber, pkt)
	pkt.DecRef()
	out := to.Read()
	if out == nil {
		b.Fatal("gVisor lost a packet")
	}
	return out
}

// BenchmarkGvisorMasquerade is the reference: the same packets through gVisor's
// own forwarding and iptables.
func BenchmarkGvisorMasquerade(b *testing.B) {
	for _, n := range []int{1, 10000} {
		r := newGvisorRouter(b)
		out, in := make([][]byte, n), make([][]byte, n)
		for i := range n {
			out[i] = packet(17, client(i, false), server4, 0, 0, 0, packetSize)
			pkt := pass(b, r.vpc, r.overlay, out[i])
			v := pkt.ToView()
			in[i] = append([]byte(nil), v.AsSlice()...)
			v.Release()
			pkt.DecRef()
			turn(in[i])
		}
		for _, dir := range []struct {
			name     string
			from, to *channel.Endpoint
			packets  [][]byte
		}{{"to_overlay", r.vpc, r.overlay, out}, {"to_vpc", r.overlay, r.vpc, in}} {
			b.Run(dir.name+map[int]string{1: "/ipv4/flows=1", 10000: "/ipv4/flows=10000"}[n], func(b *testing.B) {
				b.SetBytes(packetSize)
				b.ReportAllocs()
				start := cpu()
				for i := range b.N {
					pass(b, dir.from, dir.to, dir.packets[i%n]).DecRef()
				}
				reportCPU(b, start)
			})
		}
	}
}

// turn makes the reply of a UDP packet: sums don't change when both ends are
// exchanged.
func turn(p []byte) {
	var t [4]byte
	copy(t[:], p[12:16])
	copy(p[12:16], p[16:20])
	copy(p[16:20], t[:])
	copy(t[:2], p[20:22])
	copy(p[20:22], p[22:24])
	copy(p[22:24], t[:2])
}
