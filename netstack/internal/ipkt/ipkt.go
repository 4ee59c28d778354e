// Package ipkt reads, checks and changes IP packets in place. Its check is what
// stands between the network and everything that forwards or inspects packets:
// what passes it can't make later code read beyond a header.
package ipkt

import (
	"encoding/binary"
	"net/netip"
)

// IP protocol numbers.
const (
	ICMP   = 1
	TCP    = 6
	UDP    = 17
	ICMPv6 = 58
)

// TCP flags.
const (
	FIN = 0x01
	SYN = 0x02
	RST = 0x04
	ACK = 0x10
)

// Reason says why a packet was refused.
type Reason uint8

const (
	OK             Reason = iota
	Short                 // less than an IP header
	Version               // neither 4 nor 6
	Length                // total length beyond the buffer or below the header
	HeaderLength          // IHL below 5
	TransportShort        // transport header cut or inconsistent
	Extension             // IPv6 extension headers too long, cut, or of a kind that is refused
	Options               // IPv4 options malformed, or a source route (RFC 7126)
	HeaderChecksum        // of IPv4
	Address               // addresses that never appear on a wire (RFC 1812 §5.3.7)
	BadFragment           // impossible, or overlapping the transport header (RFC 1858, RFC 3128)
	numReasons
)

// NumReasons is the number of reasons, [OK] among them.
const NumReasons = int(numReasons)

// String returns the label used in metrics.
func (r Reason) String() string {
	return [numReasons]string{"ok", "short", "version", "length", "header_length", "transport_short", "ipv6_extension", "ip_options",
		"header_checksum", "martian", "bad_fragment"}[r]
}

// View is a checked packet with its fields. It aliases the packet.
type View struct {
	B          []byte // the packet, cut to its total length
	V6         bool
	Proto      uint8
	L4         int // offset of the transport header
	TTL        uint8
	Src, Dst   [16]byte // IPv4 in the mapped form
	Fragment   bool     // any part of a fragmented packet
	First      bool     // has a transport header: whole, or the first fragment
	More       bool     // fragments follow
	FragOffset int      // of a fragment, in bytes
	FragID     uint32
	SPort      uint16 // TCP, UDP
	DPort      uint16
	Flags      uint8 // TCP
	ICMPType   uint8
	ICMPCode   uint8
	ICMPID     uint16 // of echo
	DontFrag   bool
	HasOptions bool // IPv4 options or IPv6 extension headers
}

const maxExtensions = 256 // bytes of IPv6 extension headers

// Parse checks b and fills v. Trailing bytes beyond the packet's own length, such
// as Ethernet padding, are cut off.
func Parse(b []byte, v *View) Reason {
	if len(b) < 20 {
		return Short
	}
	switch b[0] >> 4 {
	case 4:
		return v.parse4(b)
	case 6:
		return v.parse6(b)
	}
	return Version
}

// setMapped puts an IPv4 address into a in words, as what reads it does: a load
// wider than the stores before it stalls.
func setMapped(a *[16]byte, b []byte) {
	binary.LittleEndian.PutUint64(a[:], 0)
	binary.LittleEndian.PutUint64(a[8:], uint64(binary.LittleEndian.Uint32(b))<<32|0xffff<<16)
}

// headerOK verifies the checksum of an IPv4 header, which is mostly one without
// options.
func headerOK(b []byte) bool {
	if len(b) != 20 {
		return Sum(b, 0) == 0xffff
	}
	le := binary.LittleEndian // in either byte order the sum of a right header is all ones
	s := uint64(le.Uint32(b)) + uint64(le.Uint32(b[4:])) + uint64(le.Uint32(b[8:])) + uint64(le.Uint32(b[12:])) + uint64(le.Uint32(b[16:]))
	s = s&0xffff + s>>16&0xffff + s>>32
	s = s&0xffff + s>>16
	return s == 0xffff
}

