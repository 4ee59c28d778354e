package hostproxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"ztgate/netstack"
)

// Inbound carries on what overlay hosts open in the VPC, by sockets of this host: it is the
// [netstack.Host] of the forwarding plane. A member holds no more than its share, whatever
// addresses it uses.
type Inbound struct {
	p     *Proxy
	reply Replier

	echoes  map[echoKey]*echoSession // guarded by p.mu
	cant    atomic.Pointer[error]    // why no echo requests can be sent; nil = they can
	dialTCP func(ctx context.Context, to netip.AddrPort) (net.Conn, error)
	dialUDP func(to netip.AddrPort) (net.Conn, error)
	ping    func(to netip.Addr) (*echoSocket, error)
}

// Replier tells clients why their datagrams get nowhere: [netstack.Engine].
type Replier interface {
	Unreachable(h netstack.Handover, target netip.AddrPort, why netstack.Unreachability)
}

// Protocols by which results are counted.
const (
	protoTCP  = "tcp"
	protoUDP  = "udp"
	protoICMP = "icmp"
)

// NewInbound makes one. Until [Inbound.Use] it tells nobody why something failed.
func NewInbound(limits Limits, reg prometheus.Registerer, log *slog.Logger) *Inbound {
	results := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "ztgate_inbound_connections_total",
		Help: "TCP connections, UDP sessions and pings of overlay hosts that go on by this host's sockets, by what became of them."}, []string{"protocol", "result"})
	in := &Inbound{echoes: map[echoKey]*echoSession{}, ping: openEcho}
	in.p = newProxy(nil, limits, limits.Connections, results, []string{protoTCP, protoUDP, protoICMP}, reg, log)
	var d net.Dialer
	in.dialTCP = func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
		return d.DialContext(ctx, "tcp", to.String())
	}
	in.dialUDP = func(to netip.AddrPort) (net.Conn, error) { return d.Dial("udp", to.String()) }
	return in
}

// Use says who tells clients of failures.
func (in *Inbound) Use(r Replier) { in.reply = r }

// Run ends what is idle, and all when ctx ends.
func (in *Inbound) Run(ctx context.Context) error { return in.p.Run(ctx) }

// Refused is as [Proxy.Refused].
func (in *Inbound) Refused() []Refused { return in.p.Refused() }

// hold makes an entry of a client's member.
func hold(e *entry, h netstack.Handover, end func()) {
	e.client, e.shown, e.end = client{member: member{h.Network, h.Member}}, prefixOf(h.Client.Addr()), end
}

// Connect implements [netstack.Host].
func (in *Inbound) Connect(c *netstack.Incoming) bool {
	p := in.p
	x := &inboundConn{conn: conn{r: p, ends: ends{from: c.Client}, over: make(chan struct{})}}
	hold(&x.entry, c.Handover, x.abortBoth)
	x.ctx, x.cancel = context.WithTimeout(context.Background(), relayConnect)
	if !p.admit(&x.entry, protoTCP, p.dials, p.tcp) {
		x.cancel()
		p.count(protoTCP, relayLimit)
		return false
	}
	ok := in.begin(&x.entry, func() {
		result := in.carry(x, c)
		x.cancel()
		if p.leave(&x.entry) {
			p.count(protoTCP, result)
		}
	})
	if !ok {
		x.cancel()
	}
	return ok
}

// begin runs f for an entry, unless all is closed.
func (in *Inbound) begin(e *entry, f func()) bool {
	p := in.p
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		p.forget(e)
		return false
	}
	p.wg.Go(f)
	return true
}

// inboundConn is a connection whose client is known later than its host.
type inboundConn struct {
	conn
	gone atomic.Bool // it gave way before it was connected
}

func (x *inboundConn) abortBoth() {
	x.gone.Store(true)
	x.cancel()
	x.mu.Lock()
	connected := x.client != nil
	x.mu.Unlock()
	if connected {
		x.abort()
	}
}

func (in *Inbound) carry(x *inboundConn, c *netstack.Incoming) string {
	host, err := in.dialTCP(x.ctx, c.Server)
	if err != nil {
		why := netstack.HostIsUnreachable
		if errors.Is(err, unix.ECONNREFUSED) || x.gone.Load() {
			why = netstack.Refused
		}
		c.Refuse(why)
		return relayUnreachable
	}
	client, err := c.Accept(x.ctx)
	if err != nil {
		abort(host)
		return relayUnreachable
	}
	in.p.connected(&x.entry)
	x.mu.Lock()
	x.client, x.host = client, host
	x.mu.Unlock()
	if x.gone.Load() {
		x.abort()
		return relayOK
	}
	x.exchange()
	return relayOK
}

// inboundSession is a socket towards a VPC host, and the client's.
type inboundSession struct {
	entry
	mu           sync.Mutex // guards what follows
	client, host net.Conn
	ended        bool
}

// open takes both over, unless the session has ended.
func (x *inboundSession) open(client, host net.Conn) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.client, x.host = client, host
	return !x.ended
}

func (x *inboundSession) close() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.ended = true
	if x.client != nil {
		_ = x.client.Close()
		_ = x.host.Close()
	}
}

// Receive implements [netstack.Host].
func (in *Inbound) Receive(h netstack.Handover) (func(*netstack.UDPConn), bool) {
	p := in.p
	x := &inboundSession{}
	hold(&x.entry, h, x.close)
	if !p.admit(&x.entry, protoUDP, p.udp) {
		p.count(protoUDP, relayLimit)
		return nil, false
	}
	return func(c *netstack.UDPConn) {
		if c == nil { // somebody else has it
			p.leave(&x.entry)
			return
		}
		if !in.begin(&x.entry, func() {
			result := in.converse(x, h, c)
			x.close()
			_ = c.Close()
			if p.leave(&x.entry) {
				p.count(protoUDP, result)
			}
		}) {
			_ = c.Close()
		}
	}, true
}

// converse carries datagrams both ways until the session is closed or the host refuses.
func (in *Inbound) converse(x *inboundSession, h netstack.Handover, c *netstack.UDPConn) string {
	target := netip.AddrPort{}
	if a, ok := c.LocalAddr().(*net.UDPAddr); ok {
		target = a.AddrPort()
		target = netip.AddrPortFrom(target.Addr().Unmap(), target.Port())
	}
	host, err := in.dialUDP(h.Server)
	if err != nil {
		in.reply.Unreachable(h, target, netstack.HostIsUnreachable)
		return relayUnreachable
	}
	if !x.open(c, host) {
		_ = host.Close()
		return relayOK
	}
	in.p.wg.Go(func() {
		send := func(b []byte) error {
			x.touch(in.p.now())
			if _, err := host.Write(b); errors.Is(err, net.ErrClosed) {
				return err
			}
			return nil // lost like on any link
		}
		for from := newSource(c, in.p.packets); from.next(send) == nil; {
		}
		x.close()
	})
	send := func(b []byte) error {
		x.answered.Store(true)
		x.touch(in.p.now())
		if _, err := c.Write(b); errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	}
	from := newSource(host, in.p.packets)
	for {
		switch err := from.next(send); {
		case err == nil:
		case errors.Is(err, unix.ECONNREFUSED):
			in.reply.Unreachable(h, target, netstack.Refused)
			return relayUnreachable
		case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
			in.reply.Unreachable(h, target, netstack.HostIsUnreachable)
			return relayUnreachable
		case errors.Is(err, unix.EMSGSIZE): // one was too large for the way
		default:
			return relayOK
		}
	}
}
