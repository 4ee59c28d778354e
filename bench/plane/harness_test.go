package plane

import (
	"context"
	"encoding/binary"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/netstack"
)

const (
	network    = 0x8056c2e21c000001
	packetSize = 1400
	headerSize = 64 // what is restored between passes
	etherLen   = 14
)

var (
	ourMAC  = [6]byte{2, 0, 0, 0, 0, 1}
	hostMAC = [6]byte{2, 0, 0, 0, 0, 9}
	server4 = netip.MustParseAddrPort("10.0.0.10:443")
	server6 = netip.MustParseAddrPort("[fd77:100::10]:443")
)

// packet makes an IP packet of a size with a right header checksum. Transport
// checksums are right too, since packets that open flows are verified.
func packet(proto uint8, src, dst netip.AddrPort, flags byte, seq, ack uint32, size int) []byte {
	b := make([]byte, size)
	l4 := 20
	if src.Addr().Is4() {
		b[0], b[8], b[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(b[2:], uint16(size))
		s, d := src.Addr().As4(), dst.Addr().As4()
		copy(b[12:], s[:])
		copy(b[16:], d[:])
		binary.BigEndian.PutUint16(b[10:], ^sum(b[:20], 0))
	} else {
		l4 = 40
		b[0], b[6], b[7] = 0x60, proto, 64
		binary.BigEndian.PutUint16(b[4:], uint16(size-40))
		s, d := src.Addr().As16(), dst.Addr().As16()
		copy(b[8:], s[:])
		copy(b[24:], d[:])
	}
	t := b[l4:]
	binary.BigEndian.PutUint16(t, src.Port())
	binary.BigEndian.PutUint16(t[2:], dst.Port())
	at := 6
	if proto == 6 {
		binary.BigEndian.PutUint32(t[4:], seq)
		binary.BigEndian.PutUint32(t[8:], ack)
		t[12], t[13], t[14], t[15] = 5<<4, flags, 0xff, 0xff
		at = 16
	} else {
		binary.BigEndian.PutUint16(t[4:], uint16(len(t)))
	}
	pseudo := uint32(proto) + uint32(len(t))
	if l4 == 20 {
		pseudo += uint32(sum(b[12:20], 0))
	} else {
		pseudo += uint32(sum(b[8:40], 0))
	}
	c := ^sum(t, pseudo)
	if c == 0 {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(t[at:], c)
	return b
}

func sum(b []byte, s uint32) uint16 {
	for ; len(b) > 1; b = b[2:] {
		s += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// device gives batches while there is something to do, and keeps nothing.
type device struct {
	work   chan func(bufs [][]byte, sizes []int, offset int) int
	cur    func(bufs [][]byte, sizes []int, offset int) int
	done   chan struct{}
	closed chan struct{}
	once   sync.Once
	wrote  atomic.Int64
}

// Read asks the current job for packets; when it has none it is done.
func (d *device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	for {
		if d.cur != nil {
			if n := d.cur(bufs, sizes, offset); n > 0 {
				return n, nil
			}
			d.cur = nil
			d.done <- struct{}{}
		}
		select {
		case d.cur = <-d.work:
		case <-d.closed:
			return 0, os.ErrClosed
		}
	}
}

func (d *device) Write(bufs [][]byte, _ int) (int, error) {
	d.wrote.Add(int64(len(bufs)))
	return len(bufs), nil
}
func (d *device) BatchSize() int    { return 128 }
func (d *device) MTU() (int, error) { return 2800, nil }
func (d *device) Close() error      { d.once.Do(func() { close(d.closed) }); return nil }

// rig is a running engine.
type rig struct {
	e    *netstack.Engine
	dev  *device
	skew atomic.Int64 // of the clock
	keep func(frame []byte)
	sent atomic.Int64
	stop func()
}

// WriteFrames answers ARP and neighbour solicitations, and keeps nothing else.
func (r *rig) WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	r.sent.Add(int64(len(bufs)))
	if len(bufs) > 1 && r.keep == nil {
		return len(bufs), nil
	}
	for i, b := range bufs {
		f := b[offset : offset+sizes[i]]
		switch {
		case f[12] == 0x08 && f[13] == 0x06 && f[21] == 1:
			a := append([]byte(nil), f...)
			copy(a, f[6:12])
			copy(a[6:], hostMAC[:])
			a[21] = 2
			copy(a[22:], hostMAC[:])
			copy(a[28:], f[38:42])
			copy(a[32:], f[22:32])
			r.e.Deliver(nwid, [][]byte{a})
		case f[12] == 0x86 && len(f) >= 78 && f[20] == 58 && f[54] == 135:
			r.e.Deliver(nwid, [][]byte{advertise(f)})
		case r.keep != nil:
			r.keep(f)
		}
	}
	return len(bufs), nil
}

func advertise(f []byte) []byte {
	a := append([]byte(nil), f[:etherLen+40+32]...)
	copy(a, f[6:12])
	copy(a[6:], hostMAC[:])
	ip := a[etherLen:]
	copy(ip[24:40], f[etherLen+8:])
	copy(ip[8:24], f[etherLen+48:])
	ip[40], ip[44], ip[42], ip[43] = 136, 0x60, 0, 0
	ip[64], ip[65] = 2, 1
	copy(ip[66:], hostMAC[:])
	c := ^sum(ip[40:72], uint32(sum(ip[8:40], 0))+58+32)
	binary.BigEndian.PutUint16(ip[42:], c)
	return a
}

func newRig(b testing.TB, nat netstack.NAT) *rig {
	r := &rig{dev: &device{work: make(chan func([][]byte, []int, int) int), done: make(chan struct{}), closed: make(chan struct{})}}
	e, err := netstack.New(netstack.Config{Device: r.dev, Overlay: r, NAT: nat,
		Now: func() time.Time { return time.Now().Add(time.Duration(r.skew.Load())) },
		VPC: netstack.VPC{Sources: []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("fd77:1::/64")}}})
	if err != nil {
		b.Fatal(err)
	}
	r.e = e
	if err := e.SetNetworks([]netstack.Network{{ID: network, MAC: ourMAC, MTU: 2800, Masquerade: true,
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24"), netip.MustParsePrefix("fd77:100::1/64")}}}); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- e.Run(ctx) }()
	r.stop = func() {
		cancel()
		if err := <-ended; err != nil {
			b.Error(err)
		}
	}
	b.Cleanup(r.stop)
	return r
}

// fromVPC lets the engine read what job gives, and returns when all is done.
func (r *rig) fromVPC(job func(bufs [][]byte, sizes []int, offset int) int) {
	r.dev.work <- job
	<-r.dev.done
}

// give makes a job of packets.
func give(packets [][]byte) func(bufs [][]byte, sizes []int, offset int) int {
	return func(bufs [][]byte, sizes []int, offset int) int {
		n := min(len(bufs), len(packets))
		for i := range n {
			sizes[i] = copy(bufs[i][offset:], packets[i])
		}
		packets = packets[n:]
		return n
	}
}

// client is the i-th client endpoint of a family.
func client(i int, v6 bool) netip.AddrPort {
	port := uint16(1024 + i%1000)
	if v6 {
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte{0xfd, 0x77, 0, 1, 14: byte(i / 1000 >> 8), 15: byte(i/1000) + 1}), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{172, 16, byte(i / 1000 >> 8), byte(i/1000) + 1}), port)
}

// flows opens established UDP flows and returns the headers of their packets in
// both directions, IP packets out and frames in. Each has a server port of its own so that 100,000
// fit one address.
func (r *rig) flows(b testing.TB, n int, v6 bool) (out, in [][]byte) {
	server := server4.Addr()
	if v6 {
		server = server6.Addr()
	}
	opened := make(map[[18]byte][]byte, n)
	r.keep = func(f []byte) {
		ip := f[etherLen:]
		src, l4 := append(make([]byte, 0, 18), ip[12:16]...), 20
		if v6 {
			src, l4 = append(make([]byte, 0, 18), ip[8:24]...), 40
		}
		var k [18]byte
		copy(k[:], ip[l4+8:l4+26]) // the payload says whose it is
		opened[k] = append(append([]byte(nil), src...), ip[l4:l4+2]...)
	}
	for i := range n {
		p := packet(17, client(i%50000, v6), netip.AddrPortFrom(server, uint16(1+i/50000)), 0, 0, 0, packetSize)
		out = append(out, p)
	}
	var first [][]byte
	for i := range n {
		l4 := 20
		if v6 {
			l4 = 40
		}
		p := append([]byte(nil), out[i][:l4+26]...)
		binary.BigEndian.PutUint32(p[l4+8:], uint32(i)+1)
		first = append(first, remake(p, v6))
	}
	r.fromVPC(give(first))
	r.keep = nil
	for i := range n {
		var k [18]byte
		binary.BigEndian.PutUint32(k[:], uint32(i)+1)
		at, ok := opened[k]
		if !ok {
			b.Fatalf("flow %d of %d did not open", i, n)
		}
		src, _ := netip.AddrFromSlice(at[:len(at)-2])
		reply := packet(17, netip.AddrPortFrom(server, uint16(1+i/50000)), netip.AddrPortFrom(src, binary.BigEndian.Uint16(at[len(at)-2:])), 0, 0, 0, packetSize)
		in = append(in, frame(reply))
	}
	r.deliver(in)
	return compact(out, headerSize), compact(in, etherLen+headerSize)
}

// compact keeps the first n bytes of packets, one after the other: where the
// harness keeps them is no cost of the engine.
func compact(packets [][]byte, n int) [][]byte {
	store := make([]byte, len(packets)*n)
	out := make([][]byte, len(packets))
	for i, p := range packets {
		out[i] = store[i*n : (i+1)*n : (i+1)*n]
		copy(out[i], p)
	}
	return out
}

// remake makes the checksums of a shortened UDP packet right.
func remake(p []byte, v6 bool) []byte {
	var src, dst netip.Addr
	l4 := 20
	if v6 {
		l4 = 40
		src, dst = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
	} else {
		src, dst = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
	}
	q := packet(17, netip.AddrPortFrom(src, binary.BigEndian.Uint16(p[l4:])), netip.AddrPortFrom(dst, binary.BigEndian.Uint16(p[l4+2:])), 0, 0, 0, len(p))
	copy(q[l4+8:], p[l4+8:])
	q[l4+6], q[l4+7] = 0, 0
	c := ^sum(q[l4:], uint32(17+len(p)-l4)+uint32(sum(q[map[bool]int{false: 12, true: 8}[v6]:l4], 0)))
	binary.BigEndian.PutUint16(q[l4+6:], c)
	return q
}

func frame(p []byte) []byte {
	f := append(append(make([]byte, 0, etherLen+len(p)), ourMAC[:]...), hostMAC[:]...)
	if p[0]>>4 == 6 {
		return append(append(f, 0x86, 0xdd), p...)
	}
	return append(append(f, 0x08, 0x00), p...)
}

// deliver hands copies of frames to the engine.
func (r *rig) deliver(frames [][]byte) {
	batch := make([][]byte, 0, 128)
	for i, f := range frames {
		batch = append(batch, append([]byte(nil), f...))
		if len(batch) == 128 || i == len(frames)-1 {
			r.e.Deliver(network, batch)
			batch = batch[:0]
		}
	}
}

// cpu measures the processor time of the process: on a machine that is shared,
// wall time says little.
func cpu() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// reportCPU adds the processor time since start to the results.
func reportCPU(b *testing.B, start time.Duration) {
	b.ReportMetric(float64(cpu()-start)/float64(b.N), "cpu-ns/op")
}
