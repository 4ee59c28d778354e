// Package portmap asks the router in front of this host to map a UDP port to it
// (chapter 02 §8.3): by PCP (RFC 6887), NAT-PMP (RFC 6886) or UPnP (Internet
// Gateway Device). A [Mapper] keeps the mapping and gives it back at the end.
//
// NAT-PMP is spoken by github.com/jackpal/go-nat-pmp, the XML of UPnP by
// github.com/huin/goupnp. PCP is ours, since no library of its own speaks it, and
// so is the search for UPnP devices, since goupnp's doesn't tell who answered.
//
// Whatever the local network says is taken as hostile: answers count only if they
// come from the router that was asked, are bounded in size and time, and point to
// no other host; only public addresses are taken for external ones.
package portmap

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"ztgate/zerotier/packet"
	"ztgate/zerotier/ztnode"
)

// Limits and times.
const (
	maxGateways = 4                // routers asked, of one mapping each
	lease       = 10 * time.Minute // asked for
	minLease    = time.Minute      // shorter ones are of no use
	maxLease    = time.Hour        // renewed as if it were no longer

	attemptLimit = 15 * time.Second // for all protocols of a router
	releaseLimit = 3 * time.Second  // for giving all mappings back

	firstRetry = 15 * time.Second
	lastRetry  = 15 * time.Minute
	settle     = time.Second      // after a change of the network
	minRound   = 5 * time.Second  // between two rounds, however often the network changes
	lookEvery  = 30 * time.Second // for another default route
)

// Gateway is a router that hosts on our side send through.
type Gateway struct {
	Addr  netip.Addr // of the router, on our side
	Local netip.Addr // our own address there
}

// Mapping is a port that a router maps to us; its protocol is one of [Protocols].
type Mapping = ztnode.PortMapping

// Result is what became of a request.
type Result uint8

// Results.
const (
	Mapped    Result = iota // made or renewed
	NoAnswer                // the router speaks none of the protocols
	Refused                 // it said no
	BadAnswer               // malformed, too late, or points elsewhere
	NotPublic               // the router's own external address isn't public
	BadLease                // too short
	NoPort                  // our own port can't be opened
	numResults
)

var resultNames = [numResults]string{"mapped", "no_answer", "refused", "bad_answer", "not_public", "bad_lease", "no_port"}

func (r Result) String() string {
	if int(r) < len(resultNames) {
		return resultNames[r]
	}
	return "unknown"
}

// Stats counts since New.
type Stats struct{ results [numResults]uint64 }

// Count returns how many requests had a result.
func (s *Stats) Count(r Result) uint64 { return s.results[r] }

// Each calls f for every result.
func (s *Stats) Each(f func(result string, n uint64)) {
	for i, n := range s.results {
		f(Result(i).String(), n)
	}
}

