package netstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
	"ztgate/netstack/policy"
)

// handed is a Host whose servers say what they get, in capitals.
type handed struct {
	e    *Engine
	mu   sync.Mutex
	seen []Handover
	full bool
}

func (h *handed) note(x Handover) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.seen = append(h.seen, x)
	return !h.full
}

func (h *handed) last() (x Handover) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if n := len(h.seen); n > 0 {
		x = h.seen[n-1]
	}
	return x
}

// Ports with servers of a kind.
const (
	portEcho, portResets, portRefuses, portSilent = 7, 8, 9, 10
)

func (h *handed) Connect(c *Incoming) bool {
	if !h.note(c.Handover) {
		return false
	}
	go func() {
		switch c.Server.Port() {
		case portRefuses:
			c.Refuse(Refused)
			return
		case portSilent:
			c.Refuse(HostIsUnreachable)
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		conn, err := c.Accept(ctx)
		if err != nil {
			return
		}
		if c.Server.Port() == portResets {
			_, _ = conn.Read(make([]byte, 1))
			conn.Abort()
			_ = conn.Close()
			return
		}
		_, _ = io.Copy(conn, conn)
		_ = conn.CloseWrite()
		_ = conn.Close()
	}()
	return true
}

func (h *handed) Receive(x Handover) (func(*UDPConn), bool) {
	if !h.note(x) {
		return nil, false
	}
	return func(c *UDPConn) {
		if c == nil {
			return
		}
		target := netip.MustParseAddrPort(c.LocalAddr().String())
		go func() {
			b := make([]byte, 65535)
			n, err := c.Read(b)
			if err == nil && x.Server.Port() == portEcho {
				_, _ = c.Write(b[:n])
			} else {
				h.e.Unreachable(x, target, map[uint16]Unreachability{portRefuses: Refused, portSilent: HostIsUnreachable}[x.Server.Port()])
			}
			_ = c.Close()
		}()
	}, true
}

func (h *handed) Echo(r *EchoRequest) bool {
	if !h.note(r.Handover) {
		return false
	}
	if r.Server.Addr() == netip.MustParseAddr("172.31.0.66") {
		r.Unreachable()
	} else {
		r.Reply(r.Data)
	}
	return true
}

// memberHost is a host of the overlay with a stack of its own.
type memberHost struct {
	*Client
	e    *Engine
	echo chan []byte
}

// WriteFrames implements [Overlay].
func (m *memberHost) WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	o := &fakeOverlay{e: m.e, silent: map[netip.Addr]bool{}}
	if _, err := o.WriteFrames(nwid, bufs, sizes, offset); err != nil {
		return 0, err
	}
	for _, b := range o.out {
		if b[0]>>4 == 4 && b[9] == 1 || b[0]>>4 == 6 && (b[6] == 58 || b[6] == 44) || b[0]>>4 == 4 && b[6]&0x3f|b[7] != 0 {
			select {
			case m.echo <- slices.Clone(b):
			default:
			}
		}
		m.Deliver(b)
	}
	return len(bufs), nil
}

