package netstack

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
	"ztgate/netstack/policy"
)

const otherNet = testNet + 1

// slowVPC and slowDeliver are vpcBatch and Deliver without the fast path.
func (r *rig) slowVPC(packets [][]byte) {
	w := r.e.worker()
	for _, p := range packets {
		w.rx[VPCSide].packets++
		w.rx[VPCSide].bytes += uint64(len(p))
		buf := append(make([]byte, vpcOffset, vpcOffset+readSize), p...)
		w.packet(VPCSide, nil, buf[vpcOffset:], buf)
	}
	r.e.release(w)
}

func (r *rig) slowDeliver(network uint64, frames [][]byte) {
	w := r.e.worker()
	for _, f := range frames {
		w.rx[OverlaySide].packets++
		w.rx[OverlaySide].bytes += uint64(max(len(f)-ethernetLen, 0))
		w.frame(w.set.attachments[network], f)
	}
	r.e.release(w)
}

// answer makes what the receiver of a packet might send back.
func answer(rng *rand.Rand, b []byte) []byte {
	var v ipkt.View
	if ipkt.Parse(b, &v) != ipkt.OK || v.Fragment || v.Proto != ipkt.TCP && v.Proto != ipkt.UDP {
		return nil
	}
	p := pkttest.Packet{Proto: v.Proto, Src: netip.AddrPortFrom(v.Destination(), v.DPort), Dst: netip.AddrPortFrom(v.Source(), v.SPort),
		DF: rng.IntN(2) == 0, Payload: make([]byte, rng.IntN(40))}
	if rng.IntN(20) == 0 {
		p.Payload = make([]byte, rng.IntN(2900))
	}
	if v.Proto == ipkt.TCP {
		h := v.B[v.L4:]
		seq, ack := binary.BigEndian.Uint32(h[4:]), binary.BigEndian.Uint32(h[8:])
		p.Seq, p.Ack, p.Flags = ack, seq+uint32(len(h)-int(h[12]>>4)*4), ipkt.ACK
		switch {
		case v.Flags == ipkt.SYN:
			p.Flags, p.Ack, p.Payload = ipkt.SYN|ipkt.ACK, seq+1, nil
		case v.Flags&(ipkt.SYN|ipkt.FIN) != 0:
			p.Ack++
		}
		switch rng.IntN(40) {
		case 0:
			p.Flags |= ipkt.FIN
		case 1:
			p.Flags = ipkt.RST | ipkt.ACK
		case 2:
			p.Seq += rng.Uint32() // outside the window
		}
	}
	return p.Bytes()
}

// damage changes what isn't part of the tuple. Most checksums are repaired.
func damage(rng *rand.Rand, b []byte) []byte {
	l4 := 40
	offsets := []int{0, 1, 4, 5, 7} // of IPv6
	if b[0]>>4 == 4 {
		l4 = 20
		offsets = []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11}
	}
	for i := 4; i < 20 && l4+i < len(b); i++ {
		offsets = append(offsets, l4+i)
	}
	at := offsets[rng.IntN(len(offsets))]
	b[at] = []byte{0, 1, 2, 0x40, 0x45, 0xff, b[at] ^ 1, byte(rng.Uint32())}[rng.IntN(8)]
	if l4 == 20 && rng.IntN(4) > 0 && b[0] == 0x45 {
		ipkt.FixHeader(b)
	}
	switch rng.IntN(8) {
	case 0:
		b = append(b, make([]byte, 8)...)
	case 1:
		b = b[:rng.IntN(len(b))]
	}
	return b
}

// TestFastPath sends the same histories through two engines, through one of them
// without the fast path: what comes out, every counter and every flow is the same.
func TestFastPath(t *testing.T) {
	t.Run("out", func(t *testing.T) { testFastPath(t, func(*Config) {}) })
	t.Run("both ways", func(t *testing.T) { testFastPath(t, hidden) })
}