func (v *View) parse4(b []byte) Reason {
	ihl := int(b[0]&15) * 4
	total := int(binary.BigEndian.Uint16(b[2:]))
	if ihl < 20 {
		return HeaderLength
	}
	if total < ihl || total > len(b) {
		return Length
	}
	b = b[:total:total]
	if !headerOK(b[:ihl]) {
		return HeaderChecksum
	}
	if ihl > 20 && !validOptions(b[20:ihl]) {
		return Options
	}
	if !validPair4(b[12:20]) {
		return Address
	}
	frag := binary.BigEndian.Uint16(b[6:])
	// Field by field: a literal would be built elsewhere and copied.
	v.B, v.V6, v.Proto, v.L4, v.TTL = b, false, b[9], ihl, b[8]
	setMapped(&v.Src, b[12:16])
	setMapped(&v.Dst, b[16:20])
	v.Fragment, v.First, v.DontFrag, v.More = frag&0x3fff != 0, frag&0x1fff == 0, frag&0x4000 != 0, frag&0x2000 != 0
	v.FragOffset, v.FragID, v.HasOptions = int(frag&0x1fff)*8, uint32(binary.BigEndian.Uint16(b[4:])), ihl > 20
	v.SPort, v.DPort, v.Flags, v.ICMPType, v.ICMPCode, v.ICMPID = 0, 0, 0, 0, 0, 0
	if v.Fragment && !v.validFragment() {
		return BadFragment
	}
	return v.transport()
}

// validOptions reports whether IPv4 options are well formed and without a source
// route.
func validOptions(o []byte) bool {
	for len(o) > 0 {
		switch o[0] {
		case 0:
			return true
		case 1:
			o = o[1:]
			continue
		case 131, 137:
			return false
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			return false
		}
		o = o[o[1]:]
	}
	return true
}

// validPair4 judges source and destination, which follow each other in b.
func validPair4(b []byte) bool {
	_ = b[7]
	src, dst := binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])
	s, d := src>>24, dst>>24
	return s != 0 && s != 127 && s < 224 && d != 0 && d != 127 && src != dst
}

// validPair6 judges source and destination. IPv4-mapped addresses are refused
// because they would be taken for IPv4 ones.
func (v *View) validPair6() bool {
	return v.Src[0] != 0xff && v.Src != v.Dst && v.Dst != [16]byte{} && !special6(&v.Src) && !special6(&v.Dst)
}

// special6 reports the loopback and IPv4-mapped addresses.
func special6(a *[16]byte) bool {
	if binary.BigEndian.Uint64(a[:]) != 0 {
		return false
	}
	low := binary.BigEndian.Uint64(a[8:])
	return low == 1 || low>>32 == 0xffff
}

// validFragment judges a fragment by its length and place.
func (v *View) validFragment() bool {
	n := len(v.B) - v.L4
	switch {
	case v.More && (n == 0 || n%8 != 0), v.FragOffset+n+v.L4 > 65535:
		return false
	case !v.First && v.Proto == TCP && v.FragOffset < 20:
		return false
	}
	return true
}

func (v *View) parse6(b []byte) Reason {
	if len(b) < 40 {
		return Short
	}
	total := 40 + int(binary.BigEndian.Uint16(b[4:]))
	if total > len(b) {
		return Length
	}
	v.B, v.V6, v.Proto, v.L4, v.TTL = b[:total:total], true, b[6], 40, b[7]
	v.Src, v.Dst = [16]byte(b[8:24]), [16]byte(b[24:40])
	v.Fragment, v.First, v.DontFrag, v.More = false, true, true, false
	v.FragOffset, v.FragID, v.HasOptions = 0, 0, false
	v.SPort, v.DPort, v.Flags, v.ICMPType, v.ICMPCode, v.ICMPID = 0, 0, 0, 0, 0, 0
	if !v.validPair6() {
		return Address
	}
	for {
		switch v.Proto {
		case 0, 43, 60, 135:
			if v.L4+8 > total || v.L4 > 40+maxExtensions {
				return Extension
			}
			v.HasOptions = true
			v.Proto, v.L4 = b[v.L4], v.L4+8+8*int(b[v.L4+1])
		case 44:
			if v.L4+8 > total || v.Fragment {
				return Extension
			}
			f := binary.BigEndian.Uint16(b[v.L4+2:])
			v.HasOptions = true
			v.Fragment, v.First = f&0xfff9 != 0, f&0xfff8 == 0
			v.More, v.FragOffset = f&1 != 0, int(f&0xfff8)
			v.FragID = binary.BigEndian.Uint32(b[v.L4+4:])
			v.Proto, v.L4 = b[v.L4], v.L4+8
			if v.Fragment && !v.validFragment() {
				return BadFragment
			}
		case 59:
			if v.L4 != total {
				return Extension
			}
			return OK
		default:
			if v.L4 > total {
				return Extension
			}
			return v.transport()
		}
		if !v.First {
			return OK
		}
	}
}

