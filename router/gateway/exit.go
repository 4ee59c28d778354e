package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/host"
	"ztgate/router/plan"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/ztnode"
)

// exits are the members through which a host reaches the internet, one of each family.
// A default route comes into force when the internet has answered through its exit, so
// that a wrong one cuts nobody off. From then on it stays for as long as the network has
// it: what an exit that fails doesn't carry goes nowhere, and not past it, nor past one that
// takes another's place.
type exits struct {
	s      *service
	routes *host.Exits
	watch  *host.Watch
	prober *prober
	now    atomic.Pointer[[]exitNow]
	failed error // of the last enforce
}

// exitNow is an exit that the plan has.
type exitNow struct {
	plan.Exit
	device  string
	inForce bool
}

func (x exitNow) target() config.Target {
	return config.Target{Scheme: "icmp", Addr: netip.AddrPortFrom(x.Via, 0)}
}

func openExits(s *service) (_ *exits, err error) {
	x := &exits{s: s}
	x.now.Store(&[]exitNow{})
	x.prober = newProber(nil, hostDialer{}, s.log)
	x.prober.kind, x.prober.send, x.prober.answer, x.prober.failure = "exit", x.probe, s.whoAnswers, x.failure
	x.prober.changed = func() {
		select {
		case s.resync <- struct{}{}:
		default: // one is due already
		}
	}
	s.exits = x.states
	if x.routes, err = host.OpenExits(s.log); err != nil {
		return nil, err
	}
	if x.watch, err = host.OpenWatch(); err != nil {
		x.routes.Close()
		return nil, err
	}
	return x, nil
}

func (x *exits) parts() []func(context.Context) error {
	return []func(context.Context) error{x.prober.Run, x.watch.Run}
}

func (x *exits) close() {
	x.watch.Close()
	x.routes.Close()
}

// enforce carries the exits of a plan to the host.
func (x *exits) enforce(p *plan.Plan, h *plan.Host, taps map[ztnode.NetworkID]*host.TAP) error {
	old := *x.now.Load()
	list := x.judge(p, taps, old)
	want := host.ExitState{Detour: plan.KeptOut(x.s.config(), h)}
	for _, n := range list {
		want.Ways = append(want.Ways, host.ExitWay{Link: taps[n.Network].Link, Via: n.Via, InForce: n.inForce})
	}
	_, has6 := p.Exit(true)
	want.BlockIPv6 = !has6 && inForce(list, false)
	x.failed = x.routes.Set(want)
	x.now.Store(&list)
	if !slices.Equal(list, old) {
		if x.failed == nil {
			x.tell(old, list)
		}
		targets := make([]config.Target, len(list))
		for i, n := range list {
			targets[i] = n.target()
		}
		x.prober.set(targets)
	}
	return x.failed
}

// judge says which exits are there and in force, if those of old were so far.
func (x *exits) judge(p *plan.Plan, taps map[ztnode.NetworkID]*host.TAP, old []exitNow) (list []exitNow) {
	for _, v6 := range []bool{false, true} {
		e, ok := p.Exit(v6)
		if !ok || taps[e.Network] == nil { // its interface couldn't be made
			continue
		}
		n := exitNow{Exit: e, device: taps[e.Network].Name}
		// With IPv4 led through an exit, IPv6 must not go past it either.
		n.inForce = inForce(old, v6) || x.up(n) || v6 && inForce(list, false)
		list = append(list, n)
	}
	return list
}

// inForce reports whether an exit of a family is.
func inForce(list []exitNow, v6 bool) bool {
	return slices.ContainsFunc(list, func(n exitNow) bool { return n.inForce && n.Via.Is6() == v6 })
}

// tell logs what changed.
func (x *exits) tell(old, list []exitNow) {
	for _, n := range list {
		if n.inForce && !slices.Contains(old, n) {
			x.s.log.Info("default route in force", "network", n.Network, "exit", n.Via, "interface", n.device)
		}
	}
	for _, o := range old {
		if o.inForce && !slices.ContainsFunc(list, func(n exitNow) bool { return n.Exit == o.Exit }) {
			x.s.log.Info("default route removed", "network", o.Network, "exit", o.Via)
		}
	}
}

// up reports whether the internet answers through an exit.
func (x *exits) up(n exitNow) bool {
	return slices.ContainsFunc(x.prober.states(), func(t control.TargetState) bool { return t.Up && t.Target == n.target().String() })
}

