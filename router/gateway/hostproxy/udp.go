package hostproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"ztgate/router/config"
)

// listenUDP opens the socket of a UDP forward. It tells to which of the host's
// addresses a datagram came, so that the answer can come from there.
func listenUDP(network string, f config.Forward) (*net.UDPConn, error) {
	c, err := net.ListenUDP(network, net.UDPAddrFromAddrPort(f.Listen))
	if err != nil {
		return nil, err
	}
	raw, err := c.SyscallConn()
	if err == nil {
		var serr error
		err = raw.Control(func(fd uintptr) {
			if network == "udp6" {
				serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
			} else {
				serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
			}
		})
		err = errors.Join(err, serr)
	}
	if err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("ask for the destination of datagrams: %w", err)
	}
	return c, nil
}

// udpSessions are those of one forward.
type udpSessions struct {
	r *Proxy
	l *listener
	c *net.UDPConn

	mu   sync.Mutex
	open map[udpClient]*session
	wg   sync.WaitGroup
}

// session is a client's, with its socket towards the host.
type session struct {
	entry
	udpClient
	forward config.Forward

	mu    sync.Mutex // guards what follows
	host  net.Conn   // nil = not opened yet
	ended bool
}

// open takes the socket over, unless the session has ended.
func (x *session) open(host net.Conn) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.host = host
	return !x.ended
}

func (x *session) close() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.ended = true
	if x.host != nil {
		_ = x.host.Close()
	}
}

// udpClient is who sent a datagram, and to which address of ours.
type udpClient struct {
	from  netip.AddrPort
	local netip.Addr
}

// serveUDP carries datagrams until the socket is closed, and sessions of it until
// they are idle or all is closed.
func (r *Proxy) serveUDP(l *listener, c *net.UDPConn) {
	s := &udpSessions{r: r, l: l, c: c, open: map[udpClient]*session{}}
	defer s.close()
	b, oob := make([]byte, maxDatagram), make([]byte, 128)
	for {
		n, on, _, from, err := c.ReadMsgUDPAddrPort(b, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error about an earlier answer
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		if x := s.session(udpClient{from, destinationOf(oob[:on])}); x != nil {
			x.touch(r.now())
			x.out.Add(uint64(n))
			_, _ = x.host.Write(b[:n]) // lost like on any link if it fails
		}
	}
}

// session returns the way of a client's datagrams, nil if there is none.
func (s *udpSessions) session(k udpClient) *session {
	s.mu.Lock()
	x := s.open[k]
	s.mu.Unlock()
	if x != nil {
		return x
	}
	f := *s.l.forward.Load()
	if !s.r.allows(f, k.from) {
		s.r.count("udp", relayRefused)
		return nil
	}
	x = &session{udpClient: k, forward: f}
	x.client, x.end, x.about = clientOf(k.from.Addr()), x.close, x.connection
	if !s.r.admit(&x.entry, "udp", s.r.udp) {
		s.r.count("udp", relayLimit)
		return nil
	}
	host, err := s.r.plane.DialUDP(context.Background(), f.To)
	if err != nil {
		s.r.leave(&x.entry)
		s.r.count("udp", relayUnreachable)
		return nil
	}
	if !x.open(host) {
		_ = host.Close()
		return nil
	}
	s.mu.Lock()
	s.open[k] = x
	s.mu.Unlock()
	s.wg.Go(func() {
		s.answer(k, x)
		x.close()
		s.mu.Lock()
		delete(s.open, k)
		s.mu.Unlock()
		if s.r.leave(&x.entry) {
			s.r.count("udp", relayOK)
		}
	})
	return x
}

// answer carries the host's datagrams to a client until the session is closed or the
// host refuses.
func (s *udpSessions) answer(k udpClient, x *session) {
	oob := sourceControl(k.local)
	send := func(b []byte) error {
		x.answered.Store(true)
		x.touch(s.r.now())
		x.in.Add(uint64(len(b)))
		if _, _, err := s.c.WriteMsgUDPAddrPort(b, oob, k.from); errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil // lost like on any link
	}
	for from := newSource(x.host, s.r.packets); from.next(send) == nil; {
	}
}

func (s *udpSessions) close() {
	s.mu.Lock()
	for _, x := range s.open {
		x.end()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// destinationOf finds the address that a datagram was sent to, invalid if the
// kernel didn't tell.
func destinationOf(oob []byte) netip.Addr {
	list, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.Addr{}
	}
	for _, m := range list {
		switch {
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			return netip.AddrFrom4([4]byte(m.Data[8:12]))
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			return netip.AddrFrom16([16]byte(m.Data[:16]))
		}
	}
	return netip.Addr{}
}

// sourceControl makes an answer come from an address.
func sourceControl(a netip.Addr) []byte {
	switch {
	case a.Is4():
		return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: a.As4()})
	case a.Is6():
		return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: a.As16()})
	}
	return nil
}
