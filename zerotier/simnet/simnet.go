// Package simnet is a virtual internet for tests: nodes with addresses, a clock
// that only the test moves, latency, loss by rule, NATs, and nothing concurrent.
package simnet

import (
	"bytes"
	"cmp"
	"container/heap"
	"net/netip"
	"slices"
	"time"

	"ztgate/zerotier/vl1"
)

// Node is what is attached to the network.
type Node interface {
	Receive(out vl1.Out, now time.Time, sock vl1.SocketID, from netip.AddrPort, datagram []byte)
	Tick(out vl1.Out, now time.Time) time.Time
}

// Net is the network. Latency is one way.
type Net struct {
	Now     time.Time
	Latency time.Duration
	// Drop, if not nil, decides which datagrams are lost; it sees what travels on
	// the internet, with the addresses outside of NATs.
	Drop func(from, to netip.AddrPort, datagram []byte) bool
	// Delay, if not nil, returns by how much more a datagram is late: later ones overtake
	// it.
	Delay func(from, to netip.AddrPort, datagram []byte) time.Duration
	// Seen, if not nil, sees every datagram that is delivered to a node.
	Seen func(from, to netip.AddrPort, datagram []byte)

	start  time.Time // see UseClocks
	ports  map[place]*Port
	nats   map[netip.Addr]*NAT
	list   []*Port
	events eventQueue
	seq    int
}

// place is an endpoint on the internet or behind a NAT.
type place struct {
	behind *NAT
	ep     netip.AddrPort
}

// New makes an empty network; its clock starts at a fixed time.
func New() *Net {
	return &Net{
		Now: time.Unix(1_700_000_000, 0), Latency: 20 * time.Millisecond,
		ports: make(map[place]*Port), nats: make(map[netip.Addr]*NAT),
	}
}

// Port is a node's attachment with its sockets. It implements [vl1.Out].
type Port struct {
	net    *Net
	Node   Node
	nat    *NAT // nil on the internet itself
	socks  []socket
	lastID vl1.SocketID
	next   time.Time // of the network
	clock  clock
}

type socket struct {
	id vl1.SocketID
	ep netip.AddrPort
}

// Attach adds a node with one socket per address. Node may be set later, but
// before Run.
func (n *Net) Attach(node Node, socks ...netip.AddrPort) *Port {
	return n.AttachBehind(nil, node, socks...)
}

// AttachBehind adds a node behind a NAT; its addresses are local ones.
func (n *Net) AttachBehind(nat *NAT, node Node, socks ...netip.AddrPort) *Port {
	p := &Port{net: n, Node: node, nat: nat}
	n.list = append(n.list, p)
	p.open(socks)
	return p
}

func (p *Port) open(socks []netip.AddrPort) {
	for _, ep := range socks {
		p.lastID++
		p.socks = append(p.socks, socket{p.lastID, ep})
		p.net.ports[place{p.nat, ep}] = p
	}
}

func (p *Port) close() {
	for _, s := range p.socks {
		if at := (place{p.nat, s.ep}); p.net.ports[at] == p {
			delete(p.net.ports, at)
		}
	}
	p.socks = nil
}

// Move gives a node other addresses, possibly behind another NAT (nil: none). Its
// old sockets are closed; the new ones have new numbers.
func (n *Net) Move(p *Port, nat *NAT, socks ...netip.AddrPort) {
	p.close()
	p.nat = nat
	p.open(socks)
}

// Detach takes a node off the network.
func (n *Net) Detach(p *Port) {
	p.close()
	for i, q := range n.list {
		if q == p {
			n.list = append(n.list[:i:i], n.list[i+1:]...)
			break
		}
	}
}

// Endpoints returns the addresses of the port's sockets.
func (p *Port) Endpoints() []netip.AddrPort {
	out := make([]netip.AddrPort, len(p.socks))
	for i, s := range p.socks {
		out[i] = s.ep
	}
	return out
}

// Open reports whether a socket exists.
func (p *Port) Open(id vl1.SocketID) bool {
	return slices.ContainsFunc(p.socks, func(s socket) bool { return s.id == id })
}

// Send implements [vl1.Out].
func (p *Port) Send(sock vl1.SocketID, to netip.AddrPort, head, data []byte) {
	p.send(sock, to, append(bytes.Clone(head), data...), false)
}

// SendTTL implements [vl1.Out]. Such datagrams pass the own NAT and then vanish.
func (p *Port) SendTTL(sock vl1.SocketID, to netip.AddrPort, data []byte, _ int) {
	p.send(sock, to, data, true)
}

