package zerotier

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"ztgate/zerotier/transport"
	"ztgate/zerotier/vl1"
)

// sockets carry datagrams.
type sockets interface {
	NewSender() sender
	Run(ctx context.Context, handle func(w int, sock vl1.SocketID, from netip.AddrPort, datagram []byte), flush func(w int)) error
	LocalEndpoints() []netip.AddrPort
	HasSocket(id vl1.SocketID) bool
	PortNumbers() (first, second, third int)
	OpenTertiary(want int) (int, error)
	RebindSecondary() error
	Stats() transport.Stats
	Close() error
}

// sender is what one goroutine sends by.
type sender interface {
	vl1.Out
	Flush()
}

// udpSockets are real ones.
type udpSockets struct{ *transport.UDP }

// NewSender implements sockets.
func (u udpSockets) NewSender() sender { return u.UDP.NewSender() }

// Stepped is a node that somebody else moves: it has no sockets, goroutines and
// timers of its own. Otherwise it is the same, so that simulations try the real one.
type Stepped struct {
	*Node
	rx *rxWorker
	pc keeper
}

// Sockets are what a stepped node sends by.
type Sockets interface {
	vl1.Out
	Endpoints() []netip.AddrPort
	Open(id vl1.SocketID) bool
}

// NewStepped makes a node. Port, Bind, TCPRelay and PortMapping of cfg mean nothing.
func NewStepped(cfg Config, s Sockets) (*Stepped, error) {
	n, err := newNode(cfg, func(*Node) (sockets, error) { return lentSockets{s}, nil })
	if err != nil {
		return nil, err
	}
	n.tx = &txStack{n: n}
	st := &Stepped{Node: n, rx: &rxWorker{vw: n.core.NewWorker(), nw: n.layer.NewWorker(), out: n.udp.NewSender()}}
	st.rx.vw.User = st.rx.nw
	st.pc.store = n.storePeer
	close(n.ready)
	return st, nil
}

// txStack is a pool that garbage collection doesn't touch: random numbers, of which each
// new worker takes some, are then the same each time.
type txStack struct {
	n    *Node
	idle []any
}

func (s *txStack) Get() any {
	if n := len(s.idle); n > 0 {
		t := s.idle[n-1]
		s.idle = s.idle[:n-1]
		return t
	}
	return s.n.newTxWorker()
}

func (s *txStack) Put(t any) { s.idle = append(s.idle, t) }

// Receive takes a datagram.
func (s *Stepped) Receive(sock vl1.SocketID, from netip.AddrPort, datagram []byte) {
	s.rx.vw.Begin(s.rx.out, s.now())
	s.core.Receive(s.rx.vw, sock, from, datagram)
	s.layer.Flush(s.rx.nw)
}

// Woken reports whether Tick should be called before its time.
func (s *Stepped) Woken() bool {
	select {
	case <-s.wake:
		return true
	default:
		return false
	}
}

// Tick does what is due, and returns when to do so again.
func (s *Stepped) Tick() time.Time {
	next := s.tick()
	if s.ctl != nil {
		if t := s.ctl.Work(s.now()); t.Before(next) {
			next = t
		}
	}
	return next
}

// KeepPeers writes the cache of peers, as a running node does every 30 s.
func (s *Stepped) KeepPeers() { s.pc.keep(s.core.PeerRecords()) }

// lentSockets are those of a stepped node.
type lentSockets struct{ s Sockets }

// NewSender implements sockets.
func (l lentSockets) NewSender() sender { return lentSender{l.s} }

// Run implements sockets.
func (lentSockets) Run(context.Context, func(int, vl1.SocketID, netip.AddrPort, []byte), func(int)) error {
	return errors.New("a stepped node doesn't run by itself")
}

// LocalEndpoints implements sockets.
func (l lentSockets) LocalEndpoints() []netip.AddrPort { return l.s.Endpoints() }

// HasSocket implements sockets.
func (l lentSockets) HasSocket(id vl1.SocketID) bool { return id == 0 || l.s.Open(id) }

// PortNumbers implements sockets.
func (l lentSockets) PortNumbers() (first, second, third int) {
	for _, ep := range l.s.Endpoints() {
		return int(ep.Port()), 0, 0
	}
	return 0, 0, 0
}

// OpenTertiary implements sockets.
func (lentSockets) OpenTertiary(int) (int, error) { return 0, errors.ErrUnsupported }

// RebindSecondary implements sockets.
func (lentSockets) RebindSecondary() error { return nil }

// Stats implements sockets.
func (lentSockets) Stats() transport.Stats { return transport.Stats{} }

// Close implements sockets.
func (lentSockets) Close() error { return nil }

type lentSender struct{ vl1.Out }

// Flush implements sender.
func (lentSender) Flush() {}
