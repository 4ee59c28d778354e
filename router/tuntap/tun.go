package tuntap

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
)

// TUN is an IP interface with the offloads the kernel offers. It is set up and
// ended by package wireguard/tun. Reading and writing are our own: a read returns
// all that waits instead of one packet of the kernel's, and a write merges without
// copying and may be made by several goroutines at once.
type TUN struct {
	tun.Device
	raw     syscall.RawConn
	writers sync.Pool // of *Writer

	seg   Segmenter // of the reader
	large []byte
	drain func(fd uintptr) bool
	topUp func(fd uintptr)
	bufs  [][]byte
	sizes []int
	at    int // offset in bufs
	n     int
	err   error
}

// MaxRead is the most that the kernel hands over at once.
const MaxRead = vnetLen + EthernetLen + 4 + 1<<16

// OpenTUN creates or attaches to a TUN, in the network namespace of the calling
// thread. Its errors say what is missing.
func OpenTUN(name string) (*TUN, error) {
	fd, err := OpenFD(name, unix.IFF_TUN|unix.IFF_NO_PI|unix.IFF_VNET_HDR)
	if err != nil {
		return nil, err
	}
	dev, _, err := tun.CreateUnmonitoredTUNFromFD(fd)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("create tun %q: %w", name, err)
	}
	raw, err := dev.File().SyscallConn()
	if err != nil {
		_ = dev.Close()
		return nil, fmt.Errorf("create tun %q: %w", name, err)
	}
	t := &TUN{Device: dev, raw: raw, large: make([]byte, MaxRead)}
	t.drain, t.topUp = t.readAll, func(fd uintptr) { t.readAll(fd) }
	udp := false
	cerr := raw.Control(func(fd uintptr) { udp, err = SetOffloads(int(fd)) }) // again, since the library doesn't tell
	if err = errors.Join(err, cerr); err != nil {
		_ = dev.Close()
		return nil, fmt.Errorf("set offloads of %q: %w", name, err)
	}
	t.writers.New = func() any { return NewWriter(0, udp) }
	return t, nil
}

// packetError is about one packet: reading goes on.
type packetError struct{}

func (packetError) Error() string   { return "malformed packet from the kernel" }
func (packetError) Temporary() bool { return true }

var errPacket error = packetError{}

// Read waits for packets and puts them at offset into bufs, with their lengths in
// sizes. It returns how many there are; an error with a method Temporary that
// returns true is about a packet that was lost. One goroutine reads at a time.
func (t *TUN) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	t.bufs, t.sizes, t.at, t.n, t.err = bufs, sizes, offset, 0, nil
	t.cut()
	var err error
	switch {
	case t.err != nil || t.n == len(bufs):
	case t.n > 0: // what was left of an earlier read goes together with what waits
		err = t.raw.Control(t.topUp)
	default:
		err = t.raw.Read(t.drain)
	}
	t.bufs, t.sizes = nil, nil
	if err != nil {
		return t.n, os.ErrClosed
	}
	return t.n, t.err
}

// cut moves what the segmenter has to the caller's buffers.
func (t *TUN) cut() {
	for t.seg.Pending() && t.n < len(t.bufs) {
		size, err := t.seg.Next(t.bufs[t.n][t.at:])
		if err != nil {
			t.err = err
			continue
		}
		t.sizes[t.n] = size
		t.n++
	}
}

// readAll reads until nothing waits or there is no room. It returns false if
// there is nothing.
func (t *TUN) readAll(fd uintptr) bool {
	for t.n < len(t.bufs) {
		m, err := unix.Read(int(fd), t.large)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return t.n > 0 || t.err != nil
		case errors.Is(err, unix.EBADFD):
			err = os.ErrClosed
		case err == nil && m == 0:
			err = io.EOF
		}
		if err != nil {
			t.err = err
			return true
		}
		if err := t.seg.Start(t.large[:m]); err != nil {
			t.err = err
			return true
		}
		t.cut()
	}
	return true
}

// Write writes the packets at offset in bufs, which it may change. It returns how
// many reached the kernel, and the errors of the others.
func (t *TUN) Write(bufs [][]byte, offset int) (int, error) {
	w := t.writers.Get().(*Writer)
	n, err := w.WriteAll(t.raw, bufs, offset)
	t.writers.Put(w)
	return n, err
}
