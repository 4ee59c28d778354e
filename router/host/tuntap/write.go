package tuntap

import (
	"io"
	"os"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"ztgate/internal/uring"
	"ztgate/router/host/offload"
)

// writer writes packets to an interface, merged where they can be. One goroutine
// uses it at a time; several may write to one interface.
type writer struct {
	merge  offload.Merger
	ring   *uring.Ring // nil = a system call for each packet
	fd     uintptr
	bufs   [][]byte
	offset int
	lost   int // packets
	err    error
	run    func(fd uintptr)

	// What is to be written by one call.
	queue []write
	heads [uring.Entries][offload.HeaderLen]byte // the merger's is for one at a time
	iovs  []unix.Iovec                           // has always room for a large packet
}

// write is one packet of the kernel's.
type write struct {
	iov     []unix.Iovec
	packets int // of ours
	size    int
}

// iovsPerBatch is enough for a batch in which nothing is merged, or all that can be.
const iovsPerBatch = 2*uring.Entries + offload.MaxParts + 2

func newWriter(link int, udp bool) *writer {
	w := &writer{merge: offload.Merger{Link: link, UDP: udp}, queue: make([]write, 0, uring.Entries), iovs: make([]unix.Iovec, 0, iovsPerBatch)}
	w.merge.Write = w.add
	w.run = func(fd uintptr) {
		w.fd = fd
		for _, b := range w.bufs {
			w.merge.Add(b[w.offset:])
		}
		w.merge.Flush()
		w.submit()
	}
	return w
}

// writeAll writes the packets at offset in bufs, and may change them. It returns
// how many reached the kernel, and the first error of the others.
func (w *writer) writeAll(raw syscall.RawConn, bufs [][]byte, offset int) (int, error) {
	w.bufs, w.offset, w.lost, w.err = bufs, offset, 0, nil
	err := raw.Control(w.run) // never waits: a TUN takes what it is given, or refuses it
	w.bufs = nil
	if err != nil {
		return 0, os.ErrClosed
	}
	return len(bufs) - w.lost, w.err
}

// add takes parts as one packet.
func (w *writer) add(parts [][]byte) {
	if len(w.queue) == cap(w.queue) || len(w.iovs)+len(parts) > cap(w.iovs) {
		w.submit()
	}
	q := write{packets: len(parts) - 1}
	head := &w.heads[len(w.queue)]
	copy(head[:], parts[0])
	from := len(w.iovs)
	w.iovs = append(w.iovs, iovec(head[:]))
	q.size = offload.HeaderLen
	for _, p := range parts[1:] {
		if len(p) > 0 {
			w.iovs = append(w.iovs, iovec(p))
			q.size += len(p)
		}
	}
	q.iov = w.iovs[from:]
	w.queue = append(w.queue, q)
	if w.ring == nil {
		w.submit()
	}
}

func iovec(b []byte) (v unix.Iovec) {
	v.Base = unsafe.SliceData(b)
	v.SetLen(len(b))
	return v
}

// submit writes what was added.
func (w *writer) submit() {
	var results []int32
	if w.ring != nil && len(w.queue) > 1 {
		for i := range w.queue {
			w.ring.Writev(w.fd, w.queue[i].iov)
		}
		results, _ = w.ring.Submit() // what it couldn't take is written as without it
	}
	for i := range w.queue {
		q := &w.queue[i]
		if i < len(results) {
			w.ended(q, int(max(results[i], 0)), unix.Errno(max(-results[i], 0)))
		} else {
			n, errno := w.writev(q.iov)
			w.ended(q, n, errno)
		}
	}
	clear(w.queue)
	clear(w.iovs)
	w.queue, w.iovs = w.queue[:0], w.iovs[:0]
}

// ended counts a write of which the kernel took n bytes.
func (w *writer) ended(q *write, n int, errno unix.Errno) {
	var err error
	switch {
	case errno == unix.EBADFD:
		err = os.ErrClosed
	case errno != 0:
		err = errno
	case n < q.size:
		err = io.ErrShortWrite
	default:
		return
	}
	w.lost += q.packets
	if w.err == nil {
		w.err = err
	}
}

func (w *writer) writev(iov []unix.Iovec) (int, unix.Errno) {
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_WRITEV, w.fd, uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// Writers write packets to an interface, for several goroutines at a time.
type Writers struct {
	make func() *writer

	mu     sync.Mutex
	idle   []*writer
	rings  int // that may still be made
	closed bool
}

// maxRings bounds the descriptors that an interface takes for its rings. Only as many
// are made as goroutines write to it at the same time.
const maxRings = 8

// NewWriters makes some for packets with a link header of a length; udp says that
// the kernel takes merged datagrams.
func NewWriters(link int, udp bool, how Method) *Writers {
	p := &Writers{make: func() *writer { return newWriter(link, udp) }}
	if how == IOUring {
		p.rings = maxRings
	}
	return p
}

// Write writes the packets at offset in bufs, and may change them. It returns how
// many reached the kernel, and the first error of the others.
func (p *Writers) Write(raw syscall.RawConn, bufs [][]byte, offset int) (int, error) {
	w := p.take()
	defer p.put(w)
	return w.writeAll(raw, bufs, offset)
}

func (p *Writers) take() *writer {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.idle) - 1; n >= 0 {
		w := p.idle[n]
		p.idle = p.idle[:n]
		return w
	}
	w := p.make()
	if p.rings > 0 && !p.closed {
		p.rings--
		if r, err := uring.New(); err == nil { // without memory or descriptors for it the packets go all the same
			w.ring = r
		}
	}
	return w
}

func (p *Writers) put(w *writer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		w.close()
		return
	}
	p.idle = append(p.idle, w)
}

// Close frees what writers hold of the kernel, once they have written. What is written
// afterwards still goes to the interface, if that is open.
func (p *Writers) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, w := range p.idle {
		w.close()
	}
	p.idle = nil
}

func (w *writer) close() {
	if w.ring != nil {
		_ = w.ring.Close() // nothing is under way in it
		w.ring = nil
	}
}
