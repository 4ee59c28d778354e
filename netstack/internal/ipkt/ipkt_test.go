package ipkt

import (
	"encoding/binary"
	"net/netip"
	"testing"
)

// udp4 builds a UDP packet.
func udp4(src, dst string, sport, dport uint16, payload []byte) []byte {
	b := make([]byte, 28+len(payload))
	b[0], b[8], b[9] = 0x45, 64, UDP
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	s, d := netip.MustParseAddr(src).As4(), netip.MustParseAddr(dst).As4()
	copy(b[12:], s[:])
	copy(b[16:], d[:])
	FixHeader(b)
	binary.BigEndian.PutUint16(b[20:], sport)
	binary.BigEndian.PutUint16(b[22:], dport)
	binary.BigEndian.PutUint16(b[24:], uint16(8+len(payload)))
	copy(b[28:], payload)
	binary.BigEndian.PutUint16(b[26:], Checksum(b[20:], PseudoSum(false, Bytes(netip.AddrFrom4([4]byte(b[12:16]))), Bytes(netip.AddrFrom4([4]byte(b[16:20]))), UDP, len(b)-20)))
	return b
}

func TestParse(t *testing.T) {
	b := udp4("10.0.0.1", "10.0.0.2", 1, 2, []byte("hello"))
	var v View
	if r := Parse(append(b, 0, 0, 0), &v); r != OK || len(v.B) != len(b) || v.SPort != 1 || v.DPort != 2 || v.Source() != netip.MustParseAddr("10.0.0.1") {
		t.Fatalf("Parse = %v, %+v", r, v)
	}
	for i := range b {
		if Parse(b[:i], &v) == OK {
			t.Errorf("packet cut to %d bytes passes", i)
		}
	}
	v = View{}
	Parse(b, &v)
	v.DecrementTTL()
	if b[8] != 63 || Checksum(b[:20], 0) != 0 {
		t.Error("TTL or header checksum wrong")
	}
}

func TestErrorChecksums(t *testing.T) {
	b := udp4("10.0.0.1", "10.0.0.2", 1, 2, make([]byte, 1000))
	var v, e View
	Parse(b, &v)
	for kind := range numErrorKinds {
		out := AppendError(nil, kind, v.Dst, &v, 1400)
		if r := Parse(out, &e); r != OK || !e.IsICMPError() || len(out) > maxError4 {
			t.Errorf("%v: %v, %d bytes", kind, r, len(out))
		}
		if Checksum(out[:20], 0) != 0 || Checksum(out[20:], 0) != 0 {
			t.Errorf("%v: bad checksum", kind)
		}
	}
}

func TestFragment(t *testing.T) {
	b := udp4("10.0.0.1", "10.0.0.2", 1, 2, make([]byte, 3000))
	var v View
	Parse(b, &v)
	got := 0
	Fragment4(&v, 1400, func(f []byte) {
		var fv View
		if r := Parse(f, &fv); r != OK || !fv.Fragment || len(f) > 1400 || Checksum(f[:20], 0) != 0 {
			t.Errorf("fragment: %v %d bytes", r, len(f))
		}
		got += len(f) - 20
	})
	if got != len(b)-20 {
		t.Errorf("%d bytes in fragments, want %d", got, len(b)-20)
	}
}

func TestClampMSS(t *testing.T) {
	for _, pad := range []int{0, 1} {
		b := make([]byte, 20+28)
		b[0], b[8], b[9] = 0x45, 64, TCP
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		b[12], b[16], b[19] = 10, 10, 1
		FixHeader(b)
		tcp := b[20:]
		tcp[12], tcp[13] = 7<<4, SYN
		for i := 20; i < 28; i++ {
			tcp[i] = 1
		}
		copy(tcp[20+pad:], []byte{2, 4, 0x05, 0xb4})
		var v View
		if Parse(b, &v) != OK {
			t.Fatal("bad packet")
		}
		sum := PseudoSum(false, v.Src, v.Dst, TCP, 28)
		binary.BigEndian.PutUint16(tcp[16:], Checksum(tcp, sum))
		if !v.ClampMSS(1354) || v.MSS() != 1354 || Checksum(tcp, sum) != 0 {
			t.Errorf("pad %d: MSS %d, checksum %x", pad, v.MSS(), Checksum(tcp, sum))
		}
		if v.ClampMSS(1400) {
			t.Error("raised the MSS")
		}
	}
}

