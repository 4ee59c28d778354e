// Package neigh resolves IP addresses to MACs on an Ethernet network, by ARP
// (RFC 826) and neighbour discovery (RFC 4861), and answers for the own
// addresses. It sends through a function and reads no clock.
package neigh

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ztgate/netstack/internal/ipkt"
)

// MAC is an Ethernet address.
type MAC [6]byte

// Bounds and times.
const (
	maxEntries  = 4096
	maxPending  = 256 // unresolved addresses
	maxQueued   = 64  // packets per unresolved address
	maxSilent   = 256 // addresses that didn't answer
	lifetime    = int64(2 * time.Minute)
	refreshFrom = int64(30 * time.Second) // a used entry of this age is asked for again
	retryEvery  = int64(time.Second)
	maxTries    = 5
)

type entry struct {
	mac       MAC
	confirmed int64
	asked     atomic.Int64
}

// Waiting is a packet that waits for the MAC of its next hop.
type Waiting struct {
	Packet []byte
	Class  uint8 // how the caller counts it
}

type pending struct {
	packets []Waiting
	asked   int64
	tries   int
}

// Table is the neighbours on one attachment. It is safe for concurrent use.
type Table struct {
	mac  MAC
	send func(frame []byte) // an Ethernet frame; called without locks

	mu      sync.RWMutex
	own     []netip.Addr
	proxy   []netip.Prefix // answered for, too
	entries map[netip.Addr]*entry
	waiting map[netip.Addr]*pending
	silent  map[netip.Addr]MAC // that didn't answer when they were asked last, with the MAC that they had
}

// New makes the table of an attachment.
func New(mac MAC, own []netip.Addr, send func(frame []byte)) *Table {
	return &Table{mac: mac, own: own, send: send, entries: make(map[netip.Addr]*entry), waiting: make(map[netip.Addr]*pending),
		silent: make(map[netip.Addr]MAC)}
}

// SetOwn replaces the own addresses.
func (t *Table) SetOwn(own []netip.Addr) {
	t.mu.Lock()
	t.own = own
	t.mu.Unlock()
}

// SetProxy replaces the prefixes whose addresses are answered for like own ones.
func (t *Table) SetProxy(list []netip.Prefix) {
	t.mu.Lock()
	t.proxy = list
	t.mu.Unlock()
}

// mine reports addresses that are answered for.
func (t *Table) mine(a netip.Addr) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return slices.Contains(t.own, a) || slices.ContainsFunc(t.proxy, func(p netip.Prefix) bool { return p.Contains(a) })
}

// Announce tells everybody that an own address is here now (RFC 5227 §2.3,
// RFC 4861 §7.2.6).
func (t *Table) Announce(a netip.Addr) {
	if a.Is4() {
		t.send(t.arp(MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, 1, a, MAC{}, a))
		return
	}
	const override = 0x20
	all := netip.IPv6LinkLocalAllNodes()
	t.send(t.ndp(MAC{0x33, 0x33, 0, 0, 0, 1}, a, all, advertisement, override, a, optTarget))
}

// Lookup returns the MAC of an address if it is known.
func (t *Table) Lookup(now int64, a netip.Addr) (MAC, bool) {
	t.mu.RLock()
	e := t.entries[a]
	t.mu.RUnlock()
	if e == nil || now-e.confirmed >= lifetime {
		return MAC{}, false
	}
	if now-e.confirmed >= refreshFrom {
		if asked := e.asked.Load(); now-asked >= refreshFrom && e.asked.CompareAndSwap(asked, now) {
			t.refresh(now, a, e)
		}
	}
	return e.mac, true
}

// refresh asks a known neighbour whether it is still there. If it doesn't answer,
// [Table.Tick] forgets it: a host that is gone would mean silence for the whole
// lifetime (RFC 4861 §7.3.3).
func (t *Table) refresh(now int64, a netip.Addr, e *entry) {
	t.mu.Lock()
	if t.waiting[a] == nil && len(t.waiting) < maxPending {
		t.waiting[a] = &pending{asked: now, tries: 1}
	}
	t.mu.Unlock()
	t.ask(a, &e.mac)
}

