//go:build e2e

package attack

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"ztgate/router/control"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
)

const hostileIP = "10.0.0.66"

// hostile is an authorised member that means ill.
func (w *world) hostile() *hostile { return w.join("hostile", hostileIP) }

// forgery returns a payload with a signature that costs a check: all is right but the
// key.
// Each has another content, so that no cache helps.
func (h *hostile) forgery(i int) (packet.Verb, []byte) {
	forger, _ := pretend(h.id, h.w.Network.Controller())
	now := time.Now().UnixMilli() + int64(i)
	com, _ := vl2.NewCOM(forger, h.w.Network, h.id, now, 3_600_000)
	nwid := h.w.Network.Append(nil)
	group := vl2.MulticastGroup{MAC: vl2.BroadcastMAC, ADI: 0x0a000001}
	switch i % 8 {
	case 0: // EXT_FRAME with a certificate
		b := com.Append(append(nwid, 1))
		b = append(append(b, vl2.BroadcastMAC[:]...), h.mac[:]...)
		return packet.VerbExtFrame, append(be.AppendUint16(b, 0x0800), make([]byte, 40)...)
	case 1: // MULTICAST_FRAME with one
		b := group.Append(com.Append(append(nwid, 1)))
		return packet.VerbMulticastFrame, append(be.AppendUint16(b, 0x0800), make([]byte, 40)...)
	case 2:
		return packet.VerbMulticastGather, vl2.AppendGather(nil, h.w.Network, group, 32, com)
	case 3, 4:
		list, _ := vl2.AppendChunks(forger, h.w.Network, []byte("v=7\n"), uint64(i)+1, vl2.MaxChunk)
		return packet.VerbNetworkConfig, list[0]
	case 5:
		tag := &vl2.Tag{NetworkID: h.w.Network, Timestamp: now, ID: uint32(i), IssuedTo: h.id.Address()}
		_ = tag.Sign(forger)
		return packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, com, tag)
	case 6:
		rev := &vl2.Revocation{ID: uint32(i), NetworkID: h.w.Network, Threshold: now, Target: h.w.officeID.Address(), Type: vl2.TypeCOM, Flags: vl2.FlagPropagate}
		_ = rev.Sign(forger)
		return packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, rev)
	}
	capability := &vl2.Capability{NetworkID: h.w.Network, Timestamp: now, ID: uint32(i)}
	_ = capability.Issue(forger, h.id.Address())
	return packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, capability)
}

// forge sends forgeries, prepared beforehand.
func (h *hostile) forge(rate int) attack {
	type message struct {
		verb    packet.Verb
		payload []byte
	}
	var list []message
	for i := range 2000 {
		v, b := h.forgery(i)
		list = append(list, message{v, b})
	}
	return attack{
		run: every(rate, func(i int) { m := list[i%len(list)]; h.say(m.verb, m.payload) }),
		check: func() error {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			m, err := h.w.Metrics(ctx)
			if err == nil && m.Sum("ztgate_dropped_packets_total", map[string]string{"reason": "network_bad_signature"}) == 0 {
				err = fmt.Errorf("no signature was found wrong: the row tests nothing")
			}
			return err
		},
	}
}

var (
	gwIP    = netip.MustParseAddr(gwOverlay)
	noMAC   [6]byte
	ethARP  = uint16(0x0806)
	ethIPv6 = uint16(0x86dd)
)

