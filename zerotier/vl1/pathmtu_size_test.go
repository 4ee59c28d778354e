package vl1

import (
	"testing"
	"time"

	"ztgate/zerotier/packet"
)

// sized runs what asks about a path for d, one step every 50 ms. carries returns what
// the path carries at a time, 0 = nothing is answered.
func (d *datagramSize) sized(from, to time.Duration, carries func(at time.Duration) int) (probes, holes int) {
	for at := from; at < to; at += 50 * time.Millisecond {
		t := int64(time.Hour + at)
		n := d.stepLocked(t, sizePatience, sizeIdle, false)
		if n == 0 || d.sent != t {
			continue
		}
		probes++
		if n <= carries(at) && d.answeredLocked(n) {
			holes++
		}
	}
	return probes, holes
}

func TestDatagramSize(t *testing.T) {
	const ever = 30 * time.Minute
	for name, c := range map[string]struct {
		carries func(time.Duration) int
		want    int
		holes   int
		most    int // probes
	}{
		"all":             {func(time.Duration) int { return 9000 }, packet.DefaultMTU, 0, 200},
		"nothing":         {func(time.Duration) int { return 0 }, packet.DefaultMTU, 0, 60},
		"too little":      {func(time.Duration) int { return 400 }, packet.DefaultMTU, 0, 60},
		"a tunnel":        {func(time.Duration) int { return 1300 }, 1263, 1, 300},
		"later less":      {func(at time.Duration) int { return 1450 - int(at/time.Minute)/10*100 }, 1243, 2, 300},
		"silent at times": {func(at time.Duration) int { return 1450 * (1 - int(at/time.Minute)%3/2) }, packet.DefaultMTU, 0, 500},
		"wider at last": {func(at time.Duration) int {
			if at < 10*time.Minute {
				return 1000
			}
			return 1450
		}, packet.DefaultMTU, 1, 300},
	} {
		var d datagramSize
		d.begin(packet.DefaultMTU)
		if d.get() > safeDatagram {
			t.Errorf("%s: begins with %d bytes", name, d.get())
		}
		probes, holes := d.sized(0, ever, c.carries)
		t.Logf("%s: %d bytes, %d probes", name, d.get(), probes)
		if d.get() != c.want || holes != c.holes || probes > c.most {
			t.Errorf("%s: %d bytes, %d black holes, %d probes, want %d, %d, at most %d", name, d.get(), holes, probes, c.want, c.holes, c.most)
		}
	}
}
