package nat

import (
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
	NumRefusals = iota
)

// RefusalNames are the label values.
var RefusalNames = [NumRefusals]string{"", "table_full", "client_flows", "client_ports", "client_rate", "no_port", "not_first", "protocol", "clash"}

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
	To         Side
	Source     Source
	Address    [16]byte // for the source
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
	c := t.clientOf(k.src)
	c.flows++ // first, so that it stays while others are evicted
	ref, why := t.openFor(now, c, k, v, n)
	if why != Accepted {
		c.flows--
		if c.flows == 0 {
			delete(t.clients, c.addr)
		}
	}
	return ref, why
}

func (t *Table) openFor(now uint32, c *client, k *Key, v *ipkt.View, n *NewFlow) (uint32, Refusal) {
	switch {
	case c.live >= t.set.MaxFlowsPerClient && !t.evictOwn(c):
		return 0, ClientFull
	case !t.allowRate(now, c):
		return 0, ClientRate
	case t.set.MaxHalfOpen > 0 && c.halfOpen >= t.set.MaxHalfOpen:
		t.evictOwn(c)
	}
	if t.count >= t.set.MaxFlows && !t.makeRoom() {
		return 0, TableFull
	}
	id := t.alloc()
	if id == 0 {
		return 0, TableFull
	}
	f := t.flow(id)
	*f = Flow{}
	t.fill(now, f, k, v, n)
	if why := t.translate(now, f, n); why != Accepted {
		f.state.Store(stateFree)
		f.lnext, t.free = t.free, id
		return 0, why
	}
	f.deltas()
	c.live++
	back := f.key(FromServer)
	t.sum(&back)
	t.link(id, f, FromServer, &back)
	t.link(id, f, FromClient, k)
	t.joinLists(id, f)
	t.wheel.add(t, id, f)
	t.count++
	class := ClassOf(f.Proto())
	t.stats.Live[class].Add(1)
	t.stats.Created[class].Add(1)
	return id<<1 | FromClient, Accepted
}

// evictOwn removes a client's oldest half-open flow.
func (t *Table) evictOwn(c *client) bool {
	id := c.opening.first
	if id == 0 {
		return false
	}
	t.remove(id, t.flow(id), Evicted)
	return true
}

func (t *Table) fill(now uint32, f *Flow, k *Key, v *ipkt.View, n *NewFlow) {
	for _, end := range [...]int{endClient, endExternal} {
		f.setAddr(end, k.src)
		f.setPort(end, k.sport)
	}
	for _, end := range [...]int{endTarget, endServer} {
		f.setAddr(end, k.dst)
		f.setPort(end, k.dport)
	}
	f.tuples[0].kind, f.tuples[1].kind = kindOf(k.proto, k.side, v.V6), kindOf(k.proto, n.To, v.V6)
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
func (t *Table) translate(now uint32, f *Flow, n *NewFlow) Refusal {
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
		why := t.acquire(now, f, n.Address)
		if why == NoPort && t.set.PortSharing == ByDestination {
			return t.share(f)
		}
		if why != Accepted {
			return why
		}
	}
	if !t.taken(f) {
		return Accepted
	}
	if f.Mapped() {
		t.release(f, Closed)
		f.flags &^= flagMapped
	}
	return Clash
}

// taken reports whether another flow has the same tuple on the server's side.
func (t *Table) taken(f *Flow) bool {
	back := f.key(FromServer)
	t.sum(&back)
	other, _ := t.lookup(&back)
	return other != nil
}

// share gives a flow a port of others that isn't used towards its server.
func (t *Table) share(f *Flow) Refusal {
	const tries = 128
	client, clientPort := f.Client(), f.ClientPort()
	ranges := portRange(f.Proto(), clientPort)
	n := uint64(ranges[0][1]) + 1 - uint64(ranges[0][0])
	for round := range uint64(tries) {
		port := ranges[0][0] + uint16(t.endpointHash(&client, clientPort, round+1)>>16%n)
		f.setPort(endExternal, port)
		if !t.pools[f.pool].reserved.has(port) && !t.taken(f) {
			return Accepted
		}
	}
	return NoPort
}
