package gatewaytest

import (
	"encoding/binary"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/netstack"
)

// Device is a VPC in memory.
type Device struct {
	toGateway, toVPC chan []byte
	closed           chan struct{}
	once             sync.Once
}

var _ netstack.Device = (*Device)(nil)

const (
	deviceMTU = 2800
	// deviceQueue is how many packets may wait for [Device.Receive]; more are lost.
	deviceQueue = 256
)

// NewDevice returns a device with nothing in it.
func NewDevice() *Device {
	return &Device{toGateway: make(chan []byte), toVPC: make(chan []byte, deviceQueue), closed: make(chan struct{})}
}

// Send sends IP packets as hosts of the VPC do. It returns when they are taken.
func (d *Device) Send(packets ...[]byte) {
	for _, p := range packets {
		select {
		case d.toGateway <- p:
		case <-d.closed:
			return
		}
	}
}

// Receive returns the next packet to the VPC, nil after a few seconds without one.
func (d *Device) Receive() []byte {
	select {
	case p := <-d.toVPC:
		return p
	case <-time.After(5 * time.Second):
		return nil
	}
}

// Connect opens a connection from a VPC host to one of an [Office], and sends data.
func (d *Device) Connect(t testing.TB, from, to netip.AddrPort, data []byte) {
	t.Helper()
	const seq = 1000
	d.Send(TCP(from, to, SYN, seq, 0, nil))
	p := d.Receive()
	if len(p) < ipLen+tcpLen || p[9] != unix.IPPROTO_TCP || p[ipLen+13] != SYN|ACK {
		t.Fatalf("connect from %s to %s: got %x, want an acknowledgement", from, to, p)
	}
	if got := binary.BigEndian.Uint16(p[ipLen+2:]); got != from.Port() {
		t.Fatalf("connect from %s to %s: the answer goes to port %d", from, to, got)
	}
	d.Send(TCP(from, to, ACK, seq+1, firstSeq+1, data))
}

// Read implements [netstack.Device].
func (d *Device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case p := <-d.toGateway:
		sizes[0] = copy(bufs[0][offset:], p)
		return 1, nil
	case <-d.closed:
		return 0, os.ErrClosed
	}
}

// Write implements [netstack.Device].
func (d *Device) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		select {
		case d.toVPC <- slices.Clone(b[offset:]):
		default:
		}
	}
	return len(bufs), nil
}

// BatchSize implements [netstack.Device].
func (d *Device) BatchSize() int { return 1 }

// MTU implements [netstack.Device].
func (d *Device) MTU() (int, error) { return deviceMTU, nil }

// Close implements [netstack.Device].
func (d *Device) Close() error {
	d.once.Do(func() { close(d.closed) })
	return nil
}
