//go:build linux && !portableudp

package transport

import (
	"context"
	"errors"
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
	// small holds destinations whose path takes no segments of the size we
	// use, e.g. a smaller MTU; they get plain datagrams, which the kernel can
	// fragment.
	small atomic.Pointer[map[netip.Addr]struct{}]
}

// maxSmall bounds socket.small, which is emptied when full.
const maxSmall = 256

func openSocket(p place, ep netip.AddrPort, noOffload bool) (*socket, error) {
	s := &socket{}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) { err = s.setOptions(int(fd), p, ep, noOffload) })
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
func (s *socket) setOptions(fd int, p place, ep netip.AddrPort, noOffload bool) error {
	for _, o := range [...]int{unix.SO_RCVBUF, unix.SO_RCVBUFFORCE, unix.SO_SNDBUF, unix.SO_SNDBUFFORCE} {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, o, bufferSize)
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
	if p.ifname != "" {
		// Keeps routes of virtual networks from capturing our own traffic. Old
		// kernels want CAP_NET_RAW; without it the routes must be right.
		_ = unix.BindToDevice(fd, p.ifname)
	}
	if ep.Addr().Is6() {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return err
		}
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DONT)
	} else {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
	}
	if !noOffload {
		_, err := unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
		s.gso.Store(err == nil)
		s.gro = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil
	}
	return nil
}

func (s *socket) close() error { return s.conn.Close() }

// canSegment reports whether messages to a may be segmented by the kernel.
func (s *socket) canSegment(a netip.Addr) bool {
	if !s.gso.Load() {
		return false
	}
	small := s.small.Load()
	if small == nil {
		return true
	}
	_, is := (*small)[a]
	return !is
}

// segmentFailed remembers that a segmented message to a was refused with errno.
func (s *socket) segmentFailed(a netip.Addr, errno unix.Errno) {
	if errno == unix.EIO { // the device can't do checksums: true for all destinations
		s.gso.Store(false)
		return
	}
	next := map[netip.Addr]struct{}{a: {}}
	if old := s.small.Load(); old != nil && len(*old) < maxSmall {
		for k := range *old {
			next[k] = struct{}{}
		}
	}
	s.small.Store(&next)
}
