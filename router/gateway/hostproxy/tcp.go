// Package hostproxy serves forwards whose connections end here: those on the host's own
// addresses, where packets end in the kernel and never reach the forwarding plane by
// themselves, and those with a PROXY header, which is read from one connection and
// written into another.
package hostproxy

import (
	"cmp"
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
	"golang.org/x/sys/unix"

	"ztgate/router/config"
	"ztgate/router/control"
)

// Proxy takes connections and datagrams up in the host's kernel and carries them on
// by the forwarding plane's own host.
type Proxy struct {
	plane   Plane
	limits  Limits
	log     *slog.Logger
	results *prometheus.CounterVec
	start   time.Time
	streams *buffers
	packets *buffers
	kernel  *network
	inside  *network

	mu       sync.Mutex // guards what follows
	open     map[endpoint]*listener
	tcp, udp *shares
	dials    *shares // of tcp, those that the host hasn't answered yet
	headers  *shares // connections of load balancers that haven't said for whom they are
	refused  blame
	warned   time.Time // when a failure to accept was logged last
	closed   bool
	wg       sync.WaitGroup
}

// Limits bound what clients may use. The zero value means the defaults.
type Limits struct {
	Connections int           // TCP in all, 0 = [MaxConnections]
	PerClient   int           // connections, and sessions, of one client; 0 = a fair share
	Idle        time.Duration // of a TCP connection, 0 = [DefaultIdle]
	IdleUDP     time.Duration // of a UDP session, 0 = [DefaultIdleUDP]
	Header      time.Duration // for a load balancer's header, 0 = [DefaultHeader]
}

const (
	// MaxConnections is how many TCP connections there may be, and how many UDP
	// sessions: they share the ports that the plane's own host has for itself.
	MaxConnections = 2048
	DefaultIdle    = 120 * time.Hour
	DefaultIdleUDP = 5 * time.Minute // RFC 4787 REQ-5
	DefaultHeader  = 5 * time.Second // it should be the first segment
	// unanswered is how long a UDP session lasts that only its client has used
	// (RFC 4787 REQ-5).
	unanswered = 2 * time.Minute
	// dialShare of the connections may wait for their hosts, and as many more for their
	// headers.
	dialShare = 4
	// expireEvery is how often idle ones are looked for.
	expireEvery = 10 * time.Second
)

// endpoint is where a forward listens.
type endpoint struct {
	in     *network
	proto  string
	listen netip.AddrPort
}

// network is where endpoints are: in the host's kernel, or at the plane's own host.
type network struct {
	listen func(f config.Forward) (io.Closer, error)
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
	// Permits asks the policy alone about a client that somebody speaks for.
	Permits(q control.Question) bool
	NoteRefusal(q control.Question, reason string)
	// ListenTCP takes connections that come to the plane's own host.
	ListenTCP(at netip.AddrPort) (net.Listener, error)
	DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error)
	DialUDP(ctx context.Context, dst netip.AddrPort) (net.Conn, error)
}

// What becomes of a connection or session.
const (
	relayOK          = "ok"
	relayRefused     = "refused"
	relayUnreachable = "unreachable"
	relayLimit       = "limit"   // too many of the client, or in all
	relayEvicted     = "evicted" // gave way to another one
	relayIdle        = "idle"
	relayUntrusted   = "untrusted"  // not of a load balancer that is named
	relayBadHeader   = "bad_header" // of one that sent something else than a PROXY header
	relayNoHeader    = "no_header"  // or none in time
)

var relayResults = []string{relayOK, relayRefused, relayUnreachable, relayLimit, relayEvicted, relayIdle, relayUntrusted, relayBadHeader, relayNoHeader}

// Reasons of refusals, as the plane names them.
const (
	reasonPolicy = "policy"
	reasonSource = "proxy_source"
	reasonHeader = "proxy_header"
)

const (
	relayConnect = 10 * time.Second
	// acceptPause is how long nothing is accepted after a failure to accept, which is
	// logged once in warnEvery.
	acceptPause = 100 * time.Millisecond
	warnEvery   = time.Minute
)

// New makes a proxy without forwards.
func New(plane Plane, limits Limits, reg prometheus.Registerer, log *slog.Logger) *Proxy {
	results := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "ztgate_relayed_connections_total",
		Help: "TCP connections and UDP sessions of forwards on the host's own addresses, by what became of them."}, []string{"protocol", "result"})
	return newProxy(plane, limits, MaxConnections, results, []string{"tcp", "udp"}, reg, log)
}

