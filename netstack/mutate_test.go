package netstack

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
)

// seeds are packets of all kinds for a direction.
func seeds(overlay bool) [][]byte {
	in, out := "172.31.0.10", "10.0.0.10"
	in6, out6 := "fd77:1::50", "fd77:100::50"
	if overlay {
		in, out = "10.0.0.10", "10.0.0.1"
		in6, out6 = out6, in6
	}
	p := func(s string, port string) string { return s + ":" + port }
	p6 := func(s string, port string) string { return "[" + s + "]:" + port }
	big := pkttest.Packet{Src: pkttest.Addr(p(in, "4000")), Dst: pkttest.Addr(p(out, "53")), ID: 7, Payload: make([]byte, 2000)}.Bytes()
	quote := pkttest.UDP(p(out, "53"), p(in, "4000"), "x")
	list := [][]byte{
		pkttest.UDP(p(in, "4000"), p(out, "53"), "question"), pkttest.UDP(p(in, "53"), p(out, "4000"), "answer"),
		pkttest.TCP(p(in, "4000"), p(out, "443"), ipkt.SYN, 1, 0, ""), pkttest.TCP(p(in, "443"), p(out, "4000"), ipkt.SYN|ipkt.ACK, 1, 2, ""),
		pkttest.TCP(p(in, "4000"), p(out, "443"), ipkt.ACK, 2, 2, "data"), pkttest.TCP(p(in, "443"), p(out, "4000"), ipkt.FIN|ipkt.ACK, 2, 2, ""),
		pkttest.TCP(p(in, "4000"), p(out, "443"), ipkt.RST, 2, 0, ""), pkttest.UDP(p(in, "4000"), p(out, "8443"), "forward"),
		pkttest.Echo(in, out, false, 77, "x"), pkttest.Echo(in, out, true, 77, "x"),
		pkttest.ICMPError(in, out, 3, 3, 0, quote, 28), pkttest.ICMPError(in, out, 11, 0, 0, pkttest.Echo(out, in, false, 77, "x"), 100),
		pkttest.UDP(p6(in6, "4000"), p6(out6, "53"), "question"), pkttest.UDP(p6(in6, "53"), p6(out6, "4000"), "answer"),
		pkttest.Echo(in6, out6, false, 77, "x"), pkttest.ICMPError(in6, out6, 2, 0, 1280, pkttest.UDP(p6(out6, "53"), p6(in6, "4000"), "x"), 100),
		pkttest.Packet{Proto: 47, Src: pkttest.Addr(in), Dst: pkttest.Addr(out), Payload: make([]byte, 20)}.Bytes(),
		pkttest.Packet{Src: pkttest.Addr(p(in, "4000")), Dst: pkttest.Addr(p(out, "53")), TTL: 1}.Bytes(),
		pkttest.Packet{Src: pkttest.Addr(p(in, "4000")), Dst: pkttest.Addr(p(out, "53")), IPOptions: []byte{7, 7, 4, 0, 0, 0, 0, 0}, DF: true, Payload: make([]byte, 3000)}.Bytes(),
		pkttest.Packet{Src: pkttest.Addr(p6(in6, "4000")), Dst: pkttest.Addr(p6(out6, "53")), ID: 9, More: true, Payload: make([]byte, 800)}.Bytes(),
	}
	return append(list, pkttest.Fragments(big, 800, 800)...)
}

// mutate changes a packet here and there; most of them keep right checksums.
func mutate(rng *rand.Rand, b []byte) []byte {
	b = slices.Clone(b)
	for range rng.IntN(4) {
		switch rng.IntN(8) {
		case 0:
			b = b[:rng.IntN(len(b)+1)]
		case 1:
			b = append(b, make([]byte, rng.IntN(64))...)
		default:
			if n := min(len(b), 64); n > 0 {
				at := rng.IntN(n)
				switch rng.IntN(3) {
				case 0:
					b[at] ^= 1 << rng.IntN(8)
				case 1:
					b[at] = byte(rng.Uint32())
				default:
					b[at] = []byte{0, 1, 0x7f, 0x80, 0xff}[rng.IntN(5)]
				}
			}
		}
		if len(b) == 0 {
			return b
		}
	}
	if len(b) >= 20 && b[0]>>4 == 4 && rng.IntN(4) > 0 {
		if ihl := int(b[0]&15) * 4; ihl >= 20 && ihl <= len(b) {
			binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
			ipkt.FixHeader(b)
		}
	}
	var v ipkt.View
	if rng.IntN(4) > 0 && ipkt.Parse(b, &v) == ipkt.OK && v.First && !v.Fragment {
		fixTransport(&v)
	}
	return b
}

// fixTransport makes a transport checksum right.
func fixTransport(v *ipkt.View) {
	t := v.B[v.L4:]
	at, pseudo := 2, uint32(0)
	if off, ok := ipkt.ChecksumOffset(v.Proto); ok {
		at, pseudo = off, ipkt.PseudoSum(v.V6, v.Src, v.Dst, v.Proto, len(t))
	} else if v.Proto != ipkt.ICMP {
		return
	}
	if v.Proto == ipkt.UDP {
		binary.BigEndian.PutUint16(t[4:], uint16(len(t)))
	}
	t[at], t[at+1] = 0, 0
	binary.BigEndian.PutUint16(t[at:], ipkt.Checksum(t, pseudo))
}

