//go:build linux && !portableudp

package transport

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	recvMessages = 32
	// One message holds up to 64 KiB when the kernel coalesces datagrams. Memory
	// that no message has reached yet is not taken from the system.
	coalescedBuffer = 1 << 16
	// Without that, the largest datagram of the protocol has about 10 KiB.
	plainBuffer = 1 << 14

	// maxReadErrors in a row make the reader give the socket up.
	maxReadErrors = 100
	readErrorWait = 10 * time.Millisecond

	controlSpace = 32 // one control message with an int, rounded up
)

// receiver reads batches from one socket. Its memory is of one goroutine.
type receiver struct {
	sock    *socket
	n       int // messages in the batch
	errno   unix.Errno
	try     func(fd uintptr) bool
	hdrs    [recvMessages]unix.Mmsghdr
	iovs    [recvMessages]unix.Iovec
	names   [recvMessages]unix.RawSockaddrInet6 // room for both families
	control [recvMessages][controlSpace / 8]uint64
	buf     []byte
	size    int // of one message's part of buf
}

func newReceiver(s *socket) *receiver {
	r := &receiver{sock: s, size: plainBuffer}
	if s.gro {
		r.size = coalescedBuffer
	}
	r.buf = make([]byte, recvMessages*r.size)
	for i := range recvMessages {
		r.iovs[i].Base = &r.buf[i*r.size]
		r.iovs[i].SetLen(r.size)
		h := &r.hdrs[i].Hdr
		h.Iov = &r.iovs[i]
		h.SetIovlen(1)
		h.Name = (*byte)(unsafe.Pointer(&r.names[i]))
		h.Control = (*byte)(unsafe.Pointer(&r.control[i]))
		r.reset(i)
	}
	r.try = r.recv
	return r
}

// reset undoes what the kernel wrote into header i.
func (r *receiver) reset(i int) {
	h := &r.hdrs[i].Hdr
	h.Namelen = uint32(unsafe.Sizeof(r.names[i]))
	h.SetControllen(controlSpace)
	h.Flags = 0
}

// recv asks the kernel for a batch. False means that nothing is there.
func (r *receiver) recv(fd uintptr) bool {
	for {
		// It never sleeps, so that the runtime need not know of it. If it does, it looks every
		// 20 µs whether a call takes long, as one that carries datagrams through the kernel
		// does, and lends the processor to another thread.
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&r.hdrs[0])),
			recvMessages, unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false
		}
		r.n, r.errno = int(n), errno
		return true
	}
}

// read is a worker: it hands the datagrams of s to handle until s is closed.
func (u *UDP) read(s *socket, handle func(int, SocketID, netip.AddrPort, []byte), flush func(int)) {
	r := newReceiver(s)
	var sum Direction
	var pace pacer
	failures := 0
	for {
		r.n, r.errno = 0, 0
		if err := s.raw.Read(r.try); err != nil {
			if !errors.Is(err, net.ErrClosed) {
				u.log.Warn("udp socket failed", "endpoint", s.local, "error", err)
				s.failed.Store(true)
			}
			return
		}
		if r.errno != 0 {
			// Errors of single datagrams; ENETDOWN while the interface is down.
			if failures++; failures == maxReadErrors {
				u.log.Warn("udp socket failed", "endpoint", s.local, "error", r.errno)
				s.failed.Store(true)
				return
			}
			time.Sleep(readErrorWait)
			continue
		}
		failures = 0
		for i := range r.n {
			u.split(s, r, i, handle, &sum)
			r.reset(i)
		}
		flush(s.worker)
		messages, datagrams, bytes := int(sum.Messages), int(sum.Datagrams), int(sum.Bytes)
		sum.Batches++
		sum.Syscalls++
		u.stats.rx.add(&sum)
		if d := pace.pause(time.Now(), messages, datagrams, bytes); d > 0 && r.n < recvMessages {
			// The runtime's own timers are too coarse for this.
			ts := unix.NsecToTimespec(int64(d))
			_ = unix.Nanosleep(&ts, nil)
		}
	}
}

// split hands over the datagrams of message i.
func (u *UDP) split(s *socket, r *receiver, i int, handle func(int, SocketID, netip.AddrPort, []byte), sum *Direction) {
	n := int(r.hdrs[i].Len)
	if r.hdrs[i].Hdr.Flags&unix.MSG_TRUNC != 0 {
		u.stats.drops[DropTruncated].Add(1)
		return
	}
	from := r.source(i)
	if u.relay != nil {
		u.relay.received(from.Addr())
	}
	b := r.buf[i*r.size:][:n:n]
	seg := r.segmentSize(i)
	if seg <= 0 || seg > n {
		seg = n
	} else if seg < n {
		sum.Offloaded += uint64((n + seg - 1) / seg)
	}
	sum.Messages++
	sum.Bytes += uint64(n)
	for {
		k := min(seg, len(b))
		handle(s.worker, s.id, from, b[:k:k])
		sum.Datagrams++
		if b = b[k:]; len(b) == 0 {
			return
		}
	}
}

// source returns the sender of message i.
func (r *receiver) source(i int) netip.AddrPort {
	sa := &r.names[i]
	port := (*[2]byte)(unsafe.Pointer(&sa.Port))
	p := binary.BigEndian.Uint16(port[:])
	if sa.Family == unix.AF_INET {
		sa4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom4(sa4.Addr), p)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), p)
}

// segmentSize returns the size of the datagrams in a coalesced message, 0 for a
// plain one.
func (r *receiver) segmentSize(i int) int {
	h := &r.hdrs[i].Hdr
	if h.Controllen < unix.SizeofCmsghdr+4 {
		return 0
	}
	c := (*unix.Cmsghdr)(unsafe.Pointer(&r.control[i]))
	if c.Level != unix.SOL_UDP || c.Type != unix.UDP_GRO {
		return 0
	}
	b := (*[controlSpace]byte)(unsafe.Pointer(&r.control[i]))
	return int(int32(binary.NativeEndian.Uint32(b[unix.CmsgLen(0):])))
}
