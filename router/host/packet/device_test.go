package packet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"ztgate/internal/ownnet"
	"ztgate/internal/testwait"
)

// place is a network namespace.
type place struct {
	t    *testing.T
	ns   netns.NsHandle
	jobs chan func()
}

func newPlace(t *testing.T) *place {
	t.Helper()
	p := &place{t: t, jobs: make(chan func())}
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with this goroutine
		var err error
		p.ns, err = netns.New()
		failed <- err
		if err == nil {
			defer p.ns.Close()
			for f := range p.jobs {
				f()
			}
		}
	}()
	if err := <-failed; err != nil {
		t.Fatalf("make a network namespace: %v", err)
	}
	t.Cleanup(func() { close(p.jobs) })
	return p
}

func (p *place) do(f func() error) {
	p.t.Helper()
	done := make(chan error)
	p.jobs <- func() { done <- f() }
	if err := <-done; err != nil {
		p.t.Fatal(err)
	}
}

// command runs a program in the place.
func (p *place) command(name string, args ...string) (out []byte, err error) {
	p.do(func() error {
		out, err = exec.Command(name, args...).CombinedOutput()
		return nil
	})
	return out, err
}

// address gives an interface addresses and sets it up.
func (p *place) address(name string, addrs ...string) {
	p.t.Helper()
	p.do(func() error { return address(name, addrs...) })
}

func address(name string, addrs ...string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, s := range addrs {
		a, err := netlink.ParseAddr(s)
		if err != nil {
			return err
		}
		a.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(l)
}

func (p *place) route(target, via string) {
	p.t.Helper()
	p.do(func() error {
		_, dst, err := net.ParseCIDR(target)
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(via)})
	})
}

