package vl1

import (
	"testing"

	"ztgate/zerotier/packet"
)

// Neither IDs that count up, as those of older releases, nor distant ones are taken for
// each other.
func TestRepeatsOfNewPackets(t *testing.T) {
	for _, step := range []packet.ID{1, repeatSize, 1 << 32, 1 << 44, 0x9e3779b97f4a7c15} {
		r := newRepeats()
		for i := range packet.ID(1 << 16) {
			if r.look(77 + i*step).seen() {
				t.Fatalf("step %x: packet %d is new", step, i)
			}
		}
	}
	for _, step := range []packet.ID{1, 1 << 32, 0x9e3779b97f4a7c15} {
		r := newRepeats()
		known := 0
		for i := range packet.ID(10_000) {
			r.look(i * step).seen()
		}
		for i := range packet.ID(10_000) {
			if r.look(i * step).seen() {
				known++
			}
		}
		if known < 9_200 {
			t.Errorf("step %x: %d of 10,000 repeats found", step, known)
		}
	}
}

func BenchmarkRepeats(b *testing.B) {
	r := newRepeats()
	b.ReportAllocs()
	x := packet.ID(1)
	for b.Loop() {
		x = x*6364136223846793005 + 1442695040888963407
		r.look(x).seen()
	}
}