func TestReasons(t *testing.T) {
	good := func() []byte { return udp4("10.0.0.1", "10.0.0.2", 1, 2, make([]byte, 32)) }
	edit := func(f func(b []byte)) []byte { b := good(); f(b); FixHeader(b); return b }
	addrs := func(src, dst string) []byte { return udp4(src, dst, 1, 2, nil) }
	options := func(o ...byte) []byte {
		b := make([]byte, 20+len(o)+8)
		copy(b, good()[:20])
		b[0] = 0x40 | byte(5+len(o)/4)
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		copy(b[20:], o)
		b[20+len(o)+5] = 8
		FixHeader(b)
		return b
	}
	six := func(next byte, payload ...byte) []byte {
		b := make([]byte, 40+len(payload))
		b[0], b[6], b[7], b[8], b[24] = 0x60, next, 64, 0xfd, 0xfc
		binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
		copy(b[40:], payload)
		return b
	}
	v4in6 := six(UDP, 0, 1, 0, 2, 0, 8, 0, 0)
	clear(v4in6[8:24])
	copy(v4in6[18:], []byte{0xff, 0xff, 10, 0, 0, 1})
	for _, tt := range []struct {
		name string
		b    []byte
		want Reason
	}{
		{"1812-5.2.2 good", good(), OK},
		{"1812-5.2.2 checksum", func() []byte { b := good(); b[10] ^= 1; return b }(), HeaderChecksum},
		{"1812-5.2.2 version 5", edit(func(b []byte) { b[0] = 0x55 }), Version},
		{"1812-5.2.2 IHL 4", edit(func(b []byte) { b[0] = 0x44 }), HeaderLength},
		{"1812-5.2.2 IHL 15 too short", good()[:28], Length},
		{"1812-5.2.2 longer than the frame", edit(func(b []byte) { b[2] = 9 }), Length},
		{"1812-5.2.2 shorter than the header", edit(func(b []byte) { b[3] = 19 }), Length},
		{"1812-5.3.7s source 0/8", addrs("0.0.0.1", "10.0.0.2"), Address},
		{"1812-5.3.7s source 127/8", addrs("127.0.0.1", "10.0.0.2"), Address},
		{"1812-5.3.7s multicast source", addrs("224.0.0.1", "10.0.0.2"), Address},
		{"1812-5.3.7s broadcast source", addrs("255.255.255.255", "10.0.0.2"), Address},
		{"1812-5.3.7d destination 127/8", addrs("10.0.0.1", "127.0.0.1"), Address},
		{"1812-5.3.7o land", addrs("10.0.0.1", "10.0.0.1"), Address},
		{"1812-4.2.2.6 unknown option", options(0x9e, 4, 1, 2), OK},
		{"1812-4.2.2.6 NOP and EOL", options(1, 1, 0, 0), OK},
		{"1812-5.3.13.4 LSRR", options(131, 3, 4, 0), Options},
		{"1812-5.3.13.4 SSRR", options(1, 137, 3, 4), Options},
		{"1812-5.3.13.5 zero length", options(7, 0, 0, 0), Options},
		{"791-tiny TCP", edit(func(b []byte) { b[7], b[9] = 1, TCP }), BadFragment},
		{"791-tiny TCP at 16", edit(func(b []byte) { b[7], b[9] = 2, TCP }), BadFragment},
		{"TCP at 24", edit(func(b []byte) { b[7], b[9] = 3, TCP }), OK},
		{"L-FRAG-TAIL", edit(func(b []byte) { b[6], b[7] = 0x1f, 0xfe }), BadFragment},
		{"odd fragment", edit(func(b []byte) { b[3] -= 4; b[6] = 0x20 }), BadFragment},
		{"UDP short", edit(func(b []byte) { b[3] = 27 }), TransportShort},
		{"TCP short", edit(func(b []byte) { b[3], b[9] = 39, TCP }), TransportShort},
		{"TCP offset beyond the segment", edit(func(b []byte) { b[9], b[32] = TCP, 0xf0 }), TransportShort},
		{"UDP length", edit(func(b []byte) { b[25]++ }), TransportShort},
		{"4291 mapped source", v4in6, Address},
		{"8200-4.7 no next header, empty", six(59), OK},
		{"no next header with payload", six(59, 1, 2), Extension},
		{"8200-4.4 routing header cut", six(43, 17, 1, 0, 0, 0, 0, 0, 0), Extension},
		{"extension", six(60, 17, 0, 1, 4, 0, 0, 0, 0, 0, 1, 0, 2, 0, 8, 0, 0), OK},
		{"6946 atomic fragment", six(44, 17, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 2, 0, 8, 0, 0), OK},
		{"8200-4.5c odd fragment", six(44, 17, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 2, 0, 8, 0, 0, 1), BadFragment},
		{"7112 first fragment without transport", six(44, 17, 0, 0, 1, 0, 0, 0, 1), BadFragment},
	} {
		var v View
		if got := Parse(tt.b, &v); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
	for r := range numReasons {
		if r.String() == "" {
			t.Errorf("reason %d has no name", r)
		}
	}
}

func TestChecksumOK(t *testing.T) {
	var v View
	b := udp4("10.0.0.1", "10.0.0.2", 1, 2, []byte("odd"))
	if Parse(b, &v); !v.ChecksumOK() {
		t.Error("right checksum refused")
	}
	b[29] ^= 1
	if Parse(b, &v); v.ChecksumOK() {
		t.Error("wrong checksum accepted")
	}
	b[26], b[27] = 0, 0
	if Parse(b, &v); !v.ChecksumOK() {
		t.Error("CK-UDP0: absent checksum refused")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(udp4("10.0.0.1", "10.0.0.2", 1, 2, []byte("hello")))
	six := make([]byte, 68)
	six[0], six[5], six[6], six[8], six[24], six[40], six[44], six[53] = 0x60, 28, 44, 0xfd, 0xfc, 17, 1, 20
	f.Add(six)
	f.Fuzz(func(t *testing.T, b []byte) {
		checkPlain(t, b)
		var v View
		if Parse(b, &v) != OK {
			return
		}
		v.ChecksumOK()
		own4, own6 := [16]byte{10: 0xff, 0xff, 10, 9, 8, 7}, [16]byte{0xfd, 15: 9}
		own := own4
		if v.V6 {
			own = own6
		}
		if own == v.Src {
			return
		}
		if v.L4 > len(v.B) || len(v.B) > len(b) {
			t.Fatalf("header beyond the packet: %d of %d", v.L4, len(v.B))
		}
		v.MSS()
		v.ClampMSS(1000)
		if v.MayAnswer() {
			var e View
			if r := Parse(AppendError(nil, TooBig, own, &v, 1300), &e); r != OK {
				t.Errorf("own error is refused: %v", r)
			}
			if v.Proto == TCP && v.Destination().IsGlobalUnicast() {
				if r := Parse(AppendReset(nil, &v), &e); r != OK {
					t.Errorf("own reset is refused: %v", r)
				}
			}
		}
		if !v.V6 && len(v.B) > 100 {
			Fragment4(&v, 88, func([]byte) {})
		}
	})
}

// plain calls Plain4 or Plain6.
func plain(b []byte) (size int, proto uint8) {
	switch {
	case len(b) > 0 && b[0] == 0x45:
		return Plain4(b)
	case len(b) > 0 && b[0]>>4 == 6:
		return Plain6(b)
	}
	return 0, 0
}

// checkPlain compares Plain4 and Plain6 with Parse.
func checkPlain(t testing.TB, b []byte) {
	t.Helper()
	var v View
	why := Parse(b, &v)
	size, proto := plain(b)
	usual := why == OK && (v.Proto == TCP || v.Proto == UDP) && !v.Fragment && !v.HasOptions && v.TTL > 1
	switch {
	case size != 0 && (!usual || size != len(v.B) || proto != v.Proto || v.L4 != map[bool]int{false: 20, true: 40}[v.V6]):
		t.Errorf("plain, %d bytes of protocol %d, but Parse says %v: %x", size, proto, why, b)
	case size == 0 && usual && len(v.B) <= 0xffff && !(v.V6 && ([8]byte(v.Src[:]) == [8]byte{} || [8]byte(v.Dst[:]) == [8]byte{})):
		t.Errorf("not plain: %x", b)
	}
}

// TestPlain compares Plain4 and Plain6 with Parse on packets with a byte or a bit
// changed.
func TestPlain(t *testing.T) {
	six := func(proto byte, transport []byte) []byte {
		b := append(make([]byte, 40), transport...)
		b[0], b[5], b[6], b[7], b[8], b[24] = 0x60, byte(len(transport)), proto, 64, 0xfd, 0xfc
		return b
	}
	tcp := make([]byte, 24)
	tcp[12] = 6 << 4
	four := append(udp4("10.0.0.1", "10.0.0.2", 1, 2, nil)[:20], tcp...)
	four[3], four[9] = byte(len(four)), TCP
	FixHeader(four)
	udp := []byte{0, 1, 0, 2, 0, 12, 0, 0, 1, 2, 3, 4}
	seen := 0
	for _, b := range [][]byte{udp4("10.0.0.1", "10.0.0.2", 1, 2, []byte("hello")), four, six(UDP, udp), six(TCP, tcp)} {
		if size, _ := plain(b); size == 0 {
			t.Errorf("not plain: %x", b)
		}
		for i := range b {
			for _, to := range []byte{0, 1, 2, 44, 59, 0x7f, 0x80, 0xff, b[i] ^ 1, b[i] ^ 0x10, b[i] ^ 0x20, b[i] ^ 0x40, b[i] + 1, b[i] - 1} {
				for _, n := range []int{len(b), len(b) + 8, len(b) - 1, len(b) - 4, i} {
					p := append(append([]byte(nil), b...), make([]byte, 8)...)[:n]
					if i >= n {
						continue
					}
					p[i] = to
					checkPlain(t, p)
					if n >= 20 && p[0]>>4 == 4 && p[0]&15 >= 5 && int(p[0]&15)*4 <= n {
						FixHeader(p)
						checkPlain(t, p)
					}
					if size, _ := plain(p); size > 0 {
						seen++
					}
				}
			}
		}
	}
	if seen < 1000 {
		t.Errorf("only %d changed packets were plain", seen)
	}
}
