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
