// Package wire reads the fields of packets and files, which are big-endian and
// follow each other without padding (chapter 01 §1).
package wire

import (
	"encoding/binary"

	"ztgate/zerotier/identity"
)

// Reader reads fields one after another. After a failure it yields zeros.
type Reader struct {
	Buf    []byte
	Off    int
	Failed bool
}

// Bytes returns the next n bytes, which are part of Buf; nil after a failure.
func (r *Reader) Bytes(n int) []byte {
	if r.Failed || n < 0 || n > len(r.Buf)-r.Off {
		r.Failed = true
		return nil
	}
	r.Off += n
	return r.Buf[r.Off-n : r.Off : r.Off]
}

// Left returns how many bytes are left.
func (r *Reader) Left() int { return len(r.Buf) - r.Off }

// Rest returns what is left without reading it.
func (r *Reader) Rest() []byte { return r.Buf[r.Off:] }

// U8 reads one byte.
func (r *Reader) U8() uint8 {
	if b := r.Bytes(1); b != nil {
		return b[0]
	}
	return 0
}

// U16 reads two bytes.
func (r *Reader) U16() uint16 {
	if b := r.Bytes(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

// U32 reads four bytes.
func (r *Reader) U32() uint32 {
	if b := r.Bytes(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

// U64 reads eight bytes.
func (r *Reader) U64() uint64 {
	if b := r.Bytes(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// Address reads the address of a node, five bytes.
func (r *Reader) Address() identity.Address {
	if b := r.Bytes(identity.AddressLen); b != nil {
		return identity.AddressFromBytes(b)
	}
	return 0
}
