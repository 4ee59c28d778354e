package nat

import (
	"encoding/binary"
	"net/netip"

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
		if q.proto, q.l4, ok = skipExtensions(b); !ok {
			return q, false
		}
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
		q.sport, q.dport, ok = queryPorts(t[0], binary.BigEndian.Uint16(t[4:]))
		return q, ok
	}
	return q, true
}

// skipExtensions finds the transport header in a quoted IPv6 packet.
func skipExtensions(b []byte) (proto uint8, l4 int, ok bool) {
	proto, l4 = b[6], 40
	for len(b) >= l4+8 {
		switch proto {
		case 0, 43, 60, 135:
			proto, l4 = b[l4], l4+8+8*int(b[l4+1])
		case 44:
			if binary.BigEndian.Uint16(b[l4+2:])&0xfff8 != 0 {
				return 0, 0, false
			}
			proto, l4 = b[l4], l4+8
		default:
			return proto, l4, true
		}
	}
	return 0, 0, false
}

// TranslateError rewrites an ICMP error from a side, with the packet it quotes,
// for the other side, and returns the flow it is about and the direction the
// error goes in, nil if there is none (RFC 5508 §4). Errors with a wrong checksum
// and those that don't fit the packet they quote belong to no flow; those that quote
// a TCP segment which wasn't sent lately are out of its window.
func (t *Table) TranslateError(now int64, side Side, v *ipkt.View) (f *Flow, dir int, verdict Verdict) {
	if !v.First || v.Fragment || !v.ChecksumOK() {
		return nil, 0, Pass
	}
	q, ok := parseQuoted(v.B[v.L4+8:], v.V6)
	if !ok || q.src != v.Dst {
		return nil, 0, Pass
	}
	// The quoted packet went the other way: turned round, it is as if it came from
	// this side.
	k := Key{src: q.dst, dst: q.src, sport: q.dport, dport: q.sport, proto: q.proto, side: side}
	t.sum(&k)
	if f, dir = t.Find(now, &k); f == nil {
		return nil, 0, Pass
	}
	if q.proto == ipkt.TCP && !t.sentLately(f, 1-dir, binary.BigEndian.Uint32(q.b[q.l4+4:])) {
		return f, dir, OutOfWindow
	}
	if f.flags&(flagSource|flagDestination) == 0 {
		return f, dir, Pass
	}
	if dir == FromClient {
		q.set(true, f.Server(), f.ServerPort())
		q.set(false, f.External(), f.ExtPort())
		if f.Translated() { // also when a router behind the client sent it (RFC 5508 REQ-5)
			setAddr(v, true, f.External())
		}
		setAddr(v, false, f.Server())
	} else {
		q.set(true, f.Client(), f.ClientPort())
		q.set(false, f.Target(), f.TargetPort())
		if f.Redirected() { // what lies behind a forward stays hidden
			setAddr(v, true, f.Target())
		}
		setAddr(v, false, f.Client())
	}
	finish(v)
	return f, dir, Pass
}

// sentLately reports whether a sequence number can be of a segment of a direction that
// is still under way (RFC 5927 §4).
func (t *Table) sentLately(f *Flow, dir int, seq uint32) bool {
	d, other := &f.dir[dir], &f.dir[1-dir]
	w := d.window.Load()
	if t.set.NoWindow || w&winSeen == 0 || (w|other.window.Load())&winLiberal != 0 {
		return true
	}
	end := d.end.Load()
	return !after(seq, end) && !after(end-max(other.maxWindow(d), 66000)-1, seq)
}

// QuotedTarget returns where the packet went that an ICMP error quotes.
func QuotedTarget(v *ipkt.View) (dst netip.Addr, ok bool) {
	q, ok := parseQuoted(v.B[v.L4+8:], v.V6)
	return ipkt.Addr(q.dst), ok
}

// SetErrorSource replaces who sent an ICMP error.
func SetErrorSource(v *ipkt.View, a [16]byte) {
	setAddr(v, true, a)
	finish(v)
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
		adjust(q.b[10:], addr)
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
			adjust(t[sumAt:], ipkt.AddDelta(addr, pd))
		}
	case ipkt.ICMP, ipkt.ICMPv6:
		if isReply(q.proto, t[0]) != source { // the end that has the identifier
			binary.BigEndian.PutUint16(t[4:], port)
		}
		if q.proto == ipkt.ICMP {
			addr = 0
		}
		adjust(t[2:], ipkt.AddDelta(addr, pd))
	}
}
