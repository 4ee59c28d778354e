package nat

import (
	"encoding/binary"
	"fmt"
	"net/netip"
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

// BenchmarkLife is all that flows cost the table from the first packet to the last and
// their end: TCP connections of six segments, or a question and an answer by UDP. The
// table is full, or flows end by time.
func BenchmarkLife(b *testing.B) {
	for _, proto := range []uint8{ipkt.TCP, ipkt.UDP} {
		for _, clients := range []int{4, 4000} {
			for _, full := range []bool{true, false} {
				if full && proto == ipkt.UDP {
					continue // what was answered doesn't make room
				}
				b.Run(fmt.Sprintf("proto=%d/clients=%d/full=%v", proto, clients, full), func(b *testing.B) { life(b, proto, clients, full) })
			}
		}
	}
}

func life(b *testing.B, proto uint8, clients int, full bool) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	p := newPlayer(b, Settings{MaxFlows: 1 << 17})
	view := func(flags uint8) (v ipkt.View) {
		t := pkttest.UDP(v1, o1, "")
		if proto == ipkt.TCP {
			t = pkttest.TCP(v1, o1, flags, 0, 0, "")
		}
		if r := ipkt.Parse(t, &v); r != ipkt.OK {
			b.Fatal(r)
		}
		return v
	}
	const group = 64
	type step struct {
		v        ipkt.View
		out      bool
		seq, ack uint32
	}
	steps := []step{
		{view(ipkt.SYN), true, 99, 0}, {view(synack), false, 499, 100}, {view(ipkt.ACK), true, 100, 500},
		{view(fin), true, 100, 500}, {view(fin), false, 500, 101}, {view(ipkt.ACK), true, 101, 501},
	}
	if proto == ipkt.UDP {
		steps = []step{{v: view(0), out: true}, {v: view(0)}}
	}
	every := time.Millisecond
	if !full {
		every = 240 * time.Second / (25000 / group)
	}
	var ports, ext [group]uint16
	var addrs [group][16]byte
	server, own := ipkt.Bytes(netip.MustParseAddr("10.0.0.10")), ipkt.Bytes(external)
	next, swept := 0, int64(0)
	open := NewFlow{To: Overlay, Source: Masquerade, Address: own}
	round := func() {
		p.now += int64(every)
		if p.now-swept > int64(500*time.Millisecond) {
			swept = p.now
			p.tab.Sweep(p.now)
		}
		for i := range group {
			addrs[i] = [16]byte{10: 0xff, 0xff, 172, 16, byte(next % clients >> 8), byte(next % clients)}
			ports[i] = uint16(32768 + next/clients%28000)
			next++
		}
		for _, s := range steps {
			p.r.Enter()
			for i := range group {
				var k Key
				side := Overlay
				if s.out {
					side = VPC
					s.v.Src, s.v.Dst, s.v.SPort, s.v.DPort = addrs[i], server, ports[i], 443
				} else {
					s.v.Src, s.v.Dst, s.v.SPort, s.v.DPort = server, own, 443, ext[i]
				}
				if proto == ipkt.TCP {
					binary.BigEndian.PutUint32(s.v.B[s.v.L4+4:], s.seq)
					binary.BigEndian.PutUint32(s.v.B[s.v.L4+8:], s.ack)
				}
				p.tab.KeyOf(side, &s.v, &k)
				f, dir := p.tab.Find(p.now, &k)
				if f == nil {
					var why Refusal
					if f, dir, why = p.tab.Open(p.now, &k, &s.v, &open); why != Accepted {
						b.Fatal(next, why, s.out)
					}
				}
				if v := p.tab.Track(p.now, f, dir, &s.v); v != Pass {
					b.Fatal(next, v, s)
				}
				ext[i] = f.ExtPort()
			}
			p.r.Leave()
		}
	}
	for range (1 << 17) / group * 2 {
		round()
	}
	b.ResetTimer()
	start := threadTime()
	for n := 0; n < b.N; n += group {
		round()
	}
	b.ReportMetric(float64(threadTime()-start)/float64(b.N), "cpu-ns/op")
	b.ReportMetric(float64(p.tab.Len()), "flows")
}
