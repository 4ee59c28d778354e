//go:build linux && !portableudp

package transport

import (
	"context"
	"errors"
	"maps"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// socket is one bound socket. It is written by several senders and read by one
// worker.
type socket struct {
	place
	id     SocketID
	local  netip.AddrPort
	worker int

	conn   *net.UDPConn
	raw    syscall.RawConn
	gro    bool
	gso    atomic.Bool // cleared when the device turns out to be unable
	failed atomic.Bool // its reader gave up
	// small holds destinations to which the kernel took no segments of a size, since
	// the MTU is smaller. Datagrams that large go by themselves.
	small atomic.Pointer[map[netip.Addr]int]
}

// maxSmall bounds socket.small, which is emptied when full.
const maxSmall = 256

func openSocket(p place, ep netip.AddrPort, noOffload bool, mark int) (*socket, error) {
	s := &socket{}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) { err = s.setOptions(int(fd), p, ep, noOffload, mark) })
		return errors.Join(cerr, err)
	}}
	network := "udp4"
	if ep.Addr().Is6() {
		network = "udp6"
	}
	conn, err := lc.ListenPacket(context.Background(), network, ep.String())
	if err != nil {
		return nil, err
	}
	s.conn = conn.(*net.UDPConn)
	if s.raw, err = s.conn.SyscallConn(); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return s, nil
}

// setOptions sets what chapter 02 §8.1 asks for. Only IPV6_V6ONLY must succeed.
func (s *socket) setOptions(fd int, p place, ep netip.AddrPort, noOffload bool, mark int) error {
	for _, o := range [...]int{unix.SO_RCVBUF, unix.SO_RCVBUFFORCE, unix.SO_SNDBUF, unix.SO_SNDBUFFORCE} {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, o, bufferSize)
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
	setMark(fd, mark)
	if p.ifname != "" {
		// Keeps routes of virtual networks from capturing our own traffic. Old
		// kernels want CAP_NET_RAW; without it the routes must be right.
		_ = unix.BindToDevice(fd, p.ifname)
	}
	// Nobody on the way cuts our datagrams: the pieces are dropped by many firewalls,
	// and the node, which finds out what a path carries, couldn't tell. ICMP errors,
	// which anybody may forge, are not believed.
	if ep.Addr().Is6() {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return err
		}
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE)
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1)
	} else {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
	}
	if !noOffload {
		_, err := unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
		s.gso.Store(err == nil)
		s.gro = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil
	}
	return nil
}

// setMark marks what a socket sends, if the system lets us.
func setMark(fd, mark int) {
	if mark != 0 {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark)
	}
}

func (s *socket) close() error { return s.conn.Close() }

// canSegment reports whether messages to a may be segmented by the kernel into
// datagrams of n bytes.
func (s *socket) canSegment(a netip.Addr, n int) bool {
	if !s.gso.Load() {
		return false
	}
	small := s.small.Load()
	if small == nil {
		return true
	}
	refused, is := (*small)[a]
	return !is || n < refused
}

// segmentFailed remembers that a message to a in segments of n bytes was refused with
// errno.
func (s *socket) segmentFailed(a netip.Addr, n int, errno unix.Errno) {
	if errno == unix.EIO { // the device can't do checksums: true for all destinations
		s.gso.Store(false)
		return
	}
	next := map[netip.Addr]int{}
	if old := s.small.Load(); old != nil && len(*old) < maxSmall {
		maps.Copy(next, *old)
	}
	if old, ok := next[a]; !ok || n < old {
		next[a] = n
	}
	s.small.Store(&next)
}
