package nat

import (
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
)

// threadTime is the processor time of the calling thread: what others take on a
// shared machine doesn't count.
func threadTime() time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

// BenchmarkSweep removes 262,144 flows that expire at once and reports how much
// processor time passes at a time while the lock is held.
func BenchmarkSweep(b *testing.B) {
	const flows = DefaultMaxFlows
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for b.Loop() {
		b.StopTimer()
		p := newPlayer(b, Settings{MaxFlows: flows, MaxFlowsPerClient: flows})
		template := pkttest.UDP(v1, o1, "")
		p.r.Enter()
		for i := range flows {
			var v ipkt.View
			var k Key
			ipkt.Parse(template, &v)
			v.SPort, v.DPort = uint16(1024+i%40000), uint16(1+i/40000)
			p.tab.KeyOf(VPC, &v, &k)
			if _, _, why := p.tab.Open(p.now, &k, &v, &NewFlow{To: Overlay, Source: Masquerade, Address: ipkt.Bytes(external)}); why != Accepted {
				b.Fatalf("flow %d refused: %d", i, why)
			}
		}
		p.r.Leave()
		now := Coarse(p.now + int64(130*time.Second))
		var held []time.Duration
		b.StartTimer()
		for more := true; more; {
			p.tab.mu.Lock()
			start := threadTime()
			more = p.tab.sweepSome(now)
			held = append(held, threadTime()-start)
			p.tab.mu.Unlock()
		}
		b.StopTimer()
		if n := p.tab.Len(); n != 0 {
			b.Errorf("%d flows left", n)
		}
		slices.Sort(held)
		b.ReportMetric(float64(held[len(held)/2].Nanoseconds())/1000, "median-hold-µs")
		b.ReportMetric(float64(held[len(held)*99/100].Nanoseconds())/1000, "p99-hold-µs")
		b.ReportMetric(float64(held[len(held)-1].Nanoseconds())/1000, "longest-hold-µs")
		b.StartTimer()
	}
}
