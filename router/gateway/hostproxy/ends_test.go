package hostproxy

import (
	"bytes"
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
	readReset(t, "the client", c)
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

// readReset reads until the end, which has to be a reset.
func readReset(t *testing.T, who string, c net.Conn) {
	t.Helper()
	if n, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%s reads %d bytes and then %v, want a reset", who, n, err)
	}
}

// TestEnds: each side sees how the other one ended.
func TestEnds(t *testing.T) {
	file := bytes.Repeat([]byte("0123456789abcdef"), 1<<12)
	write := func(t *testing.T, c net.Conn) {
		t.Helper()
		if _, err := c.Write(file); err != nil {
			t.Fatal(err)
		}
	}
	all := func(t *testing.T, who string, c net.Conn) {
		t.Helper()
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, file) {
			t.Errorf("%s reads %d bytes, %v, want %d and a clean end", who, len(got), err, len(file))
		}
	}
	half := func(t *testing.T, c net.Conn) {
		t.Helper()
		if _, err := io.ReadFull(c, make([]byte, len(file)/2)); err != nil {
			t.Fatal(err)
		}
	}
	for family, addr := range loopbacks {
		for name, f := range map[string]func(*testing.T, *between){
			"the host aborts within a file": func(t *testing.T, b *between) {
				client := b.dial(t, addr)
				host := b.accept(t)
				write(t, host)
				half(t, client)
				abort(host)
				readReset(t, "the client", client)
			},
			"the client aborts within a file": func(t *testing.T, b *between) {
				client := b.dial(t, addr)
				host := b.accept(t)
				write(t, client)
				half(t, host)
				abort(client)
				readReset(t, "the host", host)
			},
			"the host ends first": func(t *testing.T, b *between) {
				client := b.dial(t, addr)
				host := b.accept(t)
				write(t, host)
				_ = host.CloseWrite()
				all(t, "the client", client)
				write(t, client)
				_ = client.CloseWrite()
				all(t, "the host", host)
			},
			"the client ends first": func(t *testing.T, b *between) {
				client := b.dial(t, addr)
				host := b.accept(t)
				write(t, client)
				_ = client.CloseWrite()
				all(t, "the host", host)
				write(t, host)
				_ = host.Close()
				all(t, "the client", client)
				testwait.For(t, patience, "the count", func() bool { return b.results(t, "tcp", relayOK) == 1 })
			},
			"the client ends and then aborts": func(t *testing.T, b *between) {
				client := b.dial(t, addr)
				host := b.accept(t)
				write(t, client)
				_ = client.CloseWrite()
				all(t, "the host", host)
				abort(client)
				if err := awaitReset(host); err == nil {
					t.Error("the host isn't told")
				}
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
			},
			"the gateway ends": func(t *testing.T, b *between) {
				client := b.dial(t, addr)
				host := b.accept(t)
				write(t, host)
				half(t, client)
				b.stop()
				readReset(t, "the client", client)
				readReset(t, "the host", host)
			},
			"idle for too long": func(t *testing.T, b *between) {
				client := b.dial(t, addr)
				host := b.accept(t)
				write(t, host)
				half(t, client)
				b.expire(b.now() + DefaultIdle - time.Minute)
				half(t, client)
				b.expire(b.now() + DefaultIdle + time.Minute)
				readReset(t, "the client", client)
				readReset(t, "the host", host)
				if n := b.results(t, "tcp", relayIdle); n != 1 {
					t.Errorf("%v idle connections, want 1", n)
				}
			},
		} {
			t.Run(family+"/"+name, func(t *testing.T) { f(t, newBetween(t, addr, Limits{})) })
		}
	}
}
