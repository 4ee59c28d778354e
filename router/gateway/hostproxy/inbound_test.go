package hostproxy

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/internal/ownnet"
	"ztgate/internal/testwait"
	"ztgate/netstack"
	"ztgate/netstack/policy"
)

// inboundWorld is an engine that hands over to an Inbound, between members of a network and
// servers on this machine.
type inboundWorld struct {
	*Inbound
	e       *netstack.Engine
	reg     *prometheus.Registry
	tcp     *net.TCPListener
	udp     *net.UDPConn
	members map[[6]byte]*netstack.Client
	of      map[netip.Addr][6]byte // addresses of members
	closed  chan struct{}
}

const inboundNet = 0x8056c2e21c000001

var (
	gatewayMAC  = [6]byte{2, 0, 0, 0, 0, 1}
	one, two    = [6]byte{2, 0, 0, 0, 0, 10}, [6]byte{2, 0, 0, 0, 0, 11}
	memberAddrs = map[[6]byte][]string{one: {"10.0.0.10", "10.0.0.20", "10.0.0.21"}, two: {"10.0.0.11"}}
	// The plane reads nothing, and writes to nobody.
	_ netstack.Device = (*inboundWorld)(nil)
)

func (w *inboundWorld) Read([][]byte, []int, int) (int, error)     { <-w.closed; return 0, os.ErrClosed }
func (*inboundWorld) Write(bufs [][]byte, offset int) (int, error) { return len(bufs), nil }
func (*inboundWorld) BatchSize() int                               { return 1 }
func (*inboundWorld) MTU() (int, error)                            { return 2800, nil }
func (w *inboundWorld) Close() error                               { close(w.closed); return nil }

// WriteFrames implements [netstack.Overlay]: it answers ARP for the members.
func (w *inboundWorld) WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	for i, b := range bufs {
		f := append([]byte(nil), b[offset:offset+sizes[i]]...)
		if binary.BigEndian.Uint16(f[12:]) != 0x0806 {
			if m := w.members[[6]byte(f)]; m != nil {
				m.Deliver(f[14:])
			}
			continue
		}
		mac, ok := w.of[netip.AddrFrom4([4]byte(f[38:42]))]
		if !ok || f[21] != 1 {
			continue
		}
		r := append([]byte(nil), f...)
		copy(r, f[6:12])
		copy(r[6:], mac[:])
		r[21] = 2
		copy(r[22:], mac[:])
		copy(r[28:], f[38:42])
		copy(r[32:], f[22:32])
		w.e.Deliver(nwid, [][]byte{r})
	}
	return len(bufs), nil
}

func newInboundWorld(t *testing.T, limits Limits) *inboundWorld {
	t.Helper()
	w := &inboundWorld{reg: prometheus.NewRegistry(), members: map[[6]byte]*netstack.Client{}, of: map[netip.Addr][6]byte{}, closed: make(chan struct{})}
	var err error
	if w.tcp, err = net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
		t.Fatal(err)
	}
	if w.udp, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = w.tcp.Close(), w.udp.Close() })
	limits.Connections = max(limits.Connections, 16)
	w.Inbound = NewInbound(limits, w.reg, slog.New(slog.DiscardHandler))
	var d net.Dialer
	w.dialTCP = func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
		return d.DialContext(ctx, "tcp", w.tcp.Addr().String())
	}
	w.dialUDP = func(netip.AddrPort) (net.Conn, error) { return d.Dial("udp", w.udp.LocalAddr().String()) }
	w.ping = func(netip.Addr) (*echoSocket, error) { return openEcho(netip.MustParseAddr("127.0.0.1")) }
	p := netip.MustParsePrefix
	w.e, err = netstack.New(netstack.Config{Device: w, Overlay: w, Host: w.Inbound, VPC: netstack.VPC{Sources: []netip.Prefix{p("172.31.0.0/16")}},
		Policy:     policy.New(policy.Accept, []policy.Rule{{Action: policy.Accept, Direction: policy.In}}),
		Masquerade: []netstack.Masquerade{{To: p("172.31.0.0/16"), ByHost: true}}})
	if err != nil {
		t.Fatal(err)
	}
	w.Use(w.e)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for mac, list := range memberAddrs {
		var addrs []netip.Addr
		for _, a := range list {
			addrs = append(addrs, netip.MustParseAddr(a))
			w.of[addrs[len(addrs)-1]] = mac
		}
		m, err := netstack.NewClient(addrs, func(ip []byte) {
			f := append(append(append([]byte(nil), gatewayMAC[:]...), mac[:]...), 8, 0)
			w.e.Deliver(inboundNet, [][]byte{append(f, ip...)})
		})
		if err != nil {
			t.Fatal(err)
		}
		w.members[mac] = m
		running.Go(func() { _ = m.Run(ctx) })
	}
	running.Go(func() { _ = w.e.Run(ctx) })
	running.Go(func() { _ = w.Run(ctx) })
	t.Cleanup(func() { stop(); running.Wait() })
	if err := w.e.SetNetworks([]netstack.Network{{ID: inboundNet, MAC: gatewayMAC, MTU: 2800, Addresses: []netip.Prefix{p("10.0.0.1/24")}}}); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *inboundWorld) dial(t *testing.T, mac [6]byte) (net.Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := w.members[mac].DialTCP(ctx, netip.MustParseAddrPort("172.31.0.20:80"))
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(patience))
	}
	return c, err
}

