package conformance

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"ztgate/internal/testwait"
	"ztgate/netstack"
)

const (
	networkID = 0x8056c2e21c000001
	vnetRoom  = 16 // in front of packets written to a device
)

// engineRouter is the engine between two queues.
type engineRouter struct {
	engine *netstack.Engine
	dev    *queueDevice
	reg    *prometheus.Registry
	cancel context.CancelFunc
	done   chan error
	log    *logLines

	mu    sync.Mutex
	now   time.Time
	out   [][]byte // frames on the overlay
	onTUN [][]byte

	barriers int
	seq      uint16
	slow     bool // the gateway doesn't answer the barrier
}

// queueDevice is a TUN made of a queue. Idle tells whether everything handed over
// has been dealt with.
type queueDevice struct {
	mu     sync.Mutex
	cond   *sync.Cond
	in     [][]byte
	idle   bool
	closed bool
	mtu    int
	write  func(b []byte)
}

func (d *queueDevice) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(d.in) == 0 {
		if d.closed {
			return 0, os.ErrClosed
		}
		d.idle = true
		d.cond.Broadcast()
		d.cond.Wait()
	}
	d.idle = false
	n := min(len(bufs), len(d.in))
	for i := range n {
		sizes[i] = copy(bufs[i][offset:], d.in[i])
	}
	d.in = d.in[n:]
	return n, nil
}

func (d *queueDevice) Write(bufs [][]byte, offset int) (int, error) {
	if offset < vnetRoom-6 {
		return 0, errors.New("no room for the virtio header")
	}
	for _, b := range bufs {
		d.write(append([]byte(nil), b[offset:]...))
	}
	return len(bufs), nil
}

func (d *queueDevice) BatchSize() int    { return 128 }
func (d *queueDevice) MTU() (int, error) { return d.mtu, nil }

func (d *queueDevice) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	d.cond.Broadcast()
	return nil
}

func (d *queueDevice) push(packets [][]byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.in = append(d.in, packets...)
	d.idle = false
	d.cond.Broadcast()
	for !d.idle && !d.closed {
		d.cond.Wait()
	}
}

// WriteFrames implements [netstack.Overlay].
func (r *engineRouter) WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, b := range bufs {
		r.out = append(r.out, append([]byte(nil), b[offset:offset+sizes[i]]...))
	}
	return len(bufs), nil
}

// logLines keeps what the engine logs.
type logLines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logLines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newEngineRouter(t *testing.T, s setup) *engineRouter {
	r := &engineRouter{now: time.Unix(1_700_000_000, 0), reg: prometheus.NewRegistry(), done: make(chan error, 1), log: &logLines{}}
	r.dev = &queueDevice{mtu: s.vpcMTU, write: func(b []byte) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.onTUN = append(r.onTUN, b)
	}}
	r.dev.cond = sync.NewCond(&r.dev.mu)
	cfg := engineConfig(s)
	cfg.Device, cfg.Overlay, cfg.Registerer = r.dev, r, r.reg
	cfg.Logger = slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cfg.Now = func() time.Time {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.now
	}
	e, err := netstack.New(cfg)
	if err != nil {
		t.Fatalf("new engine: %v", err)
	}
	r.engine = e
	if err := e.SetNetworks([]netstack.Network{s.network}); err != nil {
		t.Fatalf("set networks: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	go func() { r.done <- e.Run(ctx) }()
	r.dev.push(nil)
	return r
}

func (r *engineRouter) name() string { return "ztgate" }

// excuse takes messages that the players sent on their own account off the count
// of packets for the gateway itself.
func (r *engineRouter) excuse(n int) { r.barriers += n }

// mappings are what the next run goes on with.
func (r *engineRouter) mappings() []netstack.Mapping { return r.engine.Mappings() }

func (r *engineRouter) close() error {
	r.cancel()
	return <-r.done
}

func (r *engineRouter) inject(s side, frames [][]byte) {
	if s == vpc {
		packets := make([][]byte, len(frames))
		for i, f := range frames {
			packets[i] = f[ethernetLen:]
		}
		r.dev.push(packets)
		return
	}
	for len(frames) > 0 {
		n := min(len(frames), 64)
		batch := make([][]byte, n)
		for i := range batch {
			batch[i] = append(make([]byte, 0, len(frames[i])+64), frames[i]...)
		}
		r.engine.Deliver(networkID, batch)
		frames = frames[n:]
	}
}

// take returns what came out on a side since the last call.
func (r *engineRouter) take(s side) (out [][]byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s == overlay {
		out, r.out = r.out, nil
		return out
	}
	for _, b := range r.onTUN {
		if p := parse(b); p.dst == barrierHost && p.typ == 0 {
			continue
		}
		f := make([]byte, ethernetLen, ethernetLen+len(b))
		f[12], f[13] = 0x08, 0x00
		if isV6(b) {
			f[12], f[13] = 0x86, 0xdd
		}
		out = append(out, append(f, b...))
	}
	r.onTUN = nil
	return out
}

// barrierHost pings the gateway from the VPC: the gateway's own host answers in
// order, so once its reply is out, everything before it is.
var barrierHost = netip.MustParseAddr("10.77.1.250")

const barrierID = 0xfeed

func (r *engineRouter) settle() {
	if r.slow {
		time.Sleep(20 * time.Millisecond)
		return
	}
	r.seq++
	r.barriers++
	r.dev.push([][]byte{ping(barrierHost, rv, barrierID, r.seq, "")})
	r.slow = !testwait.Poll(20*time.Second, r.passedBarrier)
}

func (r *engineRouter) passedBarrier() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, b := range r.onTUN {
		if p := parse(b); p.dst == barrierHost && p.typ == 0 && p.seq == r.seq {
			r.onTUN = append(r.onTUN[:i:i], r.onTUN[i+1:]...)
			return true
		}
	}
	return false
}