// states are what is told of the exits.
func (x *exits) states() []control.Exit {
	list := *x.now.Load()
	out := make([]control.Exit, len(list))
	for i, n := range list {
		out[i] = control.Exit{Network: n.Network, Via: n.Via, Interface: n.device, InForce: n.inForce, Up: x.up(n)}
	}
	return out
}

// look makes known what is wrong with the exits.
func (x *exits) look(time.Time, bool) {
	const name = "exit"
	var reasons []string
	if x.failed != nil {
		reasons = append(reasons, "the default route can't be put into force: "+x.failed.Error())
	}
	for _, n := range *x.now.Load() {
		reason := "not probed yet"
		for _, t := range x.prober.states() {
			if t.Target != n.target().String() {
				continue
			}
			if reason = t.Error; t.Up {
				reason = ""
			}
		}
		then := "what has no other way doesn't take it yet"
		if n.inForce {
			then = "what has no other way goes nowhere"
		}
		if reason != "" {
			reasons = append(reasons, fmt.Sprintf("default route of network %s through %s: %s; %s", n.Network, n.Via, reason, then))
		}
	}
	check := control.Passed(name)
	if len(reasons) > 0 {
		check = control.Failed(name, control.Down, strings.Join(reasons, "; "), "see that the exit runs and lets this member reach the internet")
	}
	x.s.hostChecks.Store(&[]control.Check{check})
}

// maxWitnesses bounds who is asked at a time, and witnessPort is what is tried besides echo
// requests: whatever comes back, be it a refusal, came through the exit.
const (
	maxWitnesses = 4
	witnessPort  = 443
)

// witnesses are hosts of the internet that a member knows: targets, and the roots.
func (x *exits) witnesses(v6 bool) (out []netip.AddrPort) {
	add := func(a netip.AddrPort) {
		a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
		if _, inside := x.s.planned().Route(a.Addr()); a.Addr().IsValid() && a.Addr().Is6() == v6 && !inside && len(out) < maxWitnesses && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	for _, t := range x.s.config().Targets {
		add(netip.AddrPortFrom(t.Addr.Addr(), cmp.Or(t.Addr.Port(), witnessPort)))
	}
	for _, ep := range x.s.node.RootEndpoints() {
		if packet.ScopeOf(ep.Addr().Unmap()) != packet.ScopeLoopback {
			add(netip.AddrPortFrom(ep.Addr(), witnessPort))
		}
	}
	return out
}

// errNoInternet says that an exit carries nothing to the internet.
var errNoInternet = errors.New("the internet doesn't answer through it")

// probe asks hosts of the internet through an exit. The first answer counts. Where none is
// known of the family, the exit itself is asked.
func (x *exits) probe(ctx context.Context, t config.Target) (probed, error) {
	via := t.Addr.Addr()
	i := slices.IndexFunc(*x.now.Load(), func(n exitNow) bool { return n.Via == via })
	if i < 0 {
		return probed{}, errors.New("its interface isn't there yet")
	}
	d := hostDialer{device: (*x.now.Load())[i].device}
	asked := x.witnesses(via.Is6())
	if len(asked) == 0 {
		took, err := d.Ping(ctx, via)
		return probed{took: took}, err
	}
	if took, ok := firstAnswer(ctx, d, asked); ok {
		return probed{took: took}, nil
	}
	again, cancel := context.WithTimeout(context.WithoutCancel(ctx), echoTimeout)
	defer cancel()
	if _, err := d.Ping(again, via); err != nil {
		return probed{}, err
	}
	return probed{}, errNoInternet
}

// firstAnswer asks all at once, and returns how long the first one took to answer.
func firstAnswer(ctx context.Context, d hostDialer, asked []netip.AddrPort) (took time.Duration, ok bool) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var first atomic.Int64
	var asking sync.WaitGroup
	began := time.Now()
	ask := func(f func() error) {
		asking.Go(func() {
			if f() == nil {
				first.CompareAndSwap(0, int64(time.Since(began)))
				cancel()
			}
		})
	}
	for _, a := range asked {
		ask(func() error {
			_, err := d.Ping(ctx, a.Addr())
			return err
		})
		ask(func() error {
			c, err := d.DialTCP(ctx, a)
			switch {
			case errors.Is(err, unix.ECONNREFUSED):
				return nil
			case err != nil:
				return err
			}
			return c.Close()
		})
	}
	asking.Wait()
	return time.Duration(first.Load()), first.Load() > 0
}

// failure says why an exit didn't work.
func (x *exits) failure(t config.Target, last seenAt, err error) string {
	if errors.Is(err, errNoInternet) {
		return err.Error()
	}
	return x.s.probeFailure(t, last, err)
}
