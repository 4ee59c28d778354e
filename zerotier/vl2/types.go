package vl2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strconv"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/wire"
	"ztgate/zerotier/ztnode"
)

// ErrMalformed is wrapped by the errors of all parsers.
var ErrMalformed = errors.New("malformed")

// NetworkID is a network's number.
type NetworkID = ztnode.NetworkID

// ParseNetworkID reads 16 hexadecimal digits. Unlike [ztnode.ParseNetworkID] it takes 0,
// which records and messages may hold.
func ParseNetworkID(s string) (NetworkID, error) {
	v, err := strconv.ParseUint(s, 16, 64)
	if err != nil || len(s) != 16 {
		return 0, fmt.Errorf("network ID %q: want 16 hexadecimal digits", s)
	}
	return NetworkID(v), nil
}

// NetworkIDFromBytes reads b[:8]; the caller has checked the length.
func NetworkIDFromBytes(b []byte) NetworkID { return NetworkID(binary.BigEndian.Uint64(b)) }

// MAC is an Ethernet address.
type MAC = ztnode.MAC

// BroadcastMAC is ff:ff:ff:ff:ff:ff.
var BroadcastMAC = MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// MACOf returns a member's MAC.
func MACOf(n NetworkID, a identity.Address) MAC { return ztnode.MACOf(n, a) }

// AddressOf inverts [MACOf]; the first byte isn't checked.
func AddressOf(n NetworkID, m MAC) identity.Address { return ztnode.AddressOf(n, m) }

// MulticastGroup is a multicast MAC with the ADI that tells ARP groups apart
// (chapter 01 §6.4).
type MulticastGroup = ztnode.Group

// ParseGroup reads a group from the start of b.
func ParseGroup(b []byte) (g MulticastGroup, ok bool) {
	if len(b) < 10 {
		return g, false
	}
	return MulticastGroup{MAC: MAC(b[:6]), ADI: binary.BigEndian.Uint32(b[6:])}, true
}

// ResolutionGroup returns the group in which others look for an address by ARP or
// neighbour discovery.
func ResolutionGroup(a netip.Addr) MulticastGroup {
	if a.Is4() {
		b := a.As4()
		return MulticastGroup{MAC: BroadcastMAC, ADI: binary.BigEndian.Uint32(b[:])}
	}
	b := a.As16()
	return MulticastGroup{MAC: MAC{0x33, 0x33, 0xff, b[13], b[14], b[15]}}
}

// EtherTypes used by the protocol.
const (
	EtherTypeIPv4 = 0x0800
	EtherTypeARP  = 0x0806
	EtherTypeIPv6 = 0x86dd
)

// GroupOf returns the group of a frame from the host; ok is false for a broadcast
// that needs the network's permission (chapter 03 §5.7).
func GroupOf(dst MAC, etherType uint16, data []byte) (g MulticastGroup, ok bool) {
	if dst != BroadcastMAC {
		return MulticastGroup{MAC: dst}, true
	}
	if etherType == EtherTypeARP && len(data) >= 28 && data[2] == 8 && data[3] == 0 && data[4] == 6 && data[5] == 4 && data[7] == 1 {
		return MulticastGroup{MAC: dst, ADI: binary.BigEndian.Uint32(data[24:])}, true
	}
	return MulticastGroup{MAC: dst}, false
}

// RFC4193 returns a member's address of that form, a /88 (chapter 01 §6.5).
func RFC4193(n NetworkID, a identity.Address) netip.Prefix {
	var b [16]byte
	b[0] = 0xfd
	binary.BigEndian.PutUint64(b[1:], uint64(n))
	b[9], b[10] = 0x99, 0x93
	a.Put(b[11:])
	return netip.PrefixFrom(netip.AddrFrom16(b), 88)
}

// SixPlane returns a member's address of that form, a /40; the member owns the
// /80 below.
func SixPlane(n NetworkID, a identity.Address) netip.Prefix {
	b := [16]byte{0: 0xfc, 15: 1}
	binary.BigEndian.PutUint32(b[1:], uint32(n)^uint32(n>>32))
	a.Put(b[5:])
	return netip.PrefixFrom(netip.AddrFrom16(b), 40)
}

// MadeOf reports an address that contains a member's own: its [RFC4193] address, or one
// of the /80 of its [SixPlane] address.
func MadeOf(n NetworkID, member identity.Address, a netip.Addr) bool {
	if a == RFC4193(n, member).Addr() {
		return true
	}
	six, b := SixPlane(n, member).Addr().As16(), a.As16()
	return a.Is6() && [10]byte(six[:10]) == [10]byte(b[:10])
}

// LinkLocal returns the link-local address that belongs to a MAC.
func LinkLocal(m MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] & 0xfd, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// reader reads the fields of this package too.
type reader struct{ wire.Reader }

func (r *reader) mac() (m MAC) {
	copy(m[:], r.Bytes(6))
	return m
}

func (r *reader) networkID() NetworkID { return NetworkID(r.U64()) }

var be = binary.BigEndian
