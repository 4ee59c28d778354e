package netstack

import (
	"net/netip"
	"testing"
	"time"
)

func TestErrorLimits(t *testing.T) {
	one := func(int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, 1}) }
	many := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }
	for _, tt := range []struct {
		name     string
		to       func(i int) netip.Addr
		size     bool
		at, more int // at once, and a second later
	}{
		{"ordinary, to one", one, false, 50, 20},
		{"ordinary, in all", many, false, 250, 250},
		{"size, to one", one, true, 200, 200},
		{"size, in all", many, true, 1000, 1000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var l limiter
			l.init()
			for i, want := range []int{tt.at, tt.more} {
				got := 0
				for j := range 3000 {
					if l.allow(int64(i)*int64(time.Second), tt.to(j), tt.size) {
						got++
					}
				}
				if got != want {
					t.Errorf("in second %d: %d errors, want %d", i, got, want)
				}
			}
			if !l.allow(0, netip.AddrFrom4([4]byte{198, 51, 100, 7}), !tt.size) {
				t.Error("the other kind is limited too")
			}
		})
	}
}
