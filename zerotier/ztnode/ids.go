package ztnode

import (
	"encoding/binary"
	"fmt"
	"net"
	"strconv"

	"ztgate/zerotier/identity"
)

// NetworkID is a network's 64-bit number (chapter 01 §1.3), 16 hex digits in text.
type NetworkID uint64

// ParseNetworkID reads 16 hex digits. No network has the ID 0.
func ParseNetworkID(s string) (NetworkID, error) {
	v, err := strconv.ParseUint(s, 16, 64)
	if err != nil || len(s) != 16 || v == 0 {
		return 0, fmt.Errorf("network ID %q: want 16 hex digits, as in 8056c2e21c000001", s)
	}
	return NetworkID(v), nil
}

// String returns 16 hex digits.
func (id NetworkID) String() string { return fmt.Sprintf("%016x", uint64(id)) }

// MarshalText implements encoding.TextMarshaler.
func (id NetworkID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler. It takes 0 for no network.
func (id *NetworkID) UnmarshalText(b []byte) (err error) {
	if string(b) == NetworkID(0).String() {
		*id = 0
		return nil
	}
	*id, err = ParseNetworkID(string(b))
	return err
}

// Append appends the eight bytes.
func (id NetworkID) Append(b []byte) []byte { return binary.BigEndian.AppendUint64(b, uint64(id)) }

// Controller returns the address of the network's controller.
func (id NetworkID) Controller() identity.Address { return identity.Address(id >> 24) }

// AdHoc reports whether members configure the network themselves.
func (id NetworkID) AdHoc() bool { return id>>56 == 0xff }

// MAC is an Ethernet address.
type MAC [6]byte

// String returns the form with colons.
func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// MarshalText implements encoding.TextMarshaler.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *MAC) UnmarshalText(b []byte) error {
	hw, err := net.ParseMAC(string(b))
	if err != nil || len(hw) != len(m) {
		return fmt.Errorf("MAC address %q: want six bytes in hex", b)
	}
	copy(m[:], hw)
	return nil
}

// IsMulticast reports whether the group bit is set.
func (m MAC) IsMulticast() bool { return m[0]&1 != 0 }

// IsZero reports whether all bytes are zero.
func (m MAC) IsZero() bool { return m == MAC{} }

// MACOf returns a member's MAC (chapter 01 §1.4).
func MACOf(n NetworkID, a identity.Address) (m MAC) {
	m[0] = byte(n)&0xfe | 0x02
	if m[0] == 0x52 {
		m[0] = 0x32
	}
	a.Put(m[1:])
	for i := range 5 {
		m[1+i] ^= byte(n >> (8 * (i + 1)))
	}
	return m
}

// AddressOf inverts [MACOf]; the first byte isn't checked.
func AddressOf(n NetworkID, m MAC) identity.Address {
	for i := range 5 {
		m[1+i] ^= byte(n >> (8 * (i + 1)))
	}
	return identity.AddressFromBytes(m[1:])
}

// Group is a multicast group of a network: a multicast MAC with the ADI that tells ARP
// groups apart (chapter 01 §6.4).
type Group struct {
	MAC MAC
	ADI uint32
}

// Append appends the ten bytes.
func (g Group) Append(b []byte) []byte {
	return binary.BigEndian.AppendUint32(append(b, g.MAC[:]...), g.ADI)
}

// MoonID returns the text form of a moon's ID, as zerotier-cli prints it.
func MoonID(id uint64) string { return fmt.Sprintf("%016x", id) }
