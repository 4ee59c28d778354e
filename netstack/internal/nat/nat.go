// Package nat is the flow table of the forwarding plane: which flows exist, how
// their packets are translated, and when they end. Mappings are endpoint
// independent and never shared, filtering is address and port dependent
// (RFC 4787, RFC 5382, RFC 5508).
package nat

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"ztgate/netstack/internal/ipkt"
)

// Errors of [Table.Open].
var (
	ErrTableFull = errors.New("flow table full")
	ErrNoPort    = errors.New("no free port")
	ErrProtocol  = errors.New("protocol cannot be translated")
	ErrNotFirst  = errors.New("segment cannot begin a flow")
)

// closedFor is how long a closed TCP flow stays, for late segments.
const closedFor = 10 * time.Second

const numShards = 64

// key is a packet's tuple as it appears on one side. For echo, sport is the
// identifier on the way out and dport on the way back, the other is 0.
type key struct {
	src, dst     [16]byte
	sport, dport uint16
	proto        uint8
	side         Side
}

func (k *key) shard() uint32 {
	h := uint32(k.sport)*0x9e3779b1 ^ uint32(k.dport)*0x85ebca6b ^ uint32(k.proto)
	h ^= uint32(k.src[15]) | uint32(k.src[14])<<8 | uint32(k.dst[15])<<16 | uint32(k.dst[14])<<24
	h *= 0xc2b2ae35
	return h >> 26
}

// TCP states as far as timers need them.
const (
	stateNew         uint32 = iota // never answered
	stateEstablished               // answered; TCP: handshake seen both ways
	stateClosing                   // one FIN
	stateClosed                    // both FINs, or RST
)

var stateNames = [...]string{"new", "established", "closing", "closed"}

// Direction holds what one direction of a flow needs.
type Direction struct {
	Packets, Bytes atomic.Uint64
	Hop            atomic.Pointer[Hop]
	addrDelta      uint16 // to the IPv4 header checksum
	l4Delta        uint16 // to the transport checksum
}

// Hop is the next hop of one direction, as the engine left it.
type Hop struct {
	Ethernet [14]byte
	Until    int64 // ns; looked up again afterwards
}

// Flow is one flow, with both directions. Its exported fields don't change.
type Flow struct {
	Network    uint64
	Proto      uint8
	V6         bool
	FromVPC    bool     // who opened it
	Masquerade bool     // the source is translated
	Client     [16]byte // who opened it
	Server     [16]byte // to whom
	ClientPort uint16   // or echo identifier
	ServerPort uint16
	External   [16]byte // source as the server sees it
	ExtPort    uint16
	NextHop    netip.Addr    // on the overlay
	MTU        int           // of the overlay network
	Generation atomic.Uint64 // of policy and routes when it was judged
	Created    int64         // ns

	Forward, Reverse Direction // from the client, from the server

	last  atomic.Int64 // ns
	state atomic.Uint32
	fins  atomic.Uint32 // 1: from the client, 2: from the server
	dead  atomic.Bool
	keys  [2]key // towards the server, towards the client
	eim   eimKey
}

type eimKey struct {
	src, ext [16]byte
	port     uint16
	proto    uint8
}

type mapping struct {
	port uint16
	refs int
}

// pool is the ports of one external address and protocol.
type pool struct {
	used  [1 << 16 / 64]uint64
	count int
}

type poolKey struct {
	ext   [16]byte
	proto uint8
}

// Config says how a table works.
type Config struct {
	MaxFlows int // 0 = 262144
	Timeouts Timeouts
}

// Table is the flow table. It is safe for concurrent use.
type Table struct {
	cfg    Config
	shards [numShards]shard

	mu       sync.Mutex // guards opening and removing
	count    int
	mappings map[eimKey]*mapping
	pools    map[poolKey]*pool
	sweepAt  int

	frags fragTable
	stats Stats
}

