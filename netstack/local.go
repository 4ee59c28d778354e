package netstack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
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

const (
	localMTU   = 1354 // fits every path without fragments
	localQueue = 512
	timeWait   = 5 * time.Second
)

// Interfaces of the local stack: one for the VPC and one for each network, since
// the same address may be a host of several.
const (
	vpcNIC   tcpip.NICID = 1
	firstNIC tcpip.NICID = 2 // of the network with the number 0
)

// nic is the interface of the local stack on a network; nil means the VPC.
func (at *attachment) nic() tcpip.NICID {
	if at == nil {
		return vpcNIC
	}
	return firstNIC + tcpip.NICID(at.slot)
}

// localStack is the gateway's own host: it owns the gateway's addresses, answers
// pings and makes connections. It sees IP packets only; the engine routes
// them.
type localStack struct {
	s     *stack.Stack
	send  func(nic tcpip.NICID, b []byte)
	ready chan struct{} // something waits in a queue

	ended sync.Once
	mu    sync.Mutex // guards nics
	nics  map[tcpip.NICID]*localNIC

	anybody bool
	closed  chan struct{} // by close

	ident  atomic.Uint32
	Panics atomic.Uint64 // of the stack on a packet, which is then lost
}

type localNIC struct {
	link  *channel.Endpoint
	addrs map[netip.Addr]tcpip.ProtocolAddress
}

func newLocalStack(send func(tcpip.NICID, []byte)) (*localStack, error) {
	return newStack(send, false)
}

// newStack makes a stack; anybody says that it takes packets to all addresses, and sends
// from them.
func newStack(send func(tcpip.NICID, []byte), anybody bool) (*localStack, error) {
	l := &localStack{send: send, anybody: anybody, ready: make(chan struct{}, 1), closed: make(chan struct{}), nics: make(map[tcpip.NICID]*localNIC)}
	l.s = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
		HandleLocal:        !anybody,
	})
	if err := l.s.SetPortRange(nat.LocalPortFirst, nat.LocalPortLast); err != nil {
		return nil, fmt.Errorf("create local stack: port range: %v", err)
	}
	// The range is small: connections that have ended mustn't hold its ports for a
	// minute (as net.ipv4.tcp_tw_reuse has it).
	reuse := tcpip.TCPTimeWaitReuseGlobal
	if err := l.s.SetTransportProtocolOption(tcp.ProtocolNumber, &reuse); err != nil {
		return nil, fmt.Errorf("create local stack: reuse of ports: %v", err)
	}
	// Nor may those that others open and hosts end first pile up: 4 KB each.
	wait := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	if err := l.s.SetTransportProtocolOption(tcp.ProtocolNumber, &wait); err != nil {
		return nil, fmt.Errorf("create local stack: time of ended connections: %v", err)
	}
	return l, nil
}

// WriteNotify implements [channel.Notification].
func (l *localStack) WriteNotify() {
	select {
	case l.ready <- struct{}{}:
	default: // it is known already
	}
}

// addNIC makes an interface. It stays: a network that comes back gets the same one.
func (l *localStack) addNIC(id tcpip.NICID) (*localNIC, error) {
	n := &localNIC{link: channel.New(localQueue, localMTU, ""), addrs: make(map[netip.Addr]tcpip.ProtocolAddress)}
	n.link.AddNotify(l)
	if err := l.s.CreateNIC(id, n.link); err != nil {
		return nil, fmt.Errorf("create interface %d of the local stack: %v", id, err)
	}
	if l.anybody {
		if err := l.s.SetPromiscuousMode(id, true); err != nil {
			return nil, fmt.Errorf("interface %d of the local stack: %v", id, err)
		}
		if err := l.s.SetSpoofing(id, true); err != nil {
			return nil, fmt.Errorf("interface %d of the local stack: %v", id, err)
		}
	}
	l.s.AddRoute(tcpip.Route{Destination: header.IPv4EmptySubnet, NIC: id})
	l.s.AddRoute(tcpip.Route{Destination: header.IPv6EmptySubnet, NIC: id})
	l.nics[id] = n
	return n, nil
}

// setAddresses makes want the addresses of the host, by interface.
func (l *localStack) setAddresses(want map[tcpip.NICID][]netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, list := range want {
		n := l.nics[id]
		if n == nil {
			var err error
			if n, err = l.addNIC(id); err != nil {
				return err
			}
		}
		for _, a := range list {
			if err := l.addAddress(id, n, a); err != nil {
				return err
			}
		}
	}
	for id, n := range l.nics {
		for a, pa := range n.addrs {
			if !slices.Contains(want[id], a) {
				l.s.RemoveAddress(id, pa.AddressWithPrefix.Address)
				delete(n.addrs, a)
			}
		}
	}
	return nil
}

