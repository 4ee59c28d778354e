package network_test

import (
	"fmt"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"ztgate/zerotier/controller"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/clock"
	"ztgate/zerotier/network"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/simnet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// watched is a node that looks at its clocks, as a node of package zerotier does, and that
// may have a real controller.
type watched struct {
	*host
	watch *clock.Watch
	ctl   *controller.Controller
}

func (w *watched) look() clock.Reading {
	return clock.Reading{Now: w.port.Clock(), Boot: w.port.Boot()}
}

func (w *watched) Tick(out vl1.Out, now time.Time) time.Time {
	if slept, _ := w.watch.Look(w.look()); slept > 0 {
		w.core.Slept(slept)
		w.layer.Slept()
	}
	next := w.host.Tick(out, now)
	if w.ctl != nil {
		w.ctl.Work(now)
	}
	return next
}

// HandleRequest and Authorized implement [network.Controller].
func (w *watched) HandleRequest(from *identity.Identity, id packet.ID, n vl2.NetworkID, meta []byte) {
	w.ctl.HandleRequest(from, id, n, meta)
}

func (w *watched) Authorized(n vl2.NetworkID, a identity.Address, now time.Time) bool {
	return w.ctl.Authorized(n, a, now)
}

// clockLab is a root with the controller and two members, all with clocks of their own.
type clockLab struct {
	t       *testing.T
	n       *simnet.Net
	planet  *vl1.World
	r, a, b *watched
	id      vl2.NetworkID
	dir     string
	simple  bool // the controller takes time stamps as they come from its wall clock, as the reference does
}

func newClockLab(t *testing.T, simple bool) *clockLab {
	l := &clockLab{t: t, n: simnet.New(), dir: t.TempDir(), simple: simple}
	l.n.UseClocks()
	root := testIDs(t)[0]
	l.planet = &vl1.World{ID: 1, Timestamp: 1, Roots: []vl1.Root{{Identity: root.Public(), Endpoints: []netip.AddrPort{place(0)}}}}
	l.id = vl2.NetworkID(root.Address())<<24 | 0x1
	l.r = l.start(0, 0)
	l.a = l.start(1, 0)
	l.n.Run(30 * time.Second) // they don't renew at the same time
	l.b = l.start(2, 0)
	if gap := l.traffic(3*time.Minute, nil); gap > 10*time.Second {
		t.Fatalf("no traffic for %v before", gap)
	}
	return l
}

func place(i int) netip.AddrPort { return ap(fmt.Sprintf("203.0.113.%d:9993", i+1)) }

// start starts node i, whose wall clock is wrong by so much.
func (l *clockLab) start(i int, wall time.Duration) *watched {
	w := &watched{}
	id := testIDs(l.t)[i]
	var simple *authority
	set := func(*network.Config) {}
	switch {
	case i == 0 && l.simple:
		simple = &authority{n: l.id, members: map[identity.Address]bool{}, authorized: map[identity.Address]bool{
			testIDs(l.t)[1].Address(): true, testIDs(l.t)[2].Address(): true,
		}}
	case i == 0:
		set = func(c *network.Config) { c.Controller = w }
	}
	w.host = newHost(l.t, l.n, id, l.planet, simple, place(i), set)
	w.port.Node = w
	w.port.SetClock(wall)
	w.watch = clock.NewWatch(w.look(), slog.New(slog.DiscardHandler))
	if i == 0 && !l.simple {
		l.startController(w)
	}
	if i > 0 {
		if err := w.layer.Join(w.port, w.port.Clock(), l.id, nil); err != nil {
			l.t.Fatal(err)
		}
	}
	return w
}

func (l *clockLab) startController(w *watched) {
	ctl, err := controller.New(controller.Config{Identity: w.id, Dir: l.dir, Now: w.port.Clock, Send: func(dst identity.Address, v packet.Verb, payload []byte, compress bool) {
		w.core.Send(w.tx.Begin(w.port, w.port.Clock()), dst, v, payload, vl1.SendOpts{Compress: compress})
	}})
	if err != nil {
		l.t.Fatal(err)
	}
	w.ctl = ctl
	if _, ok := ctl.Network(l.id); ok {
		return
	}
	rec := controller.DefaultNetwork()
	rec.ID, rec.Private = l.id, false
	if _, err := ctl.CreateNetwork(rec); err != nil {
		l.t.Fatal(err)
	}
}

// traffic sends two frames a second each way, calling f before each, and returns the
// longest time without one that arrived in both directions.
func (l *clockLab) traffic(d time.Duration, f func()) (gap time.Duration) {
	last := l.n.Now
	for end := l.n.Now.Add(d); l.n.Now.Before(end); {
		if f != nil {
			f()
		}
		l.a.got, l.b.got = nil, nil
		l.a.write(l.n, l.id, vl2.MACOf(l.id, l.b.host.id.Address()), vl2.EtherTypeIPv4, frame)
		l.b.write(l.n, l.id, vl2.MACOf(l.id, l.a.host.id.Address()), vl2.EtherTypeIPv4, frame)
		l.n.Run(500 * time.Millisecond)
		if l.a.count(frame) > 0 && l.b.count(frame) > 0 {
			last = l.n.Now
		}
		gap = max(gap, l.n.Now.Sub(last))
	}
	return gap
}

// Wall clocks that are set, and hosts that sleep, cost seconds and not hours, whoever it
// happens to, and whether or not a member is started anew afterwards.
func TestClocksThatAreSet(t *testing.T) {
	const hour = time.Hour
	for _, simple := range []bool{false, true} {
		for _, by := range []time.Duration{-hour, -3 * hour, 24 * hour, -24 * hour} {
			for who, nodes := range map[string]func(*clockLab) []*watched{
				"all":          func(l *clockLab) []*watched { return []*watched{l.r, l.a, l.b} },
				"controller":   func(l *clockLab) []*watched { return []*watched{l.r} },
				"one member":   func(l *clockLab) []*watched { return []*watched{l.a} },
				"both members": func(l *clockLab) []*watched { return []*watched{l.a, l.b} },
			} {
				for _, restart := range []bool{false, true} {
					if testing.Short() && (by == -24*hour || who == "both members" || restart != simple) {
						continue
					}
					t.Run(fmt.Sprintf("%s/%v/simple=%v/restart=%v", who, by, simple, restart), func(t *testing.T) {
						t.Parallel()
						l := newClockLab(t, simple)
						wall := map[*watched]time.Duration{}
						for _, w := range nodes(l) {
							w.port.SetClock(by)
							wall[w] = by
						}
						began := l.n.Now
						restarted := !restart
						gap := l.traffic(5*time.Minute, func() {
							if !restarted && l.n.Now.Sub(began) > 20*time.Second {
								restarted = true
								l.n.Detach(l.b.port)
								l.b = l.start(2, wall[l.b])
							}
						})
						if gap > 10*time.Second {
							t.Errorf("no traffic for %v", gap)
						}
						t.Logf("longest gap %v", gap)
						for w, d := range wall {
							if got := w.watch.Jump(); w != nil && !(restart && w.port != l.b.port && w.port != l.a.port && w.port != l.r.port) && got.By.Round(time.Second) != d {
								t.Errorf("noticed %v", got)
							}
						}
					})
				}
			}
		}
	}
}

// A host that slept is back within seconds.
func TestSleep(t *testing.T) {
	for who, node := range map[string]func(*clockLab) []*watched{
		"a member": func(l *clockLab) []*watched { return []*watched{l.a} },
		"both":     func(l *clockLab) []*watched { return []*watched{l.a, l.b} },
		"the root": func(l *clockLab) []*watched { return []*watched{l.r} },
	} {
		for _, simple := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/simple=%v", who, simple), func(t *testing.T) {
				t.Parallel()
				l := newClockLab(t, simple)
				for _, w := range node(l) {
					w.port.Sleep(8 * time.Hour)
				}
				l.n.Run(8 * time.Hour)
				if gap := l.traffic(3*time.Minute, nil); gap > 10*time.Second {
					t.Errorf("no traffic for %v", gap)
				} else {
					t.Logf("longest gap %v", gap)
				}
			})
		}
	}
}

