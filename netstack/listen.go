package netstack

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// listenBacklog is how many connections may wait to be accepted; beyond that the stack
	// answers with SYN cookies.
	listenBacklog = 128
	// listenBuffer is how much of a connection waits in either direction, in bytes: clients
	// could fill more than that, of 1 MiB that the stack has by itself.
	listenBuffer = 256 << 10
)

// TCPListener takes the connections of a relayed forward.
type TCPListener struct {
	ep     tcpip.Endpoint
	wq     *waiter.Queue
	at     netip.AddrPort
	entry  waiter.Entry
	ready  chan struct{}
	closed chan struct{}
	once   sync.Once
}

// ListenTCP takes connections of the VPC at an address and port, where a relayed
// forward lets them through. An unspecified address stands for all of ours of its
// family, as the VPC knows them.
func (e *Engine) ListenTCP(at netip.AddrPort) (net.Listener, error) {
	proto, from := ipv4.ProtocolNumber, tcpip.FullAddress{NIC: vpcNIC, Port: at.Port()}
	if at.Addr().Is6() {
		proto = ipv6.ProtocolNumber
	}
	if !at.Addr().IsUnspecified() {
		from.Addr = tcpip.AddrFromSlice(at.Addr().AsSlice())
	}
	l := &TCPListener{wq: new(waiter.Queue), at: at, closed: make(chan struct{})}
	var terr tcpip.Error
	if l.ep, terr = e.local.s.NewEndpoint(tcp.ProtocolNumber, proto, l.wq); terr != nil {
		return nil, errors.New(terr.String())
	}
	l.ep.SocketOptions().SetV6Only(true)
	l.ep.SocketOptions().SetReceiveBufferSize(listenBuffer, false)
	if terr = l.ep.Bind(from); terr == nil {
		terr = l.ep.Listen(listenBacklog)
	}
	if terr != nil {
		l.ep.Close()
		if _, taken := terr.(*tcpip.ErrPortInUse); taken {
			return nil, fmt.Errorf("listen at %v: %w", at, unix.EADDRINUSE)
		}
		return nil, fmt.Errorf("listen at %v: %s", at, terr)
	}
	l.entry, l.ready = waiter.NewChannelEntry(waiter.ReadableEvents)
	l.wq.EventRegister(&l.entry)
	return l, nil
}

// Accept implements [net.Listener].
func (l *TCPListener) Accept() (net.Conn, error) {
	for {
		ep, wq, terr := l.ep.Accept(nil)
		if terr == nil {
			ep.SocketOptions().SetSendBufferSize(listenBuffer, false)
			c := &TCPConn{TCPConn: gonet.NewTCPConn(wq, ep)}
			c.init(ep, wq)
			return c, nil
		}
		if _, wait := terr.(*tcpip.ErrWouldBlock); !wait {
			select {
			case <-l.closed:
				return nil, net.ErrClosed
			default:
				return nil, fmt.Errorf("accept at %v: %s", l.at, terr)
			}
		}
		select {
		case <-l.ready:
		case <-l.closed:
			return nil, net.ErrClosed
		}
	}
}

// Close implements [net.Listener].
func (l *TCPListener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.wq.EventUnregister(&l.entry)
		l.ep.Close()
	})
	return nil
}

// Addr implements [net.Listener].
func (l *TCPListener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.at) }
