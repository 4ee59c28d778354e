package nat

import (
	"math/bits"
	"net/netip"
	"slices"
	"time"

	"ztgate/netstack/internal/ipkt"
)

// Mapping is the external endpoint of a client's endpoint. For ICMP queries ports
// are identifiers.
type Mapping struct {
	Proto    uint8          `json:"protocol"`
	Client   netip.AddrPort `json:"client"`
	External netip.AddrPort `json:"external"`
}

// maxImportedPools bounds what a list of mappings may claim: a pool takes 70 KB.
const maxImportedPools = 64

// Mappings lists all mappings, also quarantined ones. The lock is held for a few
// hundred ports at a time: mappings that begin or end meanwhile may be missed.
func (t *Table) Mappings() (out []Mapping) {
	const step = 4 // words
	t.mu.Lock()
	pools := slices.Clone(t.pools[1:])
	n := 0
	for _, p := range pools {
		n += p.inUse + p.inQuarantine
	}
	t.mu.Unlock()
	out = make([]Mapping, 0, n)
	for _, p := range pools {
		ext := ipkt.Addr(p.key.ext)
		for first := 0; first < len(p.used); first += step {
			t.mu.Lock()
			for w := first; w < first+step; w++ {
				for left := p.used[w]; left != 0; left &= left - 1 {
					port := uint16(w*64 + bits.TrailingZeros64(left))
					m := p.at(port)
					out = append(out, Mapping{p.key.proto, netip.AddrPortFrom(ipkt.Addr(m.client), m.port), netip.AddrPortFrom(ext, port)})
				}
			}
			t.mu.Unlock()
		}
	}
	return out
}

// Import keeps the mappings of an earlier table quarantined for their owners. It
// returns how many it took: those that are wrong, taken or too many are left out.
func (t *Table) Import(now int64, list []Mapping) (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	quarantine := t.quarantine
	if quarantine == 0 {
		quarantine = Coarse(int64(2 * time.Minute))
	}
	for i := range list[:min(len(list), t.set.MaxFlows)] {
		m := &list[i]
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
