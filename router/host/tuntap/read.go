package tuntap

import (
	"io"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"ztgate/router/host/offload"
)

// Reader reads packets from an interface in batches: all that waits, so that there
// are batches under load and no delay without. One goroutine uses it.
type Reader struct {
	seg   offload.Segmenter
	large []byte
	drain func(fd uintptr) bool
	topUp func(fd uintptr)
	bufs  [][]byte
	sizes []int
	at    int // offset in bufs
	n     int
	err   error
}

// NewReader makes one for packets with a link header of a length.
func NewReader(link int) *Reader {
	r := &Reader{seg: offload.Segmenter{Link: link}, large: make([]byte, offload.MaxRead)}
	r.drain, r.topUp = r.readAll, func(fd uintptr) { r.readAll(fd) }
	return r
}

// ReadBatch waits for packets and puts them at offset into bufs, with their lengths
// in sizes. It returns how many there are, also with an error.
func (r *Reader) ReadBatch(raw syscall.RawConn, bufs [][]byte, sizes []int, offset int) (int, error) {
	r.bufs, r.sizes, r.at, r.n, r.err = bufs, sizes, offset, 0, nil
	r.cut()
	var err error
	switch {
	case r.err != nil || r.n == len(bufs):
	case r.n > 0: // what was left of an earlier read goes together with what waits
		err = raw.Control(r.topUp)
	default:
		err = raw.Read(r.drain)
	}
	r.bufs, r.sizes = nil, nil
	if err != nil {
		return r.n, os.ErrClosed
	}
	return r.n, r.err
}

// cut moves what the segmenter has to the caller's buffers.
func (r *Reader) cut() {
	for r.seg.Pending() && r.n < len(r.bufs) {
		size, err := r.seg.Next(r.bufs[r.n][r.at:])
		if err != nil {
			r.err = err
			continue
		}
		r.sizes[r.n] = size
		r.n++
	}
}

// Reads and writes here never sleep, so that the runtime need not know of them
// (RawSyscall). If it does, it looks every 20 µs whether one takes long, as a write that
// carries packets through the kernel does, and lends the processor to another thread:
// a tenth of all the time under load.

// readAll reads until nothing waits or there is no room. It returns false if
// there is nothing.
func (r *Reader) readAll(fd uintptr) bool {
	for r.n < len(r.bufs) {
		m, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(unsafe.SliceData(r.large))), uintptr(len(r.large)))
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN:
			return r.n > 0 || r.err != nil
		case errno == unix.EBADFD:
			r.err = os.ErrClosed
			return true
		case errno != 0:
			r.err = errno
			return true
		case m == 0:
			r.err = io.EOF
			return true
		}
		if err := r.seg.Start(r.large[:m]); err != nil {
			r.err = err
			return true
		}
		r.cut()
	}
	return true
}