func (l *localStack) addAddress(id tcpip.NICID, n *localNIC, a netip.Addr) error {
	if _, ok := n.addrs[a]; ok {
		return nil
	}
	proto := ipv4.ProtocolNumber
	if a.Is6() {
		proto = ipv6.ProtocolNumber
	}
	pa := tcpip.ProtocolAddress{Protocol: proto, AddressWithPrefix: tcpip.AddrFromSlice(a.AsSlice()).WithPrefix()}
	if err := l.s.AddProtocolAddress(id, pa, stack.AddressProperties{}); err != nil {
		return fmt.Errorf("add address %s: %v", a, err)
	}
	n.addrs[a] = pa
	return nil
}

// only reports whether an address is the only one of its family on its interface,
// which connections then come from unbound.
func (l *localStack) only(a tcpip.FullAddress) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.nics[a.NIC]
	if n == nil {
		return false
	}
	count := 0
	for x := range n.addrs {
		if x.BitLen() == 8*a.Addr.Len() {
			count++
		}
	}
	return count == 1
}

// link returns the link of an interface, nil if there is none.
func (l *localStack) link(id tcpip.NICID) *channel.Endpoint {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := l.nics[id]; n != nil {
		return n.link
	}
	return nil
}

// expects reports whether a TCP segment or UDP datagram on an interface belongs to
// something of ours: a connection, or a socket.
func (l *localStack) expects(nic tcpip.NICID, v *ipkt.View) bool {
	network, addr := ipv4.ProtocolNumber, func(a [16]byte) tcpip.Address { return tcpip.AddrFrom4([4]byte(a[12:])) }
	if v.V6 {
		network, addr = ipv6.ProtocolNumber, tcpip.AddrFrom16
	}
	transport := tcp.ProtocolNumber
	if v.Proto == ipkt.UDP {
		transport = udp.ProtocolNumber
	}
	id := stack.TransportEndpointID{LocalPort: v.DPort, LocalAddress: addr(v.Dst), RemotePort: v.SPort, RemoteAddress: addr(v.Src)}
	return l.s.FindTransportEndpoint(network, transport, id, nic) != nil
}

// inject hands a checked packet to the stack; false if that panicked.
func (l *localStack) inject(nic tcpip.NICID, b []byte) (ok bool) {
	defer func() {
		if recover() != nil {
			l.Panics.Add(1)
			ok = false
		}
	}()
	link := l.link(nic)
	if link == nil {
		return false
	}
	proto := ipv4.ProtocolNumber
	if b[0]>>4 == 6 {
		proto = ipv6.ProtocolNumber
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	link.InjectInbound(proto, pkt)
	pkt.DecRef()
	return true
}

// run passes on what the stack sends until ctx ends.
func (l *localStack) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			l.close()
			return
		case <-l.ready:
			l.sendAll()
		}
	}
}

// close frees the stack; closing twice is harmless.
func (l *localStack) close() {
	l.ended.Do(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, n := range l.nics {
			n.link.Close()
		}
		l.s.Close()
		close(l.closed)
	})
}

// sendAll empties the queues.
func (l *localStack) sendAll() {
	l.mu.Lock()
	nics := maps.Clone(l.nics)
	l.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(nics)) {
		n := nics[id]
		for pkt := n.link.Read(); pkt != nil; pkt = n.link.Read() {
			view := pkt.ToView()
			l.send(id, slices.Clone(view.AsSlice()))
			view.Release()
			pkt.DecRef()
		}
	}
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

// localEnds returns the ends of a connection of our own to an overlay host: our
// address on its network, and its address there.
func (e *Engine) localEnds(to netip.AddrPort) (src, dst tcpip.FullAddress, proto tcpip.NetworkProtocolNumber, err error) {
	h := e.set.Load().fromGateway(to.Addr())
	if h.at == nil {
		return src, dst, 0, fmt.Errorf("no network has a route to %s", to.Addr())
	}
	a := h.at.source(h.addr)
	if proto = ipv4.ProtocolNumber; h.addr.Is6() {
		proto = ipv6.ProtocolNumber
	}
	if !a.IsValid() {
		return src, dst, 0, fmt.Errorf("network %s gave us no address of the family of %s", networkLabel(h.at.ID), to.Addr())
	}
	src = tcpip.FullAddress{NIC: h.at.nic(), Addr: tcpip.AddrFromSlice(a.AsSlice())}
	dst = tcpip.FullAddress{NIC: h.at.nic(), Addr: tcpip.AddrFromSlice(h.addr.AsSlice()), Port: to.Port()}
	return src, dst, proto, nil
}