type shard struct {
	mu sync.RWMutex
	m  map[key]*Flow
	_  [32]byte // shards on cache lines of their own
}

// Stats are counters by protocol class.
type Stats struct {
	Live, Created, Idle, Closed, Evicted, Flushed [NumClasses]atomic.Int64
	NoPort, Full                                  [NumClasses]atomic.Int64
	PortsInUse                                    [NumClasses]atomic.Int64
}

// New makes an empty table.
func New(cfg Config) *Table {
	if cfg.MaxFlows == 0 {
		cfg.MaxFlows = DefaultMaxFlows
	}
	cfg.Timeouts.defaults()
	t := &Table{cfg: cfg, mappings: make(map[eimKey]*mapping), pools: make(map[poolKey]*pool)}
	for i := range t.shards {
		t.shards[i].m = make(map[key]*Flow)
	}
	t.frags.init()
	return t
}

// Stats returns the counters.
func (t *Table) Stats() *Stats { return &t.stats }

// Limit returns the largest number of flows.
func (t *Table) Limit() int { return t.cfg.MaxFlows }

// keyOf makes the key of a packet; ok is false if it has no transport header.
func keyOf(side Side, v *ipkt.View) (k key, ok bool) {
	k = key{src: v.Src, dst: v.Dst, proto: v.Proto, side: side}
	switch v.Proto {
	case ipkt.TCP, ipkt.UDP:
		k.sport, k.dport = v.SPort, v.DPort
	case ipkt.ICMP, ipkt.ICMPv6:
		switch v.ICMPType {
		case 8, 128:
			k.sport = v.ICMPID
		case 0, 129:
			k.dport = v.ICMPID
		default:
			return k, false
		}
	}
	return k, v.First
}

func (t *Table) find(k *key) *Flow {
	s := &t.shards[k.shard()]
	s.mu.RLock()
	f := s.m[*k]
	s.mu.RUnlock()
	return f
}

// Lookup finds the flow of a packet. forward tells whether the packet goes the
// way of the flow's first one. Fragments without a transport header are found
// by the first fragment.
func (t *Table) Lookup(now int64, side Side, v *ipkt.View) (f *Flow, forward bool) {
	if v.Fragment && !v.First {
		return t.frags.find(now, side, v)
	}
	k, ok := keyOf(side, v)
	if !ok {
		return nil, false
	}
	f = t.find(&k)
	if f == nil {
		return nil, false
	}
	forward = f.keys[0] == k
	if v.Fragment {
		t.frags.note(now, side, v, f, forward)
	}
	return f, forward
}

// timeout returns how long the flow may be idle.
func (t *Table) timeout(f *Flow) time.Duration {
	to := &t.cfg.Timeouts
	switch f.Proto {
	case ipkt.TCP:
		switch f.state.Load() {
		case stateEstablished:
			return to.TCPEstablished
		case stateClosed:
			return closedFor
		}
		return to.TCPTransitory
	case ipkt.UDP:
		return to.UDP
	case ipkt.ICMP, ipkt.ICMPv6:
		return to.ICMP
	}
	return to.Other
}

// Apply follows the flow's state and rewrites the packet in place for the side it
// goes to. It doesn't touch TTL.
func (f *Flow) Apply(now int64, forward bool, v *ipkt.View) {
	d := &f.Reverse
	if forward {
		d = &f.Forward
	}
	d.Packets.Add(1)
	d.Bytes.Add(uint64(len(v.B)))
	f.follow(now, forward, v)
	if f.Masquerade {
		f.rewrite(d, forward, v)
	}
}