// newProxy makes a proxy that counts results of protocols, and has so many sessions of UDP.
func newProxy(plane Plane, limits Limits, sessions int, results *prometheus.CounterVec, protocols []string, reg prometheus.Registerer, log *slog.Logger) *Proxy {
	limits.Connections = cmp.Or(limits.Connections, MaxConnections)
	limits.Idle = cmp.Or(limits.Idle, DefaultIdle)
	limits.IdleUDP = cmp.Or(limits.IdleUDP, DefaultIdleUDP)
	limits.Header = cmp.Or(limits.Header, DefaultHeader)
	each := func(all int) int {
		if limits.PerClient > 0 {
			return min(all, limits.PerClient)
		}
		return fairShare(all)
	}
	dials := limits.Connections / dialShare
	r := &Proxy{plane: plane, limits: limits, log: log, start: time.Now(), streams: newBuffers(streamBuffer), packets: newBuffers(maxDatagram),
		open: map[endpoint]*listener{}, refused: blame{},
		tcp: newShares(limits.Connections, each(limits.Connections)), udp: newShares(sessions, each(sessions)),
		dials: newShares(dials, min(each(limits.Connections), fairShare(dials))), headers: newShares(dials, dials),
		kernel: &network{listen}, inside: &network{insideOf(plane)},
		results: results}
	for _, result := range relayResults {
		for _, proto := range protocols {
			r.results.WithLabelValues(proto, result)
		}
	}
	reg.MustRegister(r.results)
	return r
}

func (r *Proxy) count(proto, result string) { r.results.WithLabelValues(proto, result).Inc() }

// now is the time since the start.
func (r *Proxy) now() time.Duration { return time.Since(r.start) }

// Refused lists the clients that were refused for the limits, most often first.
func (r *Proxy) Refused() []Refused {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.refused.list()
}

// Set serves these forwards on the host's own addresses from now on: it opens what is new
// and closes what is gone. With an error nothing has changed. Connections of a closed or
// replaced forward go on.
func (r *Proxy) Set(forwards []config.Forward) error { return r.set(r.kernel, forwards) }

// SetInside does so for those that the plane relays, once it lets connections through
// to them.
func (r *Proxy) SetInside(forwards []config.Forward) error { return r.set(r.inside, forwards) }

func (r *Proxy) set(in *network, forwards []config.Forward) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return net.ErrClosed
	}
	want := map[endpoint]*listener{}
	for at, l := range r.open {
		if at.in != in {
			want[at] = l
		}
	}
	for _, f := range forwards {
		at := endpoint{in, f.Proto, f.Listen}
		want[at] = r.open[at]
	}
	var fresh []*listener
	var inTheWay []config.Forward
	for _, f := range forwards {
		at := endpoint{in, f.Proto, f.Listen}
		if want[at] != nil {
			continue
		}
		c, err := in.listen(f)
		if errors.Is(err, unix.EADDRINUSE) { // perhaps by one that goes
			if gone := r.closeGone(at, want); len(gone) > 0 {
				inTheWay = append(inTheWay, gone...)
				c, err = in.listen(f)
			}
		}
		if err != nil {
			for _, l := range fresh {
				_ = l.Close()
			}
			r.reopen(in, inTheWay)
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
		want[endpoint{in, f.Proto, f.Listen}].forward.Store(&f)
	}
	r.open = want
	for _, l := range fresh {
		r.begin(l)
	}
	return nil
}

// closeGone closes what isn't wanted any more and listens at a port of an endpoint: all
// addresses of a host are in the way of a single one, and the other way round.
func (r *Proxy) closeGone(at endpoint, want map[endpoint]*listener) (gone []config.Forward) {
	for old, l := range r.open {
		if _, stays := want[old]; !stays && old.in == at.in && old.proto == at.proto && old.listen.Port() == at.listen.Port() {
			_ = l.Close()
			gone = append(gone, *l.forward.Load())
		}
	}
	return gone
}

// reopen serves again what was closed for a change that failed.
func (r *Proxy) reopen(in *network, forwards []config.Forward) {
	for _, f := range forwards {
		at := endpoint{in, f.Proto, f.Listen}
		c, err := in.listen(f)
		if err != nil {
			r.log.Error("a forward that was in force can't listen any more", "forward", f.String(), "error", err)
			delete(r.open, at)
			continue
		}
		l := &listener{Closer: c}
		l.forward.Store(&f)
		r.open[at] = l
		r.begin(l)
	}
}

func (r *Proxy) begin(l *listener) {
	switch c := l.Closer.(type) {
	case net.Listener:
		r.wg.Go(func() { r.serve(l, c) })
	case *net.UDPConn:
		r.wg.Go(func() { r.serveUDP(l, c) })
	}
}

// insideOf listens at the plane's own host.
func insideOf(plane Plane) func(f config.Forward) (io.Closer, error) {
	return func(f config.Forward) (io.Closer, error) { return plane.ListenTCP(f.Listen) }
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

// Run ends what is idle, and all when ctx ends.
func (r *Proxy) Run(ctx context.Context) error {
	t := time.NewTicker(expireEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			r.Close()
			return nil
		case <-t.C:
			r.expire(r.now())
		}
	}
}

