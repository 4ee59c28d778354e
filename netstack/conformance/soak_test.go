package conformance

import (
	"runtime"
	"time"

	"ztgate/internal/testwait"
	"ztgate/netstack"
)

// peerGone: a neighbour that answered and then is gone is reported within the
// neighbour time-out, and found again when it is back (LF-11, LF-12).
func peerGone(b *bench) {
	b.ready()
	f, g := b.udpFlow(at(v1, 4000), at(o1, 5000)).answered(), b.udpFlow(at(v2, 4000), at(o2, 5000)).answered()
	b.silent[o1] = true
	told := 0
	for gone := false; !gone; {
		b.advance(time.Second)
		told++
		v, _ := b.push(vpc, f.outgoing())
		if told > 25 && len(v) == 0 { // the retries of the engine run on real time
			testwait.Poll(600*time.Millisecond, func() bool { v, _ = b.push(vpc); return len(v) > 0 })
		}
		g.send()
		g.answer()
		gone = len(v) > 0
		switch {
		case gone && (v[0].typ != 3 || v[0].code != 1):
			b.failf("want 3/1, got %s", list(v))
		case told == 60 && *strict || told == 600: // a busy machine is late with the retries
			b.failf("nothing but silence for %d s", told)
		}
	}
	b.silent[o1] = false
	b.advance(time.Second)
	b.introduce()
	want(b, "mapping afterwards", f.send().from(), f.ext)
	f.answer()
	b.note("3/1 after %d s, another peer's flow lost 0; back with the same mapping", told)
}

// day is a day of changes at 30 % of the flow table (LF-27), on the injected clock.
func day(b *bench) {
	const (
		step     = 30 * time.Second
		every    = 10 * time.Minute // a change
		window   = 2 * time.Minute  // in which it may cost packets
		maxFlows = 3000
		fresh    = 45 // flows a step; they live for 2 minutes and wait for the sweep
		warm     = time.Hour
	)
	total := 2 * time.Hour
	if *strict {
		total = 24 * time.Hour
	}
	b.start(func(s *setup) { s.maxFlows = maxFlows })
	e := b.engineOnly()
	network := b.setup.network
	set := func(nets ...netstack.Network) {
		if err := e.engine.SetNetworks(nets); err != nil {
			b.failf("set networks: %v", err)
		}
		b.introduce()
	}
	lossy := false
	changes := []struct {
		name       string
		begin, end func()
	}{
		{"20 % loss", func() { lossy = true }, func() { lossy = false }},
		{"MTU 1300", func() { n := network; n.MTU = 1300; set(n) }, func() { set(network) }},
		{"peer gone", func() { b.silent[o1] = true }, func() { b.silent[o1] = false; b.introduce() }},
		{"not authorised", func() { set() }, func() { set(network) }},
		{"stopped", func() { b.advance([]time.Duration{5 * time.Second, time.Minute, 10 * time.Minute}[b.rng.IntN(3)]) }, func() {}},
	}
	c := b.tcpFlow(at(v2, 4000), at(o1, 80))
	counts := map[string]int{}
	var warmHeap, topHeap uint64
	var warmGo, topGo, topFlows, windows, lost, sent int
	for past := time.Duration(0); past < total; past += every {
		ch := changes[b.rng.IntN(len(changes))]
		counts[ch.name]++
		ch.begin()
		for d := time.Duration(0); d < every; d += step {
			b.advance(step)
			if d == window {
				ch.end()
				windows++
			}
			var ps [][]byte
			for range fresh {
				if !lossy || b.rng.IntN(5) > 0 {
					ps = append(ps, udp(at(v1, 1024+b.rng.IntN(60_000)), at(o2, 1+b.rng.IntN(65_000)), "x"))
				}
			}
			b.push(vpc, ps...)
			if sent++; d >= window {
				c.talk() // fails the row when it loses a segment
				continue
			}
			seg := c.outSeg(psa, "")
			if _, o := b.push(vpc, seg); len(o) == 0 {
				lost++
			}
		}
		testwait.Poll(2*time.Second, func() bool { return b.liveFlows() <= 5*fresh+5 }) // the sweep runs on real time
		topFlows = max(topFlows, b.liveFlows())
		if (past/every)%6 != 5 {
			continue
		}
		if h, n := heap(), runtime.NumGoroutine(); past < warm {
			warmHeap, warmGo = h, n
		} else {
			topHeap, topGo = max(topHeap, h), max(topGo, n)
		}
	}
	if topHeap > warmHeap+warmHeap/5+2<<20 {
		b.failf("the heap grew from %d to %d KB", warmHeap>>10, topHeap>>10)
	}
	if topGo > warmGo {
		b.failf("goroutines grew from %d to %d", warmGo, topGo)
	}
	b.note("%v on the injected clock, %d changes %v; heap %d KB after an hour, at most %d KB later; goroutines %d, at most %d; %d flows left at most after a sweep; probe lost %d of %d, all in the announced windows",
		total, windows, counts, warmHeap>>10, topHeap>>10, warmGo, topGo, topFlows, lost, sent)
}
