package netstack

import (
	"context"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
	"ztgate/netstack/policy"
)

// relayRig is an engine with a host of the VPC that has a stack of its own.
func relayRig(t *testing.T, forwards ...PortForward) (*Engine, *Client) {
	t.Helper()
	dev := &clientDevice{packets: make(chan []byte, 64), done: make(chan struct{})}
	client, err := NewClient([]netip.Addr{netip.MustParseAddr("172.31.0.10"), netip.MustParseAddr("fd77:1::10")}, func(ip []byte) { dev.packets <- ip })
	if err != nil {
		t.Fatal(err)
	}
	dev.client = client
	overlay := &fakeOverlay{silent: map[netip.Addr]bool{}, macs: map[netip.Addr][6]byte{}}
	e, err := New(Config{Device: dev, Overlay: overlay, Forwards: forwards,
		VPC: VPC{Sources: []netip.Prefix{netip.MustParsePrefix("172.31.0.0/16"), netip.MustParsePrefix("fd77:1::/64")}}})
	if err != nil {
		t.Fatal(err)
	}
	overlay.e = e
	if err := e.SetNetworks([]Network{testNetwork()}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for _, run := range []func(context.Context) error{e.Run, client.Run} {
		running.Go(func() { _ = run(ctx) })
	}
	t.Cleanup(running.Wait)
	t.Cleanup(cancel)
	return e, client
}

func relayed(listen, to string) PortForward {
	f := forward(VPCSide, ipkt.TCP, listen, to, true)
	f.Relayed = true
	return f
}

// TestRelayedForward: connections of the VPC to a relayed forward end at our listener, at
// any of our addresses or at one that is routed to us, as far as the policy lets them.
func TestRelayedForward(t *testing.T) {
	for _, tt := range []struct{ listen, at, to string }{
		{"0.0.0.0:25", "10.0.0.1:25", "10.0.0.10:25"},
		{"192.0.2.7:25", "192.0.2.7:25", "10.0.0.10:25"},
		{"[::]:25", "[fd77:100::1]:25", "[fd77:100::10]:25"},
		{"[fd00:7::7]:25", "[fd00:7::7]:25", "[fd77:100::10]:25"},
	} {
		t.Run(tt.listen, func(t *testing.T) {
			e, client := relayRig(t, relayed(tt.listen, tt.to))
			l, err := e.ListenTCP(netip.MustParseAddrPort(tt.listen))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if _, err := e.ListenTCP(netip.MustParseAddrPort(tt.listen)); err == nil || !strings.Contains(err.Error(), "in use") {
				t.Errorf("a second listener: %v", err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			at := netip.MustParseAddrPort(tt.at)
			c, err := client.DialTCP(ctx, at)
			if err != nil {
				t.Fatal(err)
			}
			s, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			if s.RemoteAddr().String() != c.LocalAddr().String() || s.LocalAddr().String() != tt.at {
				t.Errorf("from %s at %s, want %s at %s", s.RemoteAddr(), s.LocalAddr(), c.LocalAddr(), tt.at)
			}
			o := s.(*TCPConn).ep.SocketOptions()
			if o.GetReceiveBufferSize() > listenBuffer || o.GetSendBufferSize() > listenBuffer {
				t.Errorf("%d bytes wait on the way in, %d on the way out", o.GetReceiveBufferSize(), o.GetSendBufferSize())
			}
			for _, pair := range [][2]net.Conn{{c, s}, {s, c}} {
				if _, err := pair[0].Write([]byte("hello")); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(pair[1], make([]byte, 5)); err != nil {
					t.Fatal(err)
				}
			}
			_, _ = c.Close(), s.Close()
			x := e.Explain(Question{Protocol: ipkt.TCP, Src: netip.AddrPortFrom(client.Address(at.Addr().Is6()), 0), Dst: at})
			if x.Verdict != "local" || !x.Redirected || x.Destination.String() != tt.to || x.Forward == nil {
				t.Errorf("%+v", x)
			}
			e.SetPolicy(policy.New(policy.Reject, nil))
			if _, err := client.DialTCP(ctx, at); err == nil {
				t.Error("the policy refuses it, and it passes")
			}
			e.SetPolicy(policy.New(policy.Accept, nil))
			_ = l.Close()
			if _, err := l.Accept(); err == nil {
				t.Error("a closed listener accepts")
			}
			if _, err := client.DialTCP(ctx, at); err == nil {
				t.Error("nobody listens, and it is connected")
			}
		})
	}
}

// TestRelayedSides: a relayed forward is neither for the overlay nor for hosts in the VPC,
// and what it listens at gets no flows.
func TestRelayedSides(t *testing.T) {
	r := newRig(t, withForwards(relayed("0.0.0.0:25", "10.0.0.10:25"), relayed("0.0.0.0:26", "172.31.0.20:25")))
	o, v := r.fromOverlay(pkttest.TCP("10.0.0.11:4000", "10.0.0.1:25", ipkt.SYN, 1, 0, ""))
	r.want("from the overlay", append(o, v...))
	o, v = r.fromVPC(pkttest.TCP("172.31.0.10:4000", "172.31.0.1:26", ipkt.SYN, 1, 0, ""))
	if len(o) > 0 || len(v) != 1 || v[0][:8] != "icmp 3/0" {
		t.Errorf("to the VPC: %q, %q", o, v)
	}
	o, v = r.fromVPC(pkttest.TCP("172.31.9.1:4000", "10.0.0.1:25", ipkt.SYN, 1, 0, ""))
	r.want("passed on", o)
	if r.e.local.sendAll(); len(v) != 0 {
		t.Errorf("answered before it was asked: %q", v)
	}
	if n := r.e.table.Len(); n != 0 {
		t.Errorf("%d flows", n)
	}
	for from, f := range map[string]PortForward{
		"the overlay": {From: OverlaySide, Proto: ipkt.TCP, Listen: pkttest.Addr("10.0.0.1:25"), To: pkttest.Addr("172.31.0.10:25"), Relayed: true},
		"UDP":         {Proto: ipkt.UDP, Listen: pkttest.Addr("10.0.0.1:25"), To: pkttest.Addr("10.0.0.10:25"), Relayed: true},
	} {
		if err := r.e.SetTranslation([]PortForward{f}, nil); err == nil {
			t.Errorf("a relayed forward of %s is no error", from)
		}
	}
}

// TestEndedConnections: what is left of a connection that the gateway's side ends first is
// gone soon.
func TestEndedConnections(t *testing.T) {
	e, client := relayRig(t, relayed("0.0.0.0:25", "10.0.0.10:25"))
	l, err := e.ListenTCP(netip.MustParseAddrPort("0.0.0.0:25"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for range 20 {
		c, err := client.DialTCP(ctx, netip.MustParseAddrPort("10.0.0.1:25"))
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		_ = s.(*TCPConn).CloseWrite()
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
		_, _ = io.Copy(io.Discard, s)
		_ = s.Close()
	}
	testwait.For(t, 2*timeWait, "all to be forgotten", func() bool {
		return e.local.s.Stats().TCP.CurrentConnected.Value() == 0 && len(e.local.s.CleanupEndpoints()) == 0
	})
}

// TestPermits: the policy alone judges clients that somebody speaks for.
func TestPermits(t *testing.T) {
	r := newRig(t)
	r.e.SetPolicy(policy.New(policy.Drop, []policy.Rule{{Action: policy.Accept, From: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")},
		Ports: []policy.PortRange{{First: 25, Last: 25}}, Proto: ipkt.TCP}}))
	for _, tt := range []struct {
		src, dst string
		want     bool
	}{
		{"203.0.113.5:1", "10.0.0.10:25", true}, {"203.0.113.5:1", "10.0.0.10:26", false}, {"198.51.100.5:1", "10.0.0.10:25", false},
		{"203.0.113.5:1", "192.0.2.1:25", false}, {"[2001:db8::1]:1", "10.0.0.10:25", false},
	} {
		if got := r.e.Permits(Question{Protocol: ipkt.TCP, Src: pkttest.Addr(tt.src), Dst: pkttest.Addr(tt.dst)}); got != tt.want {
			t.Errorf("%s to %s: %v", tt.src, tt.dst, got)
		}
	}
}
