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
	var v View
	if Parse(b, &v) != OK {
		panic("bad packet")
	}
	binary.BigEndian.PutUint16(b[26:], Checksum(b[20:], PseudoSum(false, v.Src, v.Dst, UDP, len(b)-20)))
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

func FuzzParse(f *testing.F) {
	f.Add(udp4("10.0.0.1", "10.0.0.2", 1, 2, []byte("hello")))
	f.Fuzz(func(t *testing.T, b []byte) {
		var v View
		if Parse(b, &v) != OK {
			return
		}
		if v.L4 > len(v.B) || len(v.B) > len(b) {
			t.Fatalf("header beyond the packet: %d of %d", v.L4, len(v.B))
		}
		v.MSS()
		v.ClampMSS(1000)
		if v.MayAnswer() {
			var e View
			if r := Parse(AppendError(nil, TooBig, v.Dst, &v, 1300), &e); r != OK {
				t.Errorf("own error is refused: %v", r)
			}
			if v.Proto == TCP {
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
