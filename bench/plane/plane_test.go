package plane

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"ztgate/netstack"
)

// outJob gives n packets of the flows in turn. The payloads stay in the buffers;
// only headers are restored.
func outJob(out [][]byte, n int) func(bufs [][]byte, sizes []int, offset int) int {
	at := 0
	return func(bufs [][]byte, sizes []int, offset int) int {
		m := min(len(bufs), n)
		for i := range m {
			*(*[headerSize]byte)(bufs[i][offset:]) = [headerSize]byte(out[at]) // not a call of memmove
			sizes[i] = packetSize
			if at++; at == len(out) {
				at = 0
			}
		}
		n -= m
		return m
	}
}

// deliverN delivers n packets of the flows in turn.
func (r *rig) deliverN(in [][]byte, n int) {
	// Behind each other, as they lie in a received train of datagrams: at distances that
	// are powers of two they would compete for a few sets of the cache.
	const size, gap = etherLen + packetSize, 28
	bufs, store := make([][]byte, 128), make([]byte, 128*(size+gap))
	for i := range bufs {
		bufs[i] = store[i*(size+gap):][:size:size]
	}
	at := 0
	for n > 0 {
		m := min(len(bufs), n)
		for i := range m {
			*(*[etherLen + headerSize]byte)(bufs[i]) = [etherLen + headerSize]byte(in[at])
			if at++; at == len(in) {
				at = 0
			}
		}
		r.e.Deliver(network, bufs[:m])
		n -= m
	}
}

// BenchmarkEstablished is one worker's cost of a packet of a known flow.
func BenchmarkEstablished(b *testing.B) {
	for _, v6 := range []bool{false, true} {
		for _, n := range []int{1, 100, 10000, 100000} {
			r := newRig(b, netstack.NAT{})
			out, in := r.flows(b, n, v6)
			name := fmt.Sprintf("%s/flows=%d", map[bool]string{false: "ipv4", true: "ipv6"}[v6], n)
			b.Run("to_overlay/"+name, func(b *testing.B) {
				r.fromVPC(outJob(out, 128)) // fills the buffers' payloads once
				b.SetBytes(packetSize)
				b.ReportAllocs()
				before := r.sent.Load()
				b.ResetTimer()
				start := cpu()
				r.fromVPC(outJob(out, b.N))
				b.StopTimer()
				reportCPU(b, start)
				if got := r.sent.Load() - before; got < int64(b.N) {
					b.Errorf("%d of %d packets came out", got, b.N)
				}
			})
			b.Run("to_vpc/"+name, func(b *testing.B) {
				b.SetBytes(packetSize)
				b.ReportAllocs()
				before := r.dev.wrote.Load()
				b.ResetTimer()
				start := cpu()
				r.deliverN(in, b.N)
				b.StopTimer()
				reportCPU(b, start)
				if got := r.dev.wrote.Load() - before; got < int64(b.N) {
					b.Errorf("%d of %d packets came out", got, b.N)
				}
			})
		}
	}
}

// BenchmarkWorkers is the throughput of one and two workers, with flows of their
// own and one for each direction of the same flows.
func BenchmarkWorkers(b *testing.B) {
	r := newRig(b, netstack.NAT{})
	out, in := r.flows(b, 10000, false)
	work := map[string][]func(n int){
		"to_vpc/1": {func(n int) { r.deliverN(in, n) }},
		"to_vpc/2": {func(n int) { r.deliverN(in[:5000], n) }, func(n int) { r.deliverN(in[5000:], n) }},
		"both/1":   {func(n int) { r.deliverN(in, n/2); r.fromVPC(outJob(out, n/2)) }},
		"both/2":   {func(n int) { r.deliverN(in, n) }, func(n int) { r.fromVPC(outJob(out, n)) }},
	}
	for _, name := range []string{"to_vpc/1", "to_vpc/2", "both/1", "both/2"} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(packetSize)
			start := cpu()
			var wg sync.WaitGroup
			for _, f := range work[name] {
				wg.Go(func() { f(b.N / len(work[name])) })
			}
			wg.Wait()
			reportCPU(b, start)
		})
	}
}

