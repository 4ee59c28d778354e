package nat

import (
	"math/bits"

	"ztgate/netstack/internal/ipkt"
)

// Refusal is why a flow wasn't opened.
type Refusal uint8

const (
	Accepted    Refusal = iota
	TableFull           // and nothing in it may go
	ClientFull          // the client has all the flows it may have
	ClientPorts         // or ports
	ClientRate          // or opens flows too fast
	NoPort              // no external port is left
	NotFirst            // such a packet can't begin a flow
	Protocol            // can't be translated
	Clash               // another flow has this tuple on the other side
	MemberFull          // the overlay member has all the flows it may have, whatever addresses it uses
	MemberPorts         // or ports
	NumRefusals = iota
)

// RefusalNames are the label values.
var RefusalNames = [NumRefusals]string{"", "table_full", "client_flows", "client_ports", "client_rate", "no_port", "not_first", "protocol", "clash",
	"member_flows", "member_ports"}

// Source says what becomes of a flow's source.
type Source uint8

const (
	Keep       Source = iota
	Masquerade        // behind Address, at a port of its own
	Map               // behind Address, at Port or the same one
)

// NewFlow says what to open.
type NewFlow struct {
	Slot       uint16
	Generation uint32
	Member     uint64 // of the overlay that sent the packet
	To         Side
	Source     Source
	Address    [16]byte // for the source
	Paired     bool     // Address stands for its group, of which the client has one
	Port       uint16   // for the source; 0 = the same
	Server     [16]byte // where it goes; zero = as the packet says
	ServerPort uint16   // 0 = as the packet says
	Filtered   bool     // nothing passes before the other side sends something
}

// Open makes the flow that begins with a packet, whose key is k. If it exists
// already, because another worker was faster, that one is returned.
func (t *Table) Open(now int64, k *Key, v *ipkt.View, n *NewFlow) (*Flow, int, Refusal) {
	class := ClassOf(k.proto)
	translated := n.Source != Keep || n.Server != [16]byte{}
	why := t.mayBegin(k, v, n, translated)
	if why == Accepted {
		t.mu.Lock()
		f, ref := t.lookup(k)
		if f == nil {
			if ref, why = t.open(Coarse(now), k, v, n); why == Accepted {
				f = t.flow(ref >> 1)
			}
		}
		t.mu.Unlock()
		if why == Accepted {
			return f, int(ref & 1), Accepted
		}
	}
	t.stats.Refused[class][why].Add(1)
	return nil, 0, why
}

// mayBegin judges the packet alone.
func (t *Table) mayBegin(k *Key, v *ipkt.View, n *NewFlow, translated bool) Refusal {
	switch k.proto {
	case ipkt.TCP:
		// Without a SYN only a plain segment: the flow may be older than the table.
		if !validFlags[v.Flags&0x3f] || v.Flags&(tcpRST|tcpFIN) != 0 || v.Flags&tcpSYN != 0 && v.Flags&tcpACK != 0 ||
			v.Flags&tcpSYN == 0 && t.set.NoPickup {
			return NotFirst
		}
	case ipkt.UDP:
	case ipkt.ICMP, ipkt.ICMPv6:
		if isReply(k.proto, v.ICMPType) {
			return NotFirst
		}
	default:
		// Some have checksums over the addresses that we can't change, others ports
		// that we don't know (decision D5).
		const dccp, udpLite, ah = 33, 136, 51
		if translated && (n.Source == Masquerade || k.proto == dccp || k.proto == udpLite || k.proto == ah) {
			return Protocol
		}
	}
	return Accepted
}

// open makes a flow. It returns its reference. t.mu is held.
func (t *Table) open(now uint32, k *Key, v *ipkt.View, n *NewFlow) (uint32, Refusal) {
	t.now = max(t.now, now)
	c := t.clientFor(keyOfClient(k.src, k.side, n.Slot), n.Member)
	c.flows++ // first, so that it stays while others are evicted
	ref, why := t.openFor(now, c, k, v, n)
	if why != Accepted {
		c.refused++
		t.leave(c)
	}
	return ref, why
}

func (t *Table) openFor(now uint32, c *client, k *Key, v *ipkt.View, n *NewFlow) (uint32, Refusal) {
	switch {
	case int(c.live) >= t.set.MaxFlowsPerClient && !t.evict(t.oldestOf(c, false)):
		return 0, ClientFull
	case t.memberFull(c) && !t.evict(t.oldestOf(c, true)):
		return 0, MemberFull
	case !t.allowRate(now, c):
		return 0, ClientRate
	case t.set.MaxHalfOpen > 0 && c.half.Count() >= t.set.MaxHalfOpen:
		t.evict(c.opening.first)
	}
	if t.count >= t.bound(c) && !t.evict(t.expendableFor(c)) {
		return 0, TableFull
	}
	id := t.alloc()
	if id == 0 {
		return 0, TableFull
	}
	f := t.flow(id)
	*f = Flow{}
	t.fill(now, f, k, v, n)
	if why := t.translate(now, c, id, f, n); why != Accepted {
		f.state.Store(stateFree)
		f.lnext, t.free = t.free, id
		return 0, why
	}
	f.deltas()
	t.addLive(c, 1)
	t.link(id, f, FromServer, t.hashOf(f, FromServer))
	t.link(id, f, FromClient, k.hash)
	t.joinLists(c, id, f)
	t.wheel.add(t, id, f)
	t.count++
	class := ClassOf(f.Proto())
	t.stats.Live[class].Add(1)
	t.stats.Created[class].Add(1)
	return id<<1 | FromClient, Accepted
}