// handover starts an engine that hands everything over to a Host, with a host of the overlay.
func handover(t *testing.T, edit ...func(*Config)) (*memberHost, *handed) {
	t.Helper()
	m, h := &memberHost{echo: make(chan []byte, 100)}, &handed{}
	p := netip.MustParsePrefix
	cfg := Config{Device: &fakeDevice{feed: make(chan [][]byte), done: make(chan struct{})}, Overlay: m, Host: h,
		VPC:        VPC{Sources: []netip.Prefix{p("172.31.0.0/16"), p("fd77:1::/64")}},
		Policy:     policy.New(policy.Accept, []policy.Rule{{Action: policy.Reject, Direction: policy.In, Proto: ipkt.TCP, Ports: []policy.PortRange{{First: 81, Last: 81}}}, {Action: policy.Accept, Direction: policy.In}}),
		Masquerade: []Masquerade{{To: p("172.31.0.0/16"), ByHost: true, Except: []netip.Prefix{p("172.31.0.1/32")}}, {To: p("fd77:1::/64"), ByHost: true}},
		Forwards:   []PortForward{forward(OverlaySide, ipkt.TCP, "10.0.0.1:2222", "172.31.0.20:7", true)}}
	for _, f := range edit {
		f(&cfg)
	}
	e, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	m.e, h.e = e, e
	if m.Client, err = NewClient([]netip.Addr{netip.MustParseAddr("10.0.0.10"), netip.MustParseAddr("fd77:100::50")}, func(ip []byte) { m.sendIP(ip) }); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = m.Client.Run(ctx) })
	running.Go(func() {
		if err := e.Run(ctx); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	t.Cleanup(func() { stop(); running.Wait() })
	if err := e.SetNetworks([]Network{testNetwork()}); err != nil {
		t.Fatal(err)
	}
	return m, h
}

func (m *memberHost) sendIP(ip []byte) {
	h := ethernetHeader(ourMAC, hostMAC, ip[0]>>4 == 6)
	m.e.Deliver(testNet, [][]byte{append(h[:], ip...)})
}

func (m *memberHost) dial(t *testing.T, to string) (net.Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := m.DialTCP(ctx, netip.MustParseAddrPort(to))
	if err == nil {
		t.Cleanup(func() { _ = c.Close() })
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	}
	return c, err
}

func TestHandoverTCP(t *testing.T) {
	for _, f := range inward {
		t.Run(f.name, func(t *testing.T) {
			m, h := handover(t)
			for range 3 {
				c, err := m.dial(t, end(f.server, portEcho))
				if err != nil {
					t.Fatal(err)
				}
				data := make([]byte, 300<<10)
				go func() { _, _ = c.Write(data); _ = c.(*TCPConn).CloseWrite() }()
				if got, err := io.ReadAll(c); err != nil || len(got) != len(data) {
					t.Errorf("%d bytes came back, %v", len(got), err)
				}
				if got := h.last(); got.Client.Addr().String() != f.member || got.Server.String() != end(f.server, portEcho) || got.Member != hostMAC || got.Network != testNet {
					t.Errorf("handed over %+v", got)
				}
			}
			c, err := m.dial(t, end(f.server, portResets))
			if err != nil {
				t.Fatal(err)
			}
			_, _ = c.Write([]byte("x"))
			if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("a reset is %v", err)
			}
			for _, port := range []int{portRefuses, 81} {
				if _, err := m.dial(t, end(f.server, port)); err == nil || !strings.Contains(err.Error(), "refused") {
					t.Errorf("port %d: %v", port, err)
				}
			}
			m.unreachable(t, end(f.server, portSilent))
			h.mu.Lock()
			h.full = true
			h.mu.Unlock()
			m.unreachable(t, end(f.server, portEcho))
			if n := m.e.stats.drops[OverlaySide][dropClientLimit].Load(); n == 0 {
				t.Error("a refusal for want of room isn't counted")
			}
			testwait.For(t, 10*time.Second, "everything to be forgotten", func() bool {
				m.e.handovers.mu.Lock()
				defer m.e.handovers.mu.Unlock()
				return len(m.e.handovers.incoming)+len(m.e.handovers.accepted) == 0
			})
		})
	}
	m, h := handover(t)
	c, err := m.dial(t, "10.0.0.1:2222")
	if err != nil {
		t.Fatal(err)
	}
	_, _ = c.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil || h.last().Server.String() != "172.31.0.20:7" {
		t.Errorf("by a forward: %v, %+v", err, h.last())
	}
}

// unreachable sends a SYN, to which the answer is that the host can't be reached. (gVisor
// doesn't understand that in IPv6.)
func (m *memberHost) unreachable(t *testing.T, to string) {
	t.Helper()
	client := "10.0.0.10:4000"
	if strings.HasPrefix(to, "[") {
		client = "[fd77:100::50]:4000"
	}
	for len(m.echo) > 0 {
		<-m.echo
	}
	m.sendIP(pkttest.TCP(client, to, ipkt.SYN, 1, 0, ""))
	want := map[bool]string{true: "icmp 1/3 ", false: "icmp 3/1 "}[client[0] == '[']
	if got := pkttest.Describe(m.answer(t)); !strings.HasPrefix(got, want) || !strings.HasSuffix(got, "[6 "+client+" > "+to+"]") {
		t.Errorf("%s: %s", to, got)
	}
}

// answer returns the next ICMP message or fragment that isn't neighbour discovery.
func (m *memberHost) answer(t *testing.T) []byte {
	t.Helper()
	for {
		select {
		case b := <-m.echo:
			if b[0]>>4 == 6 && b[6] == 58 && b[40] >= 133 && b[40] <= 137 {
				continue
			}
			return b
		case <-time.After(10 * time.Second):
			t.Fatal("no answer")
		}
	}
}

