package vl1

import (
	"net/netip"
	"testing"
	"time"
)

// TestAllowed: where a peer can be, by scope of its address (chapter 02 §4.3).
func TestAllowed(t *testing.T) {
	for _, tt := range []struct {
		endpoint        string
		usual, loopback bool
	}{
		{"203.0.113.7:9993", true, true},
		{"10.0.0.7:9993", true, true},
		{"[2001:db8::7]:9993", true, true},
		{"127.0.0.1:9993", false, true},
		{"[::1]:9993", false, true},
		{"127.0.0.1:0", false, false},
		{"169.254.1.7:9993", false, false},
		{"224.0.0.7:9993", false, false},
		{"[2001:470::7]:9993", false, false},
	} {
		for on, want := range map[bool]bool{false: tt.usual, true: tt.loopback} {
			c, err := New(Config{Identity: testIdentity(t), Upper: noUpper{}, Start: time.Unix(1, 0), Loopback: on})
			if err != nil {
				t.Fatal(err)
			}
			if got := c.allowed(&Peer{addr: 0x1234567890}, netip.MustParseAddrPort(tt.endpoint)); got != want {
				t.Errorf("a peer at %s, loopback %v: allowed = %v, want %v", tt.endpoint, on, got, want)
			}
		}
	}
}
