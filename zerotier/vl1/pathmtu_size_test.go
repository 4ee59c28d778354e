package vl1

import (
	"log/slog"
	"net/netip"
	"strings"
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

// One lost probe of the size in use is enough to use less until it is known which passes.
func TestLostProbe(t *testing.T) {
	var d datagramSize
	d.begin(packet.DefaultMTU)
	d.sized(0, time.Minute, func(time.Duration) int { return 9000 })
	if d.get() != packet.DefaultMTU {
		t.Fatalf("%d bytes", d.get())
	}
	at := time.Minute
	for ; d.probe == 0; at += 50 * time.Millisecond {
		d.sized(at, at+50*time.Millisecond, func(time.Duration) int { return 0 })
	}
	d.sized(at, at+sizePatience+50*time.Millisecond, func(time.Duration) int { return 0 })
	if d.get() != safeDatagram {
		t.Errorf("%d bytes after a lost probe", d.get())
	}
}

// A size is proven by an answer as long as the probe, and a black hole is named in the log once in a while.
func TestSizeAnswers(t *testing.T) {
	var log strings.Builder
	c, peers := boundsCore(t, func(cfg *Config) { cfg.Logger = slog.New(slog.NewTextHandler(&log, nil)) }, 1)
	p, src := peers[0], Source{Socket: 1, Endpoint: netip.MustParseAddrPort("192.0.2.1:9993")}
	pa := &path{sock: src.Socket, ep: src.Endpoint}
	p.paths = append(p.paths, pa)
	answer := func(at time.Duration, size, length int) int {
		pa.size.begin(packet.DefaultMTU)
		pa.size.known.Store(0)
		pa.size.low, pa.size.high = 0, packet.DefaultMTU // which was lost
		w := c.NewWorker().Begin(nil, time.Unix(2, 0))
		w.t += int64(at)
		c.noteSize(w, p, src, &expectation{peer: p.addr, verb: packet.VerbEcho, size: size}, length-packet.HeaderLen)
		return int(pa.size.known.Load())
	}
	if got := answer(0, 1200, 1199); got != 0 {
		t.Errorf("an answer that is too short shows that %d bytes pass", got)
	}
	for i, want := range []int{1, 1, 2} {
		if got := answer(time.Duration(i)*6*time.Minute, 1200, 1200); got != 1200 {
			t.Errorf("%d bytes are known to pass", got)
		}
		if got := strings.Count(log.String(), "large datagrams vanish"); got != want {
			t.Errorf("%d times in the log, want %d", got, want)
		}
	}
}
