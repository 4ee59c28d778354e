package sim

import (
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/router/gateway/gatewaytest"
	"ztgate/zerotier/controller"
	"ztgate/zerotier/ztnode"
)

// fault is something that goes wrong for a while.
type fault struct {
	name string
	// begin starts it; the result ends it.
	begin func(w *world) (end func())
}

func seconds(r *rand.Rand, from, to int) time.Duration {
	return time.Duration(from*1000+r.IntN((to-from)*1000+1)) * time.Millisecond
}

func (w *world) someMachine() *machine { return w.machines[w.rand.IntN(len(w.machines))] }

// slowestLink is by how many seconds a link delays at most.
const slowestLink = 2

// troubles are faults that connections may fail by.
var troubles = []fault{
	{"loss", func(w *world) func() {
		w.loss = 0.02 + 0.6*w.rand.Float64()
		return func() { w.loss = 0 }
	}},
	{"delay", func(w *world) func() {
		w.delay = seconds(w.rand, 0, slowestLink)
		return func() { w.delay = 0 }
	}},
	{"partition", func(w *world) func() {
		m := w.someMachine()
		w.event("%s reaches nobody", m.name)
		w.cut[m.name] = true
		return func() { delete(w.cut, m.name) }
	}},
	{"crash", func(w *world) func() {
		m := w.someMachine()
		m.crash()
		return m.start
	}},
	{"crash at a write", func(w *world) func() {
		m := w.someMachine()
		m.disk.crashAt = m.disk.ops + 1 + w.rand.IntN(30)
		return func() {
			m.disk.crashAt = 0
			m.start()
		}
	}},
	{"crash again and again", func(w *world) func() {
		m := w.someMachine()
		stop := false
		var again func()
		again = func() {
			if stop {
				return
			}
			m.disk.crashAt = m.disk.ops + 1 + w.rand.IntN(12)
			m.start()
			w.net.After(seconds(w.rand, 1, 20), again)
		}
		again()
		return func() {
			stop = true
			m.disk.crashAt = 0
			m.start()
		}
	}},
	{"restart of the gateway", func(w *world) func() {
		w.gate.stop()
		return w.gate.start
	}},
	{"a torn file of mappings", func(w *world) func() {
		w.gate.crash()
		w.losePorts() // also if it had been stopped in good order
		w.gate.torn = w.gate.disk.tear(mappingsFile, w.rand)
		return w.gate.start
	}},
	{"the office loses its membership", func(w *world) func() { return w.expel(w.offices[0].machine) }},
	{"the office is started anew without its membership", func(w *world) func() {
		o := w.offices[0].machine
		end := w.expel(o)
		o.crash()
		return func() {
			o.start()
			end()
		}
	}},
	{"the gateway loses its membership", func(w *world) func() { return w.expel(w.gate.machine) }},
	{"another address for the gateway", func(w *world) func() {
		w.authorize(w.netA, w.gate.machine, true, netip.MustParseAddr("10.0.0.2"))
		return func() { w.authorize(w.netA, w.gate.machine, true, gateAddr) }
	}},
	{"another underlay", func(w *world) func() {
		m := []*machine{w.gate.machine, w.offices[0].machine}[w.rand.IntN(2)]
		old := m.at
		m.move(netip.AddrPortFrom(netip.AddrFrom4([4]byte{93, 184, 2, byte(100 + w.rand.IntN(50))}), old.Port()))
		return func() { m.move(old) }
	}},
	{"the interface goes down", func(w *world) func() {
		w.gate.kernel.setLink(tunIndex, false)
		w.gate.hostChanged()
		return func() {
			w.gate.kernel.setLink(tunIndex, true)
			w.gate.hostChanged()
		}
	}},
	{"a route is removed", func(w *world) func() {
		k := w.gate.kernel
		for i := range k.routes {
			if toPrefix(k.routes[i].Dst) == overlayPrefix && k.routes[i].LinkIndex == tunIndex {
				k.routes = append(k.routes[:i:i], k.routes[i+1:]...)
				w.gate.hostChanged()
				break
			}
		}
		return func() {}
	}},
	{"a clock is set", func(w *world) func() { return w.setClock(w.ctl, 2*time.Hour) }},
	{"a full disk and a crash", func(w *world) func() {
		m := w.someMachine()
		m.disk.full = true
		w.net.After(seconds(w.rand, 1, 30), func() {
			if m.disk.full {
				m.crash()
			}
		})
		return func() {
			m.disk.full = false
			m.start()
		}
	}},
}