// transport checks the transport header and reads it.
func (v *View) transport() Reason {
	if !v.First {
		return OK
	}
	b := v.B[v.L4:]
	switch v.Proto {
	case TCP:
		if len(b) < 20 || int(b[12]>>4)*4 < 20 || int(b[12]>>4)*4 > len(b) {
			return TransportShort
		}
		v.Flags = b[13]
	case UDP:
		if len(b) < 8 {
			return TransportShort
		}
		if n := int(binary.BigEndian.Uint16(b[4:])); n < 8 || !v.Fragment && n > len(b) {
			return TransportShort
		}
	case ICMP, ICMPv6:
		if len(b) < 8 {
			return TransportShort
		}
		v.ICMPType, v.ICMPCode = b[0], b[1]
		v.ICMPID = binary.BigEndian.Uint16(b[4:])
		return OK
	default:
		return OK
	}
	v.SPort, v.DPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	return OK
}

// IsEcho reports an ICMP echo request or reply.
func (v *View) IsEcho() bool {
	return v.Proto == ICMP && (v.ICMPType == 8 || v.ICMPType == 0) || v.Proto == ICMPv6 && (v.ICMPType == 128 || v.ICMPType == 129)
}

// IsICMPError reports an ICMP message that quotes a packet.
func (v *View) IsICMPError() bool {
	switch v.Proto {
	case ICMP:
		return v.ICMPType == 3 || v.ICMPType == 4 || v.ICMPType == 11 || v.ICMPType == 12
	case ICMPv6:
		return v.ICMPType >= 1 && v.ICMPType <= 4
	}
	return false
}

// Addr turns the 16-byte form into an address.
func Addr(a [16]byte) netip.Addr { return netip.AddrFrom16(a).Unmap() }

// Bytes is the inverse of Addr.
func Bytes(a netip.Addr) [16]byte { return a.As16() }

// Source returns the source address.
func (v *View) Source() netip.Addr { return Addr(v.Src) }

// Destination returns the destination address.
func (v *View) Destination() netip.Addr { return Addr(v.Dst) }

// DecrementTTL lowers TTL or hop limit by one, which must be at least 2.
func (v *View) DecrementTTL() {
	if v.V6 {
		v.B[7]--
		return
	}
	old := binary.BigEndian.Uint16(v.B[8:])
	new := old - 1<<8 // not read back: a load wider than the store before it stalls
	binary.BigEndian.PutUint16(v.B[8:], new)
	Adjust16(v.B[10:], old, new)
}

// Adjust16 updates a checksum for a changed word (RFC 1624).
func Adjust16(sum []byte, old, new uint16) {
	s := uint32(^binary.BigEndian.Uint16(sum)) + uint32(^old) + uint32(new)
	s = s&0xffff + s>>16
	s = s&0xffff + s>>16
	binary.BigEndian.PutUint16(sum, ^uint16(s))
}

// AdjustDelta updates a checksum by the difference of two sums (see Delta).
func AdjustDelta(sum []byte, delta uint16) {
	s := uint32(^binary.BigEndian.Uint16(sum)) + uint32(delta)
	s = s&0xffff + s>>16
	binary.BigEndian.PutUint16(sum, ^uint16(s))
}

