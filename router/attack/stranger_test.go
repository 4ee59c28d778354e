//go:build e2e

package attack

import (
	"context"
	"math/rand/v2"
	"net/netip"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// fresh is how many identities a stranger has whose addresses are right, besides any
// number whose aren't.
const fresh, firstFresh = 20, 4

// hellos are HELLOs of strangers.
func (w *world) hellos() (list [][]byte) {
	return w.hellosBy(func(v *voice) packet.Packet { return v.hello(w.planet) })
}

// sealedHellos are the same in envelopes, besides those of which nothing but the envelope is
// right, half of them in the name of the office.
func (w *world) sealedHellos() (list [][]byte) {
	e, err := packet.NewEnvelope(w.gateway)
	w.must(err)
	list = w.hellosBy(func(v *voice) packet.Packet { return v.sealed(v.hello(w.planet), e) })
	junk := &voice{keys: packet.NewKeys([identity.SessionLen]byte{1})}
	for i := range 2000 {
		p := packet.Packet(make([]byte, packet.HeaderLen+109))
		src := []identity.Address{w.officeID.Address(), identity.Address(0x1200000000 + i)}[i%2]
		packet.PutHeader(p, packet.ID(rand.Uint64()), w.gateway.Address(), src, packet.VerbHello)
		list = append(list, junk.sealed(p, e))
	}
	return list
}

func (w *world) hellosBy(hello func(*voice) packet.Packet) (list [][]byte) {
	for i := range fresh {
		v, err := newVoice(w.identity(firstFresh+i), w.gateway)
		w.must(err)
		list = append(list, hello(v))
	}
	for i := range 2000 {
		id, err := pretend(w.identity(firstFresh), identity.Address(0x1100000000+i))
		w.must(err)
		v, err := newVoice(id, w.gateway)
		w.must(err)
		list = append(list, hello(v))
	}
	return list
}

// captured are datagrams that a member sent to the gateway, of every verb, as whoever
// sits on the wire sees them.
func (w *world) captured(from *identity.Identity) (list []packet.Packet) {
	v, err := newVoice(from, w.gateway)
	w.must(err)
	mac := vl2.MACOf(w.Network, from.Address())
	group := vl2.MulticastGroup{MAC: vl2.BroadcastMAC, ADI: 0x0a000001}
	nwid := w.Network.Append(nil)
	for _, m := range []struct {
		verb    packet.Verb
		payload []byte
	}{
		{packet.VerbEcho, make([]byte, 1200)},
		{packet.VerbEcho, nil},
		{packet.VerbWhois, w.gateway.Address().Append(w.officeID.Address().Append(nil))},
		{packet.VerbFrame, append(be.AppendUint16(nwid[:8:8], 0x0800), icmp4(officeIP, gwIP, 8, 0, 1, make([]byte, 1000))...)},
		{packet.VerbExtFrame, vl2.AppendExtFrame(nil, w.Network, 0x10, vl2.MACOf(w.Network, w.gateway.Address()), mac, ethARP, arp(1, mac, officeIP, noMAC, gwIP))},
		{packet.VerbMulticastFrame, vl2.AppendMulticastFrame(nil, w.Network, 32, nil, group, ethARP, arp(1, mac, officeIP, noMAC, gwIP))},
		{packet.VerbMulticastGather, vl2.AppendGather(nil, w.Network, group, 100, nil)},
		{packet.VerbNetworkConfigRequest, vl2.AppendConfigRequest(nil, w.Network, vl2.RequestMetadata(), 0, 0)},
		{packet.VerbPushDirectPaths, append([]byte{0, 1, 0, 0, 0, 4, 6}, 44, 9, 9, 9, 0x02, 0x9a)},
		{packet.VerbRendezvous, append(w.officeID.Address().Append([]byte{0}), 0x02, 0x9a, 4, 44, 9, 9, 9)},
		{packet.VerbMulticastLike, group.Append(nwid[:8:8])},
		{packet.VerbNOP, nil},
	} {
		list = append(list, v.say(m.verb, m.payload))
	}
	return append(list, v.hello(w.planet))
}

// wireFlood sends datagrams to the gateway's UDP port at a rate, and counts their
// bytes.
func (w *world) wireFlood(rate int, next func(i int) (from netip.AddrPort, datagram []byte)) func(context.Context) (int, int) {
	r := w.rawWire()
	return func(ctx context.Context) (tries, bytes int) {
		tries = pace(ctx, rate, func(i int) { bytes += r.send(next(i)) })
		return tries, bytes
	}
}

func from(i int) netip.AddrPort { return netip.AddrPortFrom(behind(i), 666) }

var strangerRows = []row{
	{name: "stranger/HELLO flood, fresh identities", unproven: true, prepare: func(w *world) attack {
		list := w.hellos()
		return attack{run: w.wireFlood(5000, func(i int) (netip.AddrPort, []byte) { return from(i), list[i%len(list)] })}
	}},
	{name: "stranger/HELLO flood from one network", unproven: true, prepare: func(w *world) attack {
		list := w.hellos()
		return attack{run: w.wireFlood(5000, func(i int) (netip.AddrPort, []byte) { return from(0), list[i%len(list)] })}
	}},
	{name: "stranger/sealed HELLOs, many sources", unproven: true, prepare: func(w *world) attack {
		list := w.sealedHellos()
		return attack{run: w.wireFlood(20_000, func(i int) (netip.AddrPort, []byte) { return from(i), list[i%len(list)] })}
	}},
	{name: "stranger/sealed HELLOs from one network", unproven: true, prepare: func(w *world) attack {
		list := w.sealedHellos()
		return attack{run: w.wireFlood(20_000, func(i int) (netip.AddrPort, []byte) { return from(0), list[i%len(list)] })}
	}},
	{name: "stranger/replay, hops set", unproven: true, prepare: func(w *world) attack {
		list := w.captured(w.officeID)
		return attack{run: w.wireFlood(40_000, func(i int) (netip.AddrPort, []byte) {
			p := list[i%len(list)]
			p.SetHops(uint8(1 + i/len(list)%7))
			return from(0), p
		})}
	}},
	{name: "stranger/replay of ECHO, hops set", unproven: true, prepare: func(w *world) attack {
		p := w.captured(w.officeID)[0]
		return attack{run: w.wireFlood(40_000, func(i int) (netip.AddrPort, []byte) {
			p.SetHops(uint8(1 + i%7))
			return from(0), p
		})}
	}},
	{name: "stranger/replay, many sources", unproven: true, prepare: func(w *world) attack {
		list := append(w.captured(w.officeID), w.captured(w.storedIdentity("root"))...)
		return attack{run: w.wireFlood(20_000, func(i int) (netip.AddrPort, []byte) {
			p := list[i%len(list)]
			p.SetHops(uint8(i / len(list) % 8))
			return from(i), p
		})}
	}},
	{name: "stranger/random datagrams", unproven: true, prepare: func(w *world) attack {
		return attack{run: w.wireFlood(20_000, func(i int) (netip.AddrPort, []byte) {
			b := make([]byte, rand.IntN(300))
			for k := range b {
				b[k] = byte(rand.Uint32())
			}
			if len(b) >= packet.HeaderLen {
				src := []identity.Address{w.officeID.Address(), identity.Address(rand.Uint64() & (1<<40 - 1))}[i%2]
				flags := b[18]
				packet.PutHeader(b, packet.ID(rand.Uint64()), w.gateway.Address(), src, packet.Verb(b[27]))
				b[18] = flags
			}
			return from(i), b
		})}
	}},
	{name: "stranger/fragments", unproven: true, prepare: func(w *world) attack {
		return attack{run: w.wireFlood(20_000, func(i int) (netip.AddrPort, []byte) {
			b := make([]byte, 400)
			packet.PutHeader(b, packet.ID(rand.Uint64()), w.gateway.Address(), w.officeID.Address(), packet.VerbFrame)
			if i%2 == 0 {
				b[18] |= 0x40 // a head
			} else {
				b[13], b[14], b[15] = 0xff, byte(2+rand.IntN(15))<<4|byte(1+rand.IntN(2)), 0
			}
			return from(i % 4096), b
		})}
	}},
	{name: "stranger/WHOIS, GATHER and requests", unproven: true, prepare: func(w *world) attack {
		// With an identity that the gateway has seen, from where it isn't.
		h := w.join("outsider", "")
		list := w.captured(h.id)
		v, err := newVoice(h.id, w.gateway)
		w.must(err)
		return attack{run: w.wireFlood(5000, func(i int) (netip.AddrPort, []byte) {
			if i%2 == 0 {
				return from(0), v.say(packet.VerbWhois, identity.Address(rand.Uint64()&(1<<40-1)).Append(w.gateway.Address().Append(nil)))
			}
			return from(0), list[i/2%len(list)]
		})}
	}},
	{name: "stranger/to be relayed", unproven: true, prepare: func(w *world) attack {
		return attack{run: w.wireFlood(10_000, func(i int) (netip.AddrPort, []byte) {
			b := make([]byte, 200)
			to := []identity.Address{w.officeID.Address(), w.identity(firstFresh).Address()}[i%2]
			packet.PutHeader(b, packet.ID(rand.Uint64()), to, identity.Address(rand.Uint64()&(1<<40-1)), packet.VerbFrame)
			return from(i), b
		})}
	}},
	{name: "stranger/worlds with wrong signatures", unproven: true, prepare: func(w *world) attack {
		v, err := newVoice(w.identity(firstFresh), w.gateway)
		w.must(err)
		evil := vl1.NewPlanet(w.planet.ID, w.planet.Timestamp+1000, []vl1.Root{{Identity: w.identity(firstFresh).Public(),
			Endpoints: []netip.AddrPort{netip.MustParseAddrPort(strangerWire + ":9993")}}}, vl1.Key{})
		evil.Sign(vl1.Key{1})
		world := evil.Append(nil)
		hello := v.hello(w.planet)
		return attack{run: w.wireFlood(5000, func(i int) (netip.AddrPort, []byte) {
			if i%100 == 0 {
				return from(0), hello
			}
			b := be.AppendUint64([]byte{byte(packet.VerbHello)}, uint64(hello.ID())) // OK(HELLO)
			b = append(be.AppendUint64(b, 0), packet.ProtocolVersion, 1, 14, 0, 1, 0)
			b = append(be.AppendUint16(b, uint16(len(world))), world...)
			return from(0), v.say(packet.VerbOK, b)
		}), check: func() error { return w.serves() }}
	}},
}