func (w *inboundWorld) accept(t *testing.T) *net.TCPConn {
	t.Helper()
	_ = w.tcp.SetDeadline(time.Now().Add(patience))
	c, err := w.tcp.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}

func (w *inboundWorld) count(t *testing.T, proto, result string) float64 {
	return (&between{reg: w.reg}).results(t, proto, result)
}

// TestInboundEnds: each side sees how the other one ended.
func TestInboundEnds(t *testing.T) {
	w := newInboundWorld(t, Limits{})
	pair := func() (*netstack.TCPConn, *net.TCPConn) {
		c, err := w.dial(t, one)
		if err != nil {
			t.Fatal(err)
		}
		return c.(*netstack.TCPConn), w.accept(t)
	}
	reset := func(who string, c net.Conn) {
		t.Helper()
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s sees %v, want a reset", who, err)
		}
	}
	client, host := pair() // half-closed by the client, which goes on reading
	_, _ = client.Write([]byte("question"))
	_ = client.CloseWrite()
	if got, err := io.ReadAll(host); string(got) != "question" || err != nil {
		t.Errorf("the host got %q, %v", got, err)
	}
	_, _ = host.Write([]byte("answer"))
	_ = host.Close()
	if got, err := io.ReadAll(client); string(got) != "answer" || err != nil {
		t.Errorf("the client got %q, %v", got, err)
	}
	_ = client.Close()
	client, host = pair()
	_ = host.SetLinger(0)
	_ = host.Close()
	reset("the client", client)
	client, host = pair()
	_, _ = client.Write([]byte("x"))
	if _, err := io.ReadFull(host, make([]byte, 1)); err != nil {
		t.Error(err)
	}
	client.Abort()
	reset("the host", host)
	client, host = pair() // reset after its end was read, as a client that was killed
	_ = client.CloseWrite()
	if _, err := io.ReadAll(host); err != nil {
		t.Error(err)
	}
	client.Abort()
	testwait.For(t, patience, "the host to see the reset", func() bool {
		_, err := host.Write([]byte("x"))
		return err != nil
	})
	_ = w.tcp.Close()
	if _, err := w.dial(t, one); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("the host refuses: %v", err)
	}
	testwait.For(t, patience, "the counts", func() bool { return w.count(t, protoTCP, relayOK) == 4 && w.count(t, protoTCP, relayUnreachable) == 1 })
}

// TestInboundShares: a member gets its share, whatever addresses it uses, and another one is
// served besides.
func TestInboundShares(t *testing.T) {
	w := newInboundWorld(t, Limits{Connections: 256})
	share := fairShare(256)
	for i := range share {
		if _, err := w.dial(t, one); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		w.accept(t)
	}
	for range 3 {
		if _, err := w.dial(t, one); err == nil {
			t.Fatal("more than its share")
		}
	}
	if _, err := w.dial(t, two); err != nil {
		t.Errorf("another member: %v", err)
	}
	w.accept(t)
	if n := w.count(t, protoTCP, relayLimit); n != 3 {
		t.Errorf("%v refused, want 3", n)
	}
	if list := w.Refused(); len(list) != 1 || list[0].Count != 3 || !netip.MustParsePrefix("10.0.0.0/24").Overlaps(list[0].Client) {
		t.Errorf("refused: %v", list)
	}
	// Sessions and pings, which share what there is.
	for i := range share + 2 {
		if err := w.members[one].Knock(netip.AddrPortFrom(netip.MustParseAddr("172.31.0.20"), uint16(1000+i))); err != nil {
			t.Fatal(err)
		}
	}
	testwait.For(t, patience, "the sessions", func() bool { return w.count(t, protoUDP, relayLimit) == 2 })
	w.p.expire(w.p.now() + unanswered + time.Second)
	testwait.For(t, patience, "the end of unanswered sessions", func() bool { return w.count(t, protoUDP, relayOK) == float64(share) })
}