// aloneOnly is how many nuisances, the last ones, tell when something must have happened,
// and mean nothing when other things go wrong.
const aloneOnly = 4

// nuisances are faults that connections must not fail by.
var nuisances = []fault{
	{"a client floods", func(w *world) func() { return w.flood(w.greedy) }},
	{"a member floods", func(w *world) func() { return w.rogueFlood() }},
	{"a stranger floods", func(w *world) func() { return w.strangerFlood() }},
	{"hostile routes", func(w *world) func() { return w.pushHostile(false) }},
	{"hostile addresses", func(w *world) func() { return w.pushHostile(true) }},
	{"reload", func(w *world) func() {
		w.reload(w.rand.IntN(len(w.configs)))
		return func() { w.reload(0) }
	}},
	{"reload in a bad moment", func(w *world) func() {
		w.administer(func(c *controller.Controller) error {
			_, err := c.UpdateNetwork(w.netA, func(r *controller.Network) error { r.MTU = 1400 + w.rand.IntN(1400); return nil })
			return err
		})
		w.net.After(seconds(w.rand, 0, 1), func() { w.reload(w.rand.IntN(len(w.configs))) })
		return func() { w.reload(0) }
	}},
	{"a full disk", func(w *world) func() {
		m := w.someMachine()
		w.event("the disk of %s is full", m.name)
		m.disk.full = true
		return func() { m.disk.full = false }
	}},
	{"a clock is set a bit", func(w *world) func() {
		return w.setClock([]*machine{w.gate.machine, w.offices[0].machine, w.root}[w.rand.IntN(3)], 2*time.Hour)
	}},
	{"a member pretends", func(w *world) func() { return w.rogueTalk() }},
	{"a member claims addresses of others", func(w *world) func() {
		stop := w.rogueClaims()
		w.claimed = true
		return func() {
			stop()
			w.claimed = false
		}
	}},
	{"a route is withdrawn", func(w *world) func() {
		w.routes(w.netA, routesA[0])
		w.behindGone = w.net.Now.Sub(epoch) + pushWithin
		return func() {
			w.routes(w.netA, routesA...)
			w.behindGone = 0
		}
	}},
	{"a member is expelled", func(w *world) func() {
		end := w.expel(w.rogue.machine)
		w.revoked = w.net.Now.Sub(epoch) + pushWithin
		w.deaf = w.rogue.machine // one that means no good doesn't listen to that
		stop := w.rogueTalk()
		return func() {
			stop()
			w.deaf = nil
			end()
			w.revoked = 0
		}
	}},
	{"clients hoard", func(w *world) func() { return w.hoard() }},
}

// pushWithin is how soon what a controller pushes is in force, while nothing is wrong.
const pushWithin = 15 * time.Second

// crash ends a machine at once.
func (m *machine) crash() { m.do(func() { panic(crash{}) }) }

func (m *machine) move(to netip.AddrPort) {
	m.w.event("%s moves to %s", m.name, to)
	m.at = to
	if m.port != nil {
		m.w.net.Move(m.port, nil, to)
		m.port.Wake()
	}
}

func (w *world) expel(m *machine) func() {
	w.event("%s is de-authorised", m.name)
	w.authorize(w.netA, m, false)
	return func() { w.authorize(w.netA, m, true) }
}

// setClock sets a wall clock, and back.
func (w *world) setClock(m *machine, most time.Duration) func() {
	by := time.Duration(w.rand.Int64N(int64(2*most))) - most
	w.event("the clock of %s is set by %v", m.name, by)
	m.clock.offset = by
	return func() { m.clock.offset = 0 }
}

// reload puts a configuration into force.
func (w *world) reload(i int) {
	if w.gate.st == nil {
		return
	}
	w.event("reload %d", i)
	w.gate.do(func() {
		l, down := w.gate.kernel.byIndex(tunIndex)
		if err := w.gate.st.Reload(w.configs[i]); err != nil && down == nil && l.Flags&net.FlagUp != 0 {
			w.found("reload", "%v", err)
		}
		w.gate.cfg = w.configs[i]
		w.checkKernel()
		w.gate.step()
	})
}

