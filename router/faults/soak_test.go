//go:build e2e

package faults

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/router/lab"
)

var (
	soakFor   = flag.Duration("soak", time.Minute, "length of the soak")
	soakEvery = flag.Duration("soak-every", 12*time.Second, "time between changes")
)

// change is a fault of the soak. It returns when it is over; what the probe loses
// from its begin until settle later is announced.
type change struct {
	row    string
	settle time.Duration
	run    func()
}

// sample is what has to stay flat.
type sample struct{ rss, descriptors, goroutines, flows int }

// TestSoak is LF-27: 30 % load, a change at an interval, and everything flat.
func TestSoak(t *testing.T) {
	w := newWorld(t, "soak")
	w.row("LF-27", soak)
}

func soak(w *world) string {
	r := w.relay(*seed)
	rng := rand.New(rand.NewPCG(*seed, 27))
	p := w.probe(v1+":5000", office)
	w.eventually(patience, p.answered())
	ctx, cancel := context.WithCancel(context.Background())
	var load sync.WaitGroup
	defer load.Wait()
	defer cancel()
	full, err := lab.RunIperf(ctx, w.Office, w.VPC, lab.OfficeAddress, lab.Iperf{Duration: 3 * time.Second})
	w.must(err)
	rate := full.BitsPerSecond * 3 / 10
	var moved float64
	broken := 0
	var mu sync.Mutex
	load.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			got, err := lab.RunIperf(ctx, w.Office, w.VPC, lab.OfficeAddress, lab.Iperf{Duration: 5 * time.Second, Reverse: i%2 == 1, Bitrate: fmt.Sprintf("%.0f", rate)})
			mu.Lock()
			if err != nil {
				broken++
			}
			moved += got.Bytes
			mu.Unlock()
		}
	})
	changes := []change{
		{"LF-6", 5 * time.Second, func() {
			r.set(func() { r.loss = []float64{0.01, 0.05, 0.2}[rng.IntN(3)] })
			time.Sleep(3 * time.Second)
			r.set(func() { r.loss = 0 })
		}},
		{"LF-10", 5 * time.Second, func() {
			w.sh(w.Gateway, "ip link set ztg0 mtu 1400")
			time.Sleep(time.Second)
			w.sh(w.Gateway, "ip link set ztg0 mtu 2800")
		}},
		{"LF-11", 7 * time.Second, func() {
			w.OfficeProcess.Kill()
			time.Sleep(time.Second)
			w.OfficeProcess = w.member(w.Office, "office")
		}},
		{"LF-13", 5 * time.Second, func() {
			w.authorise(w.GatewayMember, false)
			time.Sleep(2 * time.Second)
			w.authorise(w.GatewayMember, true)
		}},
		{"LF-17", 4 * time.Second, func() {
			w.must(unix.Kill(w.GatewayProcess.PID, unix.SIGSTOP))
			time.Sleep(5 * time.Second)
			w.must(unix.Kill(w.GatewayProcess.PID, unix.SIGCONT))
		}},
	}
	if *soakEvery >= 45*time.Second { // routes that were taken away are back after 15 s
		changes[1].settle = 25 * time.Second
		changes[1].run = func() {
			w.sh(w.Gateway, "ip link set ztg0 down")
			time.Sleep(time.Second)
			w.sh(w.Gateway, "ip link set ztg0 up")
		}
	}
	var samples []sample
	counts := map[string]int{}
	lost, of, lostInside, ofInside := 0, 0, 0, 0
	var outside []string
	order := rng.Perm(len(changes))
	began, pid := time.Now(), w.GatewayProcess.PID
	for n := 0; time.Since(began) < *soakFor; n++ {
		if n%len(changes) == 0 {
			order = rng.Perm(len(changes))
		}
		c := changes[order[n%len(changes)]]
		counts[c.row]++
		next := time.Now().Add(*soakEvery)
		from := p.mark()
		c.run()
		time.Sleep(c.settle)
		w.eventually(patience, p.answered())
		settled := p.mark()
		l, k := p.lostBetween(from, settled)
		lostInside, ofInside = lostInside+l, ofInside+k
		time.Sleep(max(time.Until(next), time.Second))
		if l, k = p.lostBetween(settled, p.mark()-20); l > 0 {
			outside = append(outside, fmt.Sprintf("%d of %d after %s", l, k, c.row))
		}
		lost, of = lost+l, of+k
		m := w.metrics()
		samples = append(samples, sample{w.rss(), w.descriptors(), int(m.Sum("go_goroutines", nil)), int(m.Sum("ztgate_flows", nil))})
		fmt.Fprintf(w.t.Output(), "%v %s: lost %d inside; %+v\n", time.Since(began).Round(time.Second), c.row, l, samples[len(samples)-1])
	}
	took := time.Since(began).Round(time.Second)
	if w.GatewayProcess.PID != pid || errors.Is(unix.Kill(pid, 0), os.ErrProcessDone) {
		w.t.Error("the gateway ended")
	}
	if lost > 0 {
		w.t.Errorf("outside the announced windows the probe lost %d of %d: %s", lost, of, strings.Join(outside, ", "))
	}
	// Flat: after a warm-up of a quarter, the last third isn't above the first.
	warm := samples[len(samples)/4:]
	third := max(len(warm)/3, 1)
	most := func(list []sample, f func(sample) int) int {
		return f(slices.MaxFunc(list, func(a, b sample) int { return cmp.Compare(f(a), f(b)) }))
	}
	var flat []string
	for _, q := range []struct {
		name  string
		f     func(sample) int
		slack int
		unit  int
	}{
		{"RSS in MB", func(s sample) int { return s.rss }, 12 << 20, 1 << 20},
		{"descriptors", func(s sample) int { return s.descriptors }, 6, 1},
		{"goroutines", func(s sample) int { return s.goroutines }, 12, 1},
		{"flows", func(s sample) int { return s.flows }, 100, 1}, // closed ones stay for 4 minutes
	} {
		first, last := most(warm[:third], q.f), most(warm[len(warm)-third:], q.f)
		if last > first+q.slack {
			w.t.Errorf("%s grew from %d to %d", q.name, first/q.unit, last/q.unit)
		}
		flat = append(flat, fmt.Sprintf("%s %d then %d", q.name, first/q.unit, last/q.unit))
	}
	mu.Lock()
	defer mu.Unlock()
	return fmt.Sprintf("%v, seed %d, a change every %v: %v; load %.0f Mbit/s, 30 %% of %.0f, %.1f GB moved, %d transfers cut off by a change; probe lost %d of %d outside the announced windows, %d of %d inside; after warm-up: %s",
		took, *seed, *soakEvery, counts, rate/1e6, full.BitsPerSecond/1e6, moved/1e9, broken, lost, of, lostInside, ofInside, strings.Join(flat, ", "))
}