func sysctl(t *testing.T, key, value string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join("/proc/sys/net", key), []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

// The client is in the VPC, the server in the office. Between them is this process, in
// the test's namespace, with one device towards each.
type bench struct {
	client, server  *place
	toVPC, toOffice *Device
	large           atomic.Int64 // packets that were read with many others, as those of a large packet are
}

const (
	clientAddr, clientAddr6 = "172.31.0.10", "fd31::10"
	serverAddr, serverAddr6 = "10.0.0.10", "fd10::10"
)

func newBench(t *testing.T, mtu int) *bench {
	t.Helper()
	b := &bench{client: newPlace(t), server: newPlace(t)}
	for _, side := range []struct {
		name string
		p    *place
		own  []string
	}{{"vpc0", b.client, []string{"172.31.0.1/24", "fd31::1/64"}}, {"off0", b.server, []string{"10.0.0.129/24", "fd10::129/64"}}} {
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: side.name, MTU: mtu}, PeerName: "eth0", PeerNamespace: netlink.NsFd(side.p.ns)}
		if err := netlink.LinkAdd(v); err != nil {
			t.Fatal(err)
		}
		if err := address(side.name, side.own...); err != nil {
			t.Fatal(err)
		}
	}
	b.client.address("eth0", clientAddr+"/24", clientAddr6+"/64")
	b.server.address("eth0", serverAddr+"/24", serverAddr6+"/64")
	b.client.route("10.0.0.0/25", "172.31.0.1")
	b.client.route("fd10::/121", "fd31::1")
	b.server.route("172.31.0.0/24", "10.0.0.129")
	b.server.route("fd31::/64", "fd10::129")
	for _, p := range []*place{b.client, b.server} {
		p.do(func() error {
			for _, name := range []string{"lo", "eth0"} {
				l, err := netlink.LinkByName(name)
				if err == nil && name == "eth0" && mtu > 0 {
					err = netlink.LinkSetMTU(l, mtu)
				}
				if err == nil {
					err = netlink.LinkSetUp(l)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	b.toVPC, b.toOffice = open(t, "vpc0", "10.0.0.0/25", "fd10::/121"), open(t, "off0", "172.31.0.0/24", "fd31::/64")
	// Only the client's own, since the gateway has an address there too.
	if err := b.toOffice.SetPrefixes([]netip.Prefix{netip.MustParsePrefix(clientAddr + "/32"), netip.MustParsePrefix(clientAddr6 + "/128")}); err != nil {
		t.Fatal(err)
	}
	go b.pump(t, b.toVPC, b.toOffice)
	go b.pump(t, b.toOffice, b.toVPC)
	return b
}

func open(t *testing.T, name string, prefixes ...string) *Device {
	t.Helper()
	d, err := Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	var list []netip.Prefix
	for _, p := range prefixes {
		list = append(list, netip.MustParsePrefix(p))
	}
	if err := d.SetPrefixes(list); err != nil {
		t.Fatal(err)
	}
	return d
}

// pump carries packets from one device to another until the first is closed.
func (b *bench) pump(t *testing.T, from, to *Device) {
	const offset, size = 96, 16 << 10
	bufs, sizes := make([][]byte, batch), make([]int, batch)
	for i := range bufs {
		bufs[i] = make([]byte, offset+size)
	}
	out := make([][]byte, 0, batch)
	for {
		n, err := from.Read(bufs, sizes, offset)
		out = out[:0]
		for i := range n {
			out = append(out, bufs[i][offset-14:offset+sizes[i]])
		}
		if n > 0 {
			if n > 8 {
				b.large.Add(int64(n))
			}
			if m, err := to.Write(out, 14); m != n || err != nil {
				t.Logf("write %s: %d of %d packets, %v", to.Name(), m, n, err)
			}
		}
		if err != nil && !errors.Is(err, os.ErrClosed) {
			t.Errorf("read %s: %v", from.Name(), err)
		}
		if err != nil {
			return
		}
	}
}

// stream sends so many bytes by TCP from the dialler to the listener and checks them.
func stream(t *testing.T, from, to *place, addr string, size int) {
	t.Helper()
	var l net.Listener
	var c net.Conn
	to.do(func() (err error) { l, err = net.Listen("tcp", net.JoinHostPort(addr, "0")); return err })
	defer l.Close()
	from.do(func() (err error) { c, err = net.DialTimeout("tcp", l.Addr().String(), 5*time.Second); return err })
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, conn := range []net.Conn{c, s} {
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		sent <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
	}()
	got, err := io.ReadAll(s)
	if err := errors.Join(err, <-sent); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d of %d bytes came: %v", len(got), len(data), err)
	}
}

// awaits waits for an answer to a ping: interfaces take up to 2 s for IPv6.
func (b *bench) awaits(t *testing.T, args ...string) {
	t.Helper()
	testwait.NoError(t, 10*time.Second, func() error {
		out, err := b.client.command("ping", append([]string{"-c", "1", "-W", "1"}, args...)...)
		if err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		return nil
	})
}

func TestDevice(t *testing.T) { ownnet.Run(t, testDevice) }

func testDevice(t *testing.T) {
	b := newBench(t, 1500)
	t.Run("ping", func(t *testing.T) {
		b.awaits(t, serverAddr6)
		for _, a := range []string{serverAddr, serverAddr6} {
			if out, err := b.client.command("ping", "-c", "2", "-i", "0.2", "-W", "2", a); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		}
	})
	t.Run("heard", func(t *testing.T) {
		if mac, ok := b.toVPC.Heard(netip.MustParseAddr(clientAddr)); !ok || len(mac) != 6 {
			t.Errorf("the client's MAC is %s, %v", mac, ok)
		}
		if mac, ok := b.toVPC.Heard(netip.MustParseAddr("172.31.0.99")); ok {
			t.Errorf("somebody who isn't there has %s", mac)
		}
	})
	t.Run("host's own", func(t *testing.T) {
		for _, a := range []string{"172.31.0.1", "fd31::1"} {
			if out, err := b.client.command("ping", "-c", "2", "-i", "0.2", "-W", "2", a); err != nil || strings.Contains(string(out), "DUP") {
				t.Errorf("%v\n%s", err, out)
			}
		}
	})
	for _, a := range [][2]string{{serverAddr, clientAddr}, {serverAddr6, clientAddr6}} {
		t.Run("TCP to "+a[0], func(t *testing.T) {
			b.large.Store(0)
			stream(t, b.client, b.server, a[0], 8<<20)
			stream(t, b.server, b.client, a[1], 8<<20)
			if b.large.Load() == 0 {
				t.Error("no large packets")
			}
		})
	}
	t.Run("UDP", func(t *testing.T) {
		datagrams(t, b, serverAddr, 0)
		datagrams(t, b, serverAddr6, 0)
	})
	t.Run("UDP in large packets", func(t *testing.T) {
		for _, a := range []string{serverAddr, serverAddr6} {
			b.large.Store(0)
			datagrams(t, b, a, 200)
			if b.large.Load() == 0 {
				t.Errorf("%s: no large packets", a)
			}
		}
	})
	t.Run("fragments", func(t *testing.T) {
		for _, a := range []string{serverAddr, serverAddr6} {
			if out, err := b.client.command("ping", "-c", "1", "-s", "6000", "-W", "2", a); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		}
	})
	t.Run("down and up", func(t *testing.T) {
		l, err := netlink.LinkByName("vpc0")
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(netlink.LinkSetDown(l), netlink.LinkSetUp(l)); err != nil {
			t.Fatal(err)
		}
		b.awaits(t, serverAddr)
	})
}

// datagrams sends many to the server, in one call each or cut by the kernel from calls
// of ten.
func datagrams(t *testing.T, b *bench, addr string, segment int) {
	t.Helper()
	var server net.PacketConn
	b.server.do(func() (err error) { server, err = net.ListenPacket("udp", net.JoinHostPort(addr, "0")); return err })
	defer server.Close()
	var c net.Conn
	b.client.do(func() (err error) {
		d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) (err error) {
			if segment > 0 {
				cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment) })
				err = errors.Join(err, cerr)
			}
			return err
		}}
		c, err = d.DialContext(context.Background(), "udp", server.LocalAddr().String())
		return err
	})
	defer c.Close()
	payload, want := bytes.Repeat([]byte{'x'}, 200), 1
	if segment > 0 {
		payload, want = bytes.Repeat([]byte{'x'}, 10*segment), 10
	}
	buf := make([]byte, 4096)
	for range 50 {
		if _, err := c.Write(payload); err != nil {
			t.Fatal(err)
		}
		for range want {
			_ = server.SetReadDeadline(time.Now().Add(5 * time.Second))
			n, _, err := server.ReadFrom(buf)
			if err != nil || n != 200 {
				t.Fatalf("%d bytes, %v", n, err)
			}
		}
	}
}

