package vl1

import (
	"encoding/binary"
	"net/netip"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/wire"
	"ztgate/zerotier/packet"
)

// reader reads the fields of this package too.
type reader struct{ wire.Reader }

func (r *reader) identity() *identity.Identity {
	if r.Failed {
		return nil
	}
	id, n, err := identity.Unmarshal(r.Buf[r.Off:])
	if err != nil {
		r.Failed = true
		return nil
	}
	r.Off += n
	return id.Public()
}

func (r *reader) endpoint() netip.AddrPort {
	if r.Failed {
		return netip.AddrPort{}
	}
	ep, n, err := packet.ParseEndpoint(r.Buf[r.Off:])
	if err != nil {
		r.Failed = true
		return netip.AddrPort{}
	}
	r.Off += n
	return ep
}

// version is what a peer announces about itself.
type version struct {
	protocol     uint8
	major, minor uint8
	revision     uint16
}

func (v version) append(b []byte) []byte {
	b = append(b, v.protocol, v.major, v.minor)
	return binary.BigEndian.AppendUint16(b, v.revision)
}

func (r *reader) version() version {
	return version{protocol: r.U8(), major: r.U8(), minor: r.U8(), revision: r.U16()}
}

// worldRef names a revision of a moon.
type worldRef struct {
	id        uint64
	timestamp int64
}

// hello is the payload of HELLO (chapter 02 §2.2).
type hello struct {
	version         version
	timestamp       int64
	identity        *identity.Identity
	sentTo          netip.AddrPort
	planetID        uint64
	planetTimestamp int64
	moons           []worldRef
	masked          int // packet offset of the masked part, 0 if there is none
}

const maxMoonsInHello = 16

// append appends the payload and sets masked, given that the payload starts at
// packet offset [packet.HeaderLen].
func (h *hello) append(b []byte) []byte {
	start := len(b)
	b = h.version.append(b)
	b = binary.BigEndian.AppendUint64(b, uint64(h.timestamp))
	b = h.identity.AppendBinary(b)
	b = packet.AppendEndpoint(b, h.sentTo)
	b = binary.BigEndian.AppendUint64(b, h.planetID)
	b = binary.BigEndian.AppendUint64(b, uint64(h.planetTimestamp))
	h.masked = packet.HeaderLen + len(b) - start
	b = binary.BigEndian.AppendUint16(b, uint16(len(h.moons)))
	for _, m := range h.moons {
		b = binary.BigEndian.AppendUint64(append(b, worldMoon), m.id)
		b = binary.BigEndian.AppendUint64(b, uint64(m.timestamp))
	}
	return b
}

// parseHello reads all but the masked part.
func parseHello(payload []byte) (h hello, ok bool) {
	r := reader{Reader: wire.Reader{Buf: payload}}
	h.version = r.version()
	h.timestamp = int64(r.U64())
	h.identity = r.identity()
	if r.Failed {
		return h, false
	}
	if r.Left() > 0 {
		h.sentTo = r.endpoint()
	}
	if r.Left() >= 16 {
		h.planetID = r.U64()
		h.planetTimestamp = int64(r.U64())
	}
	if r.Left() > 0 && !r.Failed {
		h.masked = packet.HeaderLen + r.Off
	}
	return h, !r.Failed
}

// parseMoons reads the unmasked moon list.
func parseMoons(b []byte) (moons []worldRef) {
	r := reader{Reader: wire.Reader{Buf: b}}
	for range min(int(r.U16()), maxMoonsInHello) {
		typ, id, ts := r.U8(), r.U64(), int64(r.U64())
		if r.Failed {
			break
		}
		if typ == worldMoon {
			moons = append(moons, worldRef{id, ts})
		}
	}
	return moons
}

// okHello is the part of OK(HELLO) after the in-re fields.
type okHello struct {
	timestamp int64
	version   version
	sentTo    netip.AddrPort
	worlds    []byte
}

