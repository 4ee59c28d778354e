package hostproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/router/config"
)

const (
	// relayIdle ends a UDP session without datagrams (RFC 4787 REQ-5).
	relayIdle = 5 * time.Minute
	// maxRelayedUDP sessions share the ports that the host stack has for itself.
	maxRelayedUDP = 2048
	maxDatagram   = 65535
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
	open map[udpClient]net.Conn // towards the host
	wg   sync.WaitGroup
}

// udpClient is who sent a datagram, and to which address of ours.
type udpClient struct {
	from  netip.AddrPort
	local netip.Addr
}

// serveUDP carries datagrams until the socket is closed, and sessions of it until
// they are idle or all is closed.
func (r *Proxy) serveUDP(l *listener, c *net.UDPConn) {
	s := &udpSessions{r: r, l: l, c: c, open: map[udpClient]net.Conn{}}
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
		if host := s.session(udpClient{from, destinationOf(oob[:on])}); host != nil {
			_ = host.SetReadDeadline(time.Now().Add(relayIdle))
			_, _ = host.Write(b[:n]) // lost like on any link if it fails
		}
	}
}

// session returns the way of a client's datagrams, nil if there is none.
func (s *udpSessions) session(k udpClient) net.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if host := s.open[k]; host != nil {
		return host
	}
	count := func(result string) { s.r.results.WithLabelValues("udp", result).Inc() }
	f := *s.l.forward.Load()
	if !s.r.allows(f, k.from) {
		count(relayRefused)
		return nil
	}
	if len(s.open) >= maxRelayedUDP {
		count(relayLimit)
		return nil
	}
	host, err := s.r.plane.DialUDP(context.Background(), f.To)
	if err != nil {
		count(relayUnreachable)
		return nil
	}
	if !s.r.add(host) {
		_ = host.Close()
		count(relayLimit)
		return nil
	}
	s.open[k] = host
	s.wg.Go(func() {
		s.answer(k, host)
		s.r.remove(host)
		s.mu.Lock()
		delete(s.open, k)
		s.mu.Unlock()
		count(relayOK)
	})
	return host
}

// answer carries the host's datagrams to a client until the session is idle.
func (s *udpSessions) answer(k udpClient, host net.Conn) {
	_ = host.SetReadDeadline(time.Now().Add(relayIdle))
	b, oob := make([]byte, maxDatagram), sourceControl(k.local)
	for {
		n, err := host.Read(b)
		if err != nil {
			return // idle, closed, or refused by the host
		}
		_ = host.SetReadDeadline(time.Now().Add(relayIdle))
		if _, _, err := s.c.WriteMsgUDPAddrPort(b[:n], oob, k.from); errors.Is(err, net.ErrClosed) {
			return
		}
	}
}

func (s *udpSessions) close() {
	s.mu.Lock()
	for _, host := range s.open {
		_ = host.Close()
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