// follow keeps the state of a flow.
func (f *Flow) follow(now int64, forward bool, v *ipkt.View) {
	if f.last.Load() != now {
		f.last.Store(now)
	}
	state := f.state.Load()
	if f.Proto != ipkt.TCP {
		if !forward && state == stateNew {
			f.state.Store(stateEstablished)
		}
		return
	}
	if !v.First {
		return
	}
	switch {
	case v.Flags&ipkt.RST != 0:
		if state != stateNew || !forward {
			f.state.Store(stateClosed)
		}
	case v.Flags&ipkt.FIN != 0:
		bit := uint32(1)
		if !forward {
			bit = 2
		}
		if f.fins.Or(bit)|bit == 3 {
			f.state.Store(stateClosed)
		} else if state != stateClosed {
			f.state.Store(stateClosing)
		}
	case v.Flags&ipkt.SYN != 0 && forward && state == stateClosed: // the port is used again
		f.fins.Store(0)
		f.state.Store(stateNew)
	case state == stateNew && !forward:
		f.state.Store(stateEstablished)
	}
}

// rewrite translates addresses, ports and checksums.
func (f *Flow) rewrite(d *Direction, forward bool, v *ipkt.View) {
	b := v.B
	if v.V6 {
		if forward {
			copy(b[8:24], f.External[:])
		} else {
			copy(b[24:40], f.Client[:])
		}
	} else {
		if forward {
			copy(b[12:16], f.External[12:])
		} else {
			copy(b[16:20], f.Client[12:])
		}
		ipkt.AdjustDelta(b[10:], d.addrDelta)
	}
	if !v.First {
		return
	}
	l4 := b[v.L4:]
	switch v.Proto {
	case ipkt.TCP, ipkt.UDP:
		if forward {
			l4[0], l4[1] = byte(f.ExtPort>>8), byte(f.ExtPort)
		} else {
			l4[2], l4[3] = byte(f.ClientPort>>8), byte(f.ClientPort)
		}
		if v.Proto == ipkt.TCP {
			ipkt.AdjustDelta(l4[16:], d.l4Delta)
		} else if l4[6] != 0 || l4[7] != 0 { // 0 = no checksum
			ipkt.AdjustDelta(l4[6:], d.l4Delta)
			if l4[6] == 0 && l4[7] == 0 {
				l4[6], l4[7] = 0xff, 0xff
			}
		}
	case ipkt.ICMP, ipkt.ICMPv6:
		if forward {
			l4[4], l4[5] = byte(f.ExtPort>>8), byte(f.ExtPort)
		} else {
			l4[4], l4[5] = byte(f.ClientPort>>8), byte(f.ClientPort)
		}
		ipkt.AdjustDelta(l4[2:], d.l4Delta)
	}
}

// NewFlow says what to open.
type NewFlow struct {
	Network    uint64
	External   netip.Addr // source to use; invalid = no translation
	NextHop    netip.Addr
	MTU        int
	Generation uint64
}

// Open makes the flow that begins with a packet from a side. If it exists
// already, because another worker was faster, that one is returned.
func (t *Table) Open(now int64, side Side, v *ipkt.View, n NewFlow) (*Flow, error) {
	k, ok := keyOf(side, v)
	if !ok {
		return nil, ErrProtocol
	}
	if v.Proto == ipkt.TCP && v.Flags&ipkt.RST != 0 {
		return nil, ErrNotFirst
	}
	if (v.Proto == ipkt.ICMP || v.Proto == ipkt.ICMPv6) && k.sport == 0 && k.dport != 0 {
		return nil, ErrNotFirst // an echo reply to nothing
	}
	translate := n.External.IsValid()
	if translate && ClassOf(v.Proto) == ClassOther {
		return nil, ErrProtocol
	}
	class := ClassOf(v.Proto)
	t.mu.Lock()
	defer t.mu.Unlock()
	if f := t.find(&k); f != nil {
		return f, nil
	}
	if t.count >= t.cfg.MaxFlows && !t.evict() {
		t.stats.Full[class].Add(1)
		return nil, ErrTableFull
	}
	f := &Flow{
		Network: n.Network, Proto: v.Proto, V6: v.V6, FromVPC: side == VPC, Client: v.Src, Server: v.Dst,
		ClientPort: k.sport, ServerPort: k.dport, External: v.Src, ExtPort: k.sport,
		NextHop: n.NextHop, MTU: n.MTU, Created: now, Masquerade: translate,
	}
	f.last.Store(now)
	f.Generation.Store(n.Generation)
	if translate {
		if err := t.allocate(f, n.External); err != nil {
			t.stats.NoPort[class].Add(1)
			return nil, err
		}
		f.deltas()
	}
	f.keys[0] = k
	other := Overlay
	if side == Overlay {
		other = VPC
	}
	f.keys[1] = key{src: f.Server, dst: f.External, sport: f.ServerPort, dport: f.ExtPort, proto: f.Proto, side: other}
	for i := range f.keys {
		s := &t.shards[f.keys[i].shard()]
		s.mu.Lock()
		s.m[f.keys[i]] = f
		s.mu.Unlock()
	}
	t.count++
	t.stats.Live[class].Add(1)
	t.stats.Created[class].Add(1)
	return f, nil
}

