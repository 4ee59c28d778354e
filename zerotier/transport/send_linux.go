//go:build linux && !portableudp

package transport

import (
	"encoding/binary"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	arenaSize   = 256 << 10
	maxMessages = 64
	maxSegments = 64    // of one message, UDP_MAX_SEGMENTS
	maxMessage  = 65000 // bytes of one message: below 65535 with all headers
	maxDatagram = 65507

	// lookBack is how many of the latest messages are searched for one that a
	// datagram can join.
	lookBack = 16

	// sendWait bounds how long Flush waits for room in send buffers.
	sendWait = 20 * time.Millisecond
)

// Sender collects datagrams of one goroutine and sends them with few system
// calls. Neighbouring datagrams of one flow, that is of one socket and
// destination, go as one message if all but the last have the same size, even if
// datagrams of other flows lie between them. The order within a flow is kept.
//
// Everything that is put in is sent by [Sender.Flush], or earlier when there is
// no more room. A Sender must not be copied.
type Sender struct {
	u     *UDP
	arena []byte // filled up to len
	n     int    // messages in use
	msgs  [maxMessages]message
	iovs  [maxMessages][maxSegments]unix.Iovec
	sum   Direction

	// Of the transmission under way.
	sock  *socket
	batch []unix.Mmsghdr
	of    [maxMessages]int // batch[i] is message of[i]
	hdrs  [maxMessages]unix.Mmsghdr
	wait  time.Duration // left of sendWait
	send  func(fd uintptr)

	plainHdrs [maxSegments]unix.Mmsghdr
	plainIovs [maxSegments]unix.Iovec
}

// message is a run of datagrams to one destination.
type message struct {
	asked   SocketID // as named by the caller
	to      netip.AddrPort
	sock    *socket // nil once sent
	size    int     // of a segment
	bytes   int
	count   int  // segments
	closed  bool // takes no more
	iovs    int
	name    unix.RawSockaddrInet6 // room for both families
	nameLen uint32
	control [controlSpace / 8]uint64
	ctlLen  int
}

// NewSender returns a sender for one goroutine.
func (u *UDP) NewSender() *Sender {
	s := &Sender{u: u, arena: make([]byte, 0, arenaSize)}
	s.send = s.transmit
	return s
}

// Send queues the datagram head || data; both are copied.
func (s *Sender) Send(sock SocketID, to netip.AddrPort, head, data []byte) {
	s.put(sock, to, head, data, 0)
}

// SendTTL queues a datagram with its own time to live, IPv4 only: to an IPv6
// destination it is sent with the usual hop limit (chapter 02 §8.4).
func (s *Sender) SendTTL(sock SocketID, to netip.AddrPort, data []byte, ttl int) {
	s.put(sock, to, nil, data, ttl)
}

func (s *Sender) put(id SocketID, to netip.AddrPort, head, data []byte, ttl int) {
	n := len(head) + len(data)
	if n > maxDatagram {
		s.drop(DropTooLarge, 1)
		return
	}
	if r := s.u.relay; r != nil && ttl == 0 && r.wanted.Load() {
		if r.offer(to, head, data); r.force {
			return
		}
	}
	if len(s.arena)+n > cap(s.arena) {
		s.Flush()
	}
	if ttl == 0 && id != 0 {
		if i := s.open(id, to, n); i >= 0 {
			s.join(i, s.copy(head, data))
			return
		}
	}
	if a := to.Addr(); to.Port() == 0 || !a.IsValid() || a.IsUnspecified() {
		s.drop(DropAddress, 1)
		return
	}
	dst := netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	t := s.u.table.Load()
	if one, ok := t.byID[id]; ok && one.local.Addr().Is4() == dst.Addr().Is4() {
		if s.n == maxMessages {
			s.Flush()
		}
		s.begin(one, id, to, dst, s.copy(head, data), ttl)
		return
	}
	socks := t.family(dst.Addr()) // all sockets asked for, or its own is gone
	if len(socks) == 0 {
		s.drop(DropNoSocket, 1)
	}
	for _, one := range socks {
		if s.n == maxMessages || len(s.arena)+n > cap(s.arena) {
			s.Flush()
		}
		s.begin(one, id, to, dst, s.copy(head, data), ttl)
		s.msgs[s.n-1].closed = true
	}
}

// copy puts a datagram into the arena, which has room.
func (s *Sender) copy(head, data []byte) []byte {
	from := len(s.arena)
	s.arena = append(append(s.arena, head...), data...)
	return s.arena[from:]
}

