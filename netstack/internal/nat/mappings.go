package nat

import (
	"math/bits"
	"net/netip"
	"runtime"
	"time"

	"ztgate/netstack/internal/ipkt"
)

// Mapping is the external endpoint of a client's endpoint. For ICMP queries ports
// are identifiers. With a server it is one flow, whether or not its endpoint is mapped.
type Mapping struct {
	Proto    uint8          `json:"protocol"`
	Client   netip.AddrPort `json:"client"`
	External netip.AddrPort `json:"external"`
	// Of a flow:
	Target  netip.AddrPort `json:"target,omitzero"` // the server as the client names it
	Server  netip.AddrPort `json:"server,omitzero"`
	From    Side           `json:"from,omitzero"`    // of the client
	Network uint64         `json:"network,omitzero"` // that it uses
}

// IsFlow reports whether m is a flow.
func (m *Mapping) IsFlow() bool { return m.Server.IsValid() }

// maxImportedPools bounds what a list of mappings may claim: a pool takes 70 KB.
const maxImportedPools = 256

// Mappings lists all mappings, also quarantined ones. The lock is held for a few
// hundred ports at a time: mappings that begin or end meanwhile may be missed.
func (t *Table) Mappings() (out []Mapping) {
	const words, most = 64, 256 // at a time
	t.mu.Lock()
	var pools []*pool
	n := 0
	for _, p := range t.pools[1:] {
		if used := p.inUse + p.inQuarantine; used > 0 {
			pools = append(pools, p)
			n += used
		}
	}
	t.mu.Unlock()
	out = make([]Mapping, 0, n)
	for _, p := range pools {
		ext := ipkt.Addr(p.key.ext)
		for w := 0; w < len(p.used); {
			t.mu.Lock()
			for end, had := min(w+words, len(p.used)), len(out); w < end && len(out) < had+most; w++ {
				for left := p.used[w]; left != 0; left &= left - 1 {
					port := uint16(w*64 + bits.TrailingZeros64(left))
					m := p.at(port)
					out = append(out, Mapping{Proto: p.key.proto, Client: netip.AddrPortFrom(ipkt.Addr(m.client), m.port), External: netip.AddrPortFrom(ext, port)})
				}
			}
			t.mu.Unlock()
			runtime.Gosched() // see Sweep
		}
	}
	return out
}

// Import keeps the mappings of an earlier table quarantined for their owners. It
// returns how many it took: flows and those that are wrong, taken or too many are left out.
func (t *Table) Import(now int64, list []Mapping) (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	quarantine := t.quarantine
	if quarantine == 0 {
		quarantine = Coarse(int64(2 * time.Minute))
	}
	for i := range list[:min(len(list), t.set.MaxFlows)] {
		m := &list[i]
		if m.IsFlow() {
			continue
		}
		client, ext := m.Client.Addr(), m.External.Addr()
		if !client.IsValid() || !ext.IsValid() || client.Is4() != ext.Is4() || client.Is4In6() || ext.Is4In6() ||
			client.Zone() != "" || ext.Zone() != "" ||
			!validPort(m.Proto, client.Is4(), m.Client.Port(), m.External.Port()) {
			continue
		}
		key := poolKey{ipkt.Bytes(ext), m.Proto}
		if _, ok := t.byAddr[key]; !ok && len(t.pools) > maxImportedPools {
			continue
		}
		p, owner := t.pools[t.poolOf(key.ext, key.proto)], clientKey{addr: ipkt.Bytes(client)}
		if !p.free(m.External.Port()) || p.find(t, &owner, m.Client.Port()) != 0 {
			continue
		}
		p.add(t, &owner, m.Client.Port(), m.External.Port())
		p.enterQuarantine(m.External.Port(), Coarse(now)+quarantine)
		n++
	}
	return n
}

// validPort reports whether a mapping could have been made by this package.
func validPort(proto uint8, v4 bool, client, ext uint16) bool {
	switch proto {
	case ipkt.TCP, ipkt.UDP:
	case ipkt.ICMP, ipkt.ICMPv6:
		if v4 != (proto == ipkt.ICMP) {
			return false
		}
	default:
		return false
	}
	return sameClass(proto, client, ext)
}

// Resume opens a flow of an earlier table again, which was answered or may be, and
// whose next packet may come from either side. Its sequence numbers aren't known. It is
// refused unless it gets its external endpoint back.
func (t *Table) Resume(now int64, m *Mapping, n *NewFlow) (*Flow, Refusal) {
	client, target := m.Client, m.Target
	k := t.TupleKey(m.From, m.Proto, client.Addr(), target.Addr(), client.Port(), target.Port())
	v := ipkt.View{V6: client.Addr().Is6(), Proto: m.Proto, Flags: tcpACK}
	f, _, why := t.Open(now, k, &v, n)
	if why != Accepted {
		return nil, why
	}
	if ipkt.Addr(f.External()) != m.External.Addr() || f.ExtPort() != m.External.Port() {
		t.Remove(f)
		return nil, Clash
	}
	for i := range f.dir {
		f.dir[i].window.CompareAndSwap(0, winLiberal)
	}
	return f, Accepted
}
