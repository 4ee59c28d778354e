//go:build e2e

package attack

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"ztgate/internal/testwait"
)

var (
	duration = flag.Duration("attack", 5*time.Second, "how long each attack lasts")
	memory   = flag.String("memory", "", "bound of the memory of all processes of the gateway, as in 256M")
	tableTo  = flag.String("table", "", "file that the table is written to")
)

// What a gateway under attack must keep.
const (
	mayLose  = 1.0       // percent, of each kind of traffic
	mayGrow  = 160 << 20 // bytes of resident memory
	mayReply = 1.0       // bytes to a stranger for each of his
	mayLog   = 64 << 10  // bytes of warnings and errors
)

// attack is one attack, ready to begin.
type attack struct {
	// run attacks until ctx ends, and returns how many packets or tries that were, and how
	// many bytes if that counts.
	run func(ctx context.Context) (tries, bytes int)
	// check says what else is wrong after it, if anything; nil = nothing else counts.
	check func() error
}

// row is one row of the table.
type row struct {
	name     string // from whom, and what
	unproven bool   // what comes back is counted too
	few      bool   // the gateway has 256 descriptors
	prepare  func(w *world) attack
}

// result is what a row showed.
type result struct {
	name      string
	rate      float64
	lost      losses
	rss, peak int
	replied   float64 // -1 = not counted
	logged    int
	err       error
}

// TestAttack runs the rows one after another, each against a gateway that was started
// for it.
func TestAttack(t *testing.T) {
	rows := []row{{name: "nobody/nothing", prepare: func(*world) attack { return attack{run: idle} }}}
	for _, list := range [][]row{vpcRows, overlayRows, outsiderRows, strangerRows, localRows, controllerRows} {
		rows = append(rows, list...)
	}
	w := newWorld(t)
	var results []*result
	for _, r := range rows {
		t.Run(r.name, func(row *testing.T) {
			if w.Context().Err() != nil { // the gateway has ended, and with it the lab
				ids := w.ids
				w.close()
				w = newWorld(t)
				w.ids = ids
			}
			w.t = row
			defer func() { w.t = t }()
			res := w.try(r)
			results = append(results, res)
			if res.err != nil {
				row.Error(res.err)
			}
		})
	}
	text := table(results)
	fmt.Print("\n", text)
	if *tableTo != "" {
		w.must(os.WriteFile(*tableTo, []byte(text), 0o644))
	}
}

func idle(ctx context.Context) (tries, bytes int) {
	<-ctx.Done()
	return 0, 0
}

// cleanup runs f when the row ends.
func (w *world) cleanup(f func()) { w.t.Cleanup(f) }

// try runs a row.
func (w *world) try(r row) *result {
	w.t.Helper()
	w.restart(r.few)
	res := &result{name: r.name, replied: -1}
	a := r.prepare(w)
	w.must(w.serves())
	before, err := w.Gateway.Losses()
	w.must(err)
	logged := w.logSize()
	tr := w.startTraffic()
	res.rss = w.rss()
	stopWatch := w.watchMemory()
	replied := func() uint64 { return 0 }
	if r.unproven {
		replied = w.watchWire()
	}

	ctx, cancel := context.WithTimeout(context.Background(), *duration)
	start := time.Now()
	tries, bytes := a.run(ctx)
	res.rate = float64(tries) / time.Since(start).Seconds()
	<-ctx.Done() // also those that are ready earlier last as long
	cancel()
	// What they leave behind must not hurt either.
	after, cancel := context.WithTimeout(context.Background(), late)
	<-after.Done()
	cancel()
	tr.stop()

	res.lost, res.peak, res.logged = tr.losses(), stopWatch(), w.logSize()-logged
	if r.unproven {
		res.replied = float64(replied()) / float64(max(bytes, 1))
	}
	res.err = res.judge()
	if a.check != nil {
		res.err = errors.Join(res.err, a.check())
	}
	if after, err := w.Gateway.Losses(); err == nil && res.err != nil {
		for name, n := range after.Interfaces {
			if n -= before.Interfaces[name]; n > 0 {
				res.err = errors.Join(res.err, fmt.Errorf("%s dropped %d packets", name, n))
			}
		}
		if n := after.ReceiveBuffers - before.ReceiveBuffers; n > 0 {
			res.err = errors.Join(res.err, fmt.Errorf("the node's sockets had no room for %d datagrams", n))
		}
	}
	if err := w.serves(); err != nil {
		res.err = errors.Join(res.err, fmt.Errorf("afterwards: %w", err))
	}
	return res
}

// watchMemory returns a function that returns the greatest memory meanwhile.
func (w *world) watchMemory() func() int {
	quit := make(chan struct{})
	var watch sync.WaitGroup
	peak := 0
	watch.Go(func() {
		t := time.NewTicker(100 * time.Millisecond)
		defer t.Stop()
		for {
			peak = max(peak, w.rss())
			select {
			case <-quit:
				return
			case <-t.C:
			}
		}
	})
	return func() int {
		close(quit)
		watch.Wait()
		return peak
	}
}

func (r *result) judge() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if r.lost.worst() > mayLose {
		bad("open flows lost %.1f %% (ping), %.1f %% (UDP), %.1f %% (TCP)", r.lost.ping, r.lost.bulk, r.lost.stream)
	}
	if 100*float64(r.lost.failed) > mayLose*float64(r.lost.of) {
		bad("%d of %d new connections of others failed or took more than %s", r.lost.failed, r.lost.of, late)
	}
	if len(errs) > 0 {
		bad("%s", strings.Join(r.lost.why, "; "))
	}
	if r.peak-r.rss > mayGrow {
		bad("memory grew from %d to %d MB", r.rss>>20, r.peak>>20)
	}
	if r.logged > mayLog {
		bad("%d KB were logged", r.logged>>10)
	}
	if r.peak == 0 {
		bad("the gateway has ended")
	}
	if r.replied > mayReply {
		bad("%.2f bytes went to the stranger for each of his", r.replied)
	}
	return errors.Join(errs...)
}

// table is Markdown.
func table(list []*result) string {
	var b strings.Builder
	b.WriteString("| attack | rate, 1/s | lost: ping / UDP / TCP, % | new connections failed | RSS before / peak, MB | bytes out per byte in | verdict |\n")
	b.WriteString("| --- | --: | --: | --: | --: | --: | --- |\n")
	for _, r := range list {
		replied, verdict := "-", "held"
		if r.replied >= 0 {
			replied = fmt.Sprintf("%.2f", r.replied)
		}
		if r.err != nil {
			first, _, _ := strings.Cut(r.err.Error(), "\n")
			verdict = "FAILED: " + first
		}
		fmt.Fprintf(&b, "| %s | %.0f | %.1f / %.1f / %.1f | %d of %d | %d / %d | %s | %s |\n", r.name, r.rate,
			r.lost.ping, r.lost.bulk, r.lost.stream, r.lost.failed, r.lost.of, r.rss>>20, r.peak>>20, replied, verdict)
	}
	return b.String()
}

// every runs f at a rate.
func every(rate int, f func(i int)) func(context.Context) (int, int) {
	return func(ctx context.Context) (int, int) { return pace(ctx, rate, f), 0 }
}

// eventually tries f for some seconds.
func eventually(f func() error) error { return testwait.Try(5*time.Second, f) }