// TestInboundUDP: datagrams go both ways, and a host that refuses them is heard.
func TestInboundUDP(t *testing.T) {
	w := newInboundWorld(t, Limits{})
	if err := w.members[one].Knock(netip.MustParseAddrPort("172.31.0.20:53")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	_ = w.udp.SetDeadline(time.Now().Add(patience))
	n, from, err := w.udp.ReadFromUDPAddrPort(b)
	if err != nil || string(b[:n]) != "ztgate" {
		t.Fatalf("%q, %v", b[:n], err)
	}
	if _, err := w.udp.WriteToUDPAddrPort([]byte("answer"), from); err != nil {
		t.Fatal(err)
	}
	testwait.For(t, patience, "the answer", func() bool {
		w.p.mu.Lock()
		defer w.p.mu.Unlock()
		for e := range w.p.udp.open {
			return e.answered.Load()
		}
		return false
	})
	_ = w.udp.Close()
	_ = w.members[one].Knock(netip.MustParseAddrPort("172.31.0.20:54"))
	testwait.For(t, patience, "the refusal", func() bool { return w.count(t, protoUDP, relayUnreachable) == 1 })
}

// TestInboundEcho: pings come back; without a socket for them they are unreachable; and what
// waits for answers is bounded.
func TestInboundEcho(t *testing.T) {
	for _, to := range []string{"127.0.0.1", "::1"} {
		s, err := openEcho(netip.MustParseAddr(to))
		if err != nil {
			t.Skip(err)
		}
		if err := s.request(7, 64, []byte("question")); err != nil {
			t.Fatal(err)
		}
		_ = s.SetReadDeadline(time.Now().Add(patience))
		for b, data := make([]byte, 1000), []byte(nil); data == nil; {
			var seq uint16
			if seq, data, err = s.answer(b); err != nil || data != nil && (seq != 7 || string(data) != "question") {
				t.Fatalf("%s: %d, %q, %v", to, seq, data, err)
			}
		}
		_ = s.Close()
	}
	socket, err := openEcho(netip.MustParseAddr("127.0.0.1"))
	if err != nil {
		t.Skip(err)
	}
	defer socket.Close()
	w := newInboundWorld(t, Limits{})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for range 3 {
		if _, err := w.members[one].Ping(ctx, netip.MustParseAddr("172.31.0.20")); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.CantPing(); err != nil {
		t.Error(err)
	}
	w.ping = func(netip.Addr) (*echoSocket, error) { return nil, errors.New("no socket") }
	short, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if _, err := w.members[two].Ping(short, netip.MustParseAddr("172.31.0.20")); err == nil {
		t.Error("an answer without a socket")
	}
	if w.CantPing() == nil || w.count(t, protoICMP, relayUnreachable) != 1 {
		t.Errorf("%v is counted, %v told", w.count(t, protoICMP, relayUnreachable), w.CantPing())
	}
	x := &echoSession{socket: socket, sent: map[uint16]*netstack.EchoRequest{}}
	for seq := range uint16(1000) {
		x.send(&netstack.EchoRequest{Seq: seq, TTL: 64})
		if len(x.sent) > maxEchoes {
			t.Fatalf("%d requests wait", len(x.sent))
		}
	}
}

// A request that can't leave, as to a host that doesn't answer ARP, doesn't hold up who sends
// it, and of those that wait only what errors need is kept.
func TestInboundEchoDoesNotWait(t *testing.T) {
	ownnet.Run(t, func(t *testing.T) {
		link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vpc0"}, PeerName: "vpc1"}
		if err := netlink.LinkAdd(link); err != nil {
			t.Skip(err)
		}
		for _, name := range []string{"vpc0", "vpc1"} {
			l, err := netlink.LinkByName(name)
			if err == nil {
				err = netlink.LinkSetUp(l)
			}
			if err == nil && name == "vpc0" {
				err = netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(172, 31, 0, 1), Mask: net.CIDRMask(24, 32)}})
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		// Of ping sockets; a raw one that is full loses what it gets.
		if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0o644); err != nil {
			t.Skip(err)
		}
		socket, err := openEcho(netip.MustParseAddr("172.31.0.2"))
		if err != nil {
			t.Skip(err)
		}
		defer socket.Close()
		raw, err := socket.SyscallConn()
		if err == nil { // full long before the queue of what waits for ARP
			err = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, 1) })
		}
		if err != nil {
			t.Fatal(err)
		}
		x := &echoSession{socket: socket, sent: map[uint16]*netstack.EchoRequest{}}
		done := make(chan struct{})
		go func() {
			for seq := range uint16(200) {
				x.send(&netstack.EchoRequest{Seq: seq, TTL: 64, Data: make([]byte, 1000)})
			}
			close(done)
		}()
		select {
		case <-done:
		case <-time.After(patience):
			t.Error("the sender waits")
		}
		x.mu.Lock()
		defer x.mu.Unlock()
		for _, r := range x.sent {
			if len(r.Data) > 0 {
				t.Fatalf("%d bytes of a request are kept", len(r.Data))
			}
		}
	})
}