var overlayRows = []row{
	{name: "member/forged signatures", prepare: func(w *world) attack { return w.hostile().forge(4000) }},
	{name: "member/claims the office's address by ARP", prepare: func(w *world) attack {
		h := w.hostile()
		gw := vl2.MACOf(w.Network, w.gateway.Address())
		return attack{run: every(500, func(i int) {
			switch i % 4 {
			case 0: // an answer that was not asked for
				h.ext(gw, h.mac, ethARP, arp(2, h.mac, officeIP, gw, gwIP))
			case 1: // gratuitous
				h.ext(vl2.BroadcastMAC, h.mac, ethARP, arp(1, h.mac, officeIP, noMAC, officeIP))
			case 2: // a question as the office
				h.ext(vl2.BroadcastMAC, h.mac, ethARP, arp(1, h.mac, officeIP, noMAC, gwIP))
			case 3: // the office's MAC within, ours outside
				h.ext(gw, h.mac, ethARP, arp(2, vl2.MACOf(w.Network, w.officeID.Address()), netip.MustParseAddr(hostileIP), gw, gwIP))
			}
		})}
	}},
	{name: "member/claims addresses by NDP", prepare: func(w *world) attack {
		h := w.hostile()
		gw := vl2.MACOf(w.Network, w.gateway.Address())
		to := vl2.LinkLocal(gw)
		return attack{run: every(500, func(i int) {
			a := vl2.LinkLocal(vl2.MACOf(w.Network, w.officeID.Address()))
			if i%2 == 1 {
				a = netip.MustParseAddr(fmt.Sprintf("fd00::%x", i))
			}
			h.ext(gw, h.mac, ethIPv6, advertise(h.mac, a, to))
		})}
	}},
	{name: "member/claims every address of the network", prepare: func(w *world) attack {
		h := w.hostile()
		return attack{run: every(4000, func(i int) {
			a := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
			h.ext(vl2.BroadcastMAC, h.mac, ethARP, arp(uint16(1+i%2), h.mac, a, noMAC, gwIP))
		})}
	}},
	{name: "member/errors about others' flows", prepare: func(w *world) attack {
		h := w.hostile()
		return attack{run: every(4000, func(i int) {
			// The client's own port is kept where it is free, so the kernel's range is the place to
			// look.
			from := netip.AddrPortFrom(gwIP, uint16(32768+rand.IntN(28232)))
			to := netip.AddrPortFrom(officeIP, []uint16{echoPort, 80}[i%2])
			about := udp(from, to, make([]byte, 100))
			if i%4 < 2 {
				about = tcp(from, to, ack, rand.Uint32(), 0)
			}
			list := icmpErrors(h.addr, gwIP, about)
			h.frame(list[rand.IntN(len(list))])
		})}
	}},
	{name: "member/errors about all flows there are", prepare: func(w *world) attack {
		h := w.hostile()
		return attack{run: func(ctx context.Context) (tries, bytes int) {
			// Worse than it can be: it is told the ports.
			return pace(ctx, 20, func(int) {
				for _, f := range w.flows() {
					for _, from := range []netip.Addr{h.addr, officeIP} {
						for _, b := range icmpErrors(from, gwIP, f) {
							h.frame(b)
						}
					}
				}
			}), 0
		}}
	}},
	{name: "member/SYN flood to a forward", prepare: func(w *world) attack {
		h := w.hostile()
		return attack{run: every(8000, func(i int) {
			h.frame(tcp(netip.AddrPortFrom(h.addr, port(i)), netip.AddrPortFrom(gwIP, entryPort), syn, uint32(i), 0))
		})}
	}},
	{name: "member/sources of the VPC and of others", prepare: func(w *world) attack {
		h := w.hostile()
		froms := []netip.Addr{clientIP, netip.MustParseAddr(gwVPC), officeIP, gwIP, netip.MustParseAddr("8.8.8.8"), netip.MustParseAddr("127.0.0.1")}
		return attack{run: every(8000, func(i int) {
			from := netip.AddrPortFrom(froms[i%len(froms)], port(i))
			h.frame(tcp(from, netip.AddrPortFrom(gwIP, entryPort), syn, uint32(i), 0))
			h.frame(udp(from, netip.AddrPortFrom(clientIP, echoPort), []byte("x")))
		})}
	}},
	{name: "member/multicast flood", prepare: func(w *world) attack {
		h := w.hostile()
		return attack{run: every(8000, func(i int) {
			g := vl2.MulticastGroup{MAC: vl2.BroadcastMAC, ADI: 0x0a000001}
			if i%2 == 1 {
				g = vl2.MulticastGroup{MAC: vl2.MAC{1, 0, 0x5e, 0, 0, byte(i)}}
			}
			b := ip4(h.addr, netip.MustParseAddr("224.0.0.1"), 17, 0, 0, make([]byte, 200))
			if i%3 == 0 {
				h.say(packet.VerbMulticastFrame, vl2.AppendReplicate(nil, w.Network, h.mac, g, 0x0800, b))
				return
			}
			h.say(packet.VerbMulticastFrame, vl2.AppendMulticastFrame(nil, w.Network, 100, nil, g, 0x0800, b))
		})}
	}},
	{name: "member/64k multicast groups", prepare: func(w *world) attack {
		h := w.hostile()
		return attack{run: every(250, func(i int) { // 75 groups each
			var b []byte
			for k := range 75 {
				n := i*75 + k
				b = vl2.MulticastGroup{MAC: vl2.MAC{0x33, 0x33, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}, ADI: uint32(n)}.Append(w.Network.Append(b))
			}
			h.say(packet.VerbMulticastLike, b)
		})}
	}},
	{name: "member/gathers and questions", prepare: func(w *world) attack {
		h := w.hostile()
		return attack{run: every(4000, func(i int) {
			if i%2 == 0 {
				h.say(packet.VerbMulticastGather, vl2.AppendGather(nil, w.Network, vl2.MulticastGroup{MAC: vl2.BroadcastMAC, ADI: uint32(i)}, 1<<31, nil))
				return
			}
			var b []byte
			for range 16 {
				b = append(b, byte(1+rand.IntN(250)), byte(i>>16), byte(i>>8), byte(i), byte(rand.Uint32()))
			}
			h.say(packet.VerbWhois, b)
		})}
	}},
	{name: "member/oversized frames and odd ethertypes", prepare: func(w *world) attack {
		h := w.hostile()
		gw := vl2.MACOf(w.Network, w.gateway.Address())
		return attack{run: every(2000, func(i int) {
			size := []int{0, 1, 13, 19, 1500, 2800, 2801, 5000, 9000}[rand.IntN(9)]
			b := make([]byte, size)
			for k := range b {
				b[k] = byte(rand.Uint32())
			}
			switch {
			case i%3 == 0 && size >= 20:
				b[0] = 0x45
				h.ext(gw, h.mac, 0x0800, b)
			case i%3 == 1:
				h.ext(vl2.MAC{byte(rand.Uint32()), 2, 3, 4, 5, 6}, vl2.MAC{byte(rand.Uint32()), 1, 1, 1, 1, 1}, uint16(rand.Uint32()), b)
			default:
				h.ext(gw, h.mac, []uint16{0x8100, 0x88a8, 0x8847, 0x88cc, 0x0806, 0x86dd, 0, 0xffff}[rand.IntN(8)], b)
			}
		})}
	}},
}

