package hostproxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/router/config"
	"ztgate/router/control"
)

// dialPlane connects to a listener of the test instead of an overlay.
type dialPlane struct {
	to      string
	silent  atomic.Bool // the host never answers who connects
	forbids atomic.Bool // the policy refuses whoever a load balancer speaks for
	verdict atomic.Value
	dialled atomic.Value // the last netip.AddrPort
	noted   atomic.Value // the last refusal
}

func (p *dialPlane) DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	p.dialled.Store(dst)
	if p.silent.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if p.to == "" {
		return nil, errors.New("no route")
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", p.to)
}

func (p *dialPlane) DialUDP(ctx context.Context, _ netip.AddrPort) (net.Conn, error) {
	if p.to == "" {
		return nil, errors.New("no route")
	}
	var d net.Dialer
	return d.DialContext(ctx, "udp", p.to)
}

func (p *dialPlane) Permits(control.Question) bool { return !p.forbids.Load() }

// ListenTCP listens on this machine, as if that were inside.
func (p *dialPlane) ListenTCP(at netip.AddrPort) (net.Listener, error) {
	return net.Listen("tcp", at.String())
}

func (p *dialPlane) Explain(control.Question) control.Explanation {
	return control.Explanation{Verdict: p.verdict.Load().(string), Reason: "policy"}
}

func (p *dialPlane) NoteRefusal(q control.Question, reason string) {
	p.noted.Store(reason + " " + q.Protocol + " to " + q.Destination.String())
}