// expire ends what is idle.
func (r *Proxy) expire(now time.Duration) {
	r.mu.Lock()
	tcp := r.tcp.expired(now, r.limits.Idle, r.limits.Idle)
	udp := r.udp.expired(now, r.limits.IdleUDP, min(unanswered, r.limits.IdleUDP))
	for _, e := range tcp {
		r.forget(e)
	}
	r.mu.Unlock()
	for _, e := range tcp {
		r.count("tcp", relayIdle)
		e.end()
	}
	for _, e := range udp {
		r.count("udp", relayOK) // nothing else ends a session
		e.end()
	}
}

// Close ends all and waits for it; calling it again does nothing.
func (r *Proxy) Close() {
	r.mu.Lock()
	r.closed = true
	for _, l := range r.open {
		_ = l.Close()
	}
	var all []*entry
	for _, s := range []*shares{r.tcp, r.udp, r.headers} {
		for e := range s.open {
			all = append(all, e)
		}
	}
	r.mu.Unlock()
	for _, e := range all {
		e.end()
	}
	r.wg.Wait()
}

func (r *Proxy) serve(l *listener, accept net.Listener) {
	for {
		client, err := accept.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			r.acceptFailed(l, err)
			continue
		}
		if len(l.forward.Load().AcceptProxy) > 0 {
			r.wg.Go(func() { r.greet(l, client) })
			continue
		}
		own, err := endsOfConn(client)
		if err != nil {
			abort(client)
			continue
		}
		r.take(*l.forward.Load(), client, own, netip.AddrPort{}, nil)
	}
}

// take carries a connection of a client, which a load balancer may speak for; first is
// what it has sent already.
func (r *Proxy) take(f config.Forward, client net.Conn, e ends, behind netip.AddrPort, first []byte) {
	c := &conn{r: r, over: make(chan struct{}), forward: f, client: client, ends: e, behind: behind, first: first}
	if !c.admit() {
		r.count("tcp", relayLimit)
		abort(client)
		return
	}
	r.wg.Go(func() {
		result := c.carry()
		c.cancel()
		if r.leave(&c.entry) { // else it was counted
			r.count("tcp", result)
		}
	})
}

// acceptFailed logs a failure, as for want of descriptors, and waits a little.
func (r *Proxy) acceptFailed(l *listener, err error) {
	r.mu.Lock()
	now := time.Now()
	warn := now.Sub(r.warned) >= warnEvery
	if warn {
		r.warned = now
	}
	r.mu.Unlock()
	if warn {
		r.log.Warn("accept for a forward", "forward", l.forward.Load().String(), "error", err)
	}
	time.Sleep(acceptPause)
}

// admit gives a connection its places, if there is one for it.
func (c *conn) admit() bool {
	c.entry.client, c.end, c.about = clientOf(c.from.Addr()), c.abort, c.connection
	c.ctx, c.cancel = context.WithTimeout(context.Background(), relayConnect)
	if !c.r.admit(&c.entry, "tcp", c.r.dials, c.r.tcp) {
		c.cancel()
		return false
	}
	return true
}

// admit gives an entry a place in each of some shares, or in none.
func (r *Proxy) admit(e *entry, proto string, in ...*shares) bool {
	now := r.now()
	e.began = now
	e.touch(now)
	var gone []*entry
	r.mu.Lock()
	ok := !r.closed
	for i := 0; ok && i < len(in); i++ {
		var g *entry
		if g, ok = in[i].admit(e, now); g != nil {
			gone = append(gone, g)
		}
		if !ok {
			r.refused.add(cmp.Or(e.client.prefix, e.shown))
			for _, s := range in[:i] {
				s.remove(e)
			}
		}
	}
	for _, g := range gone {
		r.forget(g)
	}
	r.mu.Unlock()
	for _, g := range gone {
		r.count(proto, relayEvicted)
		g.end()
	}
	return ok
}

// forget takes all places of an entry, with mu held. It reports whether it had one.
func (r *Proxy) forget(e *entry) (had bool) {
	for _, s := range []*shares{r.tcp, r.udp, r.dials, r.headers} {
		had = s.remove(e) || had
	}
	return had
}

// leave gives the places of an entry back, false if they were taken from it.
func (r *Proxy) leave(e *entry) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.forget(e)
}

// allows asks policy and vpc.sources.
func (r *Proxy) allows(f config.Forward, from netip.AddrPort) bool {
	x := r.plane.Explain(question(f, from))
	if x.Verdict == "forward" {
		return true
	}
	r.note(f, from, x.Reason)
	return false
}

// permits asks the policy about a client for which a load balancer speaks: it needn't be
// one of vpc.sources.
func (r *Proxy) permits(f config.Forward, from netip.AddrPort) bool {
	if r.plane.Permits(question(f, from)) {
		return true
	}
	r.note(f, from, reasonPolicy)
	return false
}