// DialTCP connects to an overlay host from the gateway's own address: by its address
// there or its alias in the VPC, whatever the VPC has at that address.
func (e *Engine) DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	from, to, proto, err := e.localEnds(dst)
	if err != nil {
		return nil, err
	}
	if e.local.only(from) {
		from.Addr = tcpip.Address{}
	}
	c, err := dialTCP(ctx, e.local.s, from, to, proto)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// DialUDP returns a socket of the gateway's own for an overlay host, which is found
// as by [Engine.DialTCP]. Its reads fail once the peer says that nobody listens.
func (e *Engine) DialUDP(_ context.Context, dst netip.AddrPort) (net.Conn, error) {
	from, to, proto, err := e.localEnds(dst)
	if err != nil {
		return nil, err
	}
	c, err := dialUDP(e.local.s, from, to, proto)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// ErrNoAnswer says that nobody answered an echo request in time.
var ErrNoAnswer = errors.New("no answer in time")

// Ping sends an echo request to an overlay host, which is found as by
// [Engine.DialTCP], and waits for the reply.
func (e *Engine) Ping(ctx context.Context, dst netip.Addr) (time.Duration, error) {
	p, err := e.ping(dst)
	if err != nil {
		return 0, err
	}
	defer p.Close()
	return p.ask(ctx)
}

// ask sends the request and waits for the reply.
func (p *Ping) ask(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	if err := p.send(); err != nil {
		return 0, err
	}
	for !p.Answered() {
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return 0, ErrNoAnswer
			}
			return 0, ctx.Err()
		case <-p.notify:
		}
	}
	return time.Since(start), nil
}

// Ping is an echo request.
type Ping struct {
	ep     tcpip.Endpoint
	wq     waiter.Queue
	entry  waiter.Entry
	notify chan struct{} // gets a value when something has come
	dst    netip.Addr
	to     tcpip.FullAddress
	typ    byte
}

// ping prepares an echo request.
func (e *Engine) ping(dst netip.Addr) (*Ping, error) {
	src, to, proto, err := e.localEnds(netip.AddrPortFrom(dst, 0))
	if err != nil {
		return nil, err
	}
	return e.local.ping(dst, src, to, proto)
}

func (l *localStack) ping(dst netip.Addr, src, to tcpip.FullAddress, proto tcpip.NetworkProtocolNumber) (*Ping, error) {
	p := &Ping{dst: dst, to: to}
	transport, typ := icmp.ProtocolNumber4, byte(8)
	if dst.Is6() {
		transport, typ = icmp.ProtocolNumber6, 128
	}
	ep, terr := l.s.NewEndpoint(transport, proto, &p.wq)
	if terr != nil {
		return nil, fmt.Errorf("ping %s: %v", dst, terr)
	}
	src.Port = uint16(nat.LocalPortFirst + l.ident.Add(1)%(nat.LocalPortLast-nat.LocalPortFirst))
	if terr := ep.Bind(src); terr != nil {
		ep.Close()
		return nil, fmt.Errorf("ping %s: %v", dst, terr)
	}
	p.ep, p.typ = ep, typ
	p.entry, p.notify = waiter.NewChannelEntry(waiter.ReadableEvents)
	p.wq.EventRegister(&p.entry)
	return p, nil
}

func (p *Ping) send() error {
	msg := make([]byte, 8+56)
	msg[0] = p.typ
	binary.BigEndian.PutUint16(msg[6:], 1)
	if _, terr := p.ep.Write(&sliceReader{msg}, tcpip.WriteOptions{To: &p.to}); terr != nil {
		return fmt.Errorf("ping %s: %v", p.dst, terr)
	}
	return nil
}

// Answered reports whether the reply has come, once.
func (p *Ping) Answered() bool {
	_, terr := p.ep.Read(discard{}, tcpip.ReadOptions{})
	return terr == nil
}

// Close ends it.
func (p *Ping) Close() {
	p.wq.EventUnregister(&p.entry)
	p.ep.Close()
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