// deltas precomputes the checksum changes.
func (f *Flow) deltas() {
	port := func(p uint16) []byte { return []byte{byte(p >> 8), byte(p)} }
	addr := ipkt.Delta(f.Client[:], f.External[:])
	back := ipkt.Delta(f.External[:], f.Client[:])
	f.Forward.addrDelta, f.Reverse.addrDelta = addr, back
	pd, pb := ipkt.Delta(port(f.ClientPort), port(f.ExtPort)), ipkt.Delta(port(f.ExtPort), port(f.ClientPort))
	if f.Proto == ipkt.ICMP { // its checksum doesn't cover addresses
		addr, back = 0, 0
	}
	f.Forward.l4Delta, f.Reverse.l4Delta = ipkt.AddDelta(addr, pd), ipkt.AddDelta(back, pb)
}

// allocate chooses the external port: the client's existing mapping, else the
// same number, else a free one of the same class (RFC 4787 REQ-1, REQ-3).
func (t *Table) allocate(f *Flow, ext netip.Addr) error {
	f.External = ipkt.Bytes(ext)
	f.eim = eimKey{src: f.Client, ext: f.External, port: f.ClientPort, proto: f.Proto}
	if m := t.mappings[f.eim]; m != nil {
		m.refs++
		f.ExtPort = m.port
		return nil
	}
	pk := poolKey{f.External, f.Proto}
	p := t.pools[pk]
	if p == nil {
		p = &pool{}
		t.pools[pk] = p
	}
	port, ok := p.take(f.ClientPort, f.Proto == ipkt.ICMP || f.Proto == ipkt.ICMPv6)
	if !ok {
		return ErrNoPort
	}
	t.stats.PortsInUse[ClassOf(f.Proto)].Add(1)
	t.mappings[f.eim] = &mapping{port: port, refs: 1}
	f.ExtPort = port
	return nil
}

func (p *pool) free(port int) bool { return p.used[port/64]&(1<<(port%64)) == 0 }

func (p *pool) take(want uint16, icmp bool) (uint16, bool) {
	first, last := 1024, LocalPortFirst-1
	switch {
	case icmp:
		first = 0
	case want < 1024:
		first, last = 1, 1023
	}
	pick := -1
	if w := int(want); w >= first && w <= last && p.free(w) {
		pick = w
	} else {
		n := last - first + 1
		start := rand.IntN(n)
		for i := range n {
			if c := first + (start+i)%n; p.free(c) {
				pick = c
				break
			}
		}
	}
	if pick < 0 {
		return 0, false
	}
	p.used[pick/64] |= 1 << (pick % 64)
	p.count++
	return uint16(pick), true
}

