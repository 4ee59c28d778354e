package netstack

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
)

// A gateway that starts again goes on with the flows of the run before. What a client
// sends opens its flow again in any case, with the port that is quarantined for it; what a
// server sends says nothing of the client, so that is kept.

const (
	maxKept          = 1 << 16 // flows
	maxKeptPerClient = maxKept / 4
	maxKeptFor       = 124 * time.Minute // a connection that is idle for longer is rarely waited for
)

// keptFlows are flows of the last run that nobody has sent anything of yet.
type keptFlows struct {
	n     atomic.Int32 // that are left
	mu    sync.Mutex
	list  []keptFlow
	index map[keptKey]int
	open  map[keptKey]netip.AddrPort // by external endpoint alone: clients whom all may answer
	until int64                      // when the last one is over
}

type keptFlow struct {
	Mapping
	until int64 // 0 = gone
}

// keptKey is what packets of the server have in their headers. Mapped ends of clients are
// also known without a server.
type keptKey struct {
	proto            uint8
	side             Side
	server, external netip.AddrPort
}

func (m *keptFlow) key() keptKey {
	return keptKey{m.Proto, m.side(), m.Server, m.External}
}

// side is that of the server: the other one of the client, or the VPC for both.
func (m *keptFlow) side() Side {
	if m.Network == 0 || m.From == OverlaySide {
		return VPCSide
	}
	return OverlaySide
}

// validFlow reports a flow that could be one of ours.
func validFlow(m *Mapping) bool {
	if m.Proto != ipkt.TCP && m.Proto != ipkt.UDP || m.From >= numSides {
		return false
	}
	for _, a := range []netip.AddrPort{m.Client, m.Target, m.Server, m.External} {
		if !a.IsValid() || a.Port() == 0 || a.Addr().Is4() != m.Client.Addr().Is4() || a.Addr().Is4In6() || a.Addr().Zone() != "" {
			return false
		}
	}
	return true
}

// init takes over the flows among mappings, and returns how many.
func (k *keptFlows) init(now int64, list []Mapping, to *Timeouts) (n int) {
	k.index, k.open = make(map[keptKey]int), make(map[keptKey]netip.AddrPort)
	clients := map[netip.Addr]int{}
	tcp, udp := to.Established()
	for i := range list {
		m := keptFlow{list[i], now + int64(min(tcp, maxKeptFor))}
		if !m.IsFlow() || !validFlow(&m.Mapping) || len(k.list) == maxKept || clients[m.Client.Addr()] == maxKeptPerClient {
			continue
		}
		if m.Proto == ipkt.UDP {
			m.until = now + int64(min(udp, maxKeptFor))
		}
		if _, ok := k.index[m.key()]; ok {
			continue
		}
		k.index[m.key()] = len(k.list)
		k.open[keptKey{m.Proto, m.side(), netip.AddrPort{}, m.External}] = m.Client
		k.list = append(k.list, m)
		k.until = max(k.until, m.until)
		clients[m.Client.Addr()]++
	}
	k.n.Store(int32(len(k.list)))
	return len(k.list)
}