// Resolve keeps a copy of an IP packet until the address is resolved, and asks.
// It reports false if there is no room for it.
func (t *Table) Resolve(now int64, a netip.Addr, packet []byte, class uint8) (kept bool) {
	t.mu.Lock()
	p := t.waiting[a]
	ask := false
	if p == nil {
		if len(t.waiting) >= maxPending {
			t.mu.Unlock()
			return false
		}
		p = &pending{asked: now, tries: 1}
		t.waiting[a] = p
		ask = true
	}
	if kept = len(p.packets) < maxQueued; kept {
		p.packets = append(p.packets, Waiting{slices.Clone(packet), class})
	}
	t.mu.Unlock()
	if ask {
		t.ask(a, nil)
	}
	return kept
}

// Silent reports whether an address did not answer when it was asked last, and the
// MAC that it had before, zero if it never had one.
func (t *Table) Silent(a netip.Addr) (was MAC, silent bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	was, silent = t.silent[a]
	return was, silent
}

// silence notes that an address doesn't answer. With many of them any other is
// forgotten.
func (t *Table) silence(a netip.Addr) {
	was, known := t.silent[a]
	if e := t.entries[a]; e != nil {
		was = e.mac
	}
	if !known && len(t.silent) >= maxSilent {
		for other := range t.silent {
			delete(t.silent, other)
			break
		}
	}
	t.silent[a] = was
}

// learn stores a mapping and returns the packets that waited for it. Only
// addresses we asked about or know already are stored, unless the message was
// directed at us.
func (t *Table) learn(now int64, a netip.Addr, mac MAC, directed bool) []Waiting {
	if mac[0]&1 != 0 || !a.IsValid() || a.IsUnspecified() || a.IsMulticast() {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.waiting[a]
	e := t.entries[a]
	if e == nil && p == nil && !directed || slices.Contains(t.own, a) {
		return nil
	}
	if e == nil && len(t.entries) >= maxEntries {
		for k, old := range t.entries {
			if now-old.confirmed >= lifetime {
				delete(t.entries, k)
			}
		}
		if len(t.entries) >= maxEntries {
			return nil
		}
	}
	t.entries[a] = &entry{mac: mac, confirmed: now}
	delete(t.waiting, a)
	delete(t.silent, a)
	if p == nil {
		return nil
	}
	return p.packets
}

// Tick repeats questions, and forgets neighbours that don't answer. It returns the
// packets that waited for them.
func (t *Table) Tick(now int64) (failed []Waiting) {
	var ask []netip.Addr
	t.mu.Lock()
	for a, p := range t.waiting {
		if now-p.asked < retryEvery {
			continue
		}
		if p.tries >= maxTries {
			failed = append(failed, p.packets...)
			t.silence(a)
			delete(t.waiting, a)
			delete(t.entries, a)
			continue
		}
		p.asked = now
		p.tries++
		ask = append(ask, a)
	}
	t.mu.Unlock()
	for _, a := range ask {
		t.ask(a, nil)
	}
	return failed
}

// source returns an own address of the family, the same prefix preferred.
func (t *Table) source(a netip.Addr) (best netip.Addr) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	bits := -1
	for _, o := range t.own {
		if o.Is4() != a.Is4() {
			continue
		}
		x, y := o.AsSlice(), a.AsSlice()
		n := 0
		for n < len(x) && x[n] == y[n] {
			n++
		}
		if n > bits {
			best, bits = o, n
		}
	}
	return best
}

func (t *Table) ask(a netip.Addr, at *MAC) {
	src := t.source(a)
	if !src.IsValid() {
		return
	}
	if a.Is4() {
		dst := MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
		if at != nil {
			dst = *at
		}
		t.send(t.arp(dst, 1, src, MAC{}, a))
		return
	}
	t.send(t.solicit(src, a))
}

func (t *Table) header(b []byte, dst MAC, etherType uint16) []byte {
	b = append(append(b, dst[:]...), t.mac[:]...)
	return binary.BigEndian.AppendUint16(b, etherType)
}

func (t *Table) arp(dst MAC, op uint16, src netip.Addr, targetMAC MAC, target netip.Addr) []byte {
	b := t.header(make([]byte, 0, 42), dst, 0x0806)
	b = append(b, 0, 1, 8, 0, 6, 4)
	b = binary.BigEndian.AppendUint16(b, op)
	s, d := src.As4(), target.As4()
	b = append(append(b, t.mac[:]...), s[:]...)
	return append(append(b, targetMAC[:]...), d[:]...)
}

