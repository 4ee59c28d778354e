package transport

import (
	"testing"
	"time"
)

// feed reports batches of n datagrams, one every gap, and returns the last pause.
func feed(p *pacer, now *time.Time, batches, n int, gap time.Duration) (d time.Duration) {
	for range batches {
		*now = now.Add(gap)
		d = p.pause(*now, n)
	}
	return d
}

func TestPacer(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	var p pacer
	for _, c := range []struct {
		name    string
		batches int
		n       int
		gap     time.Duration
		paused  bool
	}{
		{"first datagram", 1, 1, time.Second, false},
		{"ping", 20, 1, 200 * time.Millisecond, false},
		{"calls", 200, 1, time.Millisecond, false},
		{"bulk", 100, 1, 50 * time.Microsecond, true},
		{"coalesced bulk", 100, 40, 200 * time.Microsecond, true},
		{"silence", 10, 1, time.Second, false},
	} {
		if d := feed(&p, &now, c.batches, c.n, c.gap); d > 0 != c.paused || d > maxPause {
			t.Errorf("%s: pause %v, want one: %v", c.name, d, c.paused)
		}
	}
}
