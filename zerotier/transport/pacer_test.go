package transport

import (
	"testing"
	"time"
)

// feed reports batches of messages, again and again, one every gap, and returns the
// last pause.
func feed(p *pacer, now *time.Time, batches int, gap time.Duration, messages ...received) (d time.Duration) {
	n, bytes := 0, 0
	for _, m := range messages {
		n += m.datagrams
		bytes += m.datagrams * m.size
	}
	for range batches {
		*now = now.Add(gap)
		d = p.pause(*now, len(messages), n, bytes)
	}
	return d
}

// received is a message of the kernel's: datagrams of one size.
type received struct{ datagrams, size int }

func TestPacer(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	var p pacer
	type batch []received
	full, ack := batch{{1, 1432}}, batch{{1, 90}}
	for _, c := range []struct {
		name    string
		batches int
		gap     time.Duration
		batch   batch
		paused  bool
	}{
		{"first datagram", 1, time.Second, full, false},
		{"ping", 20, 200 * time.Millisecond, ack, false},
		{"calls", 200, time.Millisecond, batch{{1, 300}}, false},
		{"bulk", 100, 50 * time.Microsecond, full, true},
		{"coalesced bulk", 100, 200 * time.Microsecond, batch{{28, 1432}, {12, 1432}}, true},
		{"short connections, at their clients", 100, 100 * time.Microsecond, batch{{2, 110}, {1, 90}, {1, 1432}, {1, 960}, {1, 90}}, false},
		{"bulk in halves of frames", 100, 200 * time.Microsecond, batch{{52, 777}, {50, 777}}, true},
		{"short connections, at their server", 100, 100 * time.Microsecond, batch{{4, 110}, {3, 200}, {4, 90}}, false},
		{"bulk with acknowledgements", 100, 50 * time.Microsecond, batch{{3, 1432}, {1, 90}}, true},
		{"acknowledgements alone", 100, 50 * time.Microsecond, ack, false},
		{"slow large datagrams", 100, time.Millisecond, full, false},
		{"bulk again", 100, 50 * time.Microsecond, full, true},
		{"silence", 10, time.Second, full, false},
	} {
		if d := feed(&p, &now, c.batches, c.gap, c.batch...); d > 0 != c.paused || d > maxPause {
			t.Errorf("%s: pause %v, want one: %v", c.name, d, c.paused)
		}
	}
}
