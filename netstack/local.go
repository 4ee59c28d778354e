package netstack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
)

const localNIC tcpip.NICID = 1

const (
	localMTU   = 1354 // fits every path without fragments
	localQueue = 512
)

// localStack is the gateway's own host: it owns the gateway's addresses, answers
// pings and makes connections. It sees IP packets only; the engine routes
// them.
type localStack struct {
	s    *stack.Stack
	link *channel.Endpoint
	send func(b []byte)

	mu    sync.Mutex // guards addrs
	addrs map[netip.Addr]tcpip.ProtocolAddress

	ident  atomic.Uint32
	Panics atomic.Uint64 // of the stack on a packet, which is then lost
}

func newLocalStack(send func([]byte)) (*localStack, error) {
	l := &localStack{send: send, addrs: make(map[netip.Addr]tcpip.ProtocolAddress)}
	l.s = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
		HandleLocal:        true,
	})
	l.link = channel.New(localQueue, localMTU, "")
	if err := l.s.CreateNICWithOptions(localNIC, l.link, stack.NICOptions{Name: "local"}); err != nil {
		return nil, fmt.Errorf("create local stack: %v", err)
	}
	l.s.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: localNIC},
		{Destination: header.IPv6EmptySubnet, NIC: localNIC},
	})
	if err := l.s.SetPortRange(nat.LocalPortFirst, nat.LocalPortLast); err != nil {
		return nil, fmt.Errorf("create local stack: port range: %v", err)
	}
	return l, nil
}

// setAddresses makes list the addresses of the host.
func (l *localStack) setAddresses(list []netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range list {
		if _, ok := l.addrs[a]; ok {
			continue
		}
		proto := ipv4.ProtocolNumber
		if a.Is6() {
			proto = ipv6.ProtocolNumber
		}
		pa := tcpip.ProtocolAddress{Protocol: proto, AddressWithPrefix: tcpip.AddrFromSlice(a.AsSlice()).WithPrefix()}
		if err := l.s.AddProtocolAddress(localNIC, pa, stack.AddressProperties{}); err != nil {
			return fmt.Errorf("add address %s: %v", a, err)
		}
		l.addrs[a] = pa
	}
	for a, pa := range l.addrs {
		if !slices.Contains(list, a) {
			l.s.RemoveAddress(localNIC, pa.AddressWithPrefix.Address)
			delete(l.addrs, a)
		}
	}
	return nil
}

// expects reports whether a TCP segment or UDP datagram belongs to something of
// ours: a connection, or a socket.
func (l *localStack) expects(v *ipkt.View) bool {
	network, addr := ipv4.ProtocolNumber, func(a [16]byte) tcpip.Address { return tcpip.AddrFrom4([4]byte(a[12:])) }
	if v.V6 {
		network, addr = ipv6.ProtocolNumber, tcpip.AddrFrom16
	}
	transport := tcp.ProtocolNumber
	if v.Proto == ipkt.UDP {
		transport = udp.ProtocolNumber
	}
	id := stack.TransportEndpointID{LocalPort: v.DPort, LocalAddress: addr(v.Dst), RemotePort: v.SPort, RemoteAddress: addr(v.Src)}
	return l.s.FindTransportEndpoint(network, transport, id, localNIC) != nil
}

