package netstack

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"ztgate/netstack/internal/ipkt"
)

// Where a masquerade says so, connections of overlay hosts to the VPC end here and go on by
// sockets of the host that we run on. gVisor is the end that they see: a stack of its own
// that takes whatever address a packet goes to. It gets only what the policy accepts.

// Host carries on by its own sockets what overlay hosts open. Its methods are called by
// workers of the plane and don't wait for anything; false means that there is no room.
type Host interface {
	// Connect takes a TCP connection that an overlay host begins. It is accepted or refused
	// later, by one of its methods.
	Connect(c *Incoming) bool
	// Receive is told of a first datagram. If ok, take is called at once with the socket
	// that has it, or with nil if there is none.
	Receive(h Handover) (take func(*UDPConn), ok bool)
	// Echo takes an echo request; an answer, or an error, is given by a method of r.
	Echo(r *EchoRequest) bool
}

// Handover says what is handed over to the host, and whose it is.
type Handover struct {
	Network uint64
	Member  [6]byte // MAC of the member that it came from
	Client  netip.AddrPort
	Server  netip.AddrPort // where it goes on to; the port of echo requests is 0
}

// Incoming is a TCP connection that an overlay host begins and nobody has accepted yet.
type Incoming struct {
	Handover
	h   *handovers
	key handoverKey
	syn []byte
}

// EchoRequest is one of an overlay host.
type EchoRequest struct {
	Handover
	ID, Seq uint16
	TTL     uint8 // that is left
	Data    []byte
	h       *handovers
	target  netip.Addr // that it was sent to
	quote   []byte     // of an error about it
}

// Unreachability is why something can't be carried on.
type Unreachability uint8

const (
	Refused           Unreachability = iota // nobody listens there
	HostIsUnreachable                       // or it doesn't answer
)

// handoverKey is the ends of a connection as packets of the client have them. It says
// nothing of the network: where two have the same addresses, the VPC knows hosts by
// aliases, and these aren't handed over.
type handoverKey struct {
	proto          uint8
	client, target netip.AddrPort
}

func keyOfID(proto uint8, id stack.TransportEndpointID) handoverKey {
	end := func(a tcpip.Address, port uint16) netip.AddrPort {
		addr, _ := netip.AddrFromSlice(a.AsSlice())
		return netip.AddrPortFrom(addr, port)
	}
	return handoverKey{proto, end(id.RemoteAddress, id.RemotePort), end(id.LocalAddress, id.LocalPort)}
}

// handovers are connections and sockets that end in a stack of their own.
type handovers struct {
	e     *Engine
	local *localStack

	mu       sync.Mutex
	incoming map[handoverKey]*Incoming      // nobody has accepted or refused them yet
	accepted map[handoverKey]chan *TCPConn  // their handshake goes on
	sockets  map[handoverKey]func(*UDPConn) // that are being made
}

const (
	// handoverBuffer is how much of a connection is held in each direction.
	handoverBuffer = 256 << 10
	// handoverRest is how long a connection is remembered that we have closed first.
	handoverRest = 3 * time.Second
	// maxHandshakes may be under way. The Host has a bound of its own, for each member.
	maxHandshakes = 4096
)

// newHandovers makes the stack that clients see as the hosts they speak to.
func newHandovers(e *Engine) (*handovers, error) {
	local, err := newStack(e.sendAnswer, true)
	if err != nil {
		return nil, err
	}
	h := &handovers{e: e, local: local, incoming: map[handoverKey]*Incoming{}, accepted: map[handoverKey]chan *TCPConn{}, sockets: map[handoverKey]func(*UDPConn){}}
	size := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: handoverBuffer, Max: handoverBuffer}
	if err := local.s.SetTransportProtocolOption(tcp.ProtocolNumber, &size); err != nil {
		return nil, errors.New(err.String())
	}
	// Who connects again from the same port mustn't wait for long.
	rest := tcpip.TCPTimeWaitTimeoutOption(handoverRest)
	if err := local.s.SetTransportProtocolOption(tcp.ProtocolNumber, &rest); err != nil {
		return nil, errors.New(err.String())
	}
	local.s.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(local.s, handoverBuffer, maxHandshakes, h.handshake).HandlePacket)
	local.s.SetTransportProtocolHandler(udp.ProtocolNumber, udp.NewForwarder(local.s, h.socket).HandlePacket)
	return h, nil
}

