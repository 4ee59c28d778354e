package nat

import (
	"encoding/binary"

	"ztgate/netstack/internal/ipkt"
)

// quoted is the packet that an ICMP error quotes, of which only eight bytes of
// transport header may be there (RFC 792).
type quoted struct {
	b            []byte
	l4           int
	v6           bool
	proto        uint8
	src, dst     [16]byte
	sport, dport uint16
}

func parseQuoted(b []byte, v6 bool) (q quoted, ok bool) {
	q = quoted{b: b, v6: v6}
	if v6 {
		if len(b) < 48 || b[0]>>4 != 6 {
			return q, false
		}
		q.proto, q.l4 = b[6], 40
		q.src, q.dst = [16]byte(b[8:24]), [16]byte(b[24:40])
	} else {
		if len(b) < 28 || b[0]>>4 != 4 {
			return q, false
		}
		q.proto, q.l4 = b[9], int(b[0]&15)*4
		if q.l4 < 20 || len(b) < q.l4+8 || binary.BigEndian.Uint16(b[6:])&0x1fff != 0 {
			return q, false
		}
		q.src[10], q.src[11], q.dst[10], q.dst[11] = 0xff, 0xff, 0xff, 0xff
		copy(q.src[12:], b[12:16])
		copy(q.dst[12:], b[16:20])
	}
	t := b[q.l4:]
	switch q.proto {
	case ipkt.TCP, ipkt.UDP:
		q.sport, q.dport = binary.BigEndian.Uint16(t), binary.BigEndian.Uint16(t[2:])
	case ipkt.ICMP, ipkt.ICMPv6:
		id := binary.BigEndian.Uint16(t[4:])
		switch t[0] {
		case 8, 128:
			q.sport = id
		case 0, 129:
			q.dport = id
		default:
			return q, false
		}
	default:
		return q, q.proto != 0
	}
	return q, true
}

// TranslateError rewrites an ICMP error from a side, with the packet it quotes,
// for the other side, and returns the flow it is about, nil if there is none
// (RFC 5508 §4).
func (t *Table) TranslateError(side Side, v *ipkt.View) (f *Flow, forward bool) {
	if !v.First || v.Fragment || len(v.B) < v.L4+8 {
		return nil, false
	}
	q, ok := parseQuoted(v.B[v.L4+8:], v.V6)
	if !ok {
		return nil, false
	}
	// The quoted packet went the other way: turned round, it is as if it came from this side.
	k := key{src: q.dst, dst: q.src, sport: q.dport, dport: q.sport, proto: q.proto, side: side}
	if f = t.find(&k); f == nil {
		return nil, false
	}
	forward = f.keys[0] == k
	if !f.Masquerade {
		return f, forward
	}
	if forward {
		// From the client about a reply: towards the server both sources become ours.
		q.setDst(f.External, f.ExtPort)
		if v.Src == f.Client {
			setAddr(v, true, f.External)
		}
	} else {
		q.setSrc(f.Client, f.ClientPort)
		setAddr(v, false, f.Client)
	}
	finish(v)
	return f, forward
}

// setAddr replaces the source or destination of the outer packet.
func setAddr(v *ipkt.View, source bool, a [16]byte) {
	off, b := 24, a[:]
	switch {
	case v.V6 && source:
		off = 8
	case v.V6:
	case source:
		off, b = 12, a[12:]
	default:
		off, b = 16, a[12:]
	}
	copy(v.B[off:], b)
	if source {
		v.Src = a
	} else {
		v.Dst = a
	}
}

// finish computes the checksums of an error anew: it is short and rare.
func finish(v *ipkt.View) {
	b := v.B[v.L4:]
	b[2], b[3] = 0, 0
	var sum uint32
	if v.V6 {
		sum = ipkt.PseudoSum(true, v.Src, v.Dst, ipkt.ICMPv6, len(b))
	} else {
		ipkt.FixHeader(v.B)
	}
	binary.BigEndian.PutUint16(b[2:], ipkt.Checksum(b, sum))
}

func (q *quoted) setSrc(a [16]byte, port uint16) { q.set(true, a, port) }
func (q *quoted) setDst(a [16]byte, port uint16) { q.set(false, a, port) }

// set replaces an end of the quoted packet and adapts its checksums where they
// were quoted.
func (q *quoted) set(source bool, a [16]byte, port uint16) {
	old, oldPort := q.dst, q.dport
	if source {
		old, oldPort = q.src, q.sport
	}
	off, n := 16, 12
	switch {
	case q.v6 && source:
		off, n = 8, 0
	case q.v6:
		off, n = 24, 0
	case source:
		off = 12
	}
	copy(q.b[off:], a[n:])
	addr := ipkt.Delta(old[:], a[:])
	if !q.v6 {
		ipkt.AdjustDelta(q.b[10:], addr)
	}
	t := q.b[q.l4:]
	pd := ipkt.Delta([]byte{byte(oldPort >> 8), byte(oldPort)}, []byte{byte(port >> 8), byte(port)})
	switch q.proto {
	case ipkt.TCP, ipkt.UDP:
		at := 2
		if source {
			at = 0
		}
		binary.BigEndian.PutUint16(t[at:], port)
		sumAt := 16
		if q.proto == ipkt.UDP {
			sumAt = 6
		}
		if len(t) >= sumAt+2 && (q.proto == ipkt.TCP || t[6] != 0 || t[7] != 0) {
			ipkt.AdjustDelta(t[sumAt:], ipkt.AddDelta(addr, pd))
		}
	case ipkt.ICMP, ipkt.ICMPv6:
		binary.BigEndian.PutUint16(t[4:], port)
		if q.proto == ipkt.ICMP {
			addr = 0
		}
		ipkt.AdjustDelta(t[2:], ipkt.AddDelta(addr, pd))
	}
}

// Restore turns the translation of a packet towards the server back, so that it
// can be quoted to the client that sent it.
func (f *Flow) Restore(v *ipkt.View) {
	back := Flow{V6: f.V6, Proto: f.Proto, Masquerade: true, External: f.Client, ExtPort: f.ClientPort, Client: f.External, ClientPort: f.ExtPort}
	back.deltas()
	back.rewrite(&back.Forward, true, v)
	v.Src = f.Client
	v.SPort = f.ClientPort
}