// inject hands a checked packet to the stack; false if that panicked.
func (l *localStack) inject(b []byte) (ok bool) {
	defer func() {
		if recover() != nil {
			l.Panics.Add(1)
			ok = false
		}
	}()
	proto := ipv4.ProtocolNumber
	if b[0]>>4 == 6 {
		proto = ipv6.ProtocolNumber
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	l.link.InjectInbound(proto, pkt)
	pkt.DecRef()
	return true
}

// run passes on what the stack sends until ctx ends.
func (l *localStack) run(ctx context.Context) {
	for {
		pkt := l.link.ReadContext(ctx)
		if pkt == nil {
			break
		}
		view := pkt.ToView()
		pkt.DecRef()
		l.send(append([]byte(nil), view.AsSlice()...))
		view.Release()
	}
	l.link.Close()
	l.s.Close()
}

// source returns our address on the network to speak to dst from: one of the same
// prefix if there is one (as rule 8 of RFC 6724 §5 has it), since a host need have no
// route to others.
func (at *attachment) source(dst netip.Addr) netip.Addr {
	for _, a := range at.Addresses {
		if a.Contains(dst) {
			return a.Addr()
		}
	}
	return at.address(dst.Is6())
}

// localSource returns the gateway's address on the network by which dst is reached.
func (e *Engine) localSource(dst netip.Addr) (tcpip.FullAddress, tcpip.NetworkProtocolNumber, error) {
	at, _ := e.set.Load().route(dst)
	if at == nil {
		return tcpip.FullAddress{}, 0, fmt.Errorf("no network has a route to %s", dst)
	}
	src, proto := at.source(dst), ipv4.ProtocolNumber
	if dst.Is6() {
		proto = ipv6.ProtocolNumber
	}
	if !src.IsValid() {
		return tcpip.FullAddress{}, 0, fmt.Errorf("network %s gave us no address of the family of %s", networkLabel(at.ID), dst)
	}
	return tcpip.FullAddress{NIC: localNIC, Addr: tcpip.AddrFromSlice(src.AsSlice())}, proto, nil
}

// DialTCP connects to an overlay address from the gateway's own.
func (e *Engine) DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	src, proto, err := e.localSource(dst.Addr())
	if err != nil {
		return nil, err
	}
	to := tcpip.FullAddress{NIC: localNIC, Addr: tcpip.AddrFromSlice(dst.Addr().AsSlice()), Port: dst.Port()}
	c, err := gonet.DialTCPWithBind(ctx, e.local.s, src, to, proto)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// DialUDP returns a socket of the gateway's own for an overlay address. Its reads
// fail once the peer says that nobody listens.
func (e *Engine) DialUDP(_ context.Context, dst netip.AddrPort) (net.Conn, error) {
	src, proto, err := e.localSource(dst.Addr())
	if err != nil {
		return nil, err
	}
	to := tcpip.FullAddress{NIC: localNIC, Addr: tcpip.AddrFromSlice(dst.Addr().AsSlice()), Port: dst.Port()}
	c, err := gonet.DialUDP(e.local.s, &src, &to, proto)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Ping sends an echo request to an overlay address and waits for the reply.
func (e *Engine) Ping(ctx context.Context, dst netip.Addr) (time.Duration, error) {
	src, proto, err := e.localSource(dst)
	if err != nil {
		return 0, err
	}
	var wq waiter.Queue
	transport, typ := icmp.ProtocolNumber4, byte(8)
	if dst.Is6() {
		transport, typ = icmp.ProtocolNumber6, 128
	}
	ep, terr := e.local.s.NewEndpoint(transport, proto, &wq)
	if terr != nil {
		return 0, fmt.Errorf("ping %s: %v", dst, terr)
	}
	defer ep.Close()
	src.Port = uint16(nat.LocalPortFirst + e.local.ident.Add(1)%(nat.LocalPortLast-nat.LocalPortFirst))
	if terr := ep.Bind(src); terr != nil {
		return 0, fmt.Errorf("ping %s: %v", dst, terr)
	}
	entry, notify := waiter.NewChannelEntry(waiter.ReadableEvents)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	msg := make([]byte, 8+56)
	msg[0] = typ
	binary.BigEndian.PutUint16(msg[6:], 1)
	start := time.Now()
	to := tcpip.FullAddress{NIC: localNIC, Addr: tcpip.AddrFromSlice(dst.AsSlice())}
	if _, terr := ep.Write(&sliceReader{msg}, tcpip.WriteOptions{To: &to}); terr != nil {
		return 0, fmt.Errorf("ping %s: %v", dst, terr)
	}
	for {
		if _, terr := ep.Read(discard{}, tcpip.ReadOptions{}); terr == nil {
			return time.Since(start), nil
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return 0, errors.New("no answer in time")
			}
			return 0, ctx.Err()
		case <-notify:
		}
	}
}

// sliceReader gives a message to the stack.
type sliceReader struct{ b []byte }

// Read implements [tcpip.Payloader].
func (r *sliceReader) Read(p []byte) (int, error) {
	n := copy(p, r.b)
	r.b = r.b[n:]
	return n, nil
}

// Len implements [tcpip.Payloader].
func (r *sliceReader) Len() int { return len(r.b) }

type discard struct{}

// Write implements [io.Writer].
func (discard) Write(p []byte) (int, error) { return len(p), nil }

func networkLabel(id uint64) string { return fmt.Sprintf("%016x", id) }
