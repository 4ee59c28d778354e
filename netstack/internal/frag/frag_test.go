package frag

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
)

func view(t *testing.T, b []byte) *ipkt.View {
	t.Helper()
	var v ipkt.View
	if r := ipkt.Parse(b, &v); r != ipkt.OK {
		t.Fatalf("fragment refused: %v", r)
	}
	return &v
}

func datagram(src string, id uint16, n int) []byte {
	return pkttest.Packet{Src: pkttest.Addr(src + ":4000"), Dst: pkttest.Addr("10.0.0.10:53"), ID: id, Payload: make([]byte, n)}.Bytes()
}

func newStore(lost *int) *Store { return New(func(_ uint32, n int) { *lost += n }) }

func TestOrders(t *testing.T) {
	parts := pkttest.Fragments(datagram("172.31.0.10", 7, 2048), 800, 800)
	for _, order := range [][]int{{0, 1, 2}, {2, 1, 0}, {1, 2, 0}, {0, 0, 1, 1, 2}} {
		lost := 0
		s := newStore(&lost)
		var out [][]byte
		for i, at := range order {
			done, res := s.Add(1, 0, 0, view(t, parts[at]))
			if last := i == len(order)-1; last != (res == Complete) {
				t.Errorf("4787-REQ-14: order %v, piece %d: result %d", order, i, res)
			}
			out = append(out, done...)
		}
		if !slices.EqualFunc(out, parts, func(a, b []byte) bool { return string(a) == string(b) }) {
			t.Errorf("order %v: other fragments came out", order)
		}
		if s.Bytes() != 0 || lost != 0 {
			t.Errorf("order %v: %d bytes held, %d lost", order, s.Bytes(), lost)
		}
	}
}

// TestPieces: a datagram in more pieces than anybody cuts one into is given up.
func TestPieces(t *testing.T) {
	lost, held, many := 0, 0, 0
	s := newStore(&lost)
	for _, p := range pkttest.Fragments(datagram("172.31.0.10", 7, 8*4*maxPieces), slices.Repeat([]int{8}, 2*maxPieces)...) {
		switch _, res := s.Add(1, 0, 0, view(t, p)); res {
		case Held:
			held++
		case TooMany:
			many++
		}
	}
	if held != maxPieces || many == 0 {
		t.Errorf("%d pieces held, %d too many, want %d", held, many, maxPieces)
	}
}

func TestOverlap(t *testing.T) {
	parts := pkttest.Fragments(datagram("172.31.0.10", 7, 2048), 800, 800)
	bad := slices.Clone(parts[1])
	binary.BigEndian.PutUint16(bad[6:], binary.BigEndian.Uint16(bad[6:])-1)
	ipkt.FixHeader(bad)
	lost := 0
	s := newStore(&lost)
	s.Add(1, 0, 0, view(t, parts[0]))
	if _, res := s.Add(1, 0, 0, view(t, bad)); res != Overlap {
		t.Errorf("L-FRAG-OVERLAP: result %d", res)
	}
	for _, p := range parts {
		if _, res := s.Add(1, 0, 0, view(t, p)); res != Overlap {
			t.Errorf("good fragment after an overlap: result %d", res)
		}
	}
	if lost != 1 {
		t.Errorf("%d fragments counted as lost, want 1", lost)
	}
}

func TestExpire(t *testing.T) {
	lost := 0
	s := newStore(&lost)
	parts := pkttest.Fragments(datagram("172.31.0.10", 7, 2048), 800, 800)
	s.Add(1, 0, 0, view(t, parts[0]))
	s.Expire(1 + int64(29*time.Second))
	if lost != 0 {
		t.Error("given up early")
	}
	s.Expire(1 + int64(30*time.Second))
	if lost != 1 || s.Bytes() != 0 || len(s.sources) != 0 {
		t.Errorf("%d lost, %d bytes, %d sources left", lost, s.Bytes(), len(s.sources))
	}
}