func testFastPath(t *testing.T, world func(*Config)) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	edit := func(c *Config) {
		world(c)
		c.NAT = NAT{MaxFlows: 500, Seed: [32]byte{7}}
		c.VPC.MTU = 2000
		for _, side := range []Side{VPCSide, OverlaySide} {
			c.Forwards = append(c.Forwards, forward(side, ipkt.TCP, "10.0.0.1:8443", "172.31.0.20:443", false))
		}
		c.Maps = []AddressMap{{Hosts: OverlaySide, Real: netip.MustParsePrefix("10.0.0.64/28"), Alias: netip.MustParsePrefix("100.64.0.64/28")}}
	}
	fast, slow := newRig(t, edit), newRig(t, edit)
	setMTU := func(mtu int) {
		one, other := testNetwork(), Network{ID: otherNet, MAC: ourMAC, MTU: 2800, Masquerade: true, Addresses: []netip.Prefix{netip.MustParsePrefix("10.7.0.1/24")}}
		one.MTU = mtu
		for _, r := range []*rig{fast, slow} {
			if err := r.e.SetNetworks([]Network{one, other}); err != nil {
				t.Fatal(err)
			}
			r.take()
		}
	}
	setMTU(2800)
	start := func(overlay bool) []byte {
		if overlay && rng.IntN(2) == 0 {
			return pkttest.UDP(fmt.Sprintf("10.0.0.10:%d", 2000+rng.IntN(50)), fmt.Sprintf("172.31.0.%d:53", 20+rng.IntN(2)), "question")
		}
		if overlay {
			return pkttest.TCP(fmt.Sprintf("10.0.0.10:%d", 2000+rng.IntN(50)), "10.0.0.1:8443", ipkt.SYN, rng.Uint32(), 0, "")
		}
		src, dst := fmt.Sprintf("172.31.0.%d:%d", 10+rng.IntN(4), 2000+rng.IntN(50)), "10.0.0.10:80"
		switch rng.IntN(8) {
		case 0:
			dst = "100.64.0.70:80"
		case 2:
			dst = fmt.Sprintf("10.0.0.1:%d", 2000+rng.IntN(50)) // perhaps another client's mapping
		case 3:
			dst = "10.0.0.1:8443"
		case 1:
			src, dst = fmt.Sprintf("[fd77:1::%d]:%d", 10+rng.IntN(4), 2000+rng.IntN(50)), "[fd77:100::10]:80"
		}
		if rng.IntN(2) == 0 {
			return pkttest.UDP(src, dst, "question")
		}
		return pkttest.TCP(src, dst, ipkt.SYN, rng.Uint32(), 0, "")
	}
	var pending [2][][]byte // packets that hosts of a side may send next
	rounds := 4000
	if testing.Short() {
		rounds = 800
	}
	strict := false
	for round := range rounds {
		var batch [2][][]byte
		for range 16 {
			side := rng.IntN(2)
			var b []byte
			if n := len(pending[side]); n > 0 && rng.IntN(4) > 0 {
				b = slices.Clone(pending[side][rng.IntN(n)])
			} else {
				b = start(side == 1)
			}
			if rng.IntN(8) == 0 {
				b = damage(rng, b)
			}
			batch[side] = append(batch[side], b)
		}
		var frames [2][][]byte
		for _, b := range batch[1] {
			mac, to := hostMAC, ourMAC
			switch rng.IntN(50) {
			case 0:
				mac = [6]byte{2, 0, 0, 0, 0, 66}
			case 1:
				to = [6]byte{2, 0, 0, 0, 0, 67}
			case 2:
				to = [6]byte{1, 0, 0x5e, 0, 0, 1}
			}
			h := ethernetHeader(to, mac, len(b) > 0 && b[0]>>4 == 6)
			f := append(h[:], b...)
			frames[0], frames[1] = append(frames[0], f), append(frames[1], slices.Clone(f))
		}
		fast.feed(batch[0], nil)
		slow.slowVPC(batch[0])
		network := uint64(testNet)
		if rng.IntN(50) == 0 {
			network = otherNet
		}
		fast.e.Deliver(network, frames[0])
		slow.slowDeliver(network, frames[1])
		out, vpc := fast.takeRaw()
		wantOut, wantVPC := slow.takeRaw()
		compare(t, round, "overlay", out, wantOut)
		compare(t, round, "VPC", vpc, wantVPC)
		if t.Failed() {
			return
		}
		for side, list := range [2][][]byte{vpc, out} { // who got something answers
			for _, b := range list {
				if a := answer(rng, b); a != nil {
					pending[side] = append(pending[side], a)
				}
			}
			pending[side] = pending[side][max(0, len(pending[side])-60):]
		}
		d := time.Duration(rng.IntN(100)) * time.Millisecond
		switch rng.IntN(200) {
		case 0:
			d = 6 * 24 * time.Hour
		case 1, 2, 3:
			d = time.Duration(rng.IntN(400)) * time.Second
		case 4:
			setMTU(1300 + rng.IntN(1500))
		}
		for _, r := range []*rig{fast, slow} {
			if r.now = r.now.Add(d); round%2 == 0 { // else flows that are over are still there
				r.sleep(0)
			}
		}
		if rng.IntN(100) == 0 {
			strict = !strict
			var rules []policy.Rule
			if strict {
				rules = []policy.Rule{{Action: policy.Drop, Proto: ipkt.UDP, From: []netip.Prefix{netip.MustParsePrefix("172.31.0.11/32")}}}
			}
			for _, r := range []*rig{fast, slow} {
				r.e.SetPolicy(policy.New(policy.Accept, rules))
			}
		}
		if round%20 != 0 {
			continue
		}
		if got, want := fast.state(), slow.state(); got != want {
			t.Fatalf("round %d: state\n%s\nwant\n%s", round, got, want)
		}
	}
	if hits := fast.e.stats.hits.Load(); hits < uint64(rounds) {
		t.Errorf("only %d packets of established flows", hits)
	}
	fast.drain() // fragments
	fast.account()
}

func compare(t *testing.T, round int, what string, got, want [][]byte) {
	t.Helper()
	if !slices.EqualFunc(got, want, bytes.Equal) {
		t.Errorf("round %d: to the %s went", round, what)
		for _, b := range got {
			t.Errorf("  %s %x", pkttest.Describe(b), b)
		}
		t.Error("instead of")
		for _, b := range want {
			t.Errorf("  %s %x", pkttest.Describe(b), b)
		}
	}
}

// state is everything that can be seen of an engine.
func (r *rig) state() string {
	var b bytes.Buffer
	s := &r.e.stats
	for side := range numSides {
		for dir := range numDirections {
			fmt.Fprintln(&b, sideNames[side], directionNames[dir], s.traffic[side][dir].packets.Load(), s.traffic[side][dir].bytes.Load())
		}
		for _, d := range allDrops {
			if n := s.drops[side][d].Load(); n > 0 {
				fmt.Fprintln(&b, sideNames[side], d, n)
			}
		}
	}
	fmt.Fprintln(&b, "hits", s.hits.Load(), "misses", s.misses.Load())
	for i := range numClasses {
		for _, f := range []*pathCounters{&s.vpc, r.e.set.Load().attachments[testNet].fwd} {
			fmt.Fprint(&b, f.t[i].packets.Load(), " ", f.t[i].bytes.Load(), " ")
		}
	}
	fmt.Fprintln(&b)
	for _, f := range r.e.Flows(FlowFilter{}) {
		fmt.Fprintf(&b, "%+v\n", f)
	}
	return b.String()
}