// open returns the message that a datagram of n bytes can join, or -1. Only the
// latest message of the flow qualifies.
func (s *Sender) open(id SocketID, to netip.AddrPort, n int) int {
	for i := s.n - 1; i >= max(0, s.n-lookBack); i-- {
		m := &s.msgs[i]
		if m.asked != id || m.to != to {
			continue
		}
		if m.closed || n > m.size || m.count == maxSegments || m.bytes+n > maxMessage {
			return -1
		}
		return i
	}
	return -1
}

// join adds datagram b to message i.
func (s *Sender) join(i int, b []byte) {
	m := &s.msgs[i]
	last := &s.iovs[i][m.iovs-1]
	// The datagrams lie in the arena one after the other unless another flow
	// came between.
	if len(b) > 0 && unsafe.Add(unsafe.Pointer(last.Base), last.Len) == unsafe.Pointer(&b[0]) {
		last.SetLen(int(last.Len) + len(b))
	} else {
		s.iovs[i][m.iovs] = iovec(b)
		m.iovs++
	}
	m.count++
	m.bytes += len(b)
	m.closed = len(b) < m.size
}

// begin starts a message with datagram b.
func (s *Sender) begin(sock *socket, id SocketID, to, dst netip.AddrPort, b []byte, ttl int) {
	m := &s.msgs[s.n]
	m.asked, m.to, m.sock = id, to, sock
	m.size, m.bytes, m.count, m.iovs, m.ctlLen = len(b), len(b), 1, 1, 0
	m.setName(dst)
	if ttl > 0 && dst.Addr().Is4() {
		m.setControl(unix.IPPROTO_IP, unix.IP_TTL, 4)
		binary.NativeEndian.PutUint32(m.controlData(), uint32(ttl))
	}
	m.closed = ttl != 0 || len(b) == 0 || !sock.canSegment(dst.Addr(), len(b))
	s.iovs[s.n][0] = iovec(b)
	s.n++
}

func iovec(b []byte) (v unix.Iovec) {
	v.Base = unsafe.SliceData(b)
	v.SetLen(len(b))
	return v
}

func (m *message) setName(to netip.AddrPort) {
	m.name = unix.RawSockaddrInet6{}
	port := (*[2]byte)(unsafe.Pointer(&m.name.Port))
	binary.BigEndian.PutUint16(port[:], to.Port())
	if a := to.Addr(); a.Is4() {
		sa := (*unix.RawSockaddrInet4)(unsafe.Pointer(&m.name))
		sa.Family, sa.Addr = unix.AF_INET, a.As4()
		m.nameLen = unix.SizeofSockaddrInet4
	} else {
		m.name.Family, m.name.Addr = unix.AF_INET6, a.As16()
		m.nameLen = unix.SizeofSockaddrInet6
	}
}

func (m *message) setControl(level, typ int32, n int) {
	c := (*unix.Cmsghdr)(unsafe.Pointer(&m.control))
	c.Level, c.Type = level, typ
	c.SetLen(unix.CmsgLen(n))
	m.ctlLen = unix.CmsgSpace(n)
}

func (m *message) controlData() []byte {
	b := (*[controlSpace]byte)(unsafe.Pointer(&m.control))
	return b[unix.CmsgLen(0):]
}

// header makes the kernel's description of message i.
func (s *Sender) header(i int) (h unix.Mmsghdr) {
	m := &s.msgs[i]
	if m.count > 1 {
		m.setControl(unix.SOL_UDP, unix.UDP_SEGMENT, 2)
		binary.NativeEndian.PutUint16(m.controlData(), uint16(m.size))
	}
	h.Hdr.Name, h.Hdr.Namelen = (*byte)(unsafe.Pointer(&m.name)), m.nameLen
	h.Hdr.Iov = &s.iovs[i][0]
	h.Hdr.SetIovlen(m.iovs)
	if m.ctlLen > 0 {
		h.Hdr.Control = (*byte)(unsafe.Pointer(&m.control))
		h.Hdr.SetControllen(m.ctlLen)
	}
	return h
}

