// Package hostproxy serves forwards on the host's own addresses, where packets end
// in the kernel and never reach the forwarding plane by themselves.
package hostproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/router/config"
	"ztgate/router/control"
)

// Proxy takes connections and datagrams up in the host's kernel and carries them on
// by the forwarding plane's own host.
type Proxy struct {
	plane   Plane
	log     *slog.Logger
	results *prometheus.CounterVec

	mu     sync.Mutex // guards what follows
	open   map[endpoint]*listener
	conns  map[io.Closer]struct{} // of clients
	closed bool
	wg     sync.WaitGroup
}

// endpoint is where a forward listens.
type endpoint struct {
	proto  string
	listen netip.AddrPort
}

// listener is an open endpoint. Its forward may be replaced by another one that
// listens there.
type listener struct {
	io.Closer
	forward atomic.Pointer[config.Forward]
}

// Plane is what forwards on the host's addresses need of the forwarding plane.
type Plane interface {
	Explain(q control.Question) control.Explanation
	DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error)
	DialUDP(ctx context.Context, dst netip.AddrPort) (net.Conn, error)
}

// What becomes of a connection or session.
const (
	relayOK          = "ok"
	relayRefused     = "refused"
	relayUnreachable = "unreachable"
	relayLimit       = "limit"
)

const (
	maxRelayed   = 4096 // TCP connections and UDP sessions together
	relayConnect = 10 * time.Second
	relayBuffer  = 64 << 10
)

// New makes a proxy without forwards.
func New(plane Plane, reg prometheus.Registerer, log *slog.Logger) *Proxy {
	r := &Proxy{plane: plane, log: log, open: map[endpoint]*listener{}, conns: map[io.Closer]struct{}{},
		results: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "ztgate_relayed_connections_total",
			Help: "TCP connections and UDP sessions of forwards on the host's own addresses, by what became of them."}, []string{"protocol", "result"})}
	for _, result := range []string{relayOK, relayRefused, relayUnreachable, relayLimit} {
		for _, proto := range []string{"tcp", "udp"} {
			r.results.WithLabelValues(proto, result)
		}
	}
	reg.MustRegister(r.results)
	return r
}

// Set serves these forwards from now on: it opens what is new and closes what is
// gone. With an error nothing has changed. Connections of a closed or replaced
// forward go on.
func (r *Proxy) Set(forwards []config.Forward) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return net.ErrClosed
	}
	want := map[endpoint]*listener{}
	var fresh []*listener
	for _, f := range forwards {
		at := endpoint{f.Proto, f.Listen}
		if l := r.open[at]; l != nil {
			want[at] = l
			continue
		}
		c, err := listen(f)
		if err != nil {
			for _, l := range fresh {
				_ = l.Close()
			}
			return fmt.Errorf("forward %s: %w: choose another port or end what uses it", f, err)
		}
		want[at] = &listener{Closer: c}
		fresh = append(fresh, want[at])
	}
	for at, l := range r.open {
		if want[at] == nil {
			_ = l.Close()
		}
	}
	for _, f := range forwards {
		want[endpoint{f.Proto, f.Listen}].forward.Store(&f)
	}
	r.open = want
	for _, l := range fresh {
		switch c := l.Closer.(type) {
		case net.Listener:
			r.wg.Go(func() { r.serve(l, c) })
		case *net.UDPConn:
			r.wg.Go(func() { r.serveUDP(l, c) })
		}
	}
	return nil
}

// listen opens the endpoint of a forward, for its own family alone.
func listen(f config.Forward) (io.Closer, error) {
	family := "4"
	if f.Listen.Addr().Is6() {
		family = "6"
	}
	if f.Proto == "udp" {
		return listenUDP("udp"+family, f)
	}
	return net.Listen("tcp"+family, f.Listen.String())
}

// Run waits for the end of ctx and then ends all.
func (r *Proxy) Run(ctx context.Context) error {
	<-ctx.Done()
	r.Close()
	return nil
}

// Close ends all and waits for it; calling it again does nothing.
func (r *Proxy) Close() {
	r.mu.Lock()
	r.closed = true
	for _, l := range r.open {
		_ = l.Close()
	}
	for c := range r.conns {
		_ = c.Close()
	}
	r.mu.Unlock()
	r.wg.Wait()
}

func (r *Proxy) serve(l *listener, accept net.Listener) {
	for {
		c, err := accept.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors, for example
			r.log.Warn("accept for a forward", "forward", l.forward.Load().String(), "error", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		if !r.add(c) {
			r.results.WithLabelValues("tcp", relayLimit).Inc()
			_ = c.Close()
			continue
		}
		r.wg.Go(func() {
			r.results.WithLabelValues("tcp", r.carry(*l.forward.Load(), c)).Inc()
			r.remove(c)
		})
	}
}

func (r *Proxy) add(c io.Closer) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || len(r.conns) >= maxRelayed {
		return false
	}
	r.conns[c] = struct{}{}
	return true
}

func (r *Proxy) remove(c io.Closer) {
	_ = c.Close()
	r.mu.Lock()
	delete(r.conns, c)
	r.mu.Unlock()
}

// allows asks policy and vpc.sources.
func (r *Proxy) allows(f config.Forward, from netip.AddrPort) bool {
	return r.plane.Explain(control.Question{Protocol: f.Proto, Source: from, Destination: f.To}).Verdict == "forward"
}

// carry connects a client with the forward's host until both are done.
func (r *Proxy) carry(f config.Forward, client net.Conn) string {
	from, err := netip.ParseAddrPort(client.RemoteAddr().String())
	if err != nil {
		return relayRefused
	}
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	if !r.allows(f, from) {
		return relayRefused
	}
	ctx, cancel := context.WithTimeout(context.Background(), relayConnect)
	host, err := r.plane.DialTCP(ctx, f.To)
	cancel()
	if err != nil {
		return relayUnreachable
	}
	defer host.Close()
	var wg sync.WaitGroup
	wg.Go(func() { pipe(host, client) })
	wg.Go(func() { pipe(client, host) })
	wg.Wait()
	return relayOK
}

// pipe copies until src ends, and passes the end on. After an error both sides
// are of no use any more.
func pipe(dst, src net.Conn) {
	if _, err := io.CopyBuffer(dst, struct{ io.Reader }{src}, make([]byte, relayBuffer)); err != nil {
		_ = dst.Close()
		_ = src.Close()
		return
	}
	if c, ok := dst.(interface{ CloseWrite() error }); ok {
		_ = c.CloseWrite()
	}
}