// Frames of the size that an EC2 instance has inside a VPC.
func TestJumbo(t *testing.T) { ownnet.Run(t, testJumbo) }

func testJumbo(t *testing.T) {
	b := newBench(t, 9001)
	for _, a := range []string{serverAddr, serverAddr6} {
		b.awaits(t, "-M", "do", "-s", "8900", a)
		stream(t, b.client, b.server, a, 8<<20)
	}
	if mtu, err := b.toVPC.MTU(); mtu != 9001 || err != nil {
		t.Errorf("MTU %d, %v", mtu, err)
	}
}

// A VLAN's packets belong to its own interface, those with a priority alone to this one.
func TestVLAN(t *testing.T) { ownnet.Run(t, testVLAN) }

func testVLAN(t *testing.T) {
	b := newBench(t, 1500)
	stream(t, b.client, b.server, serverAddr, 1<<10) // each knows the other's MAC
	server := func() net.PacketConn {
		var c net.PacketConn
		b.server.do(func() (err error) { c, err = net.ListenPacket("udp", serverAddr+":7000"); return err })
		return c
	}()
	defer server.Close()
	own, err := net.InterfaceByName("vpc0")
	if err != nil {
		t.Fatal(err)
	}
	send := func(tag uint16, text string) {
		b.client.do(func() error {
			l, err := net.InterfaceByName("eth0")
			if err != nil {
				return err
			}
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			frame := append(append([]byte{}, own.HardwareAddr...), l.HardwareAddr...)
			frame = append(frame, 0x81, 0, byte(tag>>8), byte(tag), 8, 0)
			ip := make([]byte, 28, 28+len(text))
			ip[0], ip[3], ip[8], ip[9] = 0x45, byte(28+len(text)), 64, unix.IPPROTO_UDP
			copy(ip[12:], netip.MustParseAddr(clientAddr).AsSlice())
			copy(ip[16:], netip.MustParseAddr(serverAddr).AsSlice())
			sum := uint32(0)
			for i := 0; i < 20; i += 2 {
				sum += uint32(ip[i])<<8 | uint32(ip[i+1])
			}
			sum = ^(sum>>16 + sum&0xffff)
			ip[10], ip[11] = byte(sum>>8), byte(sum)
			ip[20], ip[22], ip[23], ip[25] = 0x1b, 7000>>8, 7000&0xff, byte(8+len(text))
			return unix.Sendto(fd, append(frame, append(ip, text...)...), 0, &unix.SockaddrLinklayer{Ifindex: l.Index})
		})
	}
	send(5, "in a VLAN")
	send(6<<13, "with a priority")
	buf := make([]byte, 100)
	_ = server.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, _, err := server.ReadFrom(buf)
	if got := string(buf[:n]); err != nil || got != "with a priority" {
		t.Errorf("%q, %v", got, err)
	}
}

