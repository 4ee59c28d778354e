package packet

import (
	"encoding/binary"
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"ztgate/router/host/offload"
)

const (
	maxParts = 2 * batch
	// sendWait is how long a batch may wait for room in the send buffer, in ms.
	sendWait = 10
)

// writer writes packets to a device, merged where they can be. One goroutine uses it at a
// time.
type writer struct {
	d     *Device
	merge offload.Merger
	hdrs  [batch]unix.Mmsghdr
	heads [batch][offload.HeaderLen]byte // virtio_net_hdr
	count [batch]int                     // packets in a message
	iovs  [maxParts]unix.Iovec
	n     int // messages
	parts int
	wait  int // ms that are left
	lost  int // packets
	err   error
}

func newWriter(d *Device, udp bool) *writer {
	w := &writer{d: d, merge: offload.Merger{Link: offload.EthernetLen, UDP: udp}}
	w.merge.Write = w.add
	return w
}

// Write writes the packets at offset in bufs, behind room for an Ethernet header, and may
// change them. It returns how many were sent, and the first error of the others.
//
// A packet goes to the MAC that its destination sent from last. If that isn't known or not
// certain, the kernel sends the packet as one of this host's, and finds out.
func (d *Device) Write(bufs [][]byte, offset int) (int, error) {
	d.closing.RLock()
	defer d.closing.RUnlock()
	if d.closed {
		return 0, os.ErrClosed
	}
	w := d.writers.Get().(*writer)
	defer d.writers.Put(w)
	w.wait, w.lost, w.err = sendWait, 0, nil
	now, own := d.seconds(), d.mac.Load()
	for _, b := range bufs {
		w.write(now, own, b[offset-offload.EthernetLen:])
	}
	w.merge.Flush()
	w.flush()
	return len(bufs) - w.lost, w.err
}

func (w *writer) write(now int64, own uint64, frame []byte) {
	ip := frame[offload.EthernetLen:]
	var to addressKey
	var typ uint64
	switch {
	case len(ip) >= 20 && ip[0]>>4 == 4:
		to, typ = key4(ip[16:]), etherIPv4
	case len(ip) >= 40 && ip[0]>>4 == 6:
		to, typ = key16(ip[24:]), etherIPv6
	default:
		w.fail(1, unix.EINVAL)
		return
	}
	mac, ok := w.d.known.lookup(now, to)
	if !ok {
		w.byKernel(to, ip)
		return
	}
	binary.BigEndian.PutUint64(frame, mac<<16) // its last two bytes come next
	binary.BigEndian.PutUint64(frame[6:], own<<16|typ)
	w.merge.Add(frame)
}

// byKernel lets the kernel send a packet, unless it is for a host inside.
func (w *writer) byKernel(to addressKey, ip []byte) {
	if w.d.inside.has(to) {
		w.d.inside.deliver(ip)
		return
	}
	if _, own := (*w.d.own.Load())[to]; own {
		w.fail(1, errOwn)
		return
	}
	fd, size := w.d.ip4, uintptr(unix.SizeofSockaddrInet4)
	var name unix.RawSockaddrInet6 // room for both families
	if ip[0]>>4 == 4 {
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&name))
		v4.Family, v4.Addr = unix.AF_INET, [4]byte(ip[16:])
	} else {
		fd, size = w.d.ip6, unix.SizeofSockaddrInet6
		name.Family, name.Addr = unix.AF_INET6, [16]byte(ip[24:])
	}
	_, _, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&ip[0])), uintptr(len(ip)), unix.MSG_DONTWAIT,
		uintptr(unsafe.Pointer(&name)), size)
	if errno != 0 {
		w.fail(1, errno)
	}
}

// errOwn says that a packet is for this host itself.
var errOwn = errors.New("it is for an address of this host")

func (w *writer) fail(packets int, err error) {
	w.lost += packets
	if w.err == nil {
		w.err = err
	}
}

// add appends a message: a virtio_net_hdr and what belongs behind it.
func (w *writer) add(parts [][]byte) {
	if w.n == batch || w.parts+len(parts) > maxParts {
		w.flush()
	}
	i := w.n
	w.n++
	copy(w.heads[i][:], parts[0])
	first := w.parts
	w.part(w.heads[i][:])
	for _, p := range parts[1:] {
		if len(p) > 0 {
			w.part(p)
		}
	}
	w.count[i] = len(parts) - 1
	h := &w.hdrs[i].Hdr
	h.Iov = &w.iovs[first]
	h.SetIovlen(w.parts - first)
}

func (w *writer) part(b []byte) {
	w.iovs[w.parts] = unix.Iovec{Base: &b[0]}
	w.iovs[w.parts].SetLen(len(b))
	w.parts++
}

// flush sends the messages.
func (w *writer) flush() {
	for i := 0; i < w.n; {
		n, errno := w.send(w.hdrs[i:w.n])
		i += n
		if errno != 0 { // of the message after those
			w.fail(w.count[i], errno)
			i++
		}
	}
	clear(w.iovs[:w.parts])
	w.n, w.parts = 0, 0
}

// send sends some of hdrs and returns how many.
func (w *writer) send(hdrs []unix.Mmsghdr) (int, unix.Errno) {
	fd := w.d.send
	for {
		n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&hdrs[0])), uintptr(len(hdrs)), unix.MSG_DONTWAIT, 0, 0)
		switch {
		case errno == unix.EINTR:
		case errno == unix.EAGAIN && w.wait > 0:
			w.wait--
			p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
			_, _ = unix.Poll(p[:], 1)
		case errno != 0:
			return 0, errno
		default:
			return int(n), 0
		}
	}
}
