package sim

import (
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/router/gateway/gatewaytest"
)

// forwardAddr is where VPC clients find a forward to the office.
var forwardAddr = netip.MustParseAddr("10.0.0.200")

// run is the history of a world.
func (w *world) run(rounds int, quiet time.Duration) {
	w.boot()
	w.watch(true)
	w.pass(recovery + seconds(w.rand, 30, 60))
	for range rounds {
		if len(w.findings) > 0 {
			return
		}
		if w.rand.IntN(2) == 0 {
			w.storm()
		} else {
			w.annoy()
		}
	}
	for end := w.net.Now.Add(quiet); w.net.Now.Before(end) && len(w.findings) == 0; {
		w.watch(false)
		w.pass(min(seconds(w.rand, 1800, 3*3600), end.Sub(w.net.Now)))
		if w.net.Now.Before(end) {
			w.night()
			w.watch(true)
			w.pass(recovery + seconds(w.rand, 30, 60))
		}
	}
	w.event("end: %d connections, %d answered, %d faults", w.connections, w.answered, w.faults)
	w.log.settle()
}

// idle is the grain of timers while nothing goes on: less than any patience of nodes.
const idle = 4 * time.Second

// night switches machines off for hours: what is known of them ends, like certificates,
// paths and flows.
func (w *world) night() {
	members := []*machine{w.offices[0].machine, w.offices[1].machine, w.rogue.machine}
	off := [][]*machine{members, members, {w.ctl}, {w.root}, {w.gate.machine}, append(members, w.ctl, w.root)}[w.rand.IntN(6)]
	w.faults++
	over := w.disturb()
	for _, m := range off {
		w.event("%s is off for the night", m.name)
		m.crash()
	}
	w.pass(seconds(w.rand, 3600, 10*3600))
	for _, i := range w.rand.Perm(len(off)) {
		off[i].start()
	}
	w.event("morning")
	over()
}

// pass lets time pass.
func (w *world) pass(d time.Duration) {
	for end := w.net.Now.Add(d); w.net.Now.Before(end) && len(w.findings) == 0; {
		w.net.Run(min(time.Second, end.Sub(w.net.Now)))
	}
}

// watch makes clients connect, and looks at what they see, from now on: often or seldom.
func (w *world) watch(closely bool) {
	w.grain = idle
	if closely {
		w.grain = 0
	}
	w.watches++
	watch := w.watches
	later := func(often, seldom time.Duration, f func()) {
		if !closely {
			often = seldom
		}
		w.net.After(often, func() {
			if w.watches == watch {
				f()
			}
		})
	}
	var connect, ping, look func()
	connect = func() {
		to := []netip.AddrPort{
			netip.AddrPortFrom(officeAddr, uint16(80+w.rand.IntN(1000))), netip.AddrPortFrom(office2Addr, 443),
			netip.AddrPortFrom(behindAddr, 22), netip.AddrPortFrom(forwardAddr, outPort), netip.AddrPortFrom(gateAddr, inPort),
		}[w.rand.IntN(5)]
		proto := []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP}[w.rand.IntN(3)]
		switch c := w.client(); {
		case to.Addr() == forwardAddr:
			c.connect(unix.IPPROTO_UDP, to, nil)
		case to.Addr() == gateAddr: // not for the VPC
			w.fromVPC(w.lost(c))
		case to.Addr() == behindAddr && w.behindGone != 0:
			w.fromVPC(w.gone(c))
		default:
			c.connect(proto, to, nil)
		}
		later(seconds(w.rand, 0, 2), seconds(w.rand, 300, 1800), connect)
	}
	ping = func() {
		w.ping()
		later(2*time.Second, 10*time.Minute, ping)
	}
	look = func() {
		w.observe()
		later(time.Second, 10*time.Minute, look)
	}
	connect()
	ping()
	look()
}

// lost is a datagram to the forward for overlay hosts, which a VPC host can't use.
func (w *world) lost(c *client) []byte {
	from := netip.AddrPortFrom(c.addr, 19000)
	return gatewaytest.UDP(from, netip.AddrPortFrom(gateAddr, inPort), token(clientMark, from, 0))
}

// gone is a datagram to where no route leads any more.
func (w *world) gone(c *client) []byte {
	from := netip.AddrPortFrom(c.addr, 19001)
	return gatewaytest.UDP(from, netip.AddrPortFrom(behindAddr, 22), token(clientMark, from, 0))
}

// end frees what the world holds.
func (w *world) end() {
	for _, m := range w.machines {
		if m.port != nil {
			m.down(false)
		}
	}
}

// storm lets several things go wrong at the same time, and then waits until all must be
// well again.
func (w *world) storm() {
	longest := time.Duration(0)
	for range 1 + w.rand.IntN(4) {
		f := troubles[w.rand.IntN(len(troubles))]
		if w.rand.IntN(5) == 0 {
			f = nuisances[w.rand.IntN(len(nuisances)-aloneOnly)]
		}
		after, lasts := seconds(w.rand, 0, 60), seconds(w.rand, 1, 200)
		longest = max(longest, after+lasts)
		w.net.After(after, func() {
			w.faults++
			w.event("fault: %s", f.name)
			over, end := w.disturb(), f.begin(w)
			w.net.After(lasts, func() {
				w.event("over: %s", f.name)
				end()
				over()
			})
		})
	}
	w.pass(longest)
	began := w.net.Now
	for !w.calm() && len(w.findings) == 0 {
		w.pass(time.Second)
		if w.latest.After(began) && w.latest.Sub(began) > 0 && w.slowest < w.latest.Sub(began) && !w.recovered {
			w.slowest, w.recovered = w.latest.Sub(began), true
		}
	}
	w.recovered = false
	w.pass(seconds(w.rand, 30, 60))
}

// annoy lets something go wrong that nobody may notice.
func (w *world) annoy() {
	f := nuisances[w.rand.IntN(len(nuisances))]
	w.faults++
	w.event("nuisance: %s", f.name)
	end := f.begin(w)
	w.pass(seconds(w.rand, 5, 60))
	w.event("over: %s", f.name)
	end()
	w.pass(seconds(w.rand, 20, 60))
}
