// Package wire measures the way of a data packet between two nodes: sealing,
// cutting, joining, opening, in memory and through UDP sockets on loopback.
package wire

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/network"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/transport"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// sizes are frames of one and of two datagrams. The largest is a full frame of a
// network with the default MTU.
var sizes = []int{64, 1400, 2800}

const (
	batch    = 64
	headroom = 64
	ethernet = 14
)

// identities makes two identities once; the search takes a second.
var identities = sync.OnceValue(func() (ids [2]*identity.Identity) {
	for i := range ids {
		id, err := identity.Generate(nil)
		if err != nil {
			panic(err)
		}
		ids[i] = id
	}
	return ids
})

// end is one node: peer layer, optionally a network layer, and where its
// datagrams go.
type end struct {
	id    *identity.Identity
	core  *vl1.Core
	layer *network.Layer
	rx    *vl1.Worker
	nw    *network.Worker
	tx    *vl1.Worker
	got   atomic.Uint64 // frames
	take  func(frame []byte)
}

// adHoc is a network that needs no controller (chapter 03 §1.8).
const adHoc vl2.NetworkID = 0xff0a000000000001

// counter is an upper layer that counts frames.
type counter struct{ e *end }

func (u counter) PeerLearned(*vl1.Worker, *vl1.Peer) {}
func (u counter) HandlePacket(_ *vl1.Worker, _ *vl1.Peer, p packet.Packet, _ vl1.Source) vl1.Result {
	if p.Verb() == packet.VerbFrame {
		u.e.got.Add(1)
	}
	return vl1.Result{Trust: true}
}

// pair makes two ends, of which the first is a root so that no third node is
// needed. With layers they are joined to an ad-hoc network.
func pair(b testing.TB, layers bool, rootAt netip.AddrPort) (root, leaf *end) {
	b.Helper()
	ids := identities()
	planet := &vl1.World{ID: 1, Timestamp: 1, Roots: []vl1.Root{{Identity: ids[0].Public(), Endpoints: []netip.AddrPort{rootAt}}}}
	ends := [2]*end{}
	for i := range ends {
		e := &end{id: ids[i]}
		var upper vl1.Upper = counter{e}
		if layers {
			e.layer = network.New(network.Config{
				Identity: ids[i],
				Deliver: func(_ vl2.NetworkID, frames [][]byte) {
					e.got.Add(uint64(len(frames)))
					if e.take != nil {
						for _, f := range frames {
							e.take(f)
						}
					}
				},
			})
			upper = e.layer
		}
		core, err := vl1.New(vl1.Config{Identity: ids[i], Planet: planet, Upper: upper, Start: time.Now(), SoftwareVersion: [3]int{1, 14, 1}})
		if err != nil {
			b.Fatal(err)
		}
		e.core, e.rx, e.tx = core, core.NewWorker(), core.NewWorker()
		if layers {
			e.layer.SetPeers(core)
			e.nw = e.layer.NewWorker()
			e.rx.User = e.nw
		}
		ends[i] = e
	}
	return ends[0], ends[1]
}

// pipe carries datagrams to the other end within one goroutine. Datagrams of a
// batch lie one after the other, as received from the kernel.
type pipe struct {
	from netip.AddrPort
	buf  []byte
	ends []int
}

func (p *pipe) Send(_ vl1.SocketID, _ netip.AddrPort, head, data []byte) {
	p.buf = append(append(p.buf, head...), data...)
	p.ends = append(p.ends, len(p.buf))
}
func (p *pipe) SendTTL(vl1.SocketID, netip.AddrPort, []byte, int) {}

// deliver hands what was collected to e, whose own answers go to back.
func (p *pipe) deliver(e *end, back vl1.Out, now time.Time) {
	start := 0
	for _, n := range p.ends {
		e.core.Receive(e.rx.Begin(back, now), 1, p.from, p.buf[start:n:n])
		start = n
	}
	if e.layer != nil {
		e.layer.Flush(e.nw)
	}
	p.buf, p.ends = p.buf[:0], p.ends[:0]
}

var (
	rootAt = netip.MustParseAddrPort("10.0.0.1:9993")
	leafAt = netip.MustParseAddrPort("10.0.0.2:9993")
)

