package netstack

import (
	"encoding/binary"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"ztgate/netstack/internal/pkttest"
)

// fakeDevice keeps what is written and gives what is fed.
type fakeDevice struct {
	mu   sync.Mutex
	out  [][]byte
	feed chan [][]byte
	done chan struct{}
	once sync.Once
}

func (d *fakeDevice) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case batch := <-d.feed:
		for i, p := range batch {
			sizes[i] = copy(bufs[i][offset:], p)
		}
		return len(batch), nil
	case <-d.done:
		return 0, os.ErrClosed
	}
}

func (d *fakeDevice) Write(bufs [][]byte, offset int) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, b := range bufs {
		d.out = append(d.out, slices.Clone(b[offset:]))
	}
	return len(bufs), nil
}

func (d *fakeDevice) BatchSize() int    { return 128 }
func (d *fakeDevice) MTU() (int, error) { return 2800, nil }
func (d *fakeDevice) Close() error      { d.once.Do(func() { close(d.done) }); return nil }

// fakeOverlay keeps frames and answers ARP for all hosts but the silent ones.
type fakeOverlay struct {
	mu     sync.Mutex
	e      *Engine
	silent map[netip.Addr]bool
	out    [][]byte               // IP packets
	to     [][6]byte              // where the last ones of them went
	macs   map[netip.Addr][6]byte // of those that aren't at hostMAC
	arps   int
	refuse bool
}

func (o *fakeOverlay) WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	var replies [][]byte
	o.mu.Lock()
	if o.refuse {
		o.mu.Unlock()
		return 0, os.ErrClosed
	}
	for i, b := range bufs {
		f := b[offset : offset+sizes[i]]
		switch binary.BigEndian.Uint16(f[12:]) {
		case 0x0806:
			o.arps++
			target := netip.AddrFrom4([4]byte(f[38:42]))
			if f[21] == 1 && !o.silent[target] && !slices.Equal(f[28:32], f[38:42]) {
				r := slices.Clone(f)
				mac := o.macOf(target)
				copy(r, f[6:12])
				copy(r[6:], mac[:])
				r[21] = 2
				copy(r[22:], mac[:])
				copy(r[28:], f[38:42])
				copy(r[32:], f[22:32])
				replies = append(replies, r)
			}
		default:
			if nd := f[14:]; nd[0]>>4 == 6 && nd[6] == 58 && len(nd) >= 64 && nd[40] == 135 {
				if target := netip.AddrFrom16([16]byte(nd[48:64])); !o.silent[target] {
					replies = append(replies, advertise(f, o.macOf(target)))
				}
				continue
			}
			o.to = append(o.to, [6]byte(f))
			o.out = append(o.out, slices.Clone(f[ethernetLen:]))
		}
	}
	o.mu.Unlock()
	for _, r := range replies {
		o.e.Deliver(nwid, [][]byte{r})
	}
	return len(bufs), nil
}

func (o *fakeOverlay) macOf(a netip.Addr) [6]byte {
	if mac, ok := o.macs[a]; ok {
		return mac
	}
	return hostMAC
}

var (
	hostMAC = [6]byte{2, 0, 0, 0, 0, 9}
	ourMAC  = [6]byte{2, 0, 0, 0, 0, 1}
)

const testNet = 0x8056c2e21c000001

// rig is an engine between a VPC and an overlay in memory, on a clock of its own.
type rig struct {
	t       testing.TB
	e       *Engine
	dev     *fakeDevice
	overlay *fakeOverlay
	now     time.Time
}

func newRig(t testing.TB, edit ...func(*Config)) *rig {
	t.Helper()
	r := &rig{t: t, dev: &fakeDevice{feed: make(chan [][]byte), done: make(chan struct{})},
		overlay: &fakeOverlay{silent: map[netip.Addr]bool{}, macs: map[netip.Addr][6]byte{}}, now: time.Unix(1e9, 0)}
	cfg := Config{Device: r.dev, Overlay: r.overlay, Now: func() time.Time { return r.now },
		VPC: VPC{Addresses: []netip.Prefix{netip.MustParsePrefix("172.31.0.1/24"), netip.MustParsePrefix("fd77:1::1/64")},
			Sources: []netip.Prefix{netip.MustParsePrefix("172.31.0.0/16"), netip.MustParsePrefix("fd77:1::/64")}}}
	for _, f := range edit {
		f(&cfg)
	}
	e, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.e, r.overlay.e = e, e
	if err := e.SetNetworks([]Network{testNetwork()}); err != nil {
		t.Fatal(err)
	}
	r.take() // announcements
	return r
}