// More prefixes than a filter holds are told apart by the reader.
func TestManyPrefixes(t *testing.T) { ownnet.Run(t, testManyPrefixes) }

func testManyPrefixes(t *testing.T) {
	b := newBench(t, 1500)
	var list []netip.Prefix
	for i := range 5000 {
		list = append(list, netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64, byte(i >> 7), byte(i << 1)}), 32))
	}
	pinged := func(want bool) {
		t.Helper()
		if out, err := b.client.command("ping", "-c", "1", "-W", "1", serverAddr); (err == nil) != want {
			t.Errorf("want answer %v\n%s", want, out)
		}
	}
	for _, with := range []bool{false, true} {
		if with {
			list = append(list, netip.MustParsePrefix("10.0.0.0/25"))
		}
		if err := b.toVPC.SetPrefixes(list); err != nil {
			t.Fatal(err)
		}
		if b.toVPC.loose.Load() == nil {
			t.Fatal("the filter holds them all: give more")
		}
		pinged(with)
	}
	if err := b.toVPC.SetPrefixes(nil); err != nil {
		t.Fatal(err)
	}
	pinged(false)
}

// What the kernel does with its own copy of a packet that it may forward is why a gateway
// looks at its settings.
func TestForwardingHost(t *testing.T) { ownnet.Run(t, testForwardingHost) }

func testForwardingHost(t *testing.T) {
	b := newBench(t, 1500)
	twice := func() bool {
		out, _ := b.client.command("ping", "-c", "3", "-i", "0.2", "-W", "1", serverAddr)
		return strings.Contains(string(out), "DUP") || strings.Contains(string(out), "Redirect") || strings.Contains(string(out), "nreachable")
	}
	if twice() {
		t.Error("with forwarding off there are two answers")
	}
	sysctl(t, "ipv4/ip_forward", "1")
	if !twice() {
		t.Error("with forwarding on there is one answer: what is all this for?")
	}
	sysctl(t, "ipv4/conf/vpc0/forwarding", "0")
	sysctl(t, "ipv4/conf/off0/forwarding", "0")
	if twice() {
		t.Error("with forwarding off at the interfaces there are two answers")
	}
}

// A host inside reads and writes as a client does; nobody else may send as it does.
func TestInside(t *testing.T) { ownnet.Run(t, testInside) }

