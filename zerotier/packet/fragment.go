package packet

import (
	"encoding/binary"
	"errors"

	"ztgate/zerotier/identity"
)

// Fragment is a view of a datagram that carries a later part of a packet.
//
//	0    8      13   14    15   16
//	| id | dest | ff | t,n | hops | data...
type Fragment []byte

const (
	offFragCount = 14
	offFragHops  = 15
)

// ErrFragment says that the numbers of a fragment make no sense.
var ErrFragment = errors.New("bad fragment numbers")

// ParseFragment checks length and numbers (chapter 01 §4.5).
func ParseFragment(b []byte) (Fragment, error) {
	if len(b) <= FragmentHeaderLen || b[offSrc] != fragmentIndicator {
		return nil, ErrShort
	}
	f := Fragment(b)
	if t, n := f.Total(), f.Number(); t < 2 || t > MaxFragments || n < 1 || n >= t {
		return nil, ErrFragment
	}
	return f, nil
}

// ID returns the wire packet ID of the packet.
func (f Fragment) ID() ID { return ID(binary.BigEndian.Uint64(f)) }

// Destination returns the address the packet is for.
func (f Fragment) Destination() identity.Address { return identity.AddressFromBytes(f[offDst:]) }

// Total returns the number of datagrams of the packet, head included.
func (f Fragment) Total() int { return int(f[offFragCount] >> 4) }

// Number returns the place of this part, from 1.
func (f Fragment) Number() int { return int(f[offFragCount] & 0x0f) }

// Hops returns the number of relays passed.
func (f Fragment) Hops() uint8 { return f[offFragHops] & hopsMask }

// SetHops sets the number of relays passed, modulo 8.
func (f Fragment) SetHops(n uint8) { f[offFragHops] = n & hopsMask }

// Data returns the part itself.
func (f Fragment) Data() []byte { return f[FragmentHeaderLen:] }

// NeedsSplit reports whether a packet of n bytes exceeds one datagram. If so,
// [Packet.SetFragmented] must be called before sealing.
func NeedsSplit(n, mtu int) bool { return n > mtu }

// Datagrams returns how many datagrams of at most mtu bytes carry a packet of n.
func Datagrams(n, mtu int) int {
	if n <= mtu {
		return 1
	}
	chunk := mtu - FragmentHeaderLen
	return 1 + (n-mtu+chunk-1)/chunk
}

// Split cuts a sealed packet into datagrams of at most mtu bytes and hands them
// to emit in order: a datagram is head followed by data. With even set all have
// nearly the same size, which keeps trains of equal datagrams whole for UDP
// segmentation offload; otherwise all but the last are full, as the reference
// does. head is valid until emit returns; hdr, the caller's, is its memory, so that
// nothing is allocated. More than [MaxFragments] datagrams are refused by every
// receiver.
func Split(p Packet, mtu int, even bool, hdr *[FragmentHeaderLen]byte, emit func(head, data []byte)) {
	total := Datagrams(len(p), mtu)
	if total == 1 {
		emit(nil, p)
		return
	}
	size := mtu
	if even {
		size = (len(p) + FragmentHeaderLen*(total-1) + total - 1) / total
	}
	emit(nil, p[:size])
	copy(hdr[:offSrc], p[:offSrc])
	hdr[offSrc], hdr[offFragHops] = fragmentIndicator, 0
	rest := p[size:]
	for n := 1; n < total; n++ {
		hdr[offFragCount] = byte(total<<4 | n)
		k := min(size-FragmentHeaderLen, len(rest))
		emit(hdr[:], rest[:k])
		rest = rest[k:]
	}
}