// leaks reports an inside IPv4 address in a packet on the overlay, as its source
// or in what an ICMP error quotes.
func leaks(b []byte) bool {
	inside := netip.MustParsePrefix("172.31.0.0/16")
	var v ipkt.View
	if ipkt.Parse(b, &v) != ipkt.OK || v.V6 {
		return false
	}
	if inside.Contains(v.Source()) {
		return true
	}
	if q := v.B[v.L4:]; v.IsICMPError() && len(q) >= 28 && q[8]>>4 == 4 {
		q = q[8:]
		src, dst := netip.AddrFrom4([4]byte(q[12:16])), netip.AddrFrom4([4]byte(q[16:20]))
		// The packet it is about came from there or went there, as that side saw it.
		return inside.Contains(src) && src != v.Source() || inside.Contains(dst) && dst != v.Source()
	}
	return false
}

var allDrops = drops()

// account compares what came in with what became of it, by side.
func (r *rig) account() {
	r.t.Helper()
	s := &r.e.stats
	sum := func(f *pathCounters, path int) (n uint64) {
		for i := path << classShift; i < (path+1)<<classShift; i++ {
			n += f.t[i].packets.Load()
		}
		return n
	}
	out := [numSides]uint64{VPCSide: sum(&s.vpc, pathLocal) + sum(&s.vpc, pathVPCToVPC)}
	for _, at := range r.e.set.Load().attachments {
		out[VPCSide] += sum(at.fwd, pathVPCToOverlay)
		out[OverlaySide] += sum(at.fwd, pathOverlayToVPC) + sum(at.fwd, pathLocal)
	}
	for side := range numSides {
		dropped := uint64(0)
		for _, d := range allDrops {
			dropped += s.drops[side][d].Load()
		}
		if in := s.traffic[side][rx].packets.Load(); in != out[side]+dropped {
			r.t.Errorf("%s: %d packets came in, %d went on and %d were dropped", sideNames[side], in, out[side], dropped)
		}
	}
}

// TestMutated sends mutated packets from both sides: nothing panics, no inside
// address gets out, nothing vanishes uncounted. ZTGATE_MUTATED says how many.
func TestMutated(t *testing.T) {
	n := 30000
	if s := os.Getenv("ZTGATE_MUTATED"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	r := newRig(t, func(c *Config) {
		c.NAT = NAT{MaxFlows: 5000, FilterUDP: EndpointIndependent}
		c.Forwards = []PortForward{{From: OverlaySide, Proto: ipkt.UDP, Listen: netip.MustParseAddrPort("10.0.0.1:8443"), To: netip.MustParseAddrPort("172.31.0.20:53")}}
		c.Maps = []AddressMap{{Hosts: OverlaySide, Real: netip.MustParsePrefix("10.0.0.64/28"), Alias: netip.MustParsePrefix("100.64.0.64/28")}}
	})
	corpus := [2][][]byte{seeds(false), seeds(true)}
	const batch = 100
	for i := 0; i < n; i += batch {
		var packets [2][][]byte
		for range batch {
			side := rng.IntN(2)
			packets[side] = append(packets[side], mutate(rng, corpus[side][rng.IntN(len(corpus[side]))]))
		}
		r.feed(packets[0], packets[1])
		o, _ := r.takeRaw()
		for _, b := range o {
			if leaks(b) {
				t.Fatalf("L-LEAK: %s: %x", pkttest.Describe(b), b)
			}
		}
		if i%5000 == 0 {
			r.sleep(time.Duration(rng.IntN(20)) * time.Second)
		}
	}
	r.drain()
	r.account()
	if p := r.e.local.Panics.Load(); p > 0 {
		t.Logf("the local stack panicked on %d packets", p)
	}
}

// feed sends packets from both sides and keeps what comes out.
func (r *rig) feed(vpc, overlay [][]byte) {
	bufs, sizes := make([][]byte, len(vpc)), make([]int, len(vpc))
	for i, p := range vpc {
		bufs[i] = make([]byte, vpcOffset+readSize)
		sizes[i] = copy(bufs[i][vpcOffset:], p)
	}
	r.e.vpcBatch(bufs, sizes)
	var frames [][]byte
	for _, p := range overlay {
		h := ethernetHeader(ourMAC, hostMAC, len(p) > 0 && p[0]>>4 == 6)
		frames = append(frames, append(h[:], p...))
	}
	r.e.Deliver(testNet, frames)
}

// drain lets everything that waits come to its end.
func (r *rig) drain() {
	for range 90 {
		r.sleep(time.Second)
	}
}

func FuzzPackets(f *testing.F) {
	for side, list := range [][][]byte{seeds(false), seeds(true)} {
		for _, b := range list {
			f.Add(b, side == 1)
		}
	}
	r := newRig(f) // one for all: an engine is big
	f.Fuzz(func(t *testing.T, b []byte, overlay bool) {
		r.t = t
		var in [2][][]byte
		in[map[bool]int{false: 0, true: 1}[overlay]] = [][]byte{b}
		r.feed([][]byte{seeds(false)[0]}, nil) // a flow to meet
		r.feed(in[0], in[1])
		o, _ := r.takeRaw()
		for _, b := range o {
			if leaks(b) {
				t.Errorf("leak: %x", b)
			}
		}
		r.drain()
		r.account()
	})
}
