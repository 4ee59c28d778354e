package sim

import (
	"testing"
	"time"
	"unsafe"

	"ztgate/zerotier/simnet"
)

// clock is that of one machine. Its wall clock may be set, and time goes on the same.
type clock struct {
	net    *simnet.Net
	offset time.Duration // of the wall clock
}

func (c *clock) now() time.Time {
	return reading(c.net.Now.Add(c.offset), c.net.Now.Sub(epoch))
}

// epoch is when simulations begin.
var epoch = simnet.New().Now

// reading makes a time as [time.Now] returns it: with a wall clock and a monotonic one,
// which differ after the wall clock was set. The package time makes none from outside.
func reading(wall time.Time, monotonic time.Duration) (t time.Time) {
	const hasMonotonic, since1885 = 1 << 63, 2682288000 // seconds from 1885 to 1970
	raw := (*struct {
		wall uint64
		ext  int64
		loc  *time.Location
	})(unsafe.Pointer(&t))
	raw.wall = hasMonotonic | uint64(wall.Unix()+since1885)<<30 | uint64(wall.Nanosecond())
	raw.ext = int64(monotonic) + 1
	return t
}

// TestReading checks that the layout of a time is as expected.
func TestReading(t *testing.T) {
	wall := time.Unix(1_700_000_000, 123)
	a, b := reading(wall, time.Hour), reading(wall.Add(-time.Minute), time.Hour+time.Second)
	switch {
	case a.UnixNano() != wall.UnixNano() || b.UnixNano() != wall.Add(-time.Minute).UnixNano():
		t.Errorf("wall clock %d and %d, want %d and a minute less", a.UnixNano(), b.UnixNano(), wall.UnixNano())
	case b.Sub(a) != time.Second:
		t.Errorf("between them %v went by, want 1s", b.Sub(a))
	case b.Round(0).Sub(a.Round(0)) != -time.Minute:
		t.Errorf("without monotonic readings %v went by, want -1m", b.Round(0).Sub(a.Round(0)))
	}
}