func (r *engineRouter) advance(d time.Duration) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now = r.now.Add(d)
	return nil
}

// metrics returns the counters as name{labels} = value.
func (r *engineRouter) metrics() map[string]float64 {
	families, err := r.reg.Gather()
	if err != nil {
		return map[string]float64{"gather: " + err.Error(): 1}
	}
	out := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			out[f.GetName()+labels(m)] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return out
}

func labels(m *dto.Metric) string {
	var s []string
	for _, l := range m.GetLabel() {
		s = append(s, l.GetName()+"="+l.GetValue())
	}
	return "{" + strings.Join(s, ",") + "}"
}

// accounted is how many packets ended here with a counter: drops by reason, and
// packets for the gateway itself.
func (r *engineRouter) accounted() map[string]float64 {
	out := make(map[string]float64)
	for k, v := range r.metrics() {
		switch {
		case v == 0:
		case strings.HasPrefix(k, "ztgate_dropped_packets_total"):
			out[strings.TrimPrefix(k, "ztgate_dropped_packets_total")] = v
		case strings.HasPrefix(k, "ztgate_local_packets_total"):
			out["{local}"] += v
		}
	}
	if out["{local}"] -= float64(r.barriers); r.slow {
		delete(out, "{local}")
	}
	return out
}

// waitGone waits until the engine's sweep has removed the flows that use an
// external port.
func (r *engineRouter) waitGone(port uint16) error {
	gone := func() bool {
		for _, f := range r.engine.Flows(netstack.FlowFilter{}) {
			if f.External.Port() == port {
				return false
			}
		}
		return true
	}
	for range 3 { // the engine's own timers run on real time, and removal may be a moment late
		if testwait.Poll(400*time.Millisecond, gone) {
			return nil
		}
		if err := r.advance(time.Second); err != nil {
			return err
		}
	}
	if !testwait.Poll(10*time.Second, gone) {
		return fmt.Errorf("the flow with external port %d never went", port)
	}
	return nil
}

// arp builds an ARP message in a frame.
func arp(op uint16, sha mac, spa netip.Addr, tha mac, tpa netip.Addr, dst mac) []byte {
	f := ethernet(dst, sha, 0x0806)
	f = append(f, 0, 1, 8, 0, 6, 4)
	f = binary.BigEndian.AppendUint16(f, op)
	f = append(append(f, sha[:]...), spa.AsSlice()...)
	return append(append(f, tha[:]...), tpa.AsSlice()...)
}
