package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ztgate/router/host/offload"
)

const (
	// messages that the kernel is asked for at once; one may be a large packet.
	messages = 32
	// maxInjected packets wait to be read.
	maxInjected = 64
)

// reader reads from a device. One goroutine uses it.
type reader struct {
	d     *Device
	seg   offload.Segmenter
	hdrs  [messages]unix.Mmsghdr
	iovs  [messages]unix.Iovec
	store []byte // memory that no packet has reached yet isn't taken from the system
	have  int    // messages that were received
	next  int    // of them
	now   int64

	wait  func(fd uintptr) bool
	topUp func(fd uintptr)
	bufs  [][]byte
	sizes []int
	at    int // of packets in bufs
	n     int
	err   error
}

func newReader(d *Device) *reader {
	r := &reader{d: d, seg: offload.Segmenter{Link: offload.EthernetLen}, store: make([]byte, messages*offload.MaxRead)}
	for i := range r.hdrs {
		r.iovs[i].Base = &r.store[i*offload.MaxRead]
		r.iovs[i].SetLen(offload.MaxRead)
		r.hdrs[i].Hdr.Iov = &r.iovs[i]
		r.hdrs[i].Hdr.SetIovlen(1)
	}
	r.wait, r.topUp = r.readAll, func(fd uintptr) { r.readAll(fd) }
	return r
}

// Read waits for packets and puts them at offset into bufs, with their lengths in sizes.
// It returns how many there are; an error with a method Temporary that returns true is
// about a packet that was lost. Before offset there is room for an Ethernet header. One
// goroutine reads at a time.
func (d *Device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	r := d.reader
	r.bufs, r.sizes, r.at, r.n, r.err = bufs, sizes, offset, 0, nil
	defer func() { r.bufs, r.sizes = nil, nil }()
	for {
		r.injected()
		r.cut()
		var err error
		switch {
		case r.err != nil || r.n == len(bufs):
		case r.n > 0: // what was left of an earlier call goes together with what waits
			err = d.raw.Control(r.topUp)
		default:
			err = d.raw.Read(r.wait)
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded): // something was injected
			if d.file.SetReadDeadline(time.Time{}) == nil {
				continue
			}
			return r.n, os.ErrClosed
		case err != nil:
			return r.n, os.ErrClosed
		}
		return r.n, r.err
	}
}

// cut moves packets of what was received to the caller's buffers.
func (r *reader) cut() {
	for r.n < len(r.bufs) && r.err == nil {
		switch {
		case r.seg.Pending():
			size, err := r.seg.Next(r.bufs[r.n][r.at-offload.EthernetLen:])
			if err != nil {
				r.err = err
				return
			}
			r.sizes[r.n] = size - offload.EthernetLen
			r.n++
		case r.next < r.have:
			i := r.next
			r.next++
			r.start(i)
		default:
			return
		}
	}
}

// start begins with message i.
func (r *reader) start(i int) {
	n := int(r.hdrs[i].Len)
	if r.hdrs[i].Hdr.Flags&unix.MSG_TRUNC != 0 {
		r.err = offload.ErrPacket
		return
	}
	b := r.store[i*offload.MaxRead:][:n]
	frame := b[min(n, offload.HeaderLen):]
	if len(frame) < destination4+4 {
		r.err = offload.ErrPacket
		return
	}
	ip := frame[offload.EthernetLen:]
	var from addressKey
	var to netip.Addr
	var length int
	loose := r.d.loose.Load()
	switch typ := binary.BigEndian.Uint16(frame[12:]); {
	case typ == etherIPv4 && ip[0]>>4 == 4:
		from, length = key4(ip[12:]), int(binary.BigEndian.Uint16(ip[2:]))
		if loose != nil {
			to = netip.AddrFrom4([4]byte(ip[16:]))
		}
	case typ == etherIPv6 && ip[0]>>4 == 6 && len(ip) >= 40:
		from, length = key16(ip[8:]), 40+int(binary.BigEndian.Uint16(ip[4:]))
		if loose != nil {
			to = netip.AddrFrom16([16]byte(ip[24:]))
		}
	default:
		r.err = offload.ErrPacket
		return
	}
	if loose != nil && !loose.contains(to) {
		return // somebody else's
	}
	mac := macOf(frame[6:])
	if r.d.inside.has(from) || !r.d.others(from, mac) {
		r.err = offload.ErrPacket // in the name of ours
		return
	}
	r.d.known.learn(r.now, from, mac)
	// Short frames are filled up on the wire.
	if alone := b[1] == unix.VIRTIO_NET_HDR_GSO_NONE; alone && length < len(ip) {
		b = b[:len(b)-len(ip)+length]
	}
	if err := r.seg.Start(b); err != nil {
		r.err = err
	}
}

// others reports whether an address and a MAC may be those of another host. Answers to a group's
// MAC would go to all (RFC 1812 §3.3.2). Our own MAC may be another's too, as with ipvlan.
func (d *Device) others(a addressKey, mac uint64) bool {
	const group = 1 << 40
	_, own := (*d.own.Load())[a]
	return !own && mac&group == 0 && mac != 0
}

// readAll receives until nothing waits or there is no room. It returns false if there is
// nothing.
func (r *reader) readAll(fd uintptr) bool {
	r.now = r.d.seconds()
	for r.n < len(r.bufs) {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&r.hdrs[0])), messages, unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return r.n > 0 || r.err != nil
		case unix.ENETDOWN: // and when it is up again, packets come again
			if _, err := net.InterfaceByIndex(r.d.index); err == nil {
				continue
			}
			r.err = fmt.Errorf("interface %q: %w", r.d.name, os.ErrClosed)
			return true
		default: // of a form that can't be told by a virtio_net_hdr, as tunnels in one piece
			r.err = offload.ErrPacket
			return true
		}
		r.have, r.next = int(n), 0
		if r.cut(); r.err != nil {
			return true
		}
	}
	return true
}

// injected are packets of a host inside, which are read as if they came by the interface.
type injected struct {
	waiting atomic.Int32
	mu      sync.Mutex // guards queue
	queue   [][]byte
}

// errFull says that too many packets wait already.
var errFull = errors.New("too many packets wait to be read")

// Inject makes an IP packet be read as if it came by the interface.
func (d *Device) Inject(ip []byte) error {
	q := &d.injected
	q.mu.Lock()
	full := len(q.queue) == maxInjected
	if !full {
		q.queue = append(q.queue, append([]byte(nil), ip...))
		q.waiting.Add(1)
	}
	q.mu.Unlock()
	if full {
		return errFull
	}
	if err := d.file.SetReadDeadline(time.Unix(1, 0)); err != nil { // wakes the reader
		return os.ErrClosed
	}
	return nil
}

// injected takes packets that wait.
func (r *reader) injected() {
	q := &r.d.injected
	if q.waiting.Load() == 0 {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.queue) > 0 && r.n < len(r.bufs) {
		p := q.queue[0]
		q.queue = q.queue[1:]
		q.waiting.Add(-1)
		if room := r.bufs[r.n][r.at:]; len(p) <= len(room) {
			r.sizes[r.n] = copy(room, p)
			r.n++
		}
	}
}
