package tuntap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"ztgate/router/host/offload"
)

// side is a TUN in a network namespace of its own.
type side struct {
	tun *TUN
	do  func(f func()) // runs f in the namespace
}

func newSide(t testing.TB, addr string, how Method) *side {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to make a network namespace")
	}
	if _, err := os.Stat(Path); err != nil {
		t.Skip("needs " + Path)
	}
	jobs, failed := make(chan func()), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with this goroutine
		ns, err := netns.New()
		failed <- err
		if err == nil {
			defer ns.Close()
			for f := range jobs {
				f()
			}
		}
	}()
	if err := <-failed; err != nil {
		t.Skipf("make a network namespace: %v", err)
	}
	t.Cleanup(func() { close(jobs) })
	s := &side{do: func(f func()) {
		done := make(chan struct{})
		jobs <- func() { f(); close(done) }
		<-done
	}}
	var err error
	s.do(func() {
		if s.tun, err = OpenTUN("zttest0", how); err != nil {
			return
		}
		var l netlink.Link
		var a *netlink.Addr
		if l, err = netlink.LinkByName("zttest0"); err == nil {
			if a, err = netlink.ParseAddr(addr); err == nil {
				err = errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l))
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.tun.Close() })
	return s
}

// pump carries packets from one TUN to another until the first is closed.
func pump(t *testing.T, from, to *TUN, batches *[]int) {
	bufs, sizes := make([][]byte, 32), make([]int, 32)
	for i := range bufs {
		bufs[i] = make([]byte, 2048)
	}
	out := make([][]byte, 0, len(bufs))
	for {
		n, err := from.Read(bufs, sizes, 16)
		*batches = append(*batches, n)
		out = out[:0]
		for i := range n {
			out = append(out, bufs[i][:16+sizes[i]])
		}
		if n > 0 {
			if m, err := to.Write(out, 16); m != n || err != nil {
				if !errors.Is(err, os.ErrClosed) {
					t.Errorf("%d of %d packets written: %v", m, n, err)
				}
				return
			}
		}
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				t.Errorf("read: %v", err)
			}
			return
		}
	}
}

// TestTUN sends TCP and UDP through a pair of TUNs, with the kernel's offloads on
// both sides.
func TestTUN(t *testing.T) { eachMethod(t, testTUN) }

func testTUN(t *testing.T, how Method) {
	a, b := newSide(t, "10.99.0.1/24", how), newSide(t, "10.99.0.2/24", how)
	var sizes [2][]int
	ended := make(chan struct{}, 2)
	for i, ends := range [2][2]*side{{a, b}, {b, a}} {
		go func() {
			pump(t, ends[0].tun, ends[1].tun, &sizes[i])
			ended <- struct{}{}
		}()
	}
	var l net.Listener
	var u net.PacketConn
	var c, uc net.Conn
	var err error
	b.do(func() {
		if l, err = net.Listen("tcp", "10.99.0.2:0"); err == nil {
			u, err = net.ListenPacket("udp", "10.99.0.2:0")
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	defer u.Close()
	data := make([]byte, 16<<20)
	for i := range data {
		data[i] = byte(i >> 9)
	}
	got := make(chan []byte, 1)
	go func() {
		s, err := l.Accept()
		if err != nil {
			got <- nil
			return
		}
		defer s.Close()
		all, _ := io.ReadAll(s)
		got <- all
	}()
	a.do(func() {
		if c, err = net.Dial("tcp", l.Addr().String()); err == nil {
			uc, err = net.Dial("udp", u.LocalAddr().String())
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	defer uc.Close()
	if _, err := c.Write(data); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if all := <-got; !bytes.Equal(all, data) {
		t.Errorf("%d bytes arrived of %d, or others", len(all), len(data))
	}
	_ = u.SetReadDeadline(time.Now().Add(10 * time.Second))
	for i := range 200 {
		p := bytes.Repeat([]byte{byte(i)}, 1000)
		binary.BigEndian.PutUint16(p, uint16(i))
		if _, err := uc.Write(p); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 2000)
		n, from, err := u.ReadFrom(buf)
		if err != nil || !bytes.Equal(buf[:n], p) || netip.MustParseAddrPort(from.String()).Addr() != netip.MustParseAddr("10.99.0.1") {
			t.Fatalf("datagram %d: %d bytes from %v, %v", i, n, from, err)
		}
	}
	// One write of ten datagrams.
	ten := make([]byte, 10000)
	for i := range ten {
		ten[i] = byte(i / 1000)
	}
	raw, err := uc.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1000) }); err != nil || cerr != nil {
		t.Fatal(err, cerr)
	}
	if _, err := uc.Write(ten); err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		buf := make([]byte, 2000)
		if n, _, err := u.ReadFrom(buf); err != nil || !bytes.Equal(buf[:n], ten[i*1000:][:1000]) {
			t.Fatalf("datagram %d of ten: %d bytes, %v", i, n, err)
		}
	}
	_ = a.tun.Close()
	_ = b.tun.Close()
	<-ended
	<-ended
	most := 0
	for _, n := range sizes[0] {
		most = max(most, n)
	}
	if most < 8 {
		t.Errorf("at most %d packets in one read", most)
	}
}

// A large packet that doesn't fit the caller's buffers goes on with the next read.
func TestReadInParts(t *testing.T) {
	tun := &TUN{reader: NewReader(0)}
	const headers = 20 + 20
	large := make([]byte, offload.HeaderLen+headers+3500)
	large[0], large[1] = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, unix.VIRTIO_NET_HDR_GSO_TCPV4
	for at, value := range map[int]uint16{4: 1000, 6: 20, 8: 16} { // size of a segment, where its checksum begins and lies
		binary.NativeEndian.PutUint16(large[at:], value)
	}
	large[offload.HeaderLen], large[offload.HeaderLen+9], large[offload.HeaderLen+20+12] = 0x45, unix.IPPROTO_TCP, 5<<4
	if err := tun.reader.seg.Start(large); err != nil {
		t.Fatal(err)
	}
	bufs, sizes := [][]byte{make([]byte, 2000), make([]byte, 2000)}, make([]int, 2)
	for i := range 2 {
		n, err := tun.Read(bufs, sizes, 10)
		if n != 2 || err != nil {
			t.Fatalf("read %d: %d packets, %v", i, n, err)
		}
	}
	if sizes[1] != headers+500 || tun.reader.seg.Pending() {
		t.Errorf("last packet has %d bytes", sizes[1])
	}
}