// settle runs timers and delivers until the leaf has a direct path, and knows what
// it carries.
func settle(b testing.TB, root, leaf *end, up, down *pipe) time.Time {
	b.Helper()
	now := time.Now()
	join(b, root, down, now)
	join(b, leaf, up, now)
	for i := range 200 {
		now = now.Add(50 * time.Millisecond)
		if i == 100 { // something large, so that the leaf asks what its path carries
			leaf.core.Send(leaf.tx.Begin(up, now), root.id.Address(), packet.VerbNOP, make([]byte, 1300), vl1.SendOpts{})
		}
		for _, x := range []struct {
			e   *end
			out *pipe
		}{{root, down}, {leaf, up}} {
			x.e.core.Tick(x.out, now)
			if x.e.layer != nil {
				x.e.layer.Tick(x.out, now)
			}
		}
		for len(up.ends)+len(down.ends) > 0 {
			up.deliver(root, down, now)
			down.deliver(leaf, up, now)
		}
	}
	return now
}

func join(b testing.TB, e *end, out vl1.Out, now time.Time) {
	b.Helper()
	if e.layer != nil {
		if err := e.layer.Join(out, now, adHoc, nil); err != nil {
			b.Fatal(err)
		}
	}
}

// packets are the buffers of one batch of frames.
type packets struct {
	bufs  [][]byte
	sizes []int
}

func newPackets(size int) *packets {
	p := &packets{}
	for range batch {
		p.bufs = append(p.bufs, make([]byte, headroom+ethernet+size))
		p.sizes = append(p.sizes, ethernet+size)
	}
	return p
}

// addressed writes the Ethernet headers, which sending overwrites.
func (p *packets) addressed(from, to *end) {
	dst, src := vl2.MACOf(adHoc, to.id.Address()), vl2.MACOf(adHoc, from.id.Address())
	for _, b := range p.bufs {
		f := b[headroom:]
		copy(f, dst[:])
		copy(f[6:], src[:])
		binary.BigEndian.PutUint16(f[12:], 0x86dd)
	}
}

// write sends one batch.
func (p *packets) write(from, to *end, out vl1.Out, now time.Time) bool {
	if from.layer != nil {
		p.addressed(from, to)
		return from.layer.WriteFrames(from.tx.Begin(out, now), adHoc, p.bufs, p.sizes, headroom) == batch
	}
	peer := from.core.Peer(to.id.Address())
	for i, b := range p.bufs {
		// FRAME has ten bytes before what an Ethernet header has fourteen for.
		start := headroom + ethernet - 10 - packet.HeaderLen
		if !from.core.SendData(from.tx.Begin(out, now), peer, packet.VerbFrame, b[start:headroom+p.sizes[i]]) {
			return false
		}
	}
	return true
}

// cpu returns the processor time used so far: on a shared machine it says more
// than the clock.
func cpu() time.Duration {
	var ru syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &ru) != nil {
		return 0
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

func reportCPU(b *testing.B, since time.Duration, frames int) {
	b.ReportMetric(float64(cpu()-since)/float64(frames), "cpu-ns/frame")
}

// BenchmarkMemory is the whole way of a frame from one node to the other without
// sockets, on one core: both seal and open.
func BenchmarkMemory(b *testing.B) {
	for _, layers := range []bool{false, true} {
		for _, size := range sizes {
			name := "peers"
			if layers {
				name = "networks"
			}
			b.Run(fmt.Sprintf("%s/%d", name, size), func(b *testing.B) {
				root, leaf := pair(b, layers, rootAt)
				up, down := &pipe{from: leafAt}, &pipe{from: rootAt}
				now := settle(b, root, leaf, up, down)
				p := newPackets(size)
				root.got.Store(0)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				b.ResetTimer()
				start := cpu()
				for range (b.N + batch - 1) / batch {
					if !p.write(leaf, root, up, now) {
						b.Fatal("no route")
					}
					up.deliver(root, down, now)
				}
				b.StopTimer()
				reportCPU(b, start, (b.N+batch-1)/batch*batch)
				if want := uint64((b.N + batch - 1) / batch * batch); root.got.Load() != want {
					b.Fatalf("%d frames arrived, want %d", root.got.Load(), want)
				}
			})
		}
	}
}

// BenchmarkParallel is sending and receiving on two cores at once between one
// pair of nodes, as workers of one flow hash each do.
func BenchmarkParallel(b *testing.B) {
	for _, size := range sizes {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			root, leaf := pair(b, true, rootAt)
			up, down := &pipe{from: leafAt}, &pipe{from: rootAt}
			now := settle(b, root, leaf, up, down)
			b.SetBytes(int64(size) * batch)
			b.ReportAllocs()
			b.ResetTimer()
			start := cpu()
			b.RunParallel(func(pb *testing.PB) {
				// Each goroutine is a sending worker of one node and a receiving one
				// of the other.
				from, to := &end{id: leaf.id, core: leaf.core, layer: leaf.layer, tx: leaf.core.NewWorker()}, &end{
					id: root.id, core: root.core, layer: root.layer, rx: root.core.NewWorker(), nw: root.layer.NewWorker(),
				}
				to.rx.User = to.nw
				wire, back := &pipe{from: leafAt}, &pipe{from: rootAt}
				p := newPackets(size)
				for pb.Next() {
					p.write(from, to, wire, now)
					wire.deliver(to, back, now)
				}
			})
			b.StopTimer()
			reportCPU(b, start, b.N*batch)
		})
	}
}