// pushHostile gives network B what would take packets of others.
func (w *world) pushHostile(addresses bool) func() {
	hostile := []string{"172.31.0.0/28", "172.31.0.10/32", "172.31.0.0/17", "172.31.128.0/17", "169.254.169.254/32", "169.254.0.0/16", "10.0.0.0/1", "22.0.0.0/7", "28.0.0.0/6", "6.0.0.0/7",
		"10.0.0.10/32", "10.0.0.0/24", "10.0.0.0/25", "10.0.0.0/16", "10.9.0.0/24", "10.9.0.5/32", "192.168.5.0/24", "192.168.5.5/32", "10.50.0.0/16",
		"93.184.1.1/32", "93.184.2.0/24", "0.0.0.0/0", "128.0.0.0/1", "8.8.8.8/32", "127.0.0.0/8", "224.0.0.0/4", "172.16.0.0/12", "100.100.100.200/32"}
	var list []controller.Route
	for range 1 + w.rand.IntN(4) {
		r := route(hostile[w.rand.IntN(len(hostile))])
		if !addresses && w.rand.IntN(3) == 0 {
			r.Via = netip.MustParseAddr("10.88.0.66")
		}
		list = append(list, r)
	}
	w.event("network B pushes %v (addresses %v)", list, addresses)
	w.hostile++
	own := netip.MustParseAddr("10.88.0.1")
	if addresses {
		own = list[0].Target.Addr()
		if list[0].Target.Contains(own.Next()) && w.rand.IntN(2) == 0 {
			own = own.Next()
		}
	} else {
		list = append(list, routesB...)
	}
	w.routes(w.netB, list...)
	w.authorize(w.netB, w.gate.machine, true, own)
	return func() {
		w.routes(w.netB, routesB...)
		w.authorize(w.netB, w.gate.machine, true, netip.MustParseAddr("10.88.0.1"))
		w.net.After(recovery, func() { w.hostile-- })
	}
}

// repeat calls f at a rate until the result is called.
func (w *world) repeat(every time.Duration, f func()) (stop func()) {
	stopped := false
	var again func()
	again = func() {
		if !stopped {
			f()
			w.net.After(every, again)
		}
	}
	again()
	return func() { stopped = true }
}

// flood is a client that takes all it can get: connections that it never ends, or
// datagrams from ever more ports.
func (w *world) flood(c *client) func() {
	port, proto := 1024, w.rand.IntN(2)
	to := netip.AddrPortFrom(officeAddr, uint16(1+w.rand.IntN(1000)))
	if w.rand.IntN(3) == 0 {
		to = netip.AddrPortFrom(netip.MustParseAddr("10.0.0.99"), 80) // nobody is there
	}
	return w.repeat(20*time.Millisecond, func() {
		for range 12 {
			if port++; port > 65000 {
				port = 1024
			}
			from := netip.AddrPortFrom(c.addr, uint16(port))
			if proto == 0 {
				w.fromVPC(gatewaytest.TCP(from, to, gatewaytest.SYN, 1, 0, nil))
			} else {
				w.fromVPC(gatewaytest.UDP(from, to, token(greedyMark, from, 0)))
			}
		}
	})
}

// hoarders are more than the two clients that could have all flows, half of them each.
const hoarders = 3

// hoard is clients that fill the table with connections, which they keep, and go on asking
// for more. Others, who have few flows, lose none of those that wait for an answer. Between
// two bursts the hoarders' own ones are answered, so nothing else is left to take.
func (w *world) hoard() func() {
	const every, burst = 100 * time.Millisecond, 50
	port, to := 1024, netip.AddrPortFrom(officeAddr, uint16(1+w.rand.IntN(1000)))
	stop := w.repeat(every, func() {
		w.losePorts() // answered datagrams and echoes make way, and so do their ports
		for range burst {
			if port++; port > 65000 {
				port = 1025
			}
			for _, c := range w.hoarders {
				w.fromVPC(gatewaytest.TCP(netip.AddrPortFrom(c.addr, uint16(port)), to, gatewaytest.SYN, clientSeq, 0, nil))
			}
		}
	})
	return func() {
		stop()
		for _, c := range w.hoarders {
			for _, from := range c.held {
				w.fromVPC(gatewaytest.TCP(from, to, gatewaytest.RST, clientSeq+1, 0, nil))
			}
			c.held = nil
		}
		w.losePorts()
	}
}

