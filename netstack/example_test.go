package netstack_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"log"
	"net"
	"net/netip"

	"ztgate/netstack"
)

const (
	network  = 0x8056c2e21c000001
	ethernet = 14 // bytes in front of the IP packet in a frame
)

var (
	gatewayMAC = [6]byte{2, 0, 0, 0, 0, 1}
	serverMAC  = [6]byte{2, 0, 0, 0, 0, 9}
)

// A client in the VPC asks a server in an overlay network, which has never heard of
// the client's address. Both ends are in memory; a gateway has a TUN device and a
// ZeroTier node there.
func Example() {
	tun := &device{in: make(chan []byte), out: make(chan []byte, 8), closed: make(chan struct{})}
	office := &overlay{out: make(chan []byte, 8)}
	engine, err := netstack.New(netstack.Config{
		Device:  tun,
		Overlay: office,
		VPC: netstack.VPC{
			Addresses: []netip.Prefix{netip.MustParsePrefix("172.31.0.1/24")},
			Sources:   []netip.Prefix{netip.MustParsePrefix("172.31.0.0/16")},
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	office.engine = engine
	if err := engine.SetNetworks([]netstack.Network{{
		ID: network, MAC: gatewayMAC, MTU: 2800, Masquerade: true,
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24")},
	}}); err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- engine.Run(ctx) }()

	tun.in <- datagram("172.31.0.10:4000", "10.0.0.10:53", "question")
	fmt.Println("server:", describe(<-office.out))

	answer := datagram("10.0.0.10:53", "10.0.0.1:4000", "answer")
	engine.Deliver(network, [][]byte{append(header(gatewayMAC, serverMAC, 0x0800), answer...)})
	fmt.Println("client:", describe(<-tun.out))

	cancel()
	if err := <-done; err != nil {
		log.Fatal(err)
	}
	// Output:
	// server: 10.0.0.1:4000 to 10.0.0.10:53: question
	// client: 10.0.0.10:53 to 172.31.0.10:4000: answer
}

// device is the VPC side: packets go in and come out one by one.
type device struct {
	in, out chan []byte
	closed  chan struct{}
}

func (d *device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case p := <-d.in:
		sizes[0] = copy(bufs[0][offset:], p)
		return 1, nil
	case <-d.closed:
		return 0, net.ErrClosed
	}
}

func (d *device) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		d.out <- append([]byte(nil), b[offset:]...) // the buffer isn't ours
	}
	return len(bufs), nil
}

func (d *device) BatchSize() int    { return 1 }
func (d *device) MTU() (int, error) { return 1500, nil }
func (d *device) Close() error      { close(d.closed); return nil }

// overlay is a network with one host on it.
type overlay struct {
	engine *netstack.Engine
	out    chan []byte
}

func (o *overlay) WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	for i, b := range bufs {
		frame := b[offset : offset+sizes[i]]
		switch binary.BigEndian.Uint16(frame[12:]) {
		case 0x0800:
			o.out <- append([]byte(nil), frame[ethernet:]...)
		case 0x0806: // ARP: who has the server's address?
			if ask := frame[ethernet:]; [4]byte(ask[24:]) == [4]byte{10, 0, 0, 10} {
				reply := header(gatewayMAC, serverMAC, 0x0806)
				reply = append(reply, 0, 1, 8, 0, 6, 4, 0, 2)
				reply = append(append(reply, serverMAC[:]...), ask[24:28]...)
				reply = append(reply, ask[8:18]...) // the asker's addresses
				o.engine.Deliver(nwid, [][]byte{reply})
			}
		}
	}
	return len(bufs), nil
}

func header(to, from [6]byte, kind uint16) []byte {
	return binary.BigEndian.AppendUint16(append(to[:], from[:]...), kind)
}

// datagram builds an IPv4 packet with a UDP datagram, whose checksum IPv4 leaves
// optional.
func datagram(from, to, text string) []byte {
	src, dst := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
	b := make([]byte, 28, 28+len(text))
	b[0], b[8], b[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(b[2:], uint16(28+len(text)))
	copy(b[12:], src.Addr().AsSlice())
	copy(b[16:], dst.Addr().AsSlice())
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum+sum>>16))
	binary.BigEndian.PutUint16(b[20:], src.Port())
	binary.BigEndian.PutUint16(b[22:], dst.Port())
	binary.BigEndian.PutUint16(b[24:], uint16(8+len(text)))
	return append(b, text...)
}

func describe(b []byte) string {
	end := func(addr, port int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[addr:])), binary.BigEndian.Uint16(b[port:]))
	}
	return fmt.Sprintf("%v to %v: %s", end(12, 20), end(16, 22), b[28:])
}