func (p *Port) send(sock vl1.SocketID, to netip.AddrPort, d []byte, vanish bool) {
	if !p.Open(sock) {
		sock = 0
	}
	for _, s := range p.socks {
		if sock != 0 && sock != s.id || s.ep.Addr().Is4() != to.Addr().Is4() {
			continue
		}
		e := event{at: p.net.Now.Add(p.net.Latency), from: s.ep, to: to, data: bytes.Clone(d)}
		if p.nat != nil {
			if p.net.ports[place{p.nat, to}] != nil {
				e.lan = p.nat
			} else {
				e.from = p.nat.outward(p.net.Now, s.ep, to)
			}
		}
		if p.net.Delay != nil {
			e.at = e.at.Add(p.net.Delay(e.from, e.to, e.data))
		}
		if !vanish {
			p.net.push(e)
		}
	}
}

// Inject delivers a datagram as if it came from anywhere.
func (n *Net) Inject(from, to netip.AddrPort, datagram []byte) {
	n.push(event{at: n.Now, from: from, to: to, data: bytes.Clone(datagram)})
}

// After calls do when time has passed.
func (n *Net) After(d time.Duration, do func()) { n.push(event{at: n.Now.Add(d), do: do}) }

// Wake makes the node's Tick be called at once.
func (p *Port) Wake() { p.next = p.net.Now }

func (n *Net) push(e event) {
	n.seq++
	e.seq = n.seq
	heap.Push(&n.events, e)
}

// Run moves the clock by d, delivering datagrams and running timers on the way.
func (n *Net) Run(d time.Duration) {
	end := n.Now.Add(d)
	for {
		next := end
		if len(n.events) > 0 && n.events[0].at.Before(next) {
			next = n.events[0].at
		}
		for _, p := range n.list {
			if at := p.due(); at.Before(next) {
				next = at
			}
		}
		if next.After(n.Now) {
			n.Now = next
		}
		for len(n.events) > 0 && !n.events[0].at.After(n.Now) {
			n.deliver(heap.Pop(&n.events).(event))
		}
		for _, p := range append([]*Port(nil), n.list...) {
			if !p.due().After(n.Now) {
				now := p.Clock()
				p.next = n.Now.Add(max(p.Node.Tick(p, now).Sub(now), time.Millisecond))
			}
		}
		if !n.Now.Before(end) && (len(n.events) == 0 || n.events[0].at.After(end)) {
			return
		}
	}
}

// due returns when the port's timers run next.
func (p *Port) due() time.Time {
	if p.asleep() {
		return p.clock.until
	}
	return p.next
}

// RunUntil runs until cond holds or max has passed, and reports whether it holds.
func (n *Net) RunUntil(max time.Duration, cond func() bool) bool {
	for end := n.Now.Add(max); n.Now.Before(end); n.Run(10 * time.Millisecond) {
		if cond() {
			return true
		}
	}
	return cond()
}

func (n *Net) deliver(e event) {
	if e.do != nil {
		e.do()
		return
	}
	at := place{e.lan, e.to}
	if e.lan == nil {
		if n.Drop != nil && n.Drop(e.from, e.to, e.data) {
			return
		}
		if nat := n.nats[e.to.Addr()]; nat != nil {
			inside, ok := nat.inward(n.Now, e.from, e.to)
			if !ok {
				return
			}
			at = place{nat, inside}
		}
	}
	p := n.ports[at]
	if p == nil || p.asleep() {
		return
	}
	if n.Seen != nil {
		n.Seen(e.from, e.to, e.data)
	}
	for _, s := range p.socks {
		if s.ep == at.ep {
			p.Node.Receive(p, p.Clock(), s.id, e.from, e.data)
			return
		}
	}
}

type event struct {
	at       time.Time
	seq      int
	from, to netip.AddrPort
	lan      *NAT // the datagram stays behind it
	data     []byte
	do       func() // instead of a datagram
}

type eventQueue []event

func (q eventQueue) Len() int { return len(q) }

// Less makes the order of what happens at the same time depend on where it comes from,
// as long as that is different, and not on who happened to send first.
func (q eventQueue) Less(i, j int) bool {
	a, b := &q[i], &q[j]
	if c := a.at.Compare(b.at); c != 0 {
		return c < 0
	}
	return cmp.Or(a.to.Compare(b.to), a.from.Compare(b.from), cmp.Compare(a.seq, b.seq)) < 0
}
func (q eventQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *eventQueue) Push(x any)   { *q = append(*q, x.(event)) }
func (q *eventQueue) Pop() any {
	old := *q
	e := old[len(old)-1]
	*q = old[:len(old)-1]
	return e
}
