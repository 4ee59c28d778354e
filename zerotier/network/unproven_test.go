package network_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
)

// Whoever fakes an address can't make a node send more bytes there than came, by whatever
// question to its networks or its controller.
func TestNoBytesForNothing(t *testing.T) {
	n, r, a, b, id := up(t)
	talk(n, a, b, id)
	stranger := newHost(t, n, testIDs(t)[3], r.core.Planet(), nil, ap("203.0.113.9:9993"))
	stranger.send(n, b, packet.VerbNOP, nil)
	n.Run(2 * time.Second)
	group := vl2.MulticastGroup{MAC: vl2.BroadcastMAC}
	macB, macA := vl2.MACOf(id, b.id.Address()), vl2.MACOf(id, a.id.Address())
	meta := vl2.AppendConfigRequest(nil, id, vl2.RequestMetadata(), 0, 0)
	other := vl2.AppendConfigRequest(nil, id+0x1000000, nil, 0, 0)
	questions := map[string]struct {
		verb    packet.Verb
		payload []byte
	}{
		"gather":             {packet.VerbMulticastGather, vl2.AppendGather(nil, id, group, 1000, nil)},
		"multicast":          {packet.VerbMulticastFrame, vl2.AppendMulticastFrame(nil, id, 1000, nil, group, 0x800, frame)},
		"acknowledged frame": {packet.VerbExtFrame, vl2.AppendExtFrame(nil, id, 0x10, macB, macA, 0x800, []byte{1})},
		"frame":              {packet.VerbFrame, append(id.Append(nil), 8, 0)},
		"config request":     {packet.VerbNetworkConfigRequest, meta},
		"of no controller":   {packet.VerbNetworkConfigRequest, other},
		"likes":              {packet.VerbMulticastLike, group.Append(id.Append(nil))},
		"credentials":        {packet.VerbNetworkCredentials, []byte{0, 0, 0, 0, 0, 0, 0, 0, 0}},
		"config":             {packet.VerbNetworkConfig, id.Append(nil)},
		"error":              {packet.VerbError, id.Append(append(binary.BigEndian.AppendUint64([]byte{byte(packet.VerbFrame)}, 0), byte(packet.ErrorNeedMembershipCertificate)))},
	}
	ids := testIDs(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	for name, q := range questions {
		for _, target := range []*host{r, b} {
			for who := range 2 { // a member, and a stranger
				from := []int{1, 3}[who]
				session, err := ids[from].Agree(target.id)
				if err != nil {
					t.Fatal(err)
				}
				keys, s := packet.NewKeys(session), &packet.Scratch{}
				in, out := map[netip.Addr]int{}, map[netip.Addr]int{}
				at := target.port.Endpoints()[0]
				n.Drop = func(from, to netip.AddrPort, d []byte) bool {
					if from == at {
						out[to.Addr()] += len(d)
					}
					return false
				}
				for i := range 200 {
					p := packet.Packet(append(make([]byte, packet.HeaderLen), q.payload...))
					packet.PutHeader(p, packet.ID(rnd.Uint64()), target.id.Address(), ids[from].Address(), q.verb)
					keys.Seal(p, packet.SuiteAES, s)
					p.SetHops(uint8(i) & 3)
					victim := ap(fmt.Sprintf("44.0.0.%d:666", i%5))
					in[victim.Addr()] += len(p)
					n.Inject(victim, at, p)
					n.Run(50 * time.Millisecond)
				}
				n.Run(15 * time.Second) // no credit is left for the next
				for a, sent := range out {
					if a.As4()[0] == 44 && sent > in[a] {
						t.Errorf("%s: %v got %d bytes for %d", name, a, sent, in[a])
					}
				}
				n.Drop = nil
			}
		}
	}
	n.Run(10 * time.Second)
	if x, y := talk(n, a, b, id); !x || !y {
		t.Errorf("no traffic afterwards: %v %v", x, y)
	}
}