// toGate sends a packet of the rogue to the gateway.
func (w *world) toGate(b []byte) {
	mac := ztnode.MACOf(w.netA, w.gate.id.Address())
	w.rogue.send(w.netA, frame(mac, w.rogue.mac(), unix.ETH_P_IP, b))
}

// rogueFlood is a member that opens flow after flow.
func (w *world) rogueFlood() func() {
	port := 1024
	return w.repeat(20*time.Millisecond, func() {
		for range 5 {
			if port++; port > 65000 {
				port = 1024
			}
			from := netip.AddrPortFrom(rogueAddr, uint16(port))
			to := netip.AddrPortFrom(gateAddr, []uint16{inPort, outPort, uint16(w.rand.IntN(65536))}[w.rand.IntN(3)])
			w.toGate(gatewaytest.UDP(from, to, token("x", from, 0)))
		}
	})
}

// rogueTalk is a member that tries what it may not.
func (w *world) rogueTalk() func() {
	n := 0
	return w.repeat(500*time.Millisecond, func() {
		n++
		from := netip.AddrPortFrom(rogueAddr, uint16(30000+n%1000))
		send := func(mark string, from, to netip.AddrPort) { w.toGate(gatewaytest.UDP(from, to, token(mark, from, n))) }
		send(rogueMark, from, netip.AddrPortFrom(gateAddr, inPort))
		send(sidesMark, from, netip.AddrPortFrom(gateAddr, outPort))
		send(sidesMark, from, netip.AddrPortFrom(forwardAddr, outPort))
		send(spoofMark, netip.AddrPortFrom(w.clients[0].addr, 5000), netip.AddrPortFrom(gateAddr, inPort))
		send(spoofMark, netip.AddrPortFrom(w.clients[0].addr, 5000), netip.AddrPortFrom(serverAddr, 53))
		send(spoofMark, netip.AddrPortFrom(officeAddr, 5000), netip.AddrPortFrom(w.clients[0].addr, 20005))
	})
}

// rogueClaims is a member that says it has the addresses of others.
func (w *world) rogueClaims() func() {
	return w.repeat(700*time.Millisecond, func() {
		claimed := []netip.Addr{officeAddr, office2Addr, gateAddr, behindAddr}[w.rand.IntN(4)]
		gate, own := ztnode.MACOf(w.netA, w.gate.id.Address()), w.rogue.mac()
		all := ztnode.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
		switch w.rand.IntN(4) {
		case 0:
			w.rogue.send(w.netA, frame(gate, own, unix.ETH_P_ARP, arp(2, own, claimed, gate, gateAddr)))
		case 1:
			w.rogue.send(w.netA, frame(all, own, unix.ETH_P_ARP, arp(1, own, claimed, ztnode.MAC{}, claimed)))
		case 2:
			w.rogue.send(w.netA, frame(gate, own, unix.ETH_P_ARP, arp(1, own, claimed, ztnode.MAC{}, gateAddr)))
		case 3:
			from := netip.AddrPortFrom(claimed, 5000)
			w.toGate(gatewaytest.UDP(from, netip.AddrPortFrom(gateAddr, inPort), token(spoofMark, from, 0)))
		}
	})
}

// strangerFlood is somebody on the internet who sends what he has, and what he heard.
func (w *world) strangerFlood() func() {
	var heard [][]byte
	seen := w.net.Seen
	w.net.Seen = func(from, to netip.AddrPort, d []byte) {
		seen(from, to, d)
		if to == w.gate.at && len(heard) < 50 {
			heard = append(heard, d)
		}
	}
	from := netip.MustParseAddrPort("93.184.9.77:4000")
	stop := w.repeat(20*time.Millisecond, func() {
		for range 4 {
			d := make([]byte, 28+w.rand.IntN(200))
			for i := range d {
				d[i] = byte(w.rand.Uint32())
			}
			if len(heard) > 0 && w.rand.IntN(2) == 0 {
				d = heard[w.rand.IntN(len(heard))]
			} else {
				w.gate.id.Address().Put(d[8:]) // for us, it says
			}
			w.net.Inject(from, w.gate.at, d)
		}
	})
	return func() {
		stop()
		w.net.Seen = seen
	}
}
