package tuntap

import (
	"errors"
	"fmt"
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
	writers *Writers
	reader  *Reader
}

// OpenTUN creates or attaches to a TUN, in the network namespace of the calling
// thread. Its errors say what is missing.
func OpenTUN(name string, how Method) (*TUN, error) {
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
	t := &TUN{Device: dev, raw: raw, reader: NewReader(0)}
	udp := false
	cerr := raw.Control(func(fd uintptr) { udp, err = SetOffloads(int(fd)) }) // again, since the library doesn't tell
	if err = errors.Join(err, cerr); err != nil {
		_ = dev.Close()
		return nil, fmt.Errorf("set offloads of %q: %w", name, err)
	}
	t.writers = NewWriters(0, udp, how)
	return t, nil
}

// Read waits for packets and puts them at offset into bufs, with their lengths in
// sizes. It returns how many there are; an error with a method Temporary that
// returns true is about a packet that was lost. One goroutine reads at a time.
func (t *TUN) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	return t.reader.ReadBatch(t.raw, bufs, sizes, offset)
}

// Write writes the packets at offset in bufs, which it may change. It returns how
// many reached the kernel, and the errors of the others.
func (t *TUN) Write(bufs [][]byte, offset int) (int, error) {
	return t.writers.Write(t.raw, bufs, offset)
}

// Close ends reading and writing.
func (t *TUN) Close() error {
	err := t.Device.Close()
	t.writers.Close()
	return err
}
