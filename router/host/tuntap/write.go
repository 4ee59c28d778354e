package tuntap

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"ztgate/router/host/offload"
)

// Writer writes packets to an interface, merged where they can be. One goroutine
// uses it at a time; several may write to one interface.
type Writer struct {
	merge  offload.Merger
	fd     uintptr
	bufs   [][]byte
	offset int
	lost   int // packets
	err    error
	iov    []unix.Iovec
	run    func(fd uintptr)
}

// NewWriter makes one for packets with a link header of a length; udp says that
// the kernel takes merged datagrams.
func NewWriter(link int, udp bool) *Writer {
	w := &Writer{merge: offload.Merger{Link: link, UDP: udp}}
	w.merge.Write = func(parts [][]byte) {
		if err := w.writev(parts); err != nil {
			w.lost += len(parts) - 1
			if w.err == nil {
				w.err = err
			}
		}
	}
	w.run = func(fd uintptr) {
		w.fd = fd
		for _, b := range w.bufs {
			w.merge.Add(b[w.offset:])
		}
		w.merge.Flush()
	}
	return w
}

// WriteAll writes the packets at offset in bufs, and may change them. It returns
// how many reached the kernel, and the first error of the others.
func (w *Writer) WriteAll(raw syscall.RawConn, bufs [][]byte, offset int) (int, error) {
	w.bufs, w.offset, w.lost, w.err = bufs, offset, 0, nil
	err := raw.Control(w.run) // never waits: a TUN takes what it is given, or refuses it
	w.bufs = nil
	if err != nil {
		return 0, os.ErrClosed
	}
	return len(bufs) - w.lost, w.err
}

// writev writes parts as one packet.
func (w *Writer) writev(parts [][]byte) error {
	iov := w.iov[:0]
	for _, p := range parts {
		if len(p) > 0 {
			v := unix.Iovec{Base: &p[0]}
			v.SetLen(len(p))
			iov = append(iov, v)
		}
	}
	defer clear(iov)
	w.iov = iov
	for {
		_, _, e := unix.Syscall(unix.SYS_WRITEV, w.fd, uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
		switch e {
		case 0:
			return nil
		case unix.EINTR:
			continue
		case unix.EBADFD:
			return os.ErrClosed
		default:
			return e
		}
	}
}