// HandleARP handles the payload of an ARP frame and returns the packets that can
// be sent now, with the address they are for.
func (t *Table) HandleARP(now int64, b []byte) (ready []Waiting, from netip.Addr) {
	if len(b) < 28 || [6]byte(b[:6]) != [6]byte{0, 1, 8, 0, 6, 4} {
		return nil, netip.Addr{}
	}
	op := binary.BigEndian.Uint16(b[6:])
	mac, from := MAC(b[8:14]), netip.AddrFrom4([4]byte(b[14:18]))
	target := netip.AddrFrom4([4]byte(b[24:28]))
	mine := t.mine(target)
	ready = t.learn(now, from, mac, mine)
	if op == 1 && mine && mac != t.mac {
		t.send(t.arp(mac, 2, target, mac, from))
	}
	return ready, from
}

// IPv6 neighbour discovery.
const (
	solicitation  = 135
	advertisement = 136
	optSource     = 1
	optTarget     = 2
)

func solicitedNode(a netip.Addr) (netip.Addr, MAC) {
	b := a.As16()
	g := [16]byte{0: 0xff, 1: 0x02, 11: 1, 12: 0xff, 13: b[13], 14: b[14], 15: b[15]}
	return netip.AddrFrom16(g), MAC{0x33, 0x33, 0xff, b[13], b[14], b[15]}
}

func (t *Table) solicit(src, target netip.Addr) []byte {
	group, mac := solicitedNode(target)
	return t.ndp(mac, src, group, solicitation, 0, target, optSource)
}

func (t *Table) ndp(dstMAC MAC, src, dst netip.Addr, typ, flags byte, target netip.Addr, opt byte) []byte {
	b := t.header(make([]byte, 0, 86), dstMAC, 0x86dd)
	b = append(b, 0x60, 0, 0, 0, 0, 32, ipkt.ICMPv6, 255)
	s, d, tg := src.As16(), dst.As16(), target.As16()
	b = append(append(b, s[:]...), d[:]...)
	b = append(b, typ, 0, 0, 0, flags, 0, 0, 0)
	b = append(append(b, tg[:]...), opt, 1)
	b = append(b, t.mac[:]...)
	sum := ipkt.PseudoSum(true, s, d, ipkt.ICMPv6, 32)
	binary.BigEndian.PutUint16(b[14+42:], ipkt.Checksum(b[14+40:], sum))
	return b
}

// IsNDP reports whether a checked packet is neighbour discovery.
func IsNDP(v *ipkt.View) bool {
	return v.Proto == ipkt.ICMPv6 && v.First && (v.ICMPType == solicitation || v.ICMPType == advertisement)
}

// HandleNDP handles a neighbour discovery packet; see [Table.HandleARP]. Packets
// that passed a router (hop limit below 255) or have a bad checksum are ignored.
func (t *Table) HandleNDP(now int64, v *ipkt.View) (ready []Waiting, from netip.Addr) {
	b := v.B[v.L4:]
	if v.TTL != 255 || len(b) < 24 || ipkt.Checksum(b, ipkt.PseudoSum(true, v.Src, v.Dst, ipkt.ICMPv6, len(b))) != 0 {
		return nil, netip.Addr{}
	}
	target := netip.AddrFrom16([16]byte(b[8:24]))
	var mac MAC
	has := false
	for o := b[24:]; len(o) >= 8 && int(o[1])*8 <= len(o) && o[1] > 0; o = o[int(o[1])*8:] {
		if want := map[uint8]byte{solicitation: optSource, advertisement: optTarget}[v.ICMPType]; o[0] == want {
			mac, has = MAC(o[2:8]), true
		}
	}
	if v.ICMPType == advertisement {
		if !has {
			return nil, netip.Addr{}
		}
		return t.learn(now, target, mac, false), target
	}
	mine := t.mine(target)
	if !mine {
		return nil, netip.Addr{}
	}
	src := v.Source()
	if has && src.Is6() && !src.IsUnspecified() {
		ready = t.learn(now, src, mac, true)
		const router, solicited, override = 0x80, 0x40, 0x20
		t.send(t.ndp(mac, target, src, advertisement, router|solicited|override, target, optTarget))
	}
	return ready, src
}

// Len returns the number of resolved addresses.
func (t *Table) Len() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.entries)
}
