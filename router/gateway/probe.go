package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"ztgate/netstack"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/zerotier/ztnode"
)

// Probing of targets.
const (
	probeEvery   = 5 * time.Second
	probeHurry   = 250 * time.Millisecond // until a target has answered once
	probeAgain   = time.Second            // while it doesn't answer
	probeTimeout = 3 * time.Second
)

// heardLately is within how long a member that works is heard: two signs of life of a
// direct path, and a little.
const heardLately = 30 * time.Second

// prober probes the targets through the data path.
type prober struct {
	kind    string // of what is probed, for the log
	dialer  dialer
	send    sendFunc // nil = by dialer
	log     *slog.Logger
	onDone  func(t config.Target, up bool, d time.Duration) // called after each probe; may be nil
	changed func()                                          // a target went up or down; may be nil
	failure func(t config.Target, last seenAt, err error) string
	answer  func(t config.Target) seenAt // who answers for a target that is up; may be nil

	mu     sync.Mutex
	list   []*target
	change chan struct{} // list is another one
}

// sendFunc sends a probe. It returns how long the answer took, and what the probe went
// through.
type sendFunc func(ctx context.Context, t config.Target) (probed, error)

// probed is what came of a probe.
type probed struct {
	took    time.Duration
	through string // throughKernel, throughIngress or throughPlane
	policy  string // what the policy has against clients; "" = nothing
}

// What probes go through.
const (
	throughKernel  = "kernel"  // and the interface and the plane, as packets of clients do
	throughIngress = "ingress" // from where packets of clients are read, and the plane
	throughPlane   = "plane"   // from behind the interface
)

// target is a target and, guarded by the prober, its state with what isn't shown of it.
type target struct {
	config.Target
	state control.TargetState
	last  seenAt
}

// seenAt is where a target was when it last answered.
type seenAt struct{ member, over string }

func newProber(targets []config.Target, d dialer, log *slog.Logger) *prober {
	p := &prober{kind: "target", dialer: d, log: log, change: make(chan struct{}, 1),
		failure: func(_ config.Target, _ seenAt, err error) string { return err.Error() }}
	p.set(targets)
	return p
}

// set takes other targets from now on; those that stay keep their state.
func (p *prober) set(targets []config.Target) {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]*target, len(targets))
	for i, t := range targets {
		x := &target{Target: t, state: control.TargetState{Target: t.String(), Error: "not probed yet"}}
		for _, old := range p.list {
			switch {
			case old.Target == t:
				x = old
			case old.state.Target == x.state.Target: // its name has another address
				x.state, x.last = old.state, old.last
			}
		}
		list[i] = x
	}
	p.list = list
	select {
	case p.change <- struct{}{}:
	default:
	}
}

func (p *prober) targets() []*target {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.list
}

// Run probes every target until ctx ends.
func (p *prober) Run(ctx context.Context) error {
	stop := func() error { return nil }
	for {
		select {
		case <-ctx.Done():
			return stop()
		case <-p.change:
		}
		if err := stop(); err != nil {
			return err
		}
		stop = p.start(ctx)
	}
}

// start begins to probe the targets of now, and returns what ends that.
func (p *prober) start(ctx context.Context) (stop func() error) {
	g, ctx := errgroup.WithContext(ctx)
	ctx, cancel := context.WithCancel(ctx)
	for _, t := range p.targets() {
		g.Go(func() error { p.loop(ctx, t); return nil })
	}
	return func() error { cancel(); return g.Wait() }
}

