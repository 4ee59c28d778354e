package router

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
)

// dialPlane connects to a listener of the test instead of an overlay.
type dialPlane struct {
	Plane
	to      string
	verdict atomic.Value
}

func (p *dialPlane) DialTCP(ctx context.Context, _ netip.AddrPort) (net.Conn, error) {
	if p.to == "" {
		return nil, errors.New("no route")
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", p.to)
}

func (p *dialPlane) Explain(Question) Explanation {
	return Explanation{Verdict: p.verdict.Load().(string)}
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
	r := newRelays(plane, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	done := make(chan error, 1)
	go func() { done <- r.run(ctx) }()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = free.Close()
	port := netip.MustParseAddrPort(free.Addr().String()).Port()
	forward := Forward{Proto: "tcp", Side: SideVPC, Listen: netip.AddrPortFrom(netip.IPv4Unspecified(), port),
		To: netip.MustParseAddrPort("10.0.0.10:443"), Masquerade: true}
	if err := r.set([]Forward{forward}); err != nil {
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
	taken := Forward{Proto: "tcp", Side: SideVPC, To: forward.To,
		Listen: netip.AddrPortFrom(netip.IPv4Unspecified(), netip.MustParseAddrPort(host.Addr().String()).Port())}
	if err := r.set([]Forward{forward, taken}); err == nil {
		t.Error("a port in use was no error")
	}
	if got, err := ask(); got != "hello!" || err != nil {
		t.Errorf("after a faulty change: %q, %v", got, err)
	}
	plane.verdict.Store("drop")
	if got, _ := ask(); got != "" {
		t.Errorf("refused by policy, but got %q", got)
	}
	if err := r.set(nil); err != nil {
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