// window keeps the sender from outrunning the receiver's socket buffer.
const window = 1024

// BenchmarkLoopback is the way through UDP sockets with whatever offloads the
// kernel has; sender and receiver share the machine.
func BenchmarkLoopback(b *testing.B) {
	for _, size := range sizes {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			lo := netip.MustParseAddr("127.0.0.1")
			rx := open(b, lo)
			tx := open(b, lo)
			root, leaf := pair(b, true, rootAt)
			// Loopback endpoints are never learned as paths: the nodes meet in
			// memory and their datagrams are redirected.
			up, down := &pipe{from: leafAt}, &pipe{from: rootAt}
			now := settle(b, root, leaf, up, down)
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			back := &pipe{}
			go func() {
				done <- rx.Run(ctx, func(_ int, _ vl1.SocketID, _ netip.AddrPort, d []byte) {
					root.core.Receive(root.rx.Begin(back, now), 1, leafAt, d)
				}, func(int) {
					root.layer.Flush(root.nw)
					back.buf, back.ends = back.buf[:0], back.ends[:0]
				})
			}()
			out := &redirect{out: tx.NewSender(), sock: tx.Sockets()[0].ID, to: rx.LocalEndpoints()[0]}
			p := newPackets(size)
			root.got.Store(0)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			b.ResetTimer()
			sent, start := 0, cpu()
			for range (b.N + batch - 1) / batch {
				p.write(leaf, root, out, now)
				out.out.Flush()
				sent += batch
				testwait.Poll(10*time.Millisecond, func() bool { return int(root.got.Load())+window >= sent })
			}
			b.StopTimer()
			reportCPU(b, start, sent)
			b.ReportMetric(float64(root.got.Load())/float64(sent), "arrived")
			cancel()
			if err := <-done; err != nil {
				b.Fatal(err)
			}
		})
	}
}

func open(b testing.TB, a netip.Addr) *transport.UDP {
	b.Helper()
	u, err := transport.Open(transport.Config{NoSecondary: true, Bind: []netip.Addr{a}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = u.Close() })
	return u
}

// redirect sends everything to one socket.
type redirect struct {
	out  *transport.Sender
	sock vl1.SocketID
	to   netip.AddrPort
}

func (r *redirect) Send(_ vl1.SocketID, _ netip.AddrPort, head, data []byte) {
	r.out.Send(r.sock, r.to, head, data)
}
func (r *redirect) SendTTL(vl1.SocketID, netip.AddrPort, []byte, int) {}

// What the benchmarks send arrives unchanged.
func TestCarries(t *testing.T) {
	for _, size := range sizes {
		root, leaf := pair(t, true, rootAt)
		up, down := &pipe{from: leafAt}, &pipe{from: rootAt}
		now := settle(t, root, leaf, up, down)
		p := newPackets(size)
		for i, buf := range p.bufs {
			for j := range buf {
				buf[j] = byte(i + j)
			}
		}
		p.addressed(leaf, root)
		var want, got [][]byte
		for _, buf := range p.bufs {
			want = append(want, bytes.Clone(buf[headroom:]))
		}
		root.take = func(frame []byte) { got = append(got, bytes.Clone(frame)) }
		if !p.write(leaf, root, up, now) {
			t.Fatal("no route")
		}
		up.deliver(root, down, now)
		if len(got) != batch {
			t.Fatalf("%d of %d frames arrived", len(got), batch)
		}
		for i := range got {
			if !bytes.Equal(got[i], want[i]) {
				t.Fatalf("frame %d of %d bytes differs", i, size)
			}
		}
	}
}