// TestFlood: 4787-REQ-14a, a flood of first fragments doesn't stop others.
func TestFlood(t *testing.T) {
	lost := 0
	s := newStore(&lost)
	own := pkttest.Fragments(datagram("172.31.9.9", 1, 2048), 800, 800)
	s.Add(1, 0, 0, view(t, own[0]))
	for i := range 20000 {
		src := fmt.Sprintf("172.31.1.%d", i%100)
		s.Add(1, 0, 0, view(t, pkttest.Fragments(datagram(src, uint16(i), 2048), 800)[0]))
	}
	if s.Bytes() > maxBytes {
		t.Errorf("%d bytes held", s.Bytes())
	}
	s.Add(1, 0, 0, view(t, own[1]))
	if _, res := s.Add(1, 0, 0, view(t, own[2])); res != Complete {
		t.Errorf("legitimate packet: result %d", res)
	}
	if lost == 0 {
		t.Error("nothing counted as lost")
	}
}

// TestForgedFlood: 4787-REQ-14a, floods from addresses that are all different, from the
// VPC and from an overlay member, don't stop others, nor large datagrams beside them.
func TestForgedFlood(t *testing.T) {
	for name, tt := range map[string]struct {
		member uint64
		src    func(i int) string
	}{
		"a /24":  {0, func(i int) string { return fmt.Sprintf("172.31.9.%d", i%250) }},
		"a /16":  {0, func(i int) string { return fmt.Sprintf("172.31.%d.%d", i/250%250, i%250) }},
		"member": {5, func(i int) string { return fmt.Sprintf("10.%d.%d.%d", i%200, i/250%250, i%250) }},
	} {
		lost := 0
		s := newStore(&lost)
		n, now := 0, int64(1)
		flood := func(count int) {
			for range count {
				n++
				now += int64(10 * time.Microsecond)
				s.Add(now, 0, tt.member, view(t, pkttest.Fragments(datagram(tt.src(n), uint16(n>>8), 2048), 800)[0]))
			}
		}
		flood(20000)
		for i := range 20 {
			own := pkttest.Fragments(datagram("172.31.9.251", uint16(i), 40000), 1480, 1480)
			s.Add(now, 0, 0, view(t, own[0]))
			flood(1000)
			s.Add(now, 0, 0, view(t, own[1]))
			flood(1000)
			if _, res := s.Add(now, 0, 0, view(t, own[2])); res != Complete {
				t.Errorf("%s: datagram %d: result %d", name, i, res)
			}
		}
		if s.Bytes() > maxBytes {
			t.Errorf("%s: %d bytes held", name, s.Bytes())
		}
		s.Expire(now + int64(time.Minute))
		if s.Bytes() != 0 {
			t.Errorf("%s: %d bytes left", name, s.Bytes())
		}
	}
}

// TestRandom keeps the account of bytes right whatever comes.
func TestRandom(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	given, lost, out := 0, 0, 0
	s := newStore(&lost)
	for i := range 20000 {
		b := pkttest.Packet{Src: pkttest.Addr(fmt.Sprintf("172.31.0.%d:1", 1+rng.IntN(3))), Dst: pkttest.Addr("10.0.0.1:2"), ID: uint16(rng.IntN(4)),
			Offset: 8 * rng.IntN(4), More: rng.IntN(2) == 0, Payload: make([]byte, 8*(1+rng.IntN(2)))}.Bytes()
		var v ipkt.View
		if ipkt.Parse(b, &v) != ipkt.OK || !v.Fragment {
			continue
		}
		done, res := s.Add(int64(i)*int64(time.Second)/4, 0, 0, &v)
		if res == Held || res == Complete {
			given++
		}
		out += len(done)
		if i%100 == 0 {
			s.Expire(int64(i) * int64(time.Second) / 4)
		}
	}
	s.Expire(1 << 60)
	if given != lost+out {
		t.Errorf("%d fragments in, %d out and %d lost", given, out, lost)
	}
	if s.Bytes() != 0 || len(s.packets) != 0 || len(s.sources) != 0 {
		t.Errorf("%d bytes in %d packets left", s.Bytes(), len(s.packets))
	}
}
