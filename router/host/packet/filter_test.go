package packet

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/net/bpf"
)

// frameTo is a frame for a destination.
func frameTo(a netip.Addr) []byte {
	b := make([]byte, 14+40+8)
	b[14] = 0x60
	at, typ := destination6, uint16(etherIPv6)
	if a.Is4() {
		b[14], at, typ = 0x45, destination4, etherIPv4
	}
	binary.BigEndian.PutUint16(b[12:], typ)
	copy(b[at:], a.AsSlice())
	return b
}

// somePrefixes makes prefixes of which some lie in others or next to them.
func somePrefixes(r *rand.Rand, n int) (out []netip.Prefix) {
	for range n {
		var p netip.Prefix
		switch k := r.IntN(4); {
		case k == 0 && len(out) > 0:
			near := out[r.IntN(len(out))]
			p = netip.PrefixFrom(around(r, near), near.Bits()+r.IntN(near.Addr().BitLen()-near.Bits()+1))
		case k == 1:
			p = netip.PrefixFrom(random16(r), 1+r.IntN(128))
		default:
			p = netip.PrefixFrom(random4(r), 1+r.IntN(32))
		}
		out = append(out, p)
	}
	return out
}

func random4(r *rand.Rand) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], r.Uint32())
	return netip.AddrFrom4(b)
}

func random16(r *rand.Rand) netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:], r.Uint64())
	binary.BigEndian.PutUint64(b[8:], r.Uint64())
	return netip.AddrFrom16(b)
}

// around returns an address that is in a prefix, or would be but for one bit.
func around(r *rand.Rand, p netip.Prefix) netip.Addr {
	b, fresh := p.Masked().Addr().AsSlice(), random16(r).AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= fresh[i/8] & (0x80 >> (i % 8))
	}
	if p.Bits() > 0 && r.IntN(2) == 0 {
		i := r.IntN(p.Bits())
		b[i/8] ^= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// The program takes a packet if and only if its destination lies in one of the prefixes.
func TestFilter(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for range 300 {
		prefixes := somePrefixes(r, r.IntN(60))
		vm, err := bpf.NewVM(toPrefixes(disjoint(prefixes)))
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		set := prefixSet(disjoint(prefixes))
		for range 200 {
			a := random4(r)
			switch {
			case r.IntN(8) == 0:
				a = random16(r)
			case len(prefixes) > 0:
				a = around(r, prefixes[r.IntN(len(prefixes))])
			}
			want := slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
			n, err := vm.Run(frameTo(a))
			if err != nil || (n == wholePacket) != want || n != 0 && n != wholePacket {
				t.Fatalf("seed %d: %s with %v: the filter takes %d bytes, %v; want %v", seed, a, prefixes, n, err, want)
			}
			if set.contains(a) != want {
				t.Fatalf("seed %d: %s with %v: the set says %v", seed, a, prefixes, !want)
			}
		}
		for _, other := range [][]byte{nil, make([]byte, 20), frameTo(random4(r))[:20], {12: 0x08, 13: 0x06, 60: 0}} {
			if n, err := vm.Run(other); err != nil || n != 0 {
				t.Fatalf("the filter takes %d bytes of %x, %v", n, other, err)
			}
		}
	}
}

func TestFilterOfFamilies(t *testing.T) {
	vm, err := bpf.NewVM(toAnybody())
	if err != nil {
		t.Fatal(err)
	}
	for b, want := range map[string]int{
		string(frameTo(netip.MustParseAddr("10.0.0.1"))): wholePacket,
		string(frameTo(netip.MustParseAddr("fd00::1"))):  wholePacket,
		string(make([]byte, 60)):                         0,
	} {
		if n, err := vm.Run([]byte(b)); n != want || err != nil {
			t.Errorf("%x: %d bytes, %v, want %d", b, n, err, want)
		}
	}
}
