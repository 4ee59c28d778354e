// Package simnet is a virtual internet for tests: nodes with addresses, a clock
// that only the test moves, latency, loss by rule, and nothing concurrent.
package simnet

import (
	"bytes"
	"container/heap"
	"net/netip"
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
	// Drop, if not nil, decides which datagrams are lost.
	Drop func(from, to netip.AddrPort, datagram []byte) bool
	// Seen, if not nil, sees every datagram that is delivered.
	Seen func(from, to netip.AddrPort, datagram []byte)

	ports  map[netip.AddrPort]*Port
	list   []*Port
	events eventQueue
	seq    int
}

// New makes an empty network; its clock starts at a fixed time.
func New() *Net {
	return &Net{Now: time.Unix(1_700_000_000, 0), Latency: 20 * time.Millisecond, ports: make(map[netip.AddrPort]*Port)}
}

// Port is a node's attachment with its sockets. It implements [vl1.Out].
type Port struct {
	net   *Net
	Node  Node
	socks []netip.AddrPort // socket i+1
	next  time.Time
}

// Attach adds a node with one socket per address. Node may be set later, but
// before Run.
func (n *Net) Attach(node Node, socks ...netip.AddrPort) *Port {
	p := &Port{net: n, Node: node, socks: socks}
	n.list = append(n.list, p)
	for _, s := range socks {
		n.ports[s] = p
	}
	return p
}

// Detach takes a node off the network.
func (n *Net) Detach(p *Port) {
	for _, s := range p.socks {
		if n.ports[s] == p {
			delete(n.ports, s)
		}
	}
	for i, q := range n.list {
		if q == p {
			n.list = append(n.list[:i:i], n.list[i+1:]...)
			break
		}
	}
}

// Endpoints returns the addresses of the port's sockets.
func (p *Port) Endpoints() []netip.AddrPort { return p.socks }

// Send implements [vl1.Out].
func (p *Port) Send(sock vl1.SocketID, to netip.AddrPort, head, data []byte) {
	d := append(bytes.Clone(head), data...)
	for i, from := range p.socks {
		if sock != 0 && int(sock) != i+1 || from.Addr().Is4() != to.Addr().Is4() {
			continue
		}
		p.net.push(event{at: p.net.Now.Add(p.net.Latency), from: from, to: to, data: bytes.Clone(d)})
	}
}

// SendTTL implements [vl1.Out]; such datagrams never arrive.
func (p *Port) SendTTL(vl1.SocketID, netip.AddrPort, []byte, int) {}

// Inject delivers a datagram as if it came from anywhere.
func (n *Net) Inject(from, to netip.AddrPort, datagram []byte) {
	n.push(event{at: n.Now, from: from, to: to, data: bytes.Clone(datagram)})
}

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
			if p.next.Before(next) {
				next = p.next
			}
		}
		if next.After(n.Now) {
			n.Now = next
		}
		for len(n.events) > 0 && !n.events[0].at.After(n.Now) {
			n.deliver(heap.Pop(&n.events).(event))
		}
		for _, p := range append([]*Port(nil), n.list...) {
			if !p.next.After(n.Now) {
				if p.next = p.Node.Tick(p, n.Now); !p.next.After(n.Now) {
					p.next = n.Now.Add(time.Millisecond)
				}
			}
		}
		if !n.Now.Before(end) && (len(n.events) == 0 || n.events[0].at.After(end)) {
			return
		}
	}
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
	if n.Drop != nil && n.Drop(e.from, e.to, e.data) {
		return
	}
	p := n.ports[e.to]
	if p == nil {
		return
	}
	if n.Seen != nil {
		n.Seen(e.from, e.to, e.data)
	}
	for i, s := range p.socks {
		if s == e.to {
			p.Node.Receive(p, n.Now, vl1.SocketID(i+1), e.from, e.data)
		}
	}
}

type event struct {
	at       time.Time
	seq      int
	from, to netip.AddrPort
	data     []byte
}

type eventQueue []event

func (q eventQueue) Len() int { return len(q) }
func (q eventQueue) Less(i, j int) bool {
	return q[i].at.Before(q[j].at) || q[i].at.Equal(q[j].at) && q[i].seq < q[j].seq
}
func (q eventQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *eventQueue) Push(x any)   { *q = append(*q, x.(event)) }
func (q *eventQueue) Pop() any {
	old := *q
	e := old[len(old)-1]
	*q = old[:len(old)-1]
	return e
}
