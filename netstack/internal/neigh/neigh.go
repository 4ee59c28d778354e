// Package neigh resolves IP addresses to MACs on an Ethernet network, by ARP
// (RFC 826) and neighbour discovery (RFC 4861), and answers for the own
// addresses. It sends through a function and reads no clock.
//
// The MAC in front of a frame is proven by the network; what ARP and neighbour
// discovery say in their messages isn't. An address is bound to the MAC that proves it
// by a certificate, else to the first that used it. Another one gets it when the first is
// silent although it is asked, as in RFC 4861 §7.3.3 and RFC 5227 §2.4.
package neigh

import (
	"encoding/binary"
	"maps"
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
	maxEntries    = 4096
	maxUninvited  = 64  // addresses of one MAC that nobody asked for
	maxPending    = 256 // unresolved addresses
	maxQueued     = 64  // packets per unresolved address
	maxSilent     = 256 // addresses that never answered
	maxContests   = 128 // addresses that two claim, at the same time
	maxRivals     = 8   // of them by one MAC
	lifetime      = int64(2 * time.Minute)
	refreshFrom   = int64(30 * time.Second) // a used entry of this age is asked for again
	retryEvery    = int64(time.Second)
	maxTries      = 5
	contestTries  = 3                       // questions to the owner before another gets its address
	silenceCounts = int64(10 * time.Second) // for how long it counts that the owner didn't answer
	contestPause  = int64(5 * time.Second)  // after the owner has answered
	cleanEvery    = int64(time.Second)
)

// entry says whose an address is. It is replaced as a whole.
type entry struct {
	mac       MAC
	confirmed int64 // of the MAC's reachability; 0 = not by its own word
	silent    int64 // when it was found not to answer, 0 = never
	defended  int64 // when it last answered while another claimed the address
	uninvited bool  // nobody asked for it
	asked     atomic.Int64
}

// reachable reports an entry that packets may be sent by.
func (e *entry) reachable(now int64) bool { return e.confirmed != 0 && now-e.confirmed < lifetime }