// testNetwork has 10.0.0.0/24 on the link and 10.9.0.0/16 behind a router.
func testNetwork() Network {
	return Network{ID: testNet, MAC: ourMAC, MTU: 2800, Masquerade: true,
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24"), netip.MustParsePrefix("fd77:100::1/64")},
		Routes:    []Route{{Target: netip.MustParsePrefix("10.9.0.0/16"), Via: netip.MustParseAddr("10.0.0.2")}}}
}

func (r *rig) sleep(d time.Duration) {
	r.now = r.now.Add(d)
	r.e.tick(r.e.clock())
}

// fromVPC sends packets from the VPC and returns what came out on both sides.
func (r *rig) fromVPC(packets ...[]byte) (overlay, vpc []string) {
	r.t.Helper()
	bufs, sizes := make([][]byte, len(packets)), make([]int, len(packets))
	for i, p := range packets {
		bufs[i] = make([]byte, vpcOffset+readSize)
		sizes[i] = copy(bufs[i][vpcOffset:], p)
	}
	r.e.vpcBatch(bufs, sizes)
	return r.take()
}

// fromOverlay sends packets from an overlay host.
func (r *rig) fromOverlay(packets ...[]byte) (overlay, vpc []string) {
	r.t.Helper()
	return r.fromMember(hostMAC, packets...)
}

// fromMember sends packets from the overlay host with a MAC.
func (r *rig) fromMember(mac [6]byte, packets ...[]byte) (overlay, vpc []string) {
	r.t.Helper()
	frames := make([][]byte, len(packets))
	for i, p := range packets {
		h := ethernetHeader(ourMAC, mac, p[0]>>4 == 6)
		frames[i] = append(h[:], p...)
	}
	r.e.Deliver(testNet, frames)
	return r.take()
}

// takeRaw returns what came out since it was last called.
func (r *rig) takeRaw() (overlay, vpc [][]byte) {
	r.overlay.mu.Lock()
	overlay, r.overlay.out = r.overlay.out, nil
	r.overlay.to = r.overlay.to[max(0, len(r.overlay.to)-len(overlay)):]
	r.overlay.mu.Unlock()
	r.dev.mu.Lock()
	vpc, r.dev.out = r.dev.out, nil
	r.dev.mu.Unlock()
	return overlay, vpc
}

func (r *rig) take() (overlay, vpc []string) {
	o, v := r.takeRaw()
	for _, b := range o {
		overlay = append(overlay, pkttest.Describe(b))
	}
	for _, b := range v {
		vpc = append(vpc, pkttest.Describe(b))
	}
	return overlay, vpc
}

// want compares what came out.
func (r *rig) want(what string, got []string, want ...string) {
	r.t.Helper()
	if !slices.Equal(got, want) {
		r.t.Errorf("%s:\n got %q\nwant %q", what, got, want)
	}
}

func (r *rig) drops(side Side, d drop) uint64 { return r.e.stats.drops[side][d].Load() }

// advertise answers a neighbour solicitation frame.
func advertise(f []byte, mac [6]byte) []byte {
	nd := f[ethernetLen:]
	p := pkttest.Packet{Proto: 58, Src: netip.AddrPortFrom(netip.AddrFrom16([16]byte(nd[48:64])), 0),
		Dst: netip.AddrPortFrom(netip.AddrFrom16([16]byte(nd[8:24])), 0), TTL: 255, Type: 136, Seq: 0x60000000,
		Payload: append(append(slices.Clone(nd[48:64]), 2, 1), mac[:]...)}
	h := ethernetHeader(ourMAC, mac, true)
	return append(h[:], p.Bytes()...)
}