// What is on disk from a time when the clock was ahead locks nobody out: neither a
// controller's time stamps nor a member's configuration.
func TestStateFromTheFuture(t *testing.T) {
	for _, simple := range []bool{false, true} {
		l := newClockLab(t, simple)
		for _, w := range []*watched{l.r, l.a, l.b} {
			w.port.SetClock(30 * 24 * time.Hour)
		}
		l.traffic(3*time.Minute, nil)
		kept, _ := l.a.layer.Network(l.id)
		for _, w := range []*watched{l.r, l.a, l.b} { // all are booted with the right time
			l.n.Detach(w.port)
		}
		l.n.Run(time.Minute)
		l.r, l.b = l.start(0, 0), l.start(2, 0)
		l.a = l.start(1, 0)
		l.a.layer.Leave(l.id)
		if err := l.a.layer.Join(l.a.port, l.a.port.Clock(), l.id, kept.Config); err != nil {
			t.Fatal(err)
		}
		if gap := l.traffic(3*time.Minute, nil); gap > 10*time.Second {
			t.Errorf("simple=%v: no traffic for %v", simple, gap)
		}
	}
}

// It is known when the controller spoke last, by the clock as it is.
func TestLastController(t *testing.T) {
	l := newClockLab(t, true)
	at := func() time.Time {
		s, _ := l.a.layer.Network(l.id)
		return s.LastController
	}
	if d := l.a.port.Clock().Sub(at()); d < 0 || d > 70*time.Second {
		t.Errorf("spoke %v ago", d)
	}
	l.a.port.SetClock(-5 * time.Hour)
	l.n.Run(2 * time.Second)
	if d := l.a.port.Clock().Round(0).Sub(at().Round(0)); d < 0 || d > 80*time.Second {
		t.Errorf("after the clock was set, spoke %v ago", d)
	}
	l.n.Detach(l.r.port)
	l.n.Run(10 * time.Minute)
	if d := l.a.port.Clock().Sub(at()); d < 9*time.Minute || d > 12*time.Minute {
		t.Errorf("ten minutes after it went, spoke %v ago", d)
	}
}