// handOver takes a packet that goes on by the host's sockets, in fragments if it came so.
func (w *worker) handOver(at *attachment, parts []*ipkt.View, d *decision) {
	e, v := w.e, parts[0]
	h := e.handovers
	if h == nil {
		w.dropN(dropNoAddress, len(parts))
		return
	}
	server := netip.AddrPortFrom(d.server, v.DPort)
	if d.flow.ServerPort != 0 {
		server = netip.AddrPortFrom(d.server, d.flow.ServerPort)
	}
	whose := Handover{Network: at.ID, Member: macBytes(w.who.mac), Client: netip.AddrPortFrom(v.Source(), v.SPort), Server: server}
	key := handoverKey{v.Proto, whose.Client, netip.AddrPortFrom(v.Destination(), v.DPort)}
	if (v.Proto == ipkt.TCP || v.Proto == ipkt.UDP) && h.local.expects(at.nic(), v) {
		w.inject(at, h, parts)
		return
	}
	cut := len(parts) > 1
	switch {
	case !cut && !v.ChecksumOK():
		w.drop(dropChecksum)
	case v.Proto == ipkt.TCP && (cut || v.Flags&(ipkt.SYN|ipkt.ACK|ipkt.RST|ipkt.FIN) != ipkt.SYN):
		w.dropN(dropNotFirst, len(parts))
		if !cut && v.Flags&(ipkt.RST|ipkt.ACK) == ipkt.ACK {
			e.sendReset(w.now, at, v) // it is over
		}
	case v.Proto == ipkt.TCP:
		w.connect(at, h, &Incoming{whose, h, key, slices.Clone(v.B)}, v, d)
	case v.Proto == ipkt.UDP:
		w.receive(at, h, key, whose, parts, d)
	case v.IsEcho() && (v.ICMPType == 8 || v.ICMPType == 128):
		w.echo(at, h, whose, parts, d)
	case v.IsEcho():
		w.dropN(dropNotFirst, len(parts))
	default:
		w.dropN(dropOfProtocol(v.Proto), len(parts))
	}
}

// inject gives packets to the stack.
func (w *worker) inject(at *attachment, h *handovers, parts []*ipkt.View) {
	for _, p := range parts {
		if !h.local.inject(at.nic(), p.B) {
			w.drop(dropLocal)
			continue
		}
		w.countLocal(at, uint16(p.Proto), len(p.B), p.V6)
	}
}

func (w *worker) connect(at *attachment, h *handovers, c *Incoming, v *ipkt.View, d *decision) {
	h.mu.Lock()
	_, again := h.incoming[c.key]
	if !again {
		_, again = h.accepted[c.key]
	}
	if !again {
		h.incoming[c.key] = c
	}
	h.mu.Unlock()
	if !again && !h.e.cfg.Host.Connect(c) {
		h.forget(c)
		w.refuse(at, dropClientLimit, ipkt.HostUnreachable, v)
		return
	}
	if !again {
		w.set.countRule(d)
	}
	w.countLocal(at, uint16(v.Proto), len(v.B), v.V6)
}

func (w *worker) receive(at *attachment, h *handovers, key handoverKey, whose Handover, parts []*ipkt.View, d *decision) {
	take, ok := h.e.cfg.Host.Receive(whose)
	if !ok {
		w.dropN(dropClientLimit, len(parts)-1)
		w.refuse(at, dropClientLimit, ipkt.HostUnreachable, parts[0])
		return
	}
	w.set.countRule(d)
	taken := false
	h.mu.Lock()
	_, busy := h.sockets[key] // another worker has the datagram before
	if !busy {
		h.sockets[key] = func(c *UDPConn) { taken = true; take(c) }
	}
	h.mu.Unlock()
	if !busy {
		w.inject(at, h, parts)
		h.mu.Lock()
		delete(h.sockets, key)
		h.mu.Unlock()
	} else {
		w.dropN(dropLocal, len(parts))
	}
	if !taken {
		take(nil)
	}
}