// BenchmarkShortConnections opens, uses and closes TCP connections from four
// addresses to one server: seven segments each. The table is at rest in between,
// so that in the end every port comes from a closed connection.
func BenchmarkShortConnections(b *testing.B) {
	r := newRig(b, netstack.NAT{})
	const group = 64
	var outs, ins [group][]byte
	clients := [group]netip.AddrPort{}
	ext := netip.MustParseAddr("10.0.0.1")
	next := 0
	reply := func(flags byte, seq, ack uint32, ports *[group]uint16) {
		for i := range group {
			ins[i] = frame(packet(6, server4, netip.AddrPortFrom(ext, ports[i]), flags, seq, uint32(i)<<16+ack, 40))
		}
		r.e.Deliver(network, ins[:])
	}
	send := func(flags byte, seq, ack uint32) {
		for i := range group {
			outs[i] = packet(6, clients[i], server4, flags, uint32(i)<<16+seq, ack, 40)
		}
		r.fromVPC(give(outs[:]))
	}
	var ports [group]uint16
	r.keep = func(f []byte) {
		if f[12] == 8 && f[13] == 0 && f[etherLen+9] == 6 && f[etherLen+33] == 2 {
			ports[binary.BigEndian.Uint32(f[etherLen+24:])>>16] = binary.BigEndian.Uint16(f[etherLen+20:])
		}
	}
	wrote := r.dev.wrote.Load()
	b.ResetTimer()
	start := cpu()
	for n := 0; n < b.N; n += group {
		for i := range group {
			clients[i] = netip.AddrPortFrom(netip.AddrFrom4([4]byte{172, 16, 0, byte(1 + next%4)}), uint16(32768+next/4%28000))
			next++
		}
		send(2, 99, 0)                // SYN
		reply(0x12, 499, 100, &ports) // SYN/ACK
		send(0x10, 100, 500)          // ACK
		send(0x11, 100, 500)          // FIN
		reply(0x11, 500, 101, &ports)
		send(0x10, 101, 501)
	}
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "connections/s")
	reportCPU(b, start)
	if got := r.dev.wrote.Load() - wrote; got < 2*int64(b.N) {
		b.Errorf("%d replies of %d came through", got, 2*b.N)
	}
}

// BenchmarkNewUDP opens a flow with every packet. Never-answered ones make room
// once the table is full.
func BenchmarkNewUDP(b *testing.B) {
	r := newRig(b, netstack.NAT{})
	r.fromVPC(give([][]byte{packet(17, client(0, false), server4, 0, 0, 0, 128)}))
	template := packet(17, client(0, false), server4, 0, 0, 0, 128)
	template[26], template[27] = 0, 0 // no checksum: the harness changes the source
	n, left := 0, b.N
	b.ReportAllocs()
	b.ResetTimer()
	start := cpu()
	r.fromVPC(func(bufs [][]byte, sizes []int, offset int) int {
		m := min(len(bufs), left)
		for i := range m {
			p := bufs[i][offset:]
			sizes[i] = copy(p, template)
			n++
			binary.BigEndian.PutUint16(p[20:], uint16(1024+n%40000))
			binary.BigEndian.PutUint16(p[22:], uint16(1+n/40000))
			p[10], p[11] = 0, 0
			binary.BigEndian.PutUint16(p[10:], ^sum(p[:20], 0))
		}
		left -= m
		return m
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "flows/s")
	reportCPU(b, start)
}

// BenchmarkMemory is what 100,000 flows take, everything included.
func BenchmarkMemory(b *testing.B) {
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	for b.Loop() {
		const n = 100000
		before := heap()
		r := newRig(b, netstack.NAT{MaxFlows: n + 1, MaxFlowsPerClient: n})
		empty := heap()
		out := make([][]byte, 0, 128)
		for i := range n {
			out = append(out, packet(17, client(i%50000, false), netip.AddrPortFrom(server4.Addr(), uint16(1+i/50000)), 0, 0, 0, 60))
			if len(out) == 128 || i == n-1 {
				r.fromVPC(give(out))
				out = out[:0]
			}
		}
		full := heap()
		if got := len(r.e.Flows(netstack.FlowFilter{})); got != n {
			b.Errorf("%d flows, want %d", got, n)
		}
		b.ReportMetric(float64(full-empty)/n, "B/flow")
		b.ReportMetric(float64(full-before)/n, "B/flow_with_empty_table")
	}
}

// BenchmarkRemoval fills the table, lets all flows expire at once and measures how
// long packets that open flows have to wait meanwhile.
func BenchmarkRemoval(b *testing.B) {
	for b.Loop() {
		const n = 262144
		r := newRig(b, netstack.NAT{MaxFlowsPerClient: n})
		out := make([][]byte, 0, 128)
		for i := range n {
			out = append(out, packet(17, client(i%50000, false), netip.AddrPortFrom(server4.Addr(), uint16(1+i/50000)), 0, 0, 0, 60))
			if len(out) == 128 || i == n-1 {
				r.fromVPC(give(out))
				out = out[:0]
			}
		}
		if got := len(r.e.Flows(netstack.FlowFilter{})); got < n-1000 {
			b.Errorf("%d flows, want %d", got, n)
		}
		runtime.GC()
		r.skew.Store(int64(130 * time.Second))
		var longest, total time.Duration
		count := 0
		end := time.Now().Add(1500 * time.Millisecond) // the sweep runs twice a second
		for i := 0; time.Now().Before(end); i++ {
			p := [][]byte{packet(17, netip.AddrPortFrom(netip.MustParseAddr("172.20.0.1"), uint16(1024+i%60000)), server4, 0, 0, 0, 60)}
			start := time.Now()
			r.fromVPC(give(p))
			d := time.Since(start)
			longest, total, count = max(longest, d), total+d, count+1
		}
		b.ReportMetric(float64(longest.Microseconds()), "longest-µs")
		b.ReportMetric(float64(total.Nanoseconds())/float64(count)/1000, "mean-µs")
	}
}
