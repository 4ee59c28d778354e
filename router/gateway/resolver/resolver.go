// Package resolver answers questions for names at addresses of this host: those of the
// hosts of the joined networks by itself, those of domains that networks have name
// servers for by asking these over the overlay, and others by asking configured
// servers, or not at all. It keeps no answers of others: a forged one harms the one
// who asked, once.
package resolver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"ztgate/internal/rate"
)

const (
	// DefaultRate is how many questions a client may ask in a second.
	DefaultRate = 100
	// MaxForwarded questions are with other servers at a time, and eachForwarded of one
	// client.
	MaxForwarded  = 256
	eachForwarded = 32
	// MaxConnections is how many clients may be connected at a time, and eachConnected
	// connections of one client.
	MaxConnections = 64
	eachConnected  = 8
	// usualAddresses is how many addresses are listened at, and more.
	usualAddresses = 8
	readBuffer     = 1 << 20
	// maxClients are told apart when their questions are counted.
	maxClients = 16384
)

// Limits bound what clients may use together. They are made of a number of open files.
type Limits struct{ Forwarded, Connections int }

// LimitsFor returns the limits where so many files may be open.
func LimitsFor(files int) Limits {
	return Limits{Forwarded: min(MaxForwarded, max(files/8, 8)), Connections: min(MaxConnections, max(files/16, 8))}
}

// Files is how many files a resolver may have open at most.
func (l Limits) Files() int { return l.Forwarded + l.Connections + 2*usualAddresses }

// Settings are what a resolver works by.
type Settings struct {
	Listen  []netip.AddrPort
	Sources []netip.Prefix // who may ask
	Rate    int            // questions of a client in a second, 0 = [DefaultRate]
}

// Names are what a resolver knows, and who knows more.
type Names struct {
	Zone    *Zone // nil = none
	Domains []Domain
}

// Dialers open sockets to name servers.
type Dialers struct {
	Overlay Dial
	Host    Dial
}

// Resolver is a name server for clients.
type Resolver struct {
	dial   Dialers
	usable func(netip.Addr) bool // whether an address can be a host's that a network's name server tells of
	log    *slog.Logger
	now    func() time.Time
	count  counters

	settings atomic.Pointer[Settings]
	names    atomic.Pointer[names]
	limits   atomic.Pointer[limits]
	cookies  *cookies
	slip     atomic.Uint32
	flights  *places
	streams  *places

	mu     sync.Mutex // guards what follows
	open   map[netip.AddrPort]*listener
	failed map[netip.AddrPort]error
	closed bool
	ctx    context.Context // of what is forwarded
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// names are [Names] as they are used.
type names struct {
	zone  *Zone
	pools []*pool
}

// limits are how often clients may ask. Those who connect, and so have the address
// that they say, have a share of their own, which others can't use up in their name.
type limits struct{ udp, tcp rate.Map[netip.Prefix] }

func newLimits(perSecond int) *limits {
	l := &limits{}
	for _, m := range []*rate.Map[netip.Prefix]{&l.udp, &l.tcp} {
		m.Every, m.Burst, m.Max = time.Second/time.Duration(perSecond), 2*perSecond, maxClients
	}
	return l
}

// New makes a resolver that knows nothing and listens nowhere.
func New(dial Dialers, limits Limits, usable func(netip.Addr) bool, reg prometheus.Registerer, log *slog.Logger, now func() time.Time) *Resolver {
	r := &Resolver{dial: dial, usable: usable, log: log, now: now, cookies: newCookies(),
		flights: newPlaces(limits.Forwarded, min(limits.Forwarded, eachForwarded)), streams: newPlaces(limits.Connections, eachConnected),
		open: map[netip.AddrPort]*listener{}, failed: map[netip.AddrPort]error{}}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.settings.Store(&Settings{})
	r.names.Store(&names{})
	r.limits.Store(newLimits(DefaultRate))
	r.count.register(reg, r)
	return r
}

// SetNames replaces what is known. Domains that stay keep what is known of their
// servers. Nobody answers for a domain without servers: others have nothing to say there.
func (r *Resolver) SetNames(n Names) {
	old := r.names.Load()
	next := &names{zone: n.Zone}
	for _, d := range n.Domains {
		i := slices.IndexFunc(old.pools, func(p *pool) bool { return p.same(d) })
		if i >= 0 {
			next.pools = append(next.pools, old.pools[i])
			continue
		}
		p := &pool{Domain: d, dial: r.dial.Host, now: r.now}
		if d.Network != "" {
			p.dial = r.dial.Overlay
		}
		next.pools = append(next.pools, p)
	}
	r.names.Store(next)
}

// of returns who is asked for a canonical name, nil for nobody: who has most of it, the
// first of several.
func (n *names) of(name string) (best *pool) {
	most := -1
	for _, p := range n.pools {
		if has := p.covers(name); has > most {
			best, most = p, has
		}
	}
	return best
}

// listener has the sockets of one address.
type listener struct {
	udp *net.UDPConn
	tcp *net.TCPListener
}

func (l *listener) close() {
	_, _ = l.udp.Close(), l.tcp.Close()
}

// Set serves by other settings from now on. Addresses where it can't listen are tried
// again by [Resolver.Retry].
func (r *Resolver) Set(s Settings) {
	if s.Rate <= 0 {
		s.Rate = DefaultRate
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.settings.Load(); max(old.Rate, 1) != s.Rate {
		r.limits.Store(newLimits(s.Rate))
	}
	r.settings.Store(&s)
	if r.closed {
		return
	}
	for at, l := range r.open {
		if !slices.Contains(s.Listen, at) {
			l.close()
			delete(r.open, at)
		}
	}
	r.listenLocked(false)
}

// Retry listens where it couldn't before.
func (r *Resolver) Retry() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.failed) > 0 && !r.closed {
		r.listenLocked(true)
	}
}