// contest is another MAC's claim of an address whose owner is being asked.
type contest struct {
	rival MAC
	asked int64
	tries int
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

// Verdict says what became of a message or of a claim.
type Verdict uint8

const (
	Fine    Verdict = iota
	Invalid         // malformed, or it says another MAC than its frame, which is proven
	Refused         // the address is another's
)

// Conflict is an address that two claim.
type Conflict struct {
	Address      netip.Addr
	Owner, Rival MAC
	Moved        bool // the rival has it now
}

// Config is what a table needs of its surroundings. Its functions are called without
// the table's locks.
type Config struct {
	MAC  MAC
	Send func(frame []byte)
	// Owns reports whether a certificate says that an address is a MAC's; nil = there
	// are no certificates.
	Owns func(mac MAC, a netip.Addr) bool
	// Conflict is told of addresses that two claim; nil = nobody is.
	Conflict func(Conflict)
}

// Table is the neighbours on one attachment. It is safe for concurrent use.
type Table struct {
	cfg Config
	mac MAC

	contested atomic.Int32 // length of contests

	mu       sync.RWMutex
	own      []netip.Addr
	proxy    []netip.Prefix // answered for, too
	entries  map[netip.Addr]*entry
	guests   map[MAC]int // uninvited entries
	waiting  map[netip.Addr]*pending
	contests map[netip.Addr]*contest
	silent   map[netip.Addr]struct{} // that are nobody's and didn't answer when they were asked last
	cleaned  int64
}

// New makes the table of an attachment.
func New(cfg Config, own []netip.Addr) *Table {
	return &Table{cfg: cfg, mac: cfg.MAC, own: own, entries: make(map[netip.Addr]*entry), guests: make(map[MAC]int),
		waiting: make(map[netip.Addr]*pending), contests: make(map[netip.Addr]*contest), silent: make(map[netip.Addr]struct{})}
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
	return t.mineLocked(a)
}

func (t *Table) mineLocked(a netip.Addr) bool {
	return slices.Contains(t.own, a) || slices.ContainsFunc(t.proxy, func(p netip.Prefix) bool { return p.Contains(a) })
}

// Announce tells everybody that an own address is here now (RFC 5227 §2.3,
// RFC 4861 §7.2.6).
func (t *Table) Announce(a netip.Addr) {
	if a.Is4() {
		t.cfg.Send(t.arp(MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, 1, a, MAC{}, a))
		return
	}
	const override = 0x20
	all := netip.IPv6LinkLocalAllNodes()
	t.cfg.Send(t.ndp(MAC{0x33, 0x33, 0, 0, 0, 1}, a, all, advertisement, override, a, optTarget))
}

// Lookup returns the MAC of an address if it is known and answers.
func (t *Table) Lookup(now int64, a netip.Addr) (MAC, bool) {
	t.mu.RLock()
	e := t.entries[a]
	t.mu.RUnlock()
	if e == nil || !e.reachable(now) {
		return MAC{}, false
	}
	if now-e.confirmed >= refreshFrom {
		if asked := e.asked.Load(); now-asked >= refreshFrom && e.asked.CompareAndSwap(asked, now) {
			t.refresh(now, a, &e.mac)
		}
	}
	return e.mac, true
}

// Owner returns the MAC that an address is bound to, whether or not it answers.
func (t *Table) Owner(a netip.Addr) (MAC, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if e := t.entries[a]; e != nil {
		return e.mac, true
	}
	return MAC{}, false
}

// refresh asks a known neighbour whether it is still there. If it doesn't answer,
// [Table.Tick] takes it for unreachable: a host that is gone would mean silence for the
// whole lifetime (RFC 4861 §7.3.3).
func (t *Table) refresh(now int64, a netip.Addr, at *MAC) {
	t.mu.Lock()
	ask := t.waiting[a] == nil && len(t.waiting) < maxPending
	if ask {
		t.waiting[a] = &pending{asked: now, tries: 1}
	}
	t.mu.Unlock()
	if ask {
		t.ask(a, at)
	}
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
// MAC that it is bound to, zero if it never had one.
func (t *Table) Silent(a netip.Addr) (was MAC, silent bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if e := t.entries[a]; e != nil {
		return e.mac, e.silent != 0
	}
	_, silent = t.silent[a]
	return MAC{}, silent
}

// silence notes that an address doesn't answer: it stays its owner's until another claims
// it. Of many that are nobody's any other is forgotten. t.mu is held.
func (t *Table) silence(now int64, a netip.Addr) {
	if e := t.entries[a]; e != nil {
		t.entries[a] = &entry{mac: e.mac, silent: now, uninvited: e.uninvited}
		return
	}
	if _, known := t.silent[a]; !known && len(t.silent) >= maxSilent {
		for other := range t.silent {
			delete(t.silent, other)
			break
		}
	}
	t.silent[a] = struct{}{}
}

// From judges a packet that a MAC sent from an address of its own. The first one binds
// the address to it, if nothing has; what is not the owner's is refused.
func (t *Table) From(now int64, a netip.Addr, mac MAC) Verdict {
	t.mu.RLock()
	e := t.entries[a]
	t.mu.RUnlock()
	if e != nil && e.mac == mac {
		if t.contested.Load() > 0 {
			t.defend(now, a, mac)
		}
		return Fine
	}
	_, v := t.learn(now, a, mac, said{packet: true})
	return v
}

// Through judges a packet that a MAC sent on for others, as the router at an address.
// One that nothing is known of is asked for.
func (t *Table) Through(now int64, router netip.Addr, mac MAC) Verdict {
	t.mu.RLock()
	e := t.entries[router]
	t.mu.RUnlock()
	if e != nil && e.mac == mac {
		return Fine
	}
	if e == nil {
		t.refresh(now, router, nil)
		return Fine
	}
	// Perhaps another one is the router now.
	if asked := e.asked.Load(); now-asked >= contestPause && e.asked.CompareAndSwap(asked, now) {
		t.refresh(now, router, &e.mac)
	}
	return Refused
}

// said is how a MAC claims an address.
type said struct {
	directed bool // at us
	packet   bool // by sending from it
}

// learn takes over what a MAC says of an address, and returns the packets that waited for
// it. Only addresses we asked about or know already are stored, unless it was said to us.
func (t *Table) learn(now int64, a netip.Addr, mac MAC, how said) ([]Waiting, Verdict) {
	if mac[0]&1 != 0 || mac == t.mac || !a.IsValid() || a.IsMulticast() {
		return nil, Invalid
	}
	if a.IsUnspecified() { // a probe before an address is used (RFC 5227 §2.1, RFC 4862 §5.4)
		return nil, Fine
	}
	owner, bound := t.Owner(a)
	mineByProof, theirsByProof := false, false
	if bound && owner != mac && t.cfg.Owns != nil {
		mineByProof, theirsByProof = t.cfg.Owns(mac, a), t.cfg.Owns(owner, a)
	}
	t.mu.Lock()
	p, e := t.waiting[a], t.entries[a]
	var told *Conflict
	var ask bool
	v := Fine
	switch {
	case t.mineLocked(a):
		told, v = &Conflict{Address: a, Owner: t.mac, Rival: mac}, Refused
	case e == nil:
		if p == nil && !how.directed && !how.packet {
			break
		}
		t.bind(now, a, mac, how, p == nil)
	case e.mac == mac:
		if !how.packet {
			t.bind(now, a, mac, how, e.uninvited && p == nil)
		}
	case e.mac != owner: // it has just changed
		v = Refused
	case mineByProof && !theirsByProof,
		e.confirmed == 0 && e.silent == 0 && p != nil && !how.packet && !theirsByProof, // the first that answers
		e.silent != 0 && now-e.silent < silenceCounts && !theirsByProof:
		told = &Conflict{a, e.mac, mac, true}
		t.bind(now, a, mac, how, p == nil)
	default:
		told, v = &Conflict{Address: a, Owner: e.mac, Rival: mac}, Refused
		ask = !theirsByProof && t.contestLocked(now, a, e, mac)
	}
	var ready []Waiting
	if e := t.entries[a]; e != nil && e.mac == mac && e.reachable(now) {
		if p != nil {
			ready = p.packets
			delete(t.waiting, a)
		}
		t.settle(a)
	}
	t.mu.Unlock()
	if ask && !t.probe(a, owner) { // we have no address to ask from
		t.mu.Lock()
		t.settle(a)
		t.mu.Unlock()
	}
	if told != nil && t.cfg.Conflict != nil {
		t.cfg.Conflict(*told)
	}
	return ready, v
}

// bind gives an address to a MAC if there is room. t.mu is held.
func (t *Table) bind(now int64, a netip.Addr, mac MAC, how said, uninvited bool) {
	old := t.entries[a]
	switch {
	case old != nil:
	case uninvited && t.guests[mac] >= maxUninvited:
		return
	case len(t.entries) >= maxEntries:
		if t.clean(now); len(t.entries) >= maxEntries {
			return
		}
	}
	t.unbind(a)
	delete(t.silent, a)
	e := &entry{mac: mac, uninvited: uninvited}
	if !how.packet {
		e.confirmed = now
	}
	if old != nil && old.mac == mac {
		e.defended = old.defended
		e.asked.Store(old.asked.Load())
		if t.contests[a] != nil {
			e.defended = now
		}
	}
	if t.entries[a] = e; uninvited {
		t.guests[mac]++
	}
}

// unbind forgets whose an address is. t.mu is held.
func (t *Table) unbind(a netip.Addr) {
	e := t.entries[a]
	if e == nil {
		return
	}
	delete(t.entries, a)
	if e.uninvited {
		if t.guests[e.mac]--; t.guests[e.mac] == 0 {
			delete(t.guests, e.mac)
		}
	}
}

// clean forgets the bindings of those that don't answer. t.mu is held.
func (t *Table) clean(now int64) {
	if t.cleaned != 0 && now-t.cleaned < cleanEvery {
		return
	}
	t.cleaned = now
	for a, e := range t.entries {
		if !e.reachable(now) {
			t.unbind(a)
			t.settle(a)
		}
	}
}

// contestLocked notes that another MAC claims an address, and reports whether its owner
// is to be asked. t.mu is held.
func (t *Table) contestLocked(now int64, a netip.Addr, e *entry, rival MAC) bool {
	if t.contests[a] != nil || len(t.contests) >= maxContests || e.defended != 0 && now-e.defended < contestPause {
		return false
	}
	n := 0
	for _, c := range t.contests {
		if c.rival == rival {
			n++
		}
	}
	if n >= maxRivals {
		return false
	}
	t.contests[a] = &contest{rival: rival, asked: now, tries: 1}
	t.contested.Store(int32(len(t.contests)))
	return true
}

// settle ends the contest about an address. t.mu is held.
func (t *Table) settle(a netip.Addr) {
	delete(t.contests, a)
	t.contested.Store(int32(len(t.contests)))
}

// defend notes that the owner of an address is there.
func (t *Table) defend(now int64, a netip.Addr, mac MAC) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.entries[a]; t.contests[a] != nil && e != nil && e.mac == mac {
		t.entries[a] = &entry{mac: mac, confirmed: e.confirmed, defended: now, uninvited: e.uninvited}
		t.settle(a)
	}
}

// Resolved are packets that can be sent to an address now.
type Resolved struct {
	Address netip.Addr
	Packets []Waiting
}

func sorted[V any](m map[netip.Addr]V) []netip.Addr {
	if len(m) == 0 {
		return nil
	}
	return slices.SortedFunc(maps.Keys(m), netip.Addr.Compare)
}

// Tick repeats questions. It returns the packets that waited for neighbours that don't
// answer, and those for addresses that have a new owner because the old one is silent.
func (t *Table) Tick(now int64) (failed []Waiting, ready []Resolved) {
	var ask, probe []netip.Addr
	var owners []MAC
	var told []Conflict
	t.mu.Lock()
	for _, a := range sorted(t.contests) { // so that simulations can repeat it
		c, e := t.contests[a], t.entries[a]
		switch {
		case now-c.asked < retryEvery:
		case c.tries < contestTries:
			c.asked = now
			c.tries++
			probe, owners = append(probe, a), append(owners, e.mac)
		default:
			told = append(told, Conflict{a, e.mac, c.rival, true})
			t.bind(now, a, c.rival, said{}, e.uninvited)
			t.settle(a)
			if p := t.waiting[a]; p != nil {
				ready = append(ready, Resolved{a, p.packets})
				delete(t.waiting, a)
			}
		}
	}
	for _, a := range sorted(t.waiting) {
		p := t.waiting[a]
		if now-p.asked < retryEvery {
			continue
		}
		if p.tries >= maxTries {
			failed = append(failed, p.packets...)
			delete(t.waiting, a)
			t.silence(now, a)
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
	for i, a := range probe {
		t.probe(a, owners[i])
	}
	if t.cfg.Conflict != nil {
		for _, c := range told {
			t.cfg.Conflict(c)
		}
	}
	return failed, ready
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

// probe asks the owner of an address, and nobody else. It reports false if we have no
// address to ask from.
func (t *Table) probe(a netip.Addr, owner MAC) bool {
	src := t.source(a)
	switch {
	case !src.IsValid():
		return false
	case a.Is4():
		t.cfg.Send(t.arp(owner, 1, src, MAC{}, a))
	default:
		t.cfg.Send(t.ndp(owner, src, a, solicitation, 0, a, optSource))
	}
	return true
}

// ask asks all for an address, or by ARP the one that is said to have it.
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
		t.cfg.Send(t.arp(dst, 1, src, MAC{}, a))
		return
	}
	t.cfg.Send(t.solicit(src, a))
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

// HandleARP handles the payload of an ARP frame that a MAC sent, and returns the
// packets that can be sent now, with the address they are for.
func (t *Table) HandleARP(now int64, sender MAC, b []byte) (ready []Waiting, from netip.Addr, v Verdict) {
	if len(b) < 28 || [6]byte(b[:6]) != [6]byte{0, 1, 8, 0, 6, 4} {
		return nil, netip.Addr{}, Invalid
	}
	op := binary.BigEndian.Uint16(b[6:])
	mac, from := MAC(b[8:14]), netip.AddrFrom4([4]byte(b[14:18]))
	if mac != sender {
		return nil, from, Invalid
	}
	target := netip.AddrFrom4([4]byte(b[24:28]))
	mine := t.mine(target)
	ready, v = t.learn(now, from, mac, said{directed: mine})
	if op == 1 && mine && mac != t.mac && v != Invalid {
		t.cfg.Send(t.arp(mac, 2, target, mac, from))
	}
	return ready, from, v
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
// that passed a router (hop limit below 255) or have a bad checksum are invalid.
func (t *Table) HandleNDP(now int64, sender MAC, v *ipkt.View) (ready []Waiting, from netip.Addr, verdict Verdict) {
	b := v.B[v.L4:]
	if v.TTL != 255 || v.ICMPCode != 0 || len(b) < 24 || ipkt.Checksum(b, ipkt.PseudoSum(true, v.Src, v.Dst, ipkt.ICMPv6, len(b))) != 0 {
		return nil, netip.Addr{}, Invalid
	}
	target := netip.AddrFrom16([16]byte(b[8:24]))
	opt := byte(optSource)
	if v.ICMPType == advertisement {
		opt = optTarget
	}
	has := false
	for o := b[24:]; len(o) >= 8 && int(o[1])*8 <= len(o) && o[1] > 0; o = o[int(o[1])*8:] {
		if o[0] != opt {
			continue
		}
		if MAC(o[2:8]) != sender {
			return nil, target, Invalid
		}
		has = true
	}
	if v.ICMPType == advertisement { // to one alone, it may leave the MAC out (RFC 4861 §4.4)
		ready, verdict = t.learn(now, target, sender, said{})
		return ready, target, verdict
	}
	src := v.Source()
	if !t.mine(target) || !src.Is6() || src.IsUnspecified() {
		return nil, src, Fine
	}
	if has {
		ready, verdict = t.learn(now, src, sender, said{directed: true})
	}
	if verdict != Invalid && sender != t.mac {
		const router, solicited, override = 0x80, 0x40, 0x20
		t.cfg.Send(t.ndp(sender, target, src, advertisement, router|solicited|override, target, optTarget))
	}
	return ready, src, verdict
}

// Len returns the number of addresses that are bound.
func (t *Table) Len() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.entries)
}

// Each tells of the neighbours that are known and answer, in any order.
func (t *Table) Each(now int64, f func(a netip.Addr, mac MAC)) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for a, e := range t.entries {
		if e.reachable(now) {
			f(a, e.mac)
		}
	}
}