func question(f config.Forward, from netip.AddrPort) control.Question {
	return control.Question{Protocol: f.Proto, Source: from, Destination: f.To}
}

// note shows a refusal.
func (r *Proxy) note(f config.Forward, from netip.AddrPort, reason string) {
	r.plane.NoteRefusal(question(f, from), reason)
}

// conn is a client's connection, and the one to the forward's host.
type conn struct {
	entry
	r       *Proxy
	forward config.Forward
	ends                   // of the client
	behind  netip.AddrPort // the load balancer that said so; invalid = none
	first   []byte         // what came behind its header
	client  net.Conn
	over    chan struct{}   // closed when the host's end was read; nil where the client is one of the kernel's
	ctx     context.Context // of the connecting
	cancel  context.CancelFunc

	mu       sync.Mutex // guards what follows
	host     net.Conn   // nil = not connected yet
	aborted  bool
	ended    bool // the host's end was read
	watching bool // the client's end was read
}

// carry connects the client with the forward's host until both are done. However it
// ends, both sides see the same end: what isn't the other side's clean one is a
// reset.
func (c *conn) carry() string {
	f, allows := c.forward, c.r.allows
	if c.behind.IsValid() && c.behind != c.from {
		allows = c.r.permits // the load balancer itself was asked about
	}
	if !allows(f, c.from) {
		c.abort()
		return relayRefused
	}
	host, err := c.r.plane.DialTCP(c.ctx, f.To)
	if err != nil {
		c.abort()
		return relayUnreachable
	}
	c.r.connected(&c.entry)
	c.mu.Lock()
	c.host = host
	aborted := c.aborted
	c.mu.Unlock()
	if aborted {
		abort(host)
		return relayOK
	}
	if err := c.introduce(host); err != nil {
		c.abort()
		return relayUnreachable
	}
	c.exchange()
	return relayOK
}

// exchange carries what both sides say until both are done.
func (c *conn) exchange() {
	host := c.host
	var requests sync.WaitGroup
	requests.Go(func() {
		err := c.pipe(host, c.client, &c.out)
		if err == nil && c.watch() {
			err = c.awaitReset()
		}
		if err != nil {
			c.abort()
		}
	})
	if err := c.pipe(c.client, host, &c.in); err != nil {
		c.abort()
	}
	c.answersEnded()
	requests.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.aborted { // else both are being reset
		_ = c.client.Close()
		_ = host.Close()
	}
}

// awaitReset waits for the reset of the client, whose end was read, until the host's end was
// read, too.
func (c *conn) awaitReset() error {
	if inside, ok := c.client.(interface {
		AwaitReset(stop <-chan struct{}) bool
	}); ok {
		if inside.AwaitReset(c.over) {
			return errReset
		}
		return nil
	}
	return awaitReset(c.client)
}

// introduce says to the host who the client is, where it is told, and what it has sent
// already.
func (c *conn) introduce(host net.Conn) (err error) {
	var first []byte
	if version := c.forward.ProxyProtocol; version != "" {
		if first, err = appendHeader(nil, version, c.ends); err != nil {
			return err
		}
	}
	c.out.Add(uint64(len(c.first)))
	if first = append(first, c.first...); len(first) > 0 {
		_, err = host.Write(first)
	}
	c.first = nil
	return err
}

// connected frees the place of an entry among the dials.
func (r *Proxy) connected(e *entry) {
	e.answered.Store(true)
	e.touch(r.now())
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dials.remove(e)
}

// watch says whether there is anything left to wait for once the client's end was
// read.
func (c *conn) watch() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watching = !c.ended
	return c.watching
}

func (c *conn) answersEnded() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	close(c.over)
	if c.watching {
		_ = c.client.SetReadDeadline(past)
	}
}

// abort resets both sides.
func (c *conn) abort() {
	c.mu.Lock()
	host, first := c.host, !c.aborted
	c.aborted = true
	c.mu.Unlock()
	if !first {
		return
	}
	c.cancel()
	abort(c.client)
	if host != nil {
		abort(host)
	}
}

// pipe copies until src ends, and passes the end on.
func (c *conn) pipe(dst, src net.Conn, count *atomic.Uint64) error {
	s := newSource(src, c.r.streams)
	write := func(b []byte) error {
		c.touch(c.r.now())
		n, err := dst.Write(b)
		count.Add(uint64(n))
		return err
	}
	for {
		if err := s.next(write); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
	}
	c.mu.Lock()
	aborted := c.aborted // then the end is our own doing, and no clean one
	c.mu.Unlock()
	if aborted {
		return net.ErrClosed
	}
	if d, ok := dst.(interface{ CloseWrite() error }); ok {
		return d.CloseWrite()
	}
	return nil
}
