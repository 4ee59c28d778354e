package packet

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// ErrEndpoint says that an encoded endpoint is malformed.
var ErrEndpoint = errors.New("malformed endpoint")

// AppendEndpoint appends an endpoint (chapter 01 §6.2): 7 bytes for IPv4, 19 for
// IPv6, 1 for an invalid one.
func AppendEndpoint(b []byte, ep netip.AddrPort) []byte {
	a := ep.Addr().Unmap()
	switch {
	case a.Is4():
		a4 := a.As4()
		b = append(append(b, 4), a4[:]...)
	case a.Is6():
		a16 := a.As16()
		b = append(append(b, 6), a16[:]...)
	default:
		return append(b, 0)
	}
	return binary.BigEndian.AppendUint16(b, ep.Port())
}

// ParseEndpoint reads an endpoint from the start of b and returns how many bytes
// it takes. Nil and skipped types give an invalid endpoint without error.
func ParseEndpoint(b []byte) (ep netip.AddrPort, n int, err error) {
	if len(b) == 0 {
		return ep, 0, ErrEndpoint
	}
	switch b[0] {
	case 0:
		return ep, 1, nil
	case 1, 2:
		n = 7
	case 3:
		if len(b) < 3 {
			return ep, 0, ErrEndpoint
		}
		n = 3 + int(binary.BigEndian.Uint16(b[1:]))
	case 4:
		n = 7
	case 6:
		n = 19
	default:
		return ep, 0, ErrEndpoint
	}
	if len(b) < n {
		return ep, 0, ErrEndpoint
	}
	switch b[0] {
	case 4:
		ep = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[1:5])), binary.BigEndian.Uint16(b[5:]))
	case 6:
		ep = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[1:17])), binary.BigEndian.Uint16(b[17:]))
	}
	return ep, n, nil
}

// Scope is the reach of an IP address; a higher one is preferred when choosing
// between endpoints (chapter 01 §6.3).
type Scope uint8

// Scopes.
const (
	ScopeNone          Scope = 0
	ScopeMulticast     Scope = 1
	ScopeLoopback      Scope = 2
	ScopePseudoPrivate Scope = 3
	ScopeGlobal        Scope = 4
	ScopeLinkLocal     Scope = 5
	ScopeShared        Scope = 6
	ScopePrivate       Scope = 7
)

// ScopeOf classifies an address.
func ScopeOf(a netip.Addr) Scope {
	switch {
	case a.Is4():
		return scope4(a.As4())
	case a.Is6():
		return scope6(a)
	}
	return ScopeNone
}

func scope4(b [4]byte) Scope {
	switch b[0] {
	case 0, 255:
		return ScopeNone
	case 6, 11, 21, 22, 25, 26, 28, 29, 30, 51, 55, 56:
		return ScopePseudoPrivate
	case 10:
		return ScopePrivate
	case 127:
		return ScopeLoopback
	}
	switch {
	case b[0] >= 224 && b[0] <= 239:
		return ScopeMulticast
	case b[0] >= 240:
		return ScopePseudoPrivate
	case b[0] == 169 && b[1] == 254:
		return ScopeLinkLocal
	case b[0] == 100 && b[1]&0xc0 == 64,
		b[0] == 172 && b[1]&0xf0 == 16,
		b[0] == 192 && b[1] == 168,
		b[0] == 192 && b[1] == 0 && b[2] == 2,
		b[0] == 198 && b[1]&0xfe == 18,
		b[0] == 198 && b[1] == 51 && b[2] == 100,
		b[0] == 203 && b[1] == 0 && b[2] == 113:
		return ScopePrivate
	}
	return ScopeGlobal
}

func scope6(a netip.Addr) Scope {
	if a.Is4In6() {
		if a.As16()[12] == 127 {
			return ScopeLoopback
		}
		return ScopeGlobal
	}
	b := a.As16()
	switch {
	case b[0] == 0xff:
		return ScopeMulticast
	case b[0] == 0xfe && b[1]&0xc0 == 0x80:
		if b == [16]byte{0: 0xfe, 1: 0x80, 15: 1} {
			return ScopeLoopback
		}
		return ScopeLinkLocal
	case b[0]&0xfe == 0xfc:
		return ScopePrivate
	case b == [16]byte{15: 1}:
		return ScopeLoopback
	case b == [16]byte{}:
		return ScopeNone
	}
	return ScopeGlobal
}

// SourceBuckets is the number of rate limit buckets of [SourceBucket].
const SourceBuckets = 1 << 14

// SourceBucket maps the network of an address to a rate limit bucket (chapter 01
// §7.2).
func SourceBucket(a netip.Addr) int {
	if a.Is4() {
		b := a.As4()
		x := uint32(b[0])<<16 | uint32(b[1])<<8 | uint32(b[2])
		return int((x ^ x>>14) & (SourceBuckets - 1))
	}
	h := uint32(0)
	b := a.As16()
	for _, x := range b[:6] {
		h = 2*h + uint32(x)
	}
	return int(h & (SourceBuckets - 1))
}