func (t *Table) fill(now uint32, f *Flow, k *Key, v *ipkt.View, n *NewFlow) {
	src, dst := [12]byte(k.src[:]), [12]byte(k.dst[:])
	f.hi = [numEnds][12]byte{endClient: src, endTarget: dst, endServer: dst, endExternal: src}
	f.tuples[FromClient] = tuple{addrs: k.addrs(), ports: k.ports(), kind: kindOf(k.proto, k.side, v.V6)}
	f.tuples[FromServer] = tuple{addrs: bits.RotateLeft64(k.addrs(), 32), ports: bits.RotateLeft32(k.ports(), 16), kind: kindOf(k.proto, n.To, v.V6)}
	f.Slot, f.created = n.Slot, now
	if n.Filtered {
		f.flags |= flagFiltered
	}
	if n.Server != [16]byte{} {
		f.flags |= flagDestination
		f.setAddr(endServer, n.Server)
		if n.ServerPort != 0 {
			f.setPort(endServer, n.ServerPort)
		}
	}
	f.Generation.Store(n.Generation)
	f.state.Store(stateNew)
	f.last.Store(now)
}

// translate gives a flow its external source and makes sure that nobody else has
// its tuple on the other side.
func (t *Table) translate(now uint32, c *client, id uint32, f *Flow, n *NewFlow) Refusal {
	sharing := false
	switch n.Source {
	case Keep:
	case Map:
		f.flags |= flagSource
		f.setAddr(endExternal, n.Address)
		if n.Port != 0 {
			f.setPort(endExternal, n.Port)
		}
	case Masquerade:
		f.flags |= flagSource
		sharing = t.set.PortSharing == ByDestination
		ext := t.addressOf(f, n)
		why := t.acquire(now, c, id, f, ext, !sharing)
		if why == NoPort && sharing {
			if t.share(c, f) {
				return Accepted
			}
			why = t.acquire(now, c, id, f, ext, true)
		}
		if why != Accepted {
			return why
		}
	}
	switch other, otherID := t.taker(f); {
	case other == nil:
		return Accepted
	case sharing && t.yields(f, other): // it shares a port that belongs to nobody any more
		t.evict(otherID)
		return Accepted
	}
	if f.Mapped() {
		t.release(c, id, f, Closed)
		f.flags &^= flagMapped
	}
	if sharing && t.share(c, f) {
		return Accepted
	}
	return Clash
}

// taker returns the flow that has the same tuple on the server's side, nil if there is
// none.
func (t *Table) taker(f *Flow) (*Flow, uint32) {
	for ref := t.bucket(t.hashOf(f, FromServer)).Load(); ref != 0; {
		other, dir := t.flow(ref>>1), int(ref&1)
		if f.same(FromServer, other, dir) {
			return other, ref >> 1
		}
		ref = other.next[dir].Load()
	}
	return nil, 0
}

// yields reports a flow at a shared port that leaves it to the port's new owner, whose
// flow has the same server.
func (t *Table) yields(owner, f *Flow) bool {
	return !f.Mapped() && f.From() != f.To() && f.To() == owner.To() && !isFirm(f.state.Load())
}

// share gives a flow a port of others that isn't used towards its server; what is free is
// left to who will own it. Who has much already gets only every other port, so that
// nobody has all of them towards a server.
func (t *Table) share(c *client, f *Flow) bool {
	const tries = 128
	if f.pool == 0 {
		return false
	}
	p, pc := t.pools[f.pool], portClass(f.Proto(), f.ClientPort())
	most := int(c.live) >= few(p.size[pc]) || t.overPorts(p, c, pc) != Accepted
	client, clientPort := f.Client(), f.ClientPort()
	ranges := portRange(f.Proto(), clientPort)
	n := uint64(ranges[0][1]) + 1 - uint64(ranges[0][0])
	for round := range uint64(tries) {
		port := ranges[0][0] + uint16(t.endpointHash(&client, clientPort, round+1)>>16%n)
		f.setPort(endExternal, port)
		if p.used.has(port) && !p.reserved.has(port) && !(most && port%2 != 0) {
			if other, _ := t.taker(f); other == nil {
				return true
			}
		}
	}
	return false
}