func TestHandoverUDP(t *testing.T) {
	for _, f := range inward {
		t.Run(f.name, func(t *testing.T) {
			m, _ := handover(t)
			ask := func(port int, size int) (int, error) {
				src, to, proto, err := m.ends(netip.MustParseAddrPort(end(f.server, port)))
				if err != nil {
					t.Fatal(err)
				}
				u, err := dialUDP(m.local.s, src, to, proto)
				if err != nil {
					t.Fatal(err)
				}
				defer u.Close()
				_ = u.SetDeadline(time.Now().Add(10 * time.Second))
				if _, err := u.Write(make([]byte, size)); err != nil {
					t.Fatal(err)
				}
				u.WaitRead()
				return u.Read(make([]byte, 65535))
			}
			for _, size := range []int{0, 100, 8000} { // the last one in fragments
				if n, err := ask(portEcho, size); err != nil || n != size {
					t.Errorf("%d bytes: %d came back, %v", size, n, err)
				}
			}
			if _, err := ask(portRefuses, 1); err == nil || !strings.Contains(err.Error(), "refused") {
				t.Errorf("refused: %v", err)
			}
			testwait.For(t, 10*time.Second, "everything to be forgotten", func() bool {
				m.e.handovers.mu.Lock()
				defer m.e.handovers.mu.Unlock()
				return len(m.e.handovers.sockets) == 0
			})
		})
	}
}

func TestHandoverEcho(t *testing.T) {
	for _, f := range inward {
		t.Run(f.name, func(t *testing.T) {
			m, _ := handover(t)
			request := pkttest.Echo(f.member, f.server, false, 77, "question")
			m.sendIP(request)
			typ := map[string]int{"IPv4": 0, "IPv6": 129}[f.name]
			if got, want := pkttest.Describe(m.answer(t)), fmt.Sprintf("icmp %d/0 %s > %s id 77", typ, f.server, f.member); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
			if f.name == "IPv4" {
				m.sendIP(pkttest.Echo(f.member, "172.31.0.66", false, 78, "x"))
				if got, want := pkttest.Describe(m.answer(t)), "icmp 3/1 10.0.0.1 > 10.0.0.10 [1 10.0.0.10 > 172.31.0.66 id 78]"; got != want {
					t.Errorf("got %s, want %s", got, want)
				}
				for _, b := range pkttest.Fragments(pkttest.Echo(f.member, f.server, false, 79, string(make([]byte, 5000))), 2000, 2000) {
					m.sendIP(b)
				}
			} else {
				m.sendIP(pkttest.Echo(f.member, f.server, false, 79, string(make([]byte, 2700))))
				m.answer(t)
				return
			}
			total := 0
			for total < 5008 {
				b := m.answer(t)
				total += len(b) - 20
			}
			if total != 5008 {
				t.Errorf("%d bytes in fragments, want 5008", total)
			}
		})
	}
}

// TestHandoverExplained: what is handed over is explained so; segments of connections that
// nothing is known of are reset.
func TestHandoverExplained(t *testing.T) {
	m, h := handover(t)
	x := m.e.Explain(Question{FromOverlay: true, Network: testNet, Protocol: ipkt.TCP, Src: pkttest.Addr("10.0.0.10:4000"), Dst: pkttest.Addr("172.31.0.20:7")})
	if x.Verdict != "forward" || x.SourceHow != "host" || x.To != VPCSide || x.Source.IsValid() {
		t.Errorf("%+v", x)
	}
	x = m.e.Explain(Question{FromOverlay: true, Network: testNet, Protocol: ipkt.TCP, Src: pkttest.Addr("10.0.0.10:4000"), Dst: pkttest.Addr("172.31.0.1:7")})
	if x.Verdict != "drop" || x.Reason != "forbidden_address" {
		t.Errorf("%+v", x)
	}
	before := m.e.stats.resets[OverlaySide].Load()
	m.sendIP(pkttest.TCP("10.0.0.10:4000", "172.31.0.20:7", ipkt.ACK, 1, 1, "x"))
	m.sendIP(pkttest.Packet{Proto: 50, Src: pkttest.Addr("10.0.0.10"), Dst: pkttest.Addr("172.31.0.20"), Payload: make([]byte, 20)}.Bytes())
	if n := m.e.stats.resets[OverlaySide].Load() - before; n != 1 {
		t.Errorf("%d resets, want 1", n)
	}
	for _, d := range []drop{dropNotFirst, dropESP} {
		if n := m.e.stats.drops[OverlaySide][d].Load(); n != 1 {
			t.Errorf("%d drops for %s, want 1", n, d)
		}
	}
	if len(h.seen) > 0 {
		t.Errorf("handed over: %+v", h.seen)
	}
}