func TestRelays(t *testing.T) {
	host, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	go func() {
		for {
			c, err := host.Accept()
			if err != nil {
				return
			}
			go func() { // answers only after the client's end
				b, _ := io.ReadAll(c)
				_, _ = c.Write(append(b, '!'))
				_ = c.Close()
			}()
		}
	}()
	plane := &dialPlane{to: host.Addr().String()}
	plane.verdict.Store("forward")
	ctx, stop := context.WithCancel(context.Background())
	r := New(plane, Limits{}, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = free.Close()
	port := netip.MustParseAddrPort(free.Addr().String()).Port()
	forward := config.Forward{Proto: "tcp", Side: config.SideVPC, Listen: netip.AddrPortFrom(netip.IPv4Unspecified(), port),
		To: netip.MustParseAddrPort("10.0.0.10:443"), Masquerade: true}
	if err := r.Set([]config.Forward{forward}); err != nil {
		t.Fatal(err)
	}
	ask := func() (string, error) {
		c, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)))
		if err != nil {
			return "", err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Write([]byte("hello")); err != nil {
			return "", err
		}
		if err := c.CloseWrite(); err != nil {
			return "", err
		}
		b, err := io.ReadAll(c)
		return string(b), err
	}
	if got, err := ask(); got != "hello!" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	taken := config.Forward{Proto: "tcp", Side: config.SideVPC, To: forward.To,
		Listen: netip.AddrPortFrom(netip.IPv4Unspecified(), netip.MustParseAddrPort(host.Addr().String()).Port())}
	if err := r.Set([]config.Forward{forward, taken}); err == nil {
		t.Error("a port in use was no error")
	}
	if got, err := ask(); got != "hello!" || err != nil {
		t.Errorf("after a faulty change: %q, %v", got, err)
	}
	// Only where it leads to changes: the port stays open, and nobody is cut off.
	other := forward
	other.To = netip.MustParseAddrPort("10.0.0.11:443")
	if err := r.Set([]config.Forward{other}); err != nil {
		t.Fatalf("another host for the same port: %v", err)
	}
	if got, err := ask(); got != "hello!" || err != nil || plane.dialled.Load() != other.To {
		t.Errorf("after a change of host: %q, %v, dialled %v", got, err, plane.dialled.Load())
	}
	plane.verdict.Store("drop")
	if got, _ := ask(); got != "" {
		t.Errorf("refused by policy, but got %q", got)
	}
	if err := r.Set(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(); err == nil {
		t.Error("a removed forward still answers")
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestSamePort: a forward may change between all addresses of the host and one, and back, at
// the same port; a change that fails leaves everything as it was.
func TestSamePort(t *testing.T) {
	for family, addr := range loopbacks {
		for _, proto := range []string{"tcp", "udp"} {
			t.Run(family+"/"+proto, func(t *testing.T) {
				all := netip.IPv4Unspecified()
				if addr.Is6() {
					all = netip.IPv6Unspecified()
				}
				r := New(&dialPlane{}, Limits{}, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
				defer r.Close()
				at := func(a netip.Addr, port uint16) config.Forward {
					return config.Forward{Proto: proto, Side: config.SideVPC, Listen: netip.AddrPortFrom(a, port), To: netip.AddrPortFrom(addr, 443), Masquerade: true}
				}
				busy, port := freePorts(t, proto, addr)
				listens := func() bool {
					c, err := listen(at(addr, port))
					if err == nil {
						_ = c.Close()
					}
					return err != nil
				}
				for _, a := range []netip.Addr{all, addr, all, addr} {
					if err := r.Set([]config.Forward{at(a, port)}); err != nil {
						t.Fatalf("to %v: %v", a, err)
					}
					if err := r.Set([]config.Forward{at(all, port), at(addr, busy)}); err == nil {
						t.Fatal("a port in use was no error")
					}
					if _, ok := r.open[endpoint{r.kernel, proto, netip.AddrPortFrom(a, port)}]; len(r.open) != 1 || !ok || !listens() {
						t.Errorf("at %v, after a change that failed: %v", a, r.open)
					}
				}
				if err := r.Set(nil); err != nil || listens() {
					t.Errorf("still listens without forwards: %v", err)
				}
			})
		}
	}
}

// freePorts returns a port that is in use until the end of the test, and one that isn't.
func freePorts(t *testing.T, proto string, a netip.Addr) (busy, free uint16) {
	t.Helper()
	var out []uint16
	for range 2 {
		c, err := listen(config.Forward{Proto: proto, Listen: netip.AddrPortFrom(a, 0)})
		if err != nil {
			t.Fatal(err)
		}
		var at net.Addr
		switch c := c.(type) {
		case net.Listener:
			at = c.Addr()
		case *net.UDPConn:
			at = c.LocalAddr()
		}
		if out = append(out, netip.MustParseAddrPort(at.String()).Port()); len(out) == 1 {
			t.Cleanup(func() { _ = c.Close() })
		} else {
			_ = c.Close()
		}
	}
	return out[0], out[1]
}

func TestRelaysUDP(t *testing.T) {
	host, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	go func() { // says who asked
		b := make([]byte, 2000)
		for {
			n, from, err := host.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = host.WriteToUDPAddrPort(append(b[:n], from.String()...), from)
		}
	}()
	plane := &dialPlane{to: host.LocalAddr().String()}
	plane.verdict.Store("forward")
	ctx, stop := context.WithCancel(context.Background())
	reg := prometheus.NewRegistry()
	r := New(plane, Limits{}, reg, slog.New(slog.DiscardHandler))
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	free, err := net.ListenUDP("udp4", nil)
	if err != nil {
		t.Fatal(err)
	}
	port := netip.MustParseAddrPort(free.LocalAddr().String()).Port()
	_ = free.Close()
	forward := config.Forward{Proto: "udp", Side: config.SideVPC, Listen: netip.AddrPortFrom(netip.IPv4Unspecified(), port),
		To: netip.MustParseAddrPort("10.0.0.10:53"), Masquerade: true}
	if err := r.Set([]config.Forward{forward}); err != nil {
		t.Fatal(err)
	}
	// A connected socket takes answers only from the address it asked.
	dial := func(to string) *net.UDPConn {
		c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(to), port)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		return c
	}
	ask := func(c *net.UDPConn) string {
		b := make([]byte, 200)
		if _, err := c.Write([]byte("who? ")); err != nil {
			t.Fatal(err)
		}
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	one, two := dial("127.0.0.1"), dial("127.0.0.2")
	first, second := ask(one), ask(two)
	if first == second || ask(one) != first || ask(two) != second {
		t.Errorf("sessions are not kept apart: %q, %q", first, second)
	}
	plane.verdict.Store("drop")
	three := dial("127.0.0.1")
	if _, err := three.Write([]byte("who?")); err != nil {
		t.Fatal(err)
	}
	if ask(one) != first { // behind it on the same socket
		t.Error("a session ended")
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range families[0].GetMetric() { // labels in the order of their names
		if l := m.GetLabel(); l[0].GetValue() == "udp" && l[1].GetValue() == relayRefused && m.GetCounter().GetValue() != 1 {
			t.Errorf("%v sessions refused, want 1", m.GetCounter().GetValue())
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if len(r.udp.open) != 0 {
		t.Errorf("%d sessions are left", len(r.udp.open))
	}
}