func testInside(t *testing.T) {
	l := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vpc0"}, PeerName: "vpc1"}
	if err := netlink.LinkAdd(l); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(address("vpc0", "172.31.0.1/24"), address("vpc1")); err != nil {
		t.Fatal(err)
	}
	d := open(t, "vpc0", "10.0.0.0/24")
	inside := netip.MustParseAddr("100.127.255.1")
	var delivered []byte
	d.SetInside([]netip.Addr{inside}, func(ip []byte) { delivered = bytes.Clone(ip) })
	packet := make([]byte, 28)
	packet[0], packet[3], packet[9] = 0x45, 28, unix.IPPROTO_UDP
	copy(packet[12:], inside.AsSlice())
	copy(packet[16:], []byte{10, 0, 0, 10})
	bufs, sizes := [][]byte{make([]byte, 2048), make([]byte, 2048)}, make([]int, 2)

	type result struct {
		n   int
		err error
	}
	read := make(chan result)
	go func() {
		for {
			n, err := d.Read(bufs, sizes, 96)
			read <- result{n, err}
			if errors.Is(err, os.ErrClosed) {
				return
			}
		}
	}()
	for range 100 {
		if err := d.Inject(packet); err != nil {
			t.Fatal(err)
		}
		if r := <-read; r.n != 1 || r.err != nil || sizes[0] != 28 || !bytes.Equal(bufs[0][96:124], packet) {
			t.Fatalf("%d packets, %v", r.n, r.err)
		}
	}
	// The same by the wire.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	peer, err := net.InterfaceByName("vpc1")
	if err != nil {
		t.Fatal(err)
	}
	own, err := net.InterfaceByName("vpc0")
	if err != nil {
		t.Fatal(err)
	}
	frame := append(append(append([]byte{}, own.HardwareAddr...), peer.HardwareAddr...), 8, 0)
	if err := unix.Sendto(fd, append(frame, packet...), 0, &unix.SockaddrLinklayer{Ifindex: peer.Index}); err != nil {
		t.Fatal(err)
	}
	if r := <-read; r.n != 0 || r.err == nil {
		t.Errorf("%d packets, %v of somebody who sends as the host inside", r.n, r.err)
	}
	copy(packet[12:], []byte{10, 0, 0, 10})
	copy(packet[16:], inside.AsSlice())
	out := append(make([]byte, 14), packet...)
	if n, err := d.Write([][]byte{out}, 14); n != 1 || err != nil || !bytes.Equal(delivered, packet) {
		t.Errorf("%d written, %v; delivered %x", n, err, delivered)
	}
	// This host has no way back.
	own4 := netip.MustParseAddr("172.31.0.1")
	d.SetOwn([]netip.Addr{own4})
	copy(out[14+16:], own4.AsSlice())
	if n, err := d.Write([][]byte{out}, 14); n != 0 || !errors.Is(err, errOwn) {
		t.Errorf("%d packets to this host itself were written, %v", n, err)
	}
	_ = d.Close()
	for r := range read {
		if errors.Is(r.err, os.ErrClosed) {
			break
		}
	}
}

// Packets that come while nobody reads are counted.
func TestLost(t *testing.T) { ownnet.Run(t, testLost) }

func testLost(t *testing.T) {
	b := newBench(t, 1500)
	b.awaits(t, serverAddr)
	d := open(t, "vpc0", "10.0.0.0/25")
	if err := d.raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4096) }); err != nil {
		t.Fatal(err)
	}
	before := d.Lost()
	if out, err := b.client.command("ping", "-c", "50", "-i", "0.002", "-s", "1000", serverAddr); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if lost := d.Lost(); before != 0 || lost < 10 || lost != d.Lost() {
		t.Errorf("%d packets of 50 were lost, %d before", lost, before)
	}
}

// Nothing is allocated for a packet.
func TestAllocations(t *testing.T) {
	if testing.Short() {
		t.Skip("the race detector, which is used for short runs, lets pools forget things")
	}
	ownnet.Run(t, testAllocations)
}

func testAllocations(t *testing.T) {
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vpc0"}, PeerName: "vpc1"}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(address("vpc0", "172.31.0.1/24"), address("vpc1")); err != nil {
		t.Fatal(err)
	}
	d, peer := open(t, "vpc0", "10.0.0.0/24"), open(t, "vpc1", "172.31.0.0/24")
	packet := func(from, to string) []byte {
		b := make([]byte, 14+28)
		b[14], b[17], b[22], b[23] = 0x45, 28, 64, unix.IPPROTO_UDP
		copy(b[26:], netip.MustParseAddr(from).AsSlice())
		copy(b[30:], netip.MustParseAddr(to).AsSlice())
		b[39] = 8
		return b
	}
	out, back := packet("172.31.0.10", "10.0.0.10"), packet("10.0.0.10", "172.31.0.10")
	peer.known.learn(0, key4([]byte{10, 0, 0, 10}), d.mac.Load())
	bufs, sizes := [][]byte{make([]byte, 2048)}, make([]int, 1)
	outs, backs := [][]byte{out}, [][]byte{back}
	turn := func() {
		if n, err := peer.Write(outs, 14); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if n, err := d.Read(bufs, sizes, 96); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if n, err := d.Write(backs, 14); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}
	turn()
	if n := testing.AllocsPerRun(200, turn); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