// TestHandoverMutated: whatever a member sends, the process goes on, and others are served.
func TestHandoverMutated(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	m, _ := handover(t)
	const client, server, client6, server6 = "10.0.0.10:4000", "172.31.0.20:7", "[fd77:100::50]:4000", "[fd77:1::50]:7"
	corpus := [][]byte{pkttest.UDP(client, server, "question"), pkttest.UDP(client6, server6, "question"),
		pkttest.TCP(client, server, ipkt.SYN, 1, 0, ""), pkttest.TCP(client, server, ipkt.ACK, 2, 1, "data"), pkttest.TCP(client, server, ipkt.FIN|ipkt.ACK, 2, 1, ""),
		pkttest.TCP(client6, server6, ipkt.SYN, 1, 0, ""), pkttest.TCP(client6, server6, ipkt.RST, 2, 0, ""),
		pkttest.Echo("10.0.0.10", "172.31.0.20", false, 7, "x"), pkttest.Echo("fd77:100::50", "fd77:1::50", false, 7, "x")}
	corpus = append(corpus, pkttest.Fragments(pkttest.UDP(client, server, string(make([]byte, 3000))), 1000, 1000)...)
	corpus = append(corpus, pkttest.Fragments(pkttest.Echo("10.0.0.10", "172.31.0.20", false, 8, string(make([]byte, 3000))), 1000, 1000)...)
	for range 20000 {
		if b := mutate(rng, corpus[rng.IntN(len(corpus))]); len(b) > 0 {
			m.sendIP(b)
		}
	}
	if n := m.e.handovers.local.Panics.Load(); n > 0 {
		t.Logf("the stack panicked on %d packets", n)
	}
	c, err := m.dial(t, "172.31.0.20:7")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

// TestHandoverDoesNotComeBack: by sockets of the host nobody takes the ways of VPC hosts to
// the overlay, by aliases and by forwards, where the policy would take him for one.
func TestHandoverDoesNotComeBack(t *testing.T) {
	h := &handed{}
	r := newRig(t, func(c *Config) {
		c.Host = h
		c.Masquerade = []Masquerade{{To: netip.MustParsePrefix("172.31.0.0/16"), ByHost: true}}
		c.Policy = policy.New(policy.Accept, []policy.Rule{{Action: policy.Accept, Direction: policy.In}})
		c.Forwards = []PortForward{{Proto: ipkt.TCP, Listen: netip.MustParseAddrPort("172.31.9.9:443"), To: netip.MustParseAddrPort("10.0.0.11:443"), Masquerade: true}}
		c.Maps = []AddressMap{{Hosts: OverlaySide, Real: netip.MustParsePrefix("10.0.7.0/24"), Alias: netip.MustParsePrefix("172.31.7.0/24")}}
	})
	h.e = r.e
	for _, to := range []string{"172.31.9.9:443", "172.31.9.9:80", "172.31.7.10:443"} {
		o, v := r.fromOverlay(pkttest.TCP("10.0.0.10:4000", to, ipkt.SYN, 1, 0, ""), pkttest.UDP("10.0.0.10:4000", to, "x"))
		r.want(to, append(o, v...))
	}
	if len(h.seen) > 0 {
		t.Errorf("handed over: %v", h.seen)
	}
	if n := r.drops(OverlaySide, dropForbidden); n != 6 {
		t.Errorf("%d drops counted, want 6", n)
	}
}

// sockets is a Host that gives datagrams' sockets to the test.
type sockets struct {
	*handed
	taken chan *UDPConn
}

func (h sockets) Receive(Handover) (func(*UDPConn), bool) {
	return func(c *UDPConn) {
		if c != nil {
			h.taken <- c
		}
	}, true
}

// TestHandoverAnswersByPolicy: what a policy doesn't accept any more ends in both directions.
func TestHandoverAnswersByPolicy(t *testing.T) {
	for _, f := range inward {
		t.Run(f.name, func(t *testing.T) {
			h := sockets{taken: make(chan *UDPConn, 1)}
			m, _ := handover(t, func(c *Config) { c.Host = h })
			src, to, proto, err := m.ends(netip.MustParseAddrPort(end(f.server, portEcho)))
			if err != nil {
				t.Fatal(err)
			}
			u, err := dialUDP(m.local.s, src, to, proto)
			if err != nil {
				t.Fatal(err)
			}
			defer u.Close()
			_ = u.SetDeadline(time.Now().Add(10 * time.Second))
			if _, err := u.Write([]byte("question")); err != nil {
				t.Fatal(err)
			}
			c := <-h.taken
			defer c.Close()
			answer := func(text string) {
				t.Helper()
				if _, err := c.Write([]byte(text)); err != nil {
					t.Fatal(err)
				}
			}
			reads := func(want string) {
				t.Helper()
				b := make([]byte, 100)
				n, err := u.Read(b)
				if err != nil || string(b[:n]) != want {
					t.Fatalf("%q, %v, want %q", b[:n], err, want)
				}
			}
			answer("one")
			reads("one")
			m.e.SetPolicy(policy.New(policy.Drop, nil))
			answer("two")
			testwait.For(t, 10*time.Second, "a drop by the policy", func() bool { return m.e.stats.drops[VPCSide][dropPolicy].Load() == 1 })
			m.e.SetPolicy(policy.New(policy.Accept, []policy.Rule{{Action: policy.Accept, Direction: policy.In}}))
			answer("three")
			reads("three")
		})
	}
}