func (p *prober) loop(ctx context.Context, t *target) {
	first, wait := true, probeHurry
	for {
		switch up := p.probe(ctx, t); {
		case up:
			first, wait = false, probeEvery
		case !first:
			wait = probeAgain
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

func (p *prober) probe(ctx context.Context, t *target) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var got probed
	var err error
	switch {
	case !t.Addr.Addr().IsValid():
		err = fmt.Errorf("the name %s has no address yet", t.Host)
	case p.send != nil:
		got, err = p.send(ctx, t.Target)
	default:
		got, err = dialProbe(ctx, p.dialer, t.Target)
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return false // we are stopping: says nothing about the target
	}
	p.record(t, err, got, time.Now())
	if p.onDone != nil {
		p.onDone(t.Target, err == nil, got.took)
	}
	return err == nil
}

// dialProbe probes by a dialer.
func dialProbe(ctx context.Context, d dialer, t config.Target) (got probed, err error) {
	got.through = throughPlane
	if t.Scheme == "icmp" {
		got.took, err = d.Ping(ctx, t.Addr.Addr())
		return got, err
	}
	began := time.Now()
	c, err := d.DialTCP(ctx, t.Addr)
	if err != nil {
		return got, err
	}
	got.took = time.Since(began)
	_ = c.Close()
	return got, nil
}

func (p *prober) record(t *target, err error, got probed, now time.Time) {
	p.mu.Lock()
	last := t.last
	p.mu.Unlock()
	text := ""
	switch {
	case err != nil: // asks the node: without the lock
		text = p.failure(t.Target, last, err)
	case p.answer != nil:
		last = p.answer(t.Target)
	}
	p.mu.Lock()
	s := &t.state
	flipped := s.Up != (err == nil)
	s.Up, s.Error, s.ConnectMS, t.last = err == nil, text, milliseconds(got.took), last
	s.Member, s.Through, s.PolicyNote = last.member, got.through, got.policy
	if flipped {
		s.LastChange = now
	}
	p.mu.Unlock()
	if !flipped {
		return
	}
	if err == nil {
		p.log.Info(p.kind+" up", p.kind, t.Target, "connect", got.took.Round(time.Microsecond), "through", got.through)
	} else {
		p.log.Warn(p.kind+" down", p.kind, t.Target, "error", text)
	}
	if p.changed != nil {
		p.changed()
	}
}

func (p *prober) states() []control.TargetState {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]control.TargetState, len(p.list))
	for i, t := range p.list {
		out[i] = t.state
	}
	return out
}

// targetStates are the states of the targets with the ways to them now.
func (s *service) targetStates(peers []ztnode.Peer) []control.TargetState {
	states := s.targets.states()
	for i := range states {
		for _, p := range peers {
			if p.Address == states[i].Member {
				states[i].Path = p.Link
			}
		}
	}
	return states
}

// whoAnswers finds out which member is behind a target, and by which way.
func (s *service) whoAnswers(t config.Target) (at seenAt) {
	id, hop, ok := s.networkOf(t.Addr.Addr())
	if !ok || s.neighbours == nil {
		return at
	}
	mac, ok := s.neighbours.Neighbour(id, hop)
	if !ok {
		return at
	}
	at.member = ztnode.AddressOf(id, mac).String()
	for _, p := range s.peers() {
		if p.Address != at.member {
			continue
		}
		at.over = "through a root"
		if path, ok := bestPath(p); ok && p.Link == linkDirect {
			at.over = "over " + path.Endpoint.String()
		}
	}
	return at
}

// probeFailure says why a target didn't answer. Its words stay the same while nothing
// changes.
func (s *service) probeFailure(t config.Target, last seenAt, err error) string {
	text := err.Error()
	timeout, isNet := errors.AsType[net.Error](err)
	op, isOp := errors.AsType[*net.OpError](err)
	switch {
	case isNet && timeout.Timeout(), errors.Is(err, netstack.ErrNoAnswer):
		text = fmt.Sprintf("no answer in %v", probeTimeout)
	case isOp:
		text = op.Err.Error() // without the ports, which are others each time
		if strings.Contains(text, "refused") {
			return text
		}
	case errors.Is(err, unix.EHOSTUNREACH):
	default:
		return text
	}
	if at := s.whoAnswers(t); at.member != "" {
		last.member = at.member
	}
	if last.member == "" {
		return text + ", and nobody has ever answered for " + t.Addr.Addr().String() + ": is the host on, and in the network?"
	}
	text += "; member " + last.member
	for _, p := range s.node.Peers() {
		if p.Address != last.member || p.LastReceive.IsZero() {
			continue
		}
		way := over(p)
		if last.over != "" && len(p.Paths) == 0 {
			way = last.over // the path is forgotten since
		}
		if s.now().Sub(p.LastReceive) < heardLately {
			return text + " itself is heard " + way + ": is the service on, and does the host's firewall let it in?"
		}
		return text + " was last heard at " + clockTime(p.LastReceive) + " " + way + ": is it on?"
	}
	if last.over != "" {
		text += ", which was reached " + last.over + ","
	}
	return text + " isn't heard any more: is it on?"
}