func (o *okHello) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(o.timestamp))
	b = o.version.append(b)
	b = packet.AppendEndpoint(b, o.sentTo)
	b = binary.BigEndian.AppendUint16(b, uint16(len(o.worlds)))
	return append(b, o.worlds...)
}

func parseOKHello(b []byte) (o okHello, ok bool) {
	r := reader{Reader: wire.Reader{Buf: b}}
	o.timestamp = int64(r.U64())
	o.version = r.version()
	if r.Failed {
		return o, false
	}
	if r.Left() > 0 {
		o.sentTo = r.endpoint()
	}
	if r.Left() >= 2 {
		o.worlds = r.Bytes(int(r.U16()))
	}
	return o, !r.Failed
}

// rendezvous is the payload of RENDEZVOUS (chapter 02 §2.8).
type rendezvous struct {
	peer identity.Address
	at   netip.AddrPort
}

func (v rendezvous) append(b []byte) []byte {
	b = v.peer.Append(append(b, 0))
	b = binary.BigEndian.AppendUint16(b, v.at.Port())
	ip := v.at.Addr().AsSlice()
	return append(append(b, byte(len(ip))), ip...)
}

func parseRendezvous(b []byte) (v rendezvous, ok bool) {
	r := reader{Reader: wire.Reader{Buf: b}}
	r.U8()
	v.peer = r.Address()
	port := r.U16()
	n := int(r.U8())
	if n != 4 && n != 16 {
		return v, false
	}
	ip, _ := netip.AddrFromSlice(r.Bytes(n))
	v.at = netip.AddrPortFrom(ip, port)
	return v, !r.Failed && port != 0
}

// Flags and limits of PUSH_DIRECT_PATHS records (chapter 02 §2.7).
const (
	pushForget      = 0x01
	maxPushed       = 32 // records looked at
	pushPacketLimit = 1200
)

// appendPush appends as many endpoints as fit one packet and returns the rest.
func appendPush(b []byte, eps []netip.AddrPort) (payload []byte, rest []netip.AddrPort) {
	start := len(b)
	b = append(b, 0, 0)
	n := 0
	for n < len(eps) && packet.HeaderLen+len(b)-start+24 < pushPacketLimit {
		ip := eps[n].Addr().AsSlice()
		typ := byte(4)
		if len(ip) == 16 {
			typ = 6
		}
		b = append(b, 0, 0, 0, typ, byte(len(ip)+2))
		b = append(b, ip...)
		b = binary.BigEndian.AppendUint16(b, eps[n].Port())
		n++
	}
	binary.BigEndian.PutUint16(b[start:], uint16(n))
	return b, eps[n:]
}

// parsePush yields the endpoints that are offered.
func parsePush(b []byte) (eps []netip.AddrPort) {
	r := reader{Reader: wire.Reader{Buf: b}}
	for range min(int(r.U16()), maxPushed) {
		flags := r.U8()
		r.Bytes(int(r.U16()))
		typ := r.U8()
		raw := r.Bytes(int(r.U8()))
		if r.Failed {
			break
		}
		if flags&pushForget != 0 || !(typ == 4 && len(raw) == 6 || typ == 6 && len(raw) == 18) {
			continue
		}
		ip, _ := netip.AddrFromSlice(raw[:len(raw)-2])
		if port := binary.BigEndian.Uint16(raw[len(raw)-2:]); port != 0 {
			eps = append(eps, netip.AddrPortFrom(ip, port))
		}
	}
	return eps
}

// reply is the common start of OK and ERROR payloads.
type reply struct {
	verb packet.Verb
	id   packet.ID
}

const replyLen = 9

func (v reply) append(b []byte) []byte {
	return binary.BigEndian.AppendUint64(append(b, byte(v.verb)), uint64(v.id))
}

func parseReply(b []byte) (v reply, rest []byte, ok bool) {
	if len(b) < replyLen {
		return v, nil, false
	}
	return reply{packet.Verb(b[0]), packet.ID(binary.BigEndian.Uint64(b[1:]))}, b[replyLen:], true
}