// failure is an error with its [Result].
type failure struct {
	result Result
	err    error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func failed(r Result, format string, args ...any) error {
	return &failure{r, fmt.Errorf(format, args...)}
}

// resultOf returns what an error counts as.
func resultOf(err error) Result {
	var f *failure
	switch {
	case err == nil:
		return Mapped
	case errors.As(err, &f):
		return f.result
	}
	return NoAnswer
}

// protocol is one way to ask one router.
type protocol interface {
	name() string
	// request asks for a mapping, or renews it. The external port wanted is 0 if any
	// will do. own is called once the router has answered anything. The lease is what
	// the router grants.
	request(ctx context.Context, own func() (uint16, error), want uint16) (external netip.AddrPort, lease time.Duration, err error)
	// release gives a mapping back.
	release(ctx context.Context, m Mapping) error
}

// Protocols lists the names of the protocols.
func Protocols() []string {
	return []string{(*pcp)(nil).name(), (*natPMP)(nil).name(), (*upnp)(nil).name()}
}

// Config says what a [Mapper] works on.
type Config struct {
	// Gateways lists the routers, the best first.
	Gateways func() ([]Gateway, error)
	// OpenPort returns our port that is to be mapped. It is called before each
	// request, but never if no router answers.
	OpenPort    func() (uint16, error)
	Description string       // shown in the router's list, before our port
	OnChange    func()       // called after a change of the mappings; nil = nothing
	Logger      *slog.Logger // nil = no log
}

// Mapper keeps mappings. Its methods are safe for concurrent use.
type Mapper struct {
	cfg       Config
	log       *slog.Logger
	protocols func(Gateway) []protocol
	wake      chan struct{}
	mappings  atomic.Pointer[[]Mapping]
	results   [numResults]atomic.Uint64

	routers []*router // of Run's goroutine
}

// router is what is known of one gateway.
type router struct {
	Gateway
	protocols []protocol // the one that worked first
	mapping   Mapping    // no Port = none
	next      time.Time
	failures  int
	last      Result
}

// New makes a mapper; Run makes it work.
func New(cfg Config) *Mapper {
	m := &Mapper{cfg: cfg, log: cfg.Logger, wake: make(chan struct{}, 1)}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	nonce := newNonce()
	m.protocols = func(g Gateway) []protocol {
		return []protocol{&pcp{g, nonce}, &natPMP{g}, &upnp{Gateway: g, description: cfg.Description}} // as in Protocols
	}
	m.mappings.Store(&[]Mapping{})
	return m
}

// Mappings lists the mappings that are in force.
func (m *Mapper) Mappings() []Mapping { return *m.mappings.Load() }

// Stats returns the counters.
func (m *Mapper) Stats() (s Stats) {
	for i := range s.results {
		s.results[i] = m.results[i].Load()
	}
	return s
}

// NetworkChanged makes the mapper ask anew. It doesn't wait.
func (m *Mapper) NetworkChanged() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Run keeps mappings until ctx ends, then gives them back.
func (m *Mapper) Run(ctx context.Context) {
	defer m.releaseAll(ctx)
	t := time.NewTimer(0)
	defer t.Stop()
	var last time.Time
	for {
		changed := false
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-m.wake:
			changed = true
			if !pause(ctx, max(settle, time.Until(last.Add(minRound)))) {
				return
			}
		}
		last = time.Now()
		next := m.round(ctx, changed)
		t.Reset(max(time.Until(next), settle))
	}
}

// pause reports false if ctx ended meanwhile.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// round asks every router that is due, and returns when the next one is.
func (m *Mapper) round(ctx context.Context, changed bool) (next time.Time) {
	m.follow(changed)
	next = time.Now().Add(lookEvery)
	for _, r := range m.routers {
		if ctx.Err() != nil {
			break
		}
		if !time.Now().Before(r.next) {
			m.ask(ctx, r)
		}
		if r.mapping.Port != 0 && !time.Now().Before(r.mapping.Expires) {
			m.log.Warn("port mapping ran out", "external", r.mapping.External, "gateway", r.Addr)
			r.mapping = Mapping{}
		}
		for _, t := range []time.Time{r.next, r.mapping.Expires} {
			if !t.IsZero() && t.Before(next) {
				next = t
			}
		}
		m.publish()
	}
	m.publish()
	return next
}

// follow compares the routers with those that the system uses now.
func (m *Mapper) follow(changed bool) {
	list, err := m.cfg.Gateways()
	if err != nil {
		m.log.Debug("gateways can't be listed", "error", err)
		return
	}
	var now []*router
	for _, g := range list {
		if len(now) == maxGateways {
			break
		}
		same := func(r *router) bool { return r.Gateway == g }
		if slices.ContainsFunc(now, same) {
			continue
		}
		i := slices.IndexFunc(m.routers, same)
		if i < 0 {
			now = append(now, &router{Gateway: g, protocols: m.protocols(g)})
			continue
		}
		r := m.routers[i]
		if changed { // it may have been off, or be another one
			r.next, r.failures = time.Time{}, 0
		}
		now = append(now, r)
	}
	m.routers = now
}