// remove takes a flow out. t.mu is held.
func (t *Table) remove(f *Flow) {
	if f.dead.Swap(true) {
		return
	}
	for i := range f.keys {
		s := &t.shards[f.keys[i].shard()]
		s.mu.Lock()
		if s.m[f.keys[i]] == f {
			delete(s.m, f.keys[i])
		}
		s.mu.Unlock()
	}
	t.count--
	t.stats.Live[ClassOf(f.Proto)].Add(-1)
	if !f.Masquerade {
		return
	}
	if m := t.mappings[f.eim]; m != nil {
		if m.refs--; m.refs == 0 {
			delete(t.mappings, f.eim)
			if p := t.pools[poolKey{f.External, f.Proto}]; p != nil {
				p.used[m.port/64] &^= 1 << (m.port % 64)
				p.count--
				t.stats.PortsInUse[ClassOf(f.Proto)].Add(-1)
			}
		}
	}
}

// evict makes room by removing a flow that was never answered; established ones
// are never taken (RFC 7857, decision D4).
func (t *Table) evict() bool {
	const tries = 8
	for range tries {
		s := &t.shards[rand.IntN(numShards)]
		var victim *Flow
		s.mu.RLock()
		looked := 0
		for _, f := range s.m {
			if f.state.Load() == stateNew && (victim == nil || f.last.Load() < victim.last.Load()) {
				victim = f
			}
			if looked++; looked > 64 {
				break
			}
		}
		s.mu.RUnlock()
		if victim != nil {
			t.stats.Evicted[ClassOf(victim.Proto)].Add(1)
			t.remove(victim)
			return true
		}
	}
	return false
}

// Sweep removes flows that were idle too long. Each call looks at a part of the
// table, a whole pass takes eight calls.
func (t *Table) Sweep(now int64) {
	const part = numShards / 8
	for range part {
		s := &t.shards[t.sweepAt]
		t.sweepAt = (t.sweepAt + 1) % numShards
		var idle []*Flow
		s.mu.RLock()
		for _, f := range s.m {
			if now-f.last.Load() >= int64(t.timeout(f)) {
				idle = append(idle, f)
			}
		}
		s.mu.RUnlock()
		if len(idle) == 0 {
			continue
		}
		t.mu.Lock()
		for _, f := range idle {
			if f.dead.Load() {
				continue
			}
			if f.state.Load() == stateClosed {
				t.stats.Closed[ClassOf(f.Proto)].Add(1)
			} else {
				t.stats.Idle[ClassOf(f.Proto)].Add(1)
			}
			t.remove(f)
		}
		t.mu.Unlock()
	}
	t.frags.expire(now)
}

// Flush removes the flows for which match reports true.
func (t *Table) Flush(match func(*Flow) bool) (n int) {
	t.each(func(f *Flow) {
		if match(f) {
			t.mu.Lock()
			t.stats.Flushed[ClassOf(f.Proto)].Add(1)
			t.remove(f)
			t.mu.Unlock()
			n++
		}
	})
	return n
}

// each calls f for every flow once, outside of all locks.
func (t *Table) each(f func(*Flow)) {
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.RLock()
		list := make([]*Flow, 0, len(s.m))
		for k, fl := range s.m {
			if k == fl.keys[0] {
				list = append(list, fl)
			}
		}
		s.mu.RUnlock()
		for _, fl := range list {
			f(fl)
		}
	}
}

// Info describes a flow.
type Info struct {
	*Flow
	State string
	Last  int64
}

// Walk calls f for every flow until it returns false.
func (t *Table) Walk(f func(Info) bool) {
	more := true
	t.each(func(fl *Flow) {
		if more {
			more = f(Info{fl, stateNames[fl.state.Load()], fl.last.Load()})
		}
	})
}

// Len returns the number of flows.
func (t *Table) Len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.count
}

// Remove takes a flow out, because it may no longer pass.
func (t *Table) Remove(f *Flow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !f.dead.Load() {
		t.stats.Flushed[ClassOf(f.Proto)].Add(1)
		t.remove(f)
	}
}

// Dead reports whether the flow was removed.
func (f *Flow) Dead() bool { return f.dead.Load() }
