package netstack

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"ztgate/netstack/internal/pkttest"
)

// clientDevice is a device with a client inside and nobody else.
type clientDevice struct {
	packets chan []byte
	client  *Client
	done    chan struct{}
	once    sync.Once
}

func (d *clientDevice) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case p := <-d.packets:
		sizes[0] = copy(bufs[0][offset:], p)
		return 1, nil
	case <-d.done:
		return 0, os.ErrClosed
	}
}

func (d *clientDevice) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		d.client.Deliver(b[offset:])
	}
	return len(bufs), nil
}

func (d *clientDevice) BatchSize() int    { return 1 }
func (d *clientDevice) MTU() (int, error) { return 9001, nil }
func (d *clientDevice) Close() error      { d.once.Do(func() { close(d.done) }); return nil }

// officeHost is the overlay, with one host that has a stack of its own.
type officeHost struct {
	fakeOverlay
	host *Client
}

func (o *officeHost) WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	n, err := o.fakeOverlay.WriteFrames(nwid, bufs, sizes, offset)
	o.mu.Lock()
	out := o.out
	o.out = nil
	o.mu.Unlock()
	for _, p := range out {
		o.host.Deliver(p)
	}
	return n, err
}

// A client inside goes the way of others through the engine.
func TestClient(t *testing.T) {
	inside, office := netip.MustParseAddr("100.127.255.1"), netip.MustParseAddr("10.0.0.5")
	dev := &clientDevice{packets: make(chan []byte, 64), done: make(chan struct{})}
	client, err := NewClient([]netip.Addr{inside}, func(ip []byte) { dev.packets <- ip })
	if err != nil {
		t.Fatal(err)
	}
	dev.client = client
	overlay := &officeHost{fakeOverlay: fakeOverlay{silent: map[netip.Addr]bool{}, macs: map[netip.Addr][6]byte{}}}
	e, err := New(Config{Device: dev, Overlay: overlay, VPC: VPC{Sources: []netip.Prefix{netip.MustParsePrefix("172.31.0.0/16"), netip.PrefixFrom(inside, 32)}}})
	if err != nil {
		t.Fatal(err)
	}
	overlay.e = e
	overlay.host, err = NewClient([]netip.Addr{office}, func(ip []byte) {
		h := ethernetHeader(ourMAC, hostMAC, false)
		e.Deliver(testNet, [][]byte{append(h[:], ip...)})
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.SetNetworks([]Network{testNetwork()}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	var running sync.WaitGroup
	for _, run := range []func(context.Context) error{e.Run, client.Run, overlay.host.Run} {
		running.Go(func() { _ = run(ctx) })
	}
	defer running.Wait()
	defer cancel()
	l, err := gonet.ListenTCP(overlay.host.local.s, tcpip.FullAddress{NIC: vpcNIC, Addr: tcpip.AddrFrom4(office.As4()), Port: 443}, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	c, err := client.DialTCP(ctx, netip.AddrPortFrom(office, 443))
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if got := s.RemoteAddr().String(); !strings.HasPrefix(got, "10.0.0.1:") {
		t.Errorf("the office sees %s", got)
	}
	_, _ = c.Close(), s.Close()
	if c, err := client.DialTCP(ctx, netip.AddrPortFrom(office, 444)); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("connection to a closed port: %v, %v", c, err)
	}
	if d, err := client.Ping(ctx, office); err != nil || d <= 0 {
		t.Errorf("ping: %v, %v", d, err)
	}
	if n, err := client.PathMTU(ctx, office, 9001); n != testNetwork().MTU || err != nil {
		t.Errorf("path MTU %d, %v", n, err)
	}
	if err := client.Knock(netip.AddrPortFrom(office, 9)); err != nil {
		t.Error(err)
	}
	short, end := context.WithTimeout(ctx, 50*time.Millisecond)
	defer end()
	overlay.mu.Lock()
	overlay.silent[netip.MustParseAddr("10.0.0.6")] = true
	overlay.mu.Unlock()
	if _, err := client.Ping(short, netip.MustParseAddr("10.0.0.6")); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("ping of nobody: %v", err)
	}
}

// refusing takes a part of a batch only.
type refusing struct {
	*fakeDevice
	take int
	lost uint64
}

func (d *refusing) Write(bufs [][]byte, offset int) (int, error) {
	n := min(d.take, len(bufs))
	_, _ = d.fakeDevice.Write(bufs[:n], offset)
	if n < len(bufs) {
		return n, os.ErrDeadlineExceeded
	}
	return n, nil
}

func (d *refusing) Lost() uint64 { return d.lost }

// What a device doesn't take, and what it lost, is counted: no more and no less.
func TestDeviceLosses(t *testing.T) {
	dev := &refusing{take: 3}
	r := newRig(t, func(c *Config) { dev.fakeDevice = c.Device.(*fakeDevice); c.Device = dev })
	var answers [][]byte
	for i := range 5 {
		client := fmt.Sprintf("172.31.0.10:%d", 40000+i)
		r.fromVPC(pkttest.UDP(client, "10.0.0.5:53", "question"))
		answers = append(answers, pkttest.UDP("10.0.0.5:53", fmt.Sprintf("10.0.0.1:%d", 40000+i), "answer"))
	}
	if _, vpc := r.fromOverlay(answers...); len(vpc) != 3 {
		t.Fatalf("the device has %q", vpc)
	}
	if got := r.e.stats.drops[OverlaySide][dropDevice].Load(); got != 2 {
		t.Errorf("%d packets count as refused by the device, want 2", got)
	}
	if got := r.e.stats.traffic[VPCSide][tx].packets.Load(); got != 3 {
		t.Errorf("%d packets count as sent, want 3", got)
	}
	read := r.e.Pulse().Packets
	for _, lost := range []uint64{7, 7, 9} {
		dev.lost = lost
		r.e.tick(r.e.clock())
		if got := r.e.stats.drops[VPCSide][dropBacklog].Load(); got != lost {
			t.Errorf("%d packets count as lost, want %d", got, lost)
		}
	}
	if got := r.e.Pulse().Packets; got != read {
		t.Errorf("the pulse goes on by %d, and nothing is read", got-read)
	}
}