// listenLocked listens where it doesn't yet; again = also where it couldn't.
func (r *Resolver) listenLocked(again bool) {
	before := r.failed
	r.failed = map[netip.AddrPort]error{}
	for _, at := range r.settings.Load().Listen {
		if r.open[at] != nil || before[at] != nil && !again {
			if before[at] != nil {
				r.failed[at] = before[at]
			}
			continue
		}
		l, err := listen(at)
		if err != nil {
			r.failed[at] = err
			if old := before[at]; old == nil || old.Error() != err.Error() {
				r.log.Warn("listen for questions for names", "address", at.String(), "error", err)
			}
			continue
		}
		r.open[at] = l
		r.wg.Go(func() { r.serveUDP(l.udp) })
		r.wg.Go(func() { r.serveTCP(l.tcp) })
		r.log.Info("answering questions for names", "address", at.String())
	}
}

func listen(at netip.AddrPort) (*listener, error) {
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, explain(at, err)
	}
	enlarge(udp)
	tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	if err != nil {
		_ = udp.Close()
		return nil, explain(at, err)
	}
	return &listener{udp, tcp}, nil
}

// enlarge gives a socket room for bursts, beyond what the kernel gives everybody if we may.
func enlarge(c *net.UDPConn) {
	_ = c.SetReadBuffer(readBuffer) // as much as it gives
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, readBuffer) })
	}
}

// explain says why nobody can listen at an address.
func explain(at netip.AddrPort, err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("another program, as systemd-resolved, dnsmasq or named, uses port %d there", at.Port())
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return errors.New("this host doesn't have the address")
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("no permission for port %d: it takes CAP_NET_BIND_SERVICE", at.Port())
	}
	return err
}

// Close ends all and waits for it; calling it again does nothing.
func (r *Resolver) Close() {
	r.mu.Lock()
	r.closed = true
	for at, l := range r.open {
		l.close()
		delete(r.open, at)
	}
	r.cancel()
	r.mu.Unlock()
	r.streams.endAll()
	r.wg.Wait()
}

// ListenState is an address, and why it can't be used.
type ListenState struct {
	At    netip.AddrPort
	Error string
}

// State is how a resolver does.
type State struct {
	Listen    []ListenState
	Domains   []DomainState
	Hosts     int // in the zone
	Forwarded int // questions that are with other servers
}

// State tells how the resolver does.
func (r *Resolver) State() State {
	r.mu.Lock()
	var out State
	for _, at := range r.settings.Load().Listen {
		s := ListenState{At: at}
		if err := r.failed[at]; err != nil {
			s.Error = err.Error()
		}
		out.Listen = append(out.Listen, s)
	}
	r.mu.Unlock()
	n := r.names.Load()
	for _, p := range n.pools {
		out.Domains = append(out.Domains, p.state())
	}
	if n.zone != nil {
		out.Hosts = n.zone.hosts
	}
	out.Forwarded = r.flights.taken()
	return out
}

// Found is what a client would be told.
type Found struct {
	Message *dns.Msg
	From    *Domain // whose servers said so; nil = the zone
}

// ErrNobody says that nobody is asked for a name.
var ErrNobody = errors.New("nobody is asked for it")

// Find answers as clients are answered, but for their limits.
func (r *Resolver) Find(ctx context.Context, name string, qtype uint16) (Found, error) {
	name = dns.Fqdn(name)
	m := new(dns.Msg).SetQuestion(name, qtype)
	n := r.names.Load()
	if n.zone != nil && n.zone.Covers(name) {
		reply := new(dns.Msg).SetReply(m)
		n.zone.answer(m.Question[0], reply)
		return Found{Message: reply}, nil
	}
	p := n.of(dns.CanonicalName(name))
	if p == nil {
		return Found{}, ErrNobody
	}
	got, err := p.ask(ctx, Query{Name: name, Type: qtype, EDNS: true}, true)
	if err != nil {
		return Found{From: &p.Domain}, err
	}
	return Found{Message: got, From: &p.Domain}, nil
}