func (w *worker) echo(at *attachment, h *handovers, whose Handover, parts []*ipkt.View, d *decision) {
	msg := joined(parts)
	v := parts[0]
	var sum uint32
	if v.V6 {
		sum = ipkt.PseudoSum(true, v.Src, v.Dst, ipkt.ICMPv6, len(msg))
	}
	if len(msg) < 8 || ipkt.Checksum(msg, sum) != 0 {
		w.dropN(dropChecksum, len(parts))
		return
	}
	whose.Client, whose.Server = netip.AddrPortFrom(v.Source(), 0), netip.AddrPortFrom(d.server, 0)
	r := &EchoRequest{Handover: whose, ID: binary.BigEndian.Uint16(msg[4:]), Seq: binary.BigEndian.Uint16(msg[6:]), TTL: v.TTL - 1, Data: msg[8:],
		h: h, target: v.Destination(), quote: slices.Clone(v.B[:min(len(v.B), quoteLen)])}
	if !h.e.cfg.Host.Echo(r) {
		w.dropN(dropClientLimit, len(parts)-1)
		w.refuse(at, dropClientLimit, ipkt.HostUnreachable, v)
		return
	}
	w.set.countRule(d)
	for _, p := range parts {
		w.countLocal(at, uint16(p.Proto), len(p.B), p.V6)
	}
}

// quoteLen is how much of a packet is kept for errors about it.
const quoteLen = 128

// joined returns what fragments of one packet carry behind their IP headers, nil if they
// don't fit together.
func joined(parts []*ipkt.View) (out []byte) {
	parts = slices.SortedFunc(slices.Values(parts), func(a, b *ipkt.View) int { return a.FragOffset - b.FragOffset })
	for _, p := range parts {
		if p.FragOffset != len(out) {
			return nil
		}
		out = append(out, p.B[p.L4:]...)
	}
	return out
}

func (h *handovers) forget(c *Incoming) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.incoming, c.key)
}

// Accept finishes the handshake with the client, and waits for that.
func (c *Incoming) Accept(ctx context.Context) (*TCPConn, error) {
	h := c.h
	done := make(chan *TCPConn, 1)
	h.mu.Lock()
	delete(h.incoming, c.key)
	h.accepted[c.key] = done
	h.mu.Unlock()
	conn := h.await(ctx, c, done)
	h.mu.Lock()
	delete(h.accepted, c.key)
	h.mu.Unlock()
	if conn == nil {
		select {
		case conn = <-done: // perhaps it came too late
			if conn != nil {
				conn.Abort()
				_ = conn.Close()
			}
		default:
		}
		return nil, errHandshake
	}
	return conn, nil
}

func (h *handovers) await(ctx context.Context, c *Incoming, done <-chan *TCPConn) *TCPConn {
	at := h.e.set.Load().attachments[c.Network]
	if at == nil || !h.local.inject(at.nic(), c.syn) {
		return nil
	}
	select {
	case conn := <-done:
		return conn
	case <-ctx.Done():
	case <-h.local.closed:
	}
	return nil
}

var errHandshake = errors.New("the client didn't finish the handshake")

// handshake is called by the stack for a SYN that was injected by Accept.
func (h *handovers) handshake(r *tcp.ForwarderRequest) {
	key := keyOfID(ipkt.TCP, r.ID())
	h.mu.Lock()
	done := h.accepted[key]
	h.mu.Unlock()
	if done == nil { // it was given up
		r.Complete(false)
		return
	}
	wq := new(waiter.Queue)
	ep, err := r.CreateEndpoint(wq)
	r.Complete(false)
	var c *TCPConn // nil = the client has given it up
	if err == nil {
		c = &TCPConn{TCPConn: gonet.NewTCPConn(wq, ep)}
		c.init(ep, wq)
	}
	h.mu.Lock()
	wanted := h.accepted[key] == done
	if wanted {
		done <- c
	}
	h.mu.Unlock()
	if !wanted && c != nil {
		c.Abort()
		_ = c.Close()
	}
}

