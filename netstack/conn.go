package netstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// TCPConn is a connection of the gateway's own. A Read that the peer's reset ends
// returns an error other than io.EOF.
type TCPConn struct {
	*gonet.TCPConn
	readable
}

// AwaitReset waits for the reset of a connection whose end was read, until stop is closed.
// It reports whether that came.
func (c *TCPConn) AwaitReset(stop <-chan struct{}) bool {
	const over = waiter.EventHUp | waiter.EventErr
	entry, ended := waiter.NewChannelEntry(over)
	c.wq.EventRegister(&entry)
	defer c.wq.EventUnregister(&entry)
	for {
		switch tcp.EndpointState(c.ep.State()) {
		case tcp.StateError:
			return true
		case tcp.StateClose, tcp.StateTimeWait: // in order
			return false
		}
		select {
		case <-ended:
		case <-stop:
			return false
		case <-c.closed:
			return false
		}
	}
}

// Abort ends the connection by a reset.
func (c *TCPConn) Abort() { c.ep.Abort() }

// Close implements [net.Conn].
func (c *TCPConn) Close() error {
	c.end()
	return c.TCPConn.Close()
}

// UDPConn is a socket of the gateway's own for one host.
type UDPConn struct {
	*gonet.UDPConn
	readable
}

// Close implements [net.Conn].
func (c *UDPConn) Close() error {
	c.end()
	return c.UDPConn.Close()
}

// readable says when an endpoint has something to read, so that who reads needs a
// buffer only then.
type readable struct {
	ep     tcpip.Endpoint
	wq     *waiter.Queue
	entry  waiter.Entry
	ready  chan struct{}
	closed chan struct{}
	once   sync.Once
}

const readEvents = waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr

func (r *readable) init(ep tcpip.Endpoint, wq *waiter.Queue) {
	r.ep, r.wq, r.closed = ep, wq, make(chan struct{})
	r.entry, r.ready = waiter.NewChannelEntry(readEvents)
	wq.EventRegister(&r.entry)
}

func (r *readable) end() {
	r.once.Do(func() {
		close(r.closed)
		r.wq.EventUnregister(&r.entry)
	})
}

// WaitRead waits until a Read wouldn't, for whatever reason. One goroutine may wait.
func (r *readable) WaitRead() {
	for r.ep.Readiness(readEvents) == 0 {
		select {
		case <-r.ready:
		case <-r.closed:
			return
		}
	}
}

// dialTCP connects to a host. The source is bound only if from has an address; an
// unbound connection shares its port with those to other hosts.
func dialTCP(ctx context.Context, s *stack.Stack, from, to tcpip.FullAddress, proto tcpip.NetworkProtocolNumber) (*TCPConn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	wq := new(waiter.Queue)
	ep, terr := s.NewEndpoint(tcp.ProtocolNumber, proto, wq)
	if terr != nil {
		return nil, errors.New(terr.String())
	}
	entry, connected := waiter.NewChannelEntry(waiter.WritableEvents)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	if from.Addr.Len() > 0 {
		if terr := ep.Bind(from); terr != nil {
			ep.Close()
			return nil, fmt.Errorf("bind %v: %s", from.Addr, terr)
		}
	}
	terr = ep.Connect(to)
	if _, started := terr.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ctx.Done():
			ep.Abort()
			ep.Close()
			return nil, ctx.Err()
		case <-connected:
		}
		terr = ep.LastError()
	}
	if terr != nil {
		ep.Close()
		return nil, &net.OpError{Op: "connect", Net: "tcp", Addr: &net.TCPAddr{IP: to.Addr.AsSlice(), Port: int(to.Port)}, Err: errors.New(terr.String())}
	}
	c := &TCPConn{TCPConn: gonet.NewTCPConn(wq, ep)}
	c.init(ep, wq)
	return c, nil
}

// dialUDP opens a socket for one host.
func dialUDP(s *stack.Stack, from, to tcpip.FullAddress, proto tcpip.NetworkProtocolNumber) (*UDPConn, error) {
	wq := new(waiter.Queue)
	ep, terr := s.NewEndpoint(udp.ProtocolNumber, proto, wq)
	if terr != nil {
		return nil, errors.New(terr.String())
	}
	if terr = ep.Bind(from); terr == nil {
		terr = ep.Connect(to)
	}
	if terr != nil {
		ep.Close()
		return nil, &net.OpError{Op: "connect", Net: "udp", Addr: &net.UDPAddr{IP: to.Addr.AsSlice(), Port: int(to.Port)}, Err: errors.New(terr.String())}
	}
	c := &UDPConn{UDPConn: gonet.NewUDPConn(wq, ep)}
	c.init(ep, wq)
	return c, nil
}