// Delta returns what changing old to new adds to a ones' complement sum. Both
// have the same even length.
func Delta(old, new []byte) uint16 {
	var s uint32
	for i := 0; i+1 < len(old); i += 2 {
		s += uint32(^binary.BigEndian.Uint16(old[i:])) + uint32(binary.BigEndian.Uint16(new[i:]))
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// AddDelta adds two deltas.
func AddDelta(a, b uint16) uint16 {
	s := uint32(a) + uint32(b)
	return uint16(s&0xffff + s>>16)
}

// Sum returns the ones' complement sum of b on top of initial.
func Sum(b []byte, initial uint32) uint32 {
	s := uint64(initial)
	for len(b) >= 4 {
		s += uint64(binary.BigEndian.Uint32(b))
		b = b[4:]
	}
	if len(b) >= 2 {
		s += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint32(s)
}

// Checksum returns the complemented sum.
func Checksum(b []byte, initial uint32) uint16 { return ^uint16(Sum(b, initial)) }

// PseudoSum is the sum of the pseudo header for a transport segment of n bytes.
func PseudoSum(v6 bool, src, dst [16]byte, proto uint8, n int) uint32 {
	if v6 {
		return Sum(src[:], Sum(dst[:], uint32(proto)+uint32(n)))
	}
	return Sum(src[12:], Sum(dst[12:], uint32(proto)+uint32(n)))
}

// ChecksumOffset returns where the transport checksum is, relative to the
// transport header; ok is false for protocols without one that covers addresses.
func ChecksumOffset(proto uint8) (off int, ok bool) {
	switch proto {
	case TCP:
		return 16, true
	case UDP:
		return 6, true
	case ICMPv6:
		return 2, true
	}
	return 0, false
}

// ChecksumOK verifies the transport checksum of a whole packet. It is true for
// fragments, protocols without a checksum that is known here, and packets whose
// routing header makes the final destination uncertain.
func (v *View) ChecksumOK() bool {
	if v.Fragment || v.V6 && v.HasOptions {
		return true
	}
	b := v.B[v.L4:]
	switch v.Proto {
	case ICMP:
		return Sum(b, 0) == 0xffff
	case UDP:
		if b[6] == 0 && b[7] == 0 {
			return true // RFC 768, RFC 6936
		}
		b = b[:binary.BigEndian.Uint16(b[4:])]
	case TCP, ICMPv6:
	default:
		return true
	}
	return Sum(b, PseudoSum(v.V6, v.Src, v.Dst, v.Proto, len(b))) == 0xffff
}

// FixHeader computes the IPv4 header checksum anew.
func FixHeader(b []byte) {
	b[10], b[11] = 0, 0
	ihl := int(b[0]&15) * 4
	binary.BigEndian.PutUint16(b[10:], Checksum(b[:ihl], 0))
}

// option returns the value of a TCP option with a given length, and its offset in
// the options; nil if it isn't there.
func (v *View) option(kind, length byte) (value []byte, at int) {
	b := v.B[v.L4:]
	opts := b[20 : int(b[12]>>4)*4]
	for i := 0; i < len(opts); {
		switch opts[i] {
		case 0:
			return nil, 0
		case 1:
			i++
			continue
		}
		if i+1 >= len(opts) || opts[i+1] < 2 || i+int(opts[i+1]) > len(opts) {
			return nil, 0
		}
		if opts[i] == kind && opts[i+1] == length {
			return opts[i+2 : i+int(length)], i + 2
		}
		i += int(opts[i+1])
	}
	return nil, 0
}

func (v *View) isSYN() bool { return v.Proto == TCP && v.Flags&SYN != 0 && v.First }

// ClampMSS lowers the MSS option of a SYN to at most mss; it reports whether it
// did (RFC 879: the option announces what the sender can take).
func (v *View) ClampMSS(mss uint16) bool {
	if !v.isSYN() {
		return false
	}
	o, at := v.option(2, 4)
	if o == nil {
		return false
	}
	old := binary.BigEndian.Uint16(o)
	if old <= mss {
		return false
	}
	binary.BigEndian.PutUint16(o, mss)
	if sum := v.B[v.L4+16:]; at%2 == 0 {
		Adjust16(sum, old, mss)
	} else { // the option lies across two words
		Adjust16(sum, old<<8|old>>8, mss<<8|mss>>8)
	}
	return true
}

// MSS returns the MSS option of a SYN, 0 if there is none.
func (v *View) MSS() uint16 {
	if !v.isSYN() {
		return 0
	}
	o, _ := v.option(2, 4)
	if o == nil {
		return 0
	}
	return binary.BigEndian.Uint16(o)
}

// WindowScale returns the window scale option of a SYN (RFC 7323 §2.2).
func (v *View) WindowScale() (shift uint8, ok bool) {
	if !v.isSYN() {
		return 0, false
	}
	o, _ := v.option(3, 3)
	if o == nil {
		return 0, false
	}
	return o[0], true
}