// find returns the flow that a packet of a server belongs to.
func (k *keptFlows) find(now int64, key keptKey) (m Mapping, ok bool) {
	if k.n.Load() == 0 {
		return m, false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	i, ok := k.index[key]
	if !ok || now >= k.list[i].until {
		return m, false
	}
	return k.list[i].Mapping, true
}

// owner returns the client whose external endpoint it was.
func (k *keptFlows) owner(proto uint8, side Side, external netip.AddrPort) (client netip.AddrPort, ok bool) {
	if k.n.Load() == 0 {
		return client, false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	client, ok = k.open[keptKey{proto, side, netip.AddrPort{}, external}]
	return client, ok
}

// drop forgets a flow.
func (k *keptFlows) drop(key keptKey) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if i, ok := k.index[key]; ok {
		k.list[i].until = 0
		delete(k.index, key)
		k.n.Add(-1)
	}
}

// forget forgets a flow that is open again.
func (k *keptFlows) forget(f *nat.Flow) {
	if k.n.Load() > 0 {
		k.drop(keptKey{f.Proto(), f.To(), netip.AddrPortFrom(ipkt.Addr(f.Server()), f.ServerPort()), netip.AddrPortFrom(ipkt.Addr(f.External()), f.ExtPort())})
	}
}

// expire forgets all when the last one is over.
func (k *keptFlows) expire(now int64) {
	if k.n.Load() == 0 || now < k.until {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.list, k.until = nil, 0
	clear(k.index)
	clear(k.open)
	k.n.Store(0)
}

// left lists those that are neither open again nor over.
func (k *keptFlows) left(now int64) (out []Mapping) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i := range k.list {
		if k.list[i].until > now {
			out = append(out, k.list[i].Mapping)
		}
	}
	return out
}

// Mappings lists the endpoint mappings and the flows that may go on, for the [Config] of
// a later engine: answered ones first, then UDP that still waits for its answer.
func (e *Engine) Mappings() []Mapping {
	flows := e.flowsToKeep()
	return append(e.table.Mappings(), flows...)
}

func (e *Engine) flowsToKeep() []Mapping {
	s := e.set.Load()
	networks := make([]uint64, len(s.numbers))
	for id, slot := range s.numbers {
		networks[slot] = id
	}
	flows := e.kept.left(e.clock())
	var waiting []Mapping
	clients := map[netip.Addr]int{}
	for i := range flows {
		clients[flows[i].Client.Addr()]++
	}
	w := e.worker()
	defer e.release(w)
	e.table.Walk(func(i nat.Info) bool {
		answered := i.State == "established" || i.State == "closing" || i.State == "answered"
		to := &flows
		if !answered {
			to = &waiting
		}
		client := ipkt.Addr(i.Client())
		if i.Proto() != ipkt.UDP && (i.Proto() != ipkt.TCP || !answered) || int(i.Slot) >= len(networks) ||
			clients[client] == maxKeptPerClient || len(*to) >= maxKept {
			return true
		}
		clients[client]++
		m := Mapping{Proto: i.Proto(), From: i.From(), Client: netip.AddrPortFrom(client, i.ClientPort()),
			Target:   netip.AddrPortFrom(ipkt.Addr(i.Target()), i.TargetPort()),
			Server:   netip.AddrPortFrom(ipkt.Addr(i.Server()), i.ServerPort()),
			External: netip.AddrPortFrom(ipkt.Addr(i.External()), i.ExtPort())}
		if i.From() == OverlaySide || i.To() == OverlaySide { // else it stays in the VPC
			m.Network = networks[i.Slot]
		}
		*to = append(*to, m)
		return len(flows) < maxKept
	})
	return append(flows, waiting[:min(len(waiting), maxKept-len(flows))]...)
}

// resumption returns the kept flow that a packet of a server belongs to, and what its
// client's packets are judged to be now; same means that they go as they did.
func (e *Engine) resumption(now int64, s *netSet, side Side, at *attachment, t *tuple) (m Mapping, d decision, found, same bool) {
	m, found = e.kept.find(now, keptKey{t.proto, side, netip.AddrPortFrom(t.src, t.sport), netip.AddrPortFrom(t.dst, t.dport)})
	if !found {
		return m, d, false, false
	}
	var from *attachment
	if m.From == OverlaySide {
		if from = s.attachments[m.Network]; from == nil {
			return m, d, true, false
		}
	}
	d = e.decide(s, m.From, from, &tuple{t.proto, m.Client.Addr(), m.Target.Addr(), m.Client.Port(), m.Target.Port()})
	port, source := m.Target.Port(), m.Client
	if d.flow.ServerPort != 0 {
		port = d.flow.ServerPort
	}
	switch d.flow.Source {
	case nat.Masquerade: // its port is checked when it is opened
		if d.flow.Paired && d.mayBeBehind(m.External.Addr()) {
			d.flow.Address, d.flow.Paired = ipkt.Bytes(m.External.Addr()), false
		}
		source = netip.AddrPortFrom(ipkt.Addr(d.flow.Address), t.dport)
	case nat.Map:
		source = netip.AddrPortFrom(ipkt.Addr(d.flow.Address), m.Client.Port())
		if d.flow.Port != 0 {
			source = netip.AddrPortFrom(source.Addr(), d.flow.Port)
		}
	}
	same = d.do == actOpen && d.flow.To == side && (at == nil || d.flow.Slot == at.slot) &&
		d.server == t.src && port == t.sport && source == m.External
	return m, d, true, same
}

// resume opens the flow again that a packet of a server belongs to. Where that can't be,
// both ends of a connection are told; ended means that the packet goes no further.
func (w *worker) resume(side Side, at *attachment, v *ipkt.View, t *tuple) (f *nat.Flow, ended bool) {
	e := w.e
	if e.kept.n.Load() == 0 || v.Proto == ipkt.TCP && v.Flags&ipkt.SYN != 0 || !v.First {
		return nil, false
	}
	m, d, found, same := e.resumption(w.now, w.set, side, at, t)
	if !found {
		return nil, false
	}
	if !v.ChecksumOK() {
		w.drop(dropChecksum)
		return nil, true
	}
	if same {
		d.flow.Generation = w.set.generation
		if from := w.set.attachments[m.Network]; m.From == OverlaySide && from != nil {
			if mac, ok := from.neigh.Owner(from.hop(m.Client.Addr())); ok {
				d.flow.Member = macNumber(mac)<<16 | uint64(from.slot)
			}
		}
		var why nat.Refusal
		if f, why = e.table.Resume(w.now, &m, &d.flow); why == nat.Accepted {
			e.kept.forget(f)
			w.set.countRule(&d)
			return f, false
		}
		if _, full := dropOfRefusal(v.Proto, why); full && why != nat.Clash {
			w.refused(at, v, why, false) // it may be tried again
			return nil, true
		}
	}
	if m.From == OverlaySide && w.set.attachments[m.Network] == nil {
		w.drop(dropNetwork) // which may come yet
		return nil, true
	}
	e.kept.drop(keptKey{m.Proto, side, m.Server, m.External})
	w.drop(dropNoFlow)
	w.tell(at, v)
	var to *attachment
	if m.From == OverlaySide {
		to = w.set.attachments[m.Network]
	}
	w.tellClient(to, v, m.Target, m.Client)
	return nil, true
}

// tellClient says to the client of a connection, on a network or in the VPC, that it is
// over: v is a segment of its server, which the client knows by another address.
func (w *worker) tellClient(to *attachment, v *ipkt.View, server, client netip.AddrPort) {
	if v.Proto == ipkt.TCP && v.Flags&(ipkt.RST|ipkt.SYN) == 0 && w.e.errors.allow(w.now, client.Addr(), false) {
		w.e.sendRST(w.now, to, ipkt.AppendResetOn(nil, v, server, client))
	}
}