// Flush sends what was put in. It waits a few milliseconds at most when the
// kernel's buffers are full, then drops.
func (s *Sender) Flush() {
	if s.n == 0 {
		s.arena = s.arena[:0]
		return
	}
	s.wait = sendWait
	for i := range s.n {
		if s.msgs[i].sock == nil {
			continue
		}
		s.sock = s.msgs[i].sock
		k := 0
		for j := i; j < s.n; j++ {
			if s.msgs[j].sock == s.sock {
				s.hdrs[k], s.of[k] = s.header(j), j
				s.msgs[j].sock = nil
				k++
			}
		}
		s.batch = s.hdrs[:k]
		if err := s.sock.raw.Control(s.send); err != nil {
			for _, j := range s.of[:k] {
				s.drop(DropNoSocket, s.msgs[j].count)
			}
		}
	}
	s.sock = nil
	s.n, s.arena = 0, s.arena[:0]
	s.sum.Batches++
	s.u.stats.tx.add(&s.sum)
}

// transmit sends batch through fd. Runs within raw.Control.
func (s *Sender) transmit(fd uintptr) {
	for off := 0; off < len(s.batch); {
		n, errno := s.sendmmsg(fd, s.batch[off:])
		for range n {
			m := &s.msgs[s.of[off]]
			s.sent(m.count, m.bytes)
			off++
		}
		if errno == 0 {
			continue
		}
		m := &s.msgs[s.of[off]]
		if m.count > 1 && (errno == unix.EIO || errno == unix.EINVAL || errno == unix.EMSGSIZE) {
			s.sock.segmentFailed(m.to.Addr().Unmap(), m.size, errno)
			s.u.stats.fallbacks.Add(1)
			s.transmitPlain(fd, s.of[off])
		} else {
			s.drop(reasonOf(errno), m.count)
		}
		off++
	}
}

// transmitPlain sends the datagrams of message i one by one.
func (s *Sender) transmitPlain(fd uintptr, i int) {
	m := &s.msgs[i]
	k := 0
	for _, v := range s.iovs[i][:m.iovs] {
		for b := unsafe.Slice(v.Base, int(v.Len)); len(b) > 0; k++ {
			n := min(len(b), m.size)
			s.plainIovs[k] = iovec(b[:n])
			h := unix.Mmsghdr{}
			h.Hdr.Name, h.Hdr.Namelen = (*byte)(unsafe.Pointer(&m.name)), m.nameLen
			h.Hdr.Iov = &s.plainIovs[k]
			h.Hdr.SetIovlen(1)
			s.plainHdrs[k] = h
			b = b[n:]
		}
	}
	for off := 0; off < k; {
		n, errno := s.sendmmsg(fd, s.plainHdrs[off:k])
		for range n {
			s.sent(1, int(s.plainIovs[off].Len))
			off++
		}
		if errno != 0 {
			s.drop(reasonOf(errno), 1)
			off++
		}
	}
}

// sendmmsg sends some of hdrs and returns how many. The error, if any, is that
// of the message after them.
func (s *Sender) sendmmsg(fd uintptr, hdrs []unix.Mmsghdr) (int, unix.Errno) {
	for {
		// As in recv: it doesn't sleep.
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&hdrs[0])),
			uintptr(len(hdrs)), unix.MSG_DONTWAIT, 0, 0)
		s.sum.Syscalls++
		switch {
		case errno == unix.EINTR:
		case errno == unix.EAGAIN && s.wait > 0:
			s.await(fd)
		case errno != 0:
			return 0, errno
		default:
			return int(n), 0
		}
	}
}

// await waits for room in the send buffer, at most what is left of sendWait.
func (s *Sender) await(fd uintptr) {
	start := time.Now()
	p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	_, _ = unix.Poll(p[:], int(max(s.wait, time.Millisecond)/time.Millisecond))
	s.wait -= max(time.Since(start), time.Millisecond) // always gets less
}

func (s *Sender) sent(count, bytes int) {
	s.sum.Messages++
	s.sum.Datagrams += uint64(count)
	s.sum.Bytes += uint64(bytes)
	if count > 1 {
		s.sum.Offloaded += uint64(count)
	}
}

func (s *Sender) drop(r DropReason, n int) { s.u.stats.drops[r].Add(uint64(n)) }

func reasonOf(errno unix.Errno) DropReason {
	switch errno {
	case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
		return DropBufferFull
	case unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENETDOWN, unix.ENODEV, unix.ENXIO:
		return DropUnreachable
	case unix.EPERM, unix.EACCES:
		return DropRefused
	case unix.EMSGSIZE:
		return DropTooLarge
	case unix.EINVAL, unix.EAFNOSUPPORT, unix.EADDRNOTAVAIL:
		return DropAddress
	}
	return DropOther
}