// flows are packets as the gateway sends them to the office, of all its flows.
func (w *world) flows() (out [][]byte) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	list, err := w.GatewayAPI.Flows(ctx, control.FlowQuery{To: office})
	if err != nil {
		return nil
	}
	for _, f := range list.Flows {
		from, to := f.Source, f.Destination
		if f.Translated.IsValid() {
			from = f.Translated
		}
		if f.TranslatedDst.IsValid() {
			to = f.TranslatedDst
		}
		switch f.Protocol {
		case "tcp":
			out = append(out, tcp(from, to, ack, 0, 0))
		case "udp":
			out = append(out, udp(from, to, make([]byte, 100)))
		}
	}
	return out
}

var outsiderRows = []row{
	{name: "de-authorised member/frames and old certificates", prepare: func(w *world) attack {
		h := w.join("expelled", "10.0.0.67")
		s, _ := h.layer.Network(w.Network)
		com := s.Config.COM
		w.authorise(h.id.Address(), false)
		w.cleanup(func() { // the next time it is let in again
			h.cancel()
			delete(w.members, "expelled")
			w.members["expelled "+w.t.Name()] = h
		})
		w.must(eventually(func() error {
			if h.asks(gwIP) {
				return fmt.Errorf("the gateway still talks to a member that was put out")
			}
			return nil
		}))
		return attack{
			run: every(4000, func(i int) {
				switch i % 3 {
				case 0:
					h.frame(udp(netip.AddrPortFrom(h.addr, port(i)), netip.AddrPortFrom(gwIP, entryPort), nil))
				case 1:
					b := com.Append(append(w.Network.Append(nil), 1))
					b = append(append(b, vl2.BroadcastMAC[:]...), h.mac[:]...)
					h.say(packet.VerbExtFrame, append(be.AppendUint16(b, ethARP), arp(1, h.mac, h.addr, noMAC, gwIP)...))
				case 2:
					h.say(packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, com))
				}
			}),
			check: func() error {
				if h.asks(gwIP) {
					return fmt.Errorf("the gateway answers a member that was put out")
				}
				return nil
			},
		}
	}},
	{name: "outsider/forged signatures", prepare: func(w *world) attack { return w.join("outsider", "").forge(4000) }},
	{name: "outsider/frames", prepare: func(w *world) attack {
		h := w.join("outsider", "")
		return attack{
			run: every(8000, func(i int) {
				if i%2 == 0 {
					h.frame(udp(netip.AddrPortFrom(netip.MustParseAddr(hostileIP), port(i)), netip.AddrPortFrom(gwIP, entryPort), nil))
					return
				}
				h.ext(vl2.BroadcastMAC, h.mac, ethARP, arp(1, h.mac, netip.MustParseAddr(hostileIP), noMAC, gwIP))
			}),
			check: func() error {
				h.addr = netip.MustParseAddr(hostileIP)
				defer func() { h.addr = netip.Addr{} }()
				if h.asks(gwIP) {
					return fmt.Errorf("the gateway answers a node that isn't in the network")
				}
				return nil
			},
		}
	}},
}
