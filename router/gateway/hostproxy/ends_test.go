package hostproxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"ztgate/internal/testwait"
	"ztgate/router/config"
	"ztgate/router/lab/labtest"
)

const patience = 10 * time.Second

// loopbacks are the addresses of this host in both families.
var loopbacks = map[string]netip.Addr{"IPv4": netip.MustParseAddr("127.0.0.1"), "IPv6": netip.IPv6Loopback()}

// between is a proxy with one forward between a client and a host, on this machine.
type between struct {
	*Proxy
	reg   *prometheus.Registry
	plane *dialPlane
	at    netip.AddrPort
	host  *net.TCPListener
	stop  func()
}

func newBetween(t *testing.T, addr netip.Addr, limits Limits) *between {
	t.Helper()
	host, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = host.Close() })
	b := &between{plane: &dialPlane{to: host.Addr().String()}, host: host, reg: prometheus.NewRegistry()}
	b.plane.verdict.Store("forward")
	b.Proxy = New(b.plane, limits, b.reg, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	b.stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		done <- nil
	}
	t.Cleanup(b.stop)
	free, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		t.Fatal(err)
	}
	b.at = free.Addr().(*net.TCPAddr).AddrPort()
	_ = free.Close()
	if err := b.Set([]config.Forward{{Proto: "tcp", Side: config.SideVPC, Listen: b.at, To: netip.AddrPortFrom(addr, 443), Masquerade: true}}); err != nil {
		t.Fatal(err)
	}
	return b
}

// dial connects from an address of this machine.
func (b *between) dial(t *testing.T, from netip.Addr) *net.TCPConn {
	t.Helper()
	c, err := b.tryDial(from)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}

func (b *between) tryDial(from netip.Addr) (*net.TCPConn, error) {
	return net.DialTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), net.TCPAddrFromAddrPort(b.at))
}

// refused connects and has to be reset, which may be before it is noticed that the
// connection was there.
func (b *between) refused(t *testing.T, from netip.Addr) {
	t.Helper()
	c, err := b.tryDial(from)
	if errors.Is(err, unix.ECONNRESET) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	labtest.Reset(t, "the client", c)
}

func (b *between) accept(t *testing.T) *net.TCPConn {
	t.Helper()
	_ = b.host.SetDeadline(time.Now().Add(patience))
	c, err := b.host.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}

// results returns how many connections or sessions came to such an end.
func (b *between) results(t *testing.T, proto, result string) float64 {
	t.Helper()
	families, err := b.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range families[0].GetMetric() { // labels in the order of their names
		if l := m.GetLabel(); l[0].GetValue() == proto && l[1].GetValue() == result {
			return m.GetCounter().GetValue()
		}
	}
	t.Fatalf("no count of %s %s", proto, result)
	return 0
}

// TestEnds: each side sees how the other one ended.
func TestEnds(t *testing.T) {
	half := func(t *testing.T, c net.Conn) {
		t.Helper()
		if _, err := io.ReadFull(c, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	for family, addr := range loopbacks {
		t.Run(family, func(t *testing.T) {
			labtest.Ends(t, func(t *testing.T) (client, host *net.TCPConn) {
				b := newBetween(t, addr, Limits{})
				return b.dial(t, addr), b.accept(t)
			})
		})
		for name, f := range map[string]func(*testing.T, *between){
			"a clean end": func(t *testing.T, b *between) {
				client := b.dial(t, addr)
				host := b.accept(t)
				_, _ = client.Close(), host.Close()
				testwait.For(t, patience, "the count", func() bool { return b.results(t, "tcp", relayOK) == 1 })
			},
			"the host refuses": func(t *testing.T, b *between) {
				_ = b.host.Close()
				b.refused(t, addr)
				testwait.For(t, patience, "the count", func() bool { return b.results(t, "tcp", relayUnreachable) == 1 })
			},
			"the policy refuses": func(t *testing.T, b *between) {
				b.plane.verdict.Store("drop")
				b.refused(t, addr)
				testwait.For(t, patience, "the count", func() bool { return b.results(t, "tcp", relayRefused) == 1 })
				if got, want := b.plane.noted.Load(), "policy tcp to "+netip.AddrPortFrom(addr, 443).String(); got != want {
					t.Errorf("shown is %v, want %s", got, want)
				}
			},
			"the gateway ends": func(t *testing.T, b *between) {
				client := b.dial(t, addr)
				host := b.accept(t)
				_, _ = host.Write(make([]byte, 2000))
				half(t, client)
				b.stop()
				labtest.Reset(t, "the client", client)
				labtest.Reset(t, "the host", host)
			},
			"idle for too long": func(t *testing.T, b *between) {
				client := b.dial(t, addr)
				host := b.accept(t)
				_, _ = host.Write(make([]byte, 2000))
				half(t, client)
				b.expire(b.now() + DefaultIdle - time.Minute)
				half(t, client)
				b.expire(b.now() + DefaultIdle + time.Minute)
				labtest.Reset(t, "the client", client)
				labtest.Reset(t, "the host", host)
				if n := b.results(t, "tcp", relayIdle); n != 1 {
					t.Errorf("%v idle connections, want 1", n)
				}
			},
		} {
			t.Run(family+"/"+name, func(t *testing.T) { f(t, newBetween(t, addr, Limits{})) })
		}
	}
}