// Refuse says to the client that it won't get the connection.
func (c *Incoming) Refuse(why Unreachability) {
	h := c.h
	h.forget(c)
	s, now := h.e.set.Load(), h.e.clock()
	var v ipkt.View
	at := s.attachments[c.Network]
	if at == nil || ipkt.Parse(c.syn, &v) != ipkt.OK {
		return
	}
	if why == Refused {
		h.e.sendReset(now, at, &v)
		return
	}
	h.e.sendError(now, at, ipkt.HostUnreachable, &v, 0)
}

// socket is called by the stack for a datagram that begins something.
func (h *handovers) socket(r *udp.ForwarderRequest) bool {
	key := keyOfID(ipkt.UDP, r.ID())
	h.mu.Lock()
	take := h.sockets[key]
	delete(h.sockets, key)
	h.mu.Unlock()
	if take == nil {
		return true // nothing is said about it
	}
	wq := new(waiter.Queue)
	ep, err := r.CreateEndpoint(wq)
	if err != nil {
		return true
	}
	c := &UDPConn{UDPConn: gonet.NewUDPConn(wq, ep)}
	c.init(ep, wq)
	take(c)
	return true
}

// Unreachable says to a client why its datagrams get nowhere.
func (e *Engine) Unreachable(h Handover, target netip.AddrPort, why Unreachability) {
	kind, from := ipkt.HostUnreachable, netip.Addr{}
	if why == Refused {
		kind, from = ipkt.PortUnreachable, target.Addr()
	}
	e.handoverError(h.Network, from, kind, ipkt.AppendUDP(nil, h.Client, target, nil))
}

// handoverError sends an error about a packet to a client; without a source, it is from the
// gateway.
func (e *Engine) handoverError(network uint64, from netip.Addr, kind ipkt.ErrorKind, packet []byte) {
	now := e.clock()
	at := e.set.Load().attachments[network]
	var v, ev ipkt.View
	if at == nil || ipkt.Parse(packet, &v) != ipkt.OK {
		return
	}
	if !from.IsValid() {
		e.sendError(now, at, kind, &v, 0)
		return
	}
	if !v.MayAnswer() || !e.errors.allow(now, v.Source(), false) {
		return
	}
	e.stats.errors[OverlaySide][kind].Add(1)
	if ipkt.Parse(ipkt.AppendError(nil, kind, ipkt.Bytes(from), &v, 0), &ev) == ipkt.OK {
		e.sendIP(now, at, &ev)
	}
}

// Reply answers the request with data.
func (r *EchoRequest) Reply(data []byte) {
	e := r.h.e
	at := e.set.Load().attachments[r.Network]
	var v ipkt.View
	b := ipkt.AppendEchoReply(nil, r.target, r.Client.Addr(), r.ID, r.Seq, data)
	if at == nil || ipkt.Parse(b, &v) != ipkt.OK {
		return
	}
	now := e.clock()
	if len(b) <= at.MTU {
		e.sendIP(now, at, &v)
		return
	}
	ipkt.Fragment(&v, at.MTU, uint32(now), func(part []byte) {
		var p ipkt.View
		if ipkt.Parse(part, &p) == ipkt.OK {
			e.sendIP(now, at, &p)
		}
	})
}

// Unreachable says that nobody answers.
func (r *EchoRequest) Unreachable() {
	r.h.e.handoverError(r.Network, netip.Addr{}, ipkt.HostUnreachable, r.quote)
}

// Exceeded says that the request's hops were used up at a router behind us.
func (r *EchoRequest) Exceeded(router netip.Addr) {
	e := r.h.e
	if !forwardable(router) || e.set.Load().fromVPC(router).at != nil { // in another's name
		router = netip.Addr{}
	}
	e.handoverError(r.Network, router, ipkt.TimeExceeded, r.quote)
}

// handoverNICs lists the interfaces of the stack, which have no addresses.
func (s *netSet) handoverNICs() map[tcpip.NICID][]netip.Addr {
	out := map[tcpip.NICID][]netip.Addr{}
	for _, at := range s.attachments {
		out[at.nic()] = nil
	}
	return out
}
