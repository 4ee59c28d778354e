package identity

import (
	"encoding/hex"
	"fmt"
)

// Address is a ZeroTier address: 40 bits (chapter 01 §1.2).
type Address uint64

// AddressLen is the length of an address on the wire.
const AddressLen = 5

const (
	maxAddress     = 1<<40 - 1
	reservedPrefix = 0xff
)

// ParseAddress reads exactly ten hexadecimal digits.
func ParseAddress(s string) (Address, error) {
	var b [AddressLen]byte
	if len(s) != 2*AddressLen {
		return 0, fmt.Errorf("address %q: want 10 hexadecimal digits", s)
	}
	if _, err := hex.Decode(b[:], []byte(s)); err != nil {
		return 0, fmt.Errorf("address %q: want 10 hexadecimal digits", s)
	}
	return AddressFromBytes(b[:]), nil
}

// AddressFromBytes reads b[:5]; the caller has checked the length.
func AddressFromBytes(b []byte) Address {
	_ = b[4]
	return Address(b[0])<<32 | Address(b[1])<<24 | Address(b[2])<<16 | Address(b[3])<<8 | Address(b[4])
}

// String returns ten hexadecimal digits.
func (a Address) String() string { return fmt.Sprintf("%010x", uint64(a)) }

// Reserved reports whether no node may use the address: zero, or first byte ff.
func (a Address) Reserved() bool {
	return a == 0 || a > maxAddress || a>>32 == reservedPrefix
}

// Put writes the address into b[:5].
func (a Address) Put(b []byte) {
	_ = b[4]
	b[0], b[1], b[2], b[3], b[4] = byte(a>>32), byte(a>>24), byte(a>>16), byte(a>>8), byte(a)
}

// Append appends the five bytes of the address.
func (a Address) Append(b []byte) []byte {
	return append(b, byte(a>>32), byte(a>>24), byte(a>>16), byte(a>>8), byte(a))
}