// ask asks one router by one protocol after the other.
func (m *Mapper) ask(ctx context.Context, r *router) {
	ctx, cancel := context.WithTimeout(ctx, attemptLimit)
	defer cancel()
	result, text := NoAnswer, "no answer"
	for i, p := range r.protocols {
		got, granted, err := m.try(ctx, r, p)
		if err == nil {
			r.protocols[0], r.protocols[i] = r.protocols[i], r.protocols[0]
			m.granted(r, got, granted)
			return
		}
		m.log.Debug("port mapping failed", "gateway", r.Addr, "protocol", p.name(), "error", short(err))
		if res := resultOf(err); res != NoAnswer {
			result, text = res, p.name()+": "+short(err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	m.results[result].Add(1)
	if r.mapping.Port != 0 && (result == Refused || result == NotPublic || result == BadLease) {
		m.log.Warn("port mapping lost", "external", r.mapping.External, "gateway", r.Addr)
		r.mapping = Mapping{}
	}
	if result != r.last && result != NoAnswer {
		m.log.Info("router gives no port mapping", "gateway", r.Addr, "reason", result, "error", text)
	}
	r.last = result
	r.next = time.Now().Add(min(firstRetry<<min(r.failures, 10), lastRetry))
	r.failures++
}

// try asks by one protocol and checks the answer.
func (m *Mapper) try(ctx context.Context, r *router, p protocol) (got Mapping, granted time.Duration, err error) {
	got = Mapping{Gateway: r.Addr, Protocol: p.name()}
	own := func() (uint16, error) {
		port, err := m.cfg.OpenPort()
		if err != nil {
			return 0, failed(NoPort, "open port: %w", err)
		}
		got.Port = port
		return port, nil
	}
	got.External, granted, err = p.request(ctx, own, r.mapping.External.Port())
	if err != nil {
		return got, 0, err
	}
	if err = check(got, granted); err != nil {
		_ = p.release(ctx, got)
	}
	return got, granted, err
}

// check refuses what is of no use to peers or can't be true.
func check(got Mapping, granted time.Duration) error {
	switch {
	case !public(got.External.Addr()):
		return failed(NotPublic, "external address %v is not public", got.External.Addr())
	case got.External.Port() == 0 || got.Port == 0:
		return failed(BadAnswer, "external port is 0")
	case granted < minLease:
		return failed(BadLease, "lease of %v is shorter than %v", granted, minLease)
	}
	return nil
}

// public reports whether an external address can be reached from everywhere. That of
// another NAT in front (private, carrier-grade, DS-Lite) can't.
func public(a netip.Addr) bool {
	return a.Is4() && packet.ScopeOf(a) == packet.ScopeGlobal && !dsLite.Contains(a)
}

var dsLite = netip.MustParsePrefix("192.0.0.0/24")

func (m *Mapper) granted(r *router, got Mapping, granted time.Duration) {
	granted = min(granted, maxLease)
	now := time.Now()
	if old := r.mapping; old.External != got.External || old.Port != got.Port {
		m.log.Info("port mapped", "external", got.External, "port", got.Port, "gateway", r.Addr, "protocol", got.Protocol)
	}
	m.results[Mapped].Add(1)
	got.Expires = now.Add(granted)
	r.mapping, r.last, r.failures = got, Mapped, 0
	r.next = now.Add(granted / 2)
}

// publish shows the mappings to others.
func (m *Mapper) publish() {
	out := []Mapping{}
	for _, r := range m.routers {
		if r.mapping.Port != 0 {
			out = append(out, r.mapping)
		}
	}
	old := m.Mappings()
	m.mappings.Store(&out)
	same := slices.EqualFunc(old, out, func(a, b Mapping) bool { return a.External == b.External && a.Port == b.Port })
	if !same && m.cfg.OnChange != nil {
		m.cfg.OnChange()
	}
}

// releaseAll gives all mappings back. ctx has ended.
func (m *Mapper) releaseAll(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseLimit)
	defer cancel()
	for _, r := range m.routers {
		if r.mapping.Port == 0 {
			continue
		}
		if err := r.protocols[0].release(ctx, r.mapping); err != nil {
			m.log.Info("router didn't take the port mapping back", "external", r.mapping.External, "gateway", r.Addr, "error", short(err))
		}
		r.mapping = Mapping{}
	}
	m.publish()
}

// short is an error's text without what a router may have put in at length.
func short(err error) string {
	const limit = 200
	s := err.Error()
	if len(s) > limit {
		s = s[:limit] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}
