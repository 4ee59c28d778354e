package netstack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
	"ztgate/netstack/policy"
)

func TestMasquerade(t *testing.T) {
	r := newRig(t)
	o, v := r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "question"))
	r.want("out", o, "udp 10.0.0.1:4000 > 10.0.0.10:53")
	r.want("back to the sender", v)
	_, v = r.fromOverlay(pkttest.UDP("10.0.0.10:53", "10.0.0.1:4000", "answer"))
	r.want("reply", v, "udp 10.0.0.10:53 > 172.31.0.10:4000")
	// The other client with the same port gets another one.
	o, _ = r.fromVPC(pkttest.UDP("172.31.0.11:4000", "10.0.0.10:53", "question"))
	if len(o) != 1 || o[0] == "udp 10.0.0.1:4000 > 10.0.0.10:53" {
		t.Errorf("second client left as %q", o)
	}
}

func TestEcho(t *testing.T) {
	r := newRig(t)
	o, _ := r.fromVPC(pkttest.Echo("172.31.0.10", "10.0.0.10", false, 77, "x"))
	r.want("request", o, "icmp 8/0 10.0.0.1 > 10.0.0.10 id 77")
	_, v := r.fromOverlay(pkttest.Echo("10.0.0.10", "10.0.0.1", true, 77, "x"))
	r.want("reply", v, "icmp 0/0 10.0.0.10 > 172.31.0.10 id 77")
	_, v = r.fromOverlay(pkttest.Echo("10.0.0.11", "10.0.0.1", true, 77, "x"))
	r.want("L-PING-UNSOL: reply of another host", v)
}

func TestIPv6Routed(t *testing.T) {
	r := newRig(t)
	o, _ := r.fromVPC(pkttest.UDP("[fd77:1::50]:4000", "[fd77:100::50]:53", "question"))
	r.want("V6-NONAT", o, "udp [fd77:1::50]:4000 > [fd77:100::50]:53")
	_, v := r.fromOverlay(pkttest.UDP("[fd77:100::50]:53", "[fd77:1::50]:4000", "answer"))
	r.want("reply", v, "udp [fd77:100::50]:53 > [fd77:1::50]:4000")
	_, v = r.fromOverlay(pkttest.UDP("[fd77:100::50]:54", "[fd77:1::50]:4000", "unasked"))
	r.want("6092-a: unsolicited", v)
}

func TestTimeExceeded(t *testing.T) {
	r := newRig(t)
	o, v := r.fromVPC(pkttest.Packet{Src: pkttest.Addr("172.31.0.10:4000"), Dst: pkttest.Addr("10.0.0.10:53"), TTL: 1}.Bytes())
	r.want("1812-5.3.1: forwarded", o)
	if n := r.drops(VPCSide, dropTTL); n != 1 {
		t.Errorf("%d drops counted, want 1", n)
	}
	r.want("1812-5.3.1: error", v, "icmp 11/0 172.31.0.1 > 172.31.0.10 [17 172.31.0.10:4000 > 10.0.0.10:53]")
	r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "question"))
	o, _ = r.fromOverlay(pkttest.Packet{Src: pkttest.Addr("10.0.0.10:53"), Dst: pkttest.Addr("10.0.0.1:4000"), TTL: 1}.Bytes())
	r.want("inbound: no inside address", o, "icmp 11/0 10.0.0.1 > 10.0.0.10 [17 10.0.0.10:53 > 10.0.0.1:4000]")
}

func TestUnresolvedNeighbour(t *testing.T) {
	r := newRig(t)
	r.overlay.silent[pkttest.Addr("10.0.0.66").Addr()] = true
	o, v := r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.66:53", "x"))
	r.want("out", o)
	for range 10 {
		r.sleep(time.Second)
		_, more := r.take()
		v = append(v, more...)
	}
	r.want("1812-5.2.7.1: host unreachable", v, "icmp 3/1 172.31.0.1 > 172.31.0.10 [17 172.31.0.10:4000 > 10.0.0.66:53]")
}

func TestErrorFromOverlay(t *testing.T) {
	r := newRig(t)
	for _, proto := range []uint8{ipkt.UDP, ipkt.TCP} {
		out := pkttest.Packet{Proto: proto, Flags: ipkt.SYN, Src: pkttest.Addr("172.31.0.10:4000"), Dst: pkttest.Addr("10.9.0.10:53")}.Bytes()
		r.fromVPC(out)
		seen := pkttest.Packet{Proto: proto, Flags: ipkt.SYN, Src: pkttest.Addr("10.0.0.1:4000"), Dst: pkttest.Addr("10.9.0.10:53"), TTL: 1}.Bytes()
		_, v := r.fromOverlay(pkttest.ICMPError("10.0.0.2", "10.0.0.1", 11, 0, 0, seen, 28))
		name := map[uint8]string{ipkt.UDP: "17", ipkt.TCP: "6"}[proto]
		r.want("4787-REQ-12a, 5382-REQ-9", v, "icmp 11/0 10.0.0.2 > 172.31.0.10 ["+name+" 172.31.0.10:4000 > 10.9.0.10:53]")
	}
	r.fromVPC(pkttest.Echo("172.31.0.10", "10.9.0.10", false, 77, "x"))
	_, v := r.fromOverlay(pkttest.ICMPError("10.0.0.2", "10.0.0.1", 11, 0, 0, pkttest.Echo("10.0.0.1", "10.9.0.10", false, 77, "x"), 100))
	r.want("L-TRACE-ICMP", v, "icmp 11/0 10.0.0.2 > 172.31.0.10 [1 172.31.0.10 > 10.9.0.10 id 77]")
}

// TestLocalPorts: the gateway's own connections work, and nobody else gets an
// answer from its ports.
func TestLocalPorts(t *testing.T) {
	r := newRig(t)
	for _, flags := range []uint8{ipkt.SYN, ipkt.ACK, ipkt.FIN | ipkt.ACK} {
		o, v := r.fromOverlay(pkttest.TCP("10.0.0.10:5555", "10.0.0.1:61000", flags, 1, 1, ""))
		r.want("LF-26", v)
		if flags == ipkt.FIN|ipkt.ACK { // of a connection that is over
			r.want("LF-26", o, "tcp 10.0.0.1:61000 > 10.0.0.10:5555")
		} else {
			r.want("LF-26", o)
		}
	}
	if n := r.drops(OverlaySide, dropNoFlow); n != 3 {
		t.Errorf("%d drops counted, want 3", n)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.e.Run(ctx) }()
	dialed := make(chan error, 1)
	go func() {
		c, err := r.e.DialTCP(ctx, pkttest.Addr("10.0.0.10:443"))
		if err == nil {
			err = c.Close()
		}
		dialed <- err
	}()
	var syn ipkt.View
	for syn.Proto != ipkt.TCP { // until the stack has sent it
		o, _ := r.takeRaw()
		if len(o) > 0 {
			ipkt.Parse(o[0], &syn)
		}
		runtime.Gosched()
	}
	seq := binary.BigEndian.Uint32(syn.B[syn.L4+4:])
	h := ethernetHeader(ourMAC, hostMAC, false)
	r.e.Deliver(testNet, [][]byte{append(h[:], pkttest.TCP("10.0.0.10:443", fmt.Sprintf("10.0.0.1:%d", syn.SPort), ipkt.SYN|ipkt.ACK, 1, seq+1, "")...)})
	if err := <-dialed; err != nil {
		t.Errorf("dial: %v", err)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestLocalSource: of several addresses on a network the one next to the
// destination is spoken from.
func TestLocalSource(t *testing.T) {
	at := &attachment{v4: netip.MustParseAddr("10.0.0.1"), v6: netip.MustParseAddr("fd00::1"), Network: Network{Addresses: []netip.Prefix{
		netip.MustParsePrefix("fd00::1/88"), netip.MustParsePrefix("fc00:1::1/40"), netip.MustParsePrefix("10.0.0.1/24"), netip.MustParsePrefix("10.1.0.1/24"),
	}}}
	for dst, want := range map[string]string{
		"fd00::2": "fd00::1", "fc00:1:2::1": "fc00:1::1", "2001:db8::1": "fd00::1",
		"10.0.0.9": "10.0.0.1", "10.1.0.9": "10.1.0.1", "192.0.2.1": "10.0.0.1",
	} {
		if got := at.source(netip.MustParseAddr(dst)); got.String() != want {
			t.Errorf("to %s from %s, want %s", dst, got, want)
		}
	}
}

// TestRun moves a packet through the running engine.
func TestRun(t *testing.T) {
	r := newRig(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.e.Run(ctx) }()
	r.dev.feed <- [][]byte{pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "question")}
	r.dev.feed <- [][]byte{pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "question")} // the first batch is done when this one is read
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if o, _ := r.take(); len(o) == 0 {
		t.Error("nothing came out")
	}
}

// TestNothingChanges: settings that are in force already aren't put into force again, as
// that would take all flows off the fast path. What failed is.
func TestNothingChanges(t *testing.T) {
	r := newRig(t)
	was := r.e.set.Load()
	again := func() {
		t.Helper()
		if err := errors.Join(r.e.SetNetworks([]Network{testNetwork()}), r.e.SetTranslation(nil, nil)); err != nil {
			t.Fatal(err)
		}
	}
	if again(); r.e.set.Load() != was {
		t.Error("the same settings made another snapshot")
	}
	broken := testNetwork()
	broken.MTU = 10
	if err := r.e.SetNetworks([]Network{broken}); err == nil {
		t.Fatal("an MTU of 10 was taken")
	}
	if again(); r.e.set.Load() == was {
		t.Error("after a failure the settings weren't put into force again")
	}
	was = r.e.set.Load()
	other := testNetwork()
	other.Routes[0].Via = netip.MustParseAddr("10.0.0.3")
	if err := r.e.SetNetworks([]Network{other}); err != nil || r.e.set.Load() == was {
		t.Errorf("another next hop made no other snapshot: %v", err)
	}
}

// TestConcurrentEngine moves packets both ways while everything else changes.
func TestConcurrentEngine(t *testing.T) {
	r := newRig(t)
	r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "x")) // resolves the neighbour
	const rounds = 300
	var wg sync.WaitGroup
	out := make([][]byte, 32)
	for i := range out {
		out[i] = pkttest.TCP(fmt.Sprintf("172.31.0.10:%d", 5000+i), "10.0.0.10:80", ipkt.SYN, 1, 0, "")
	}
	wg.Go(func() {
		for range rounds {
			bufs, sizes := make([][]byte, len(out)), make([]int, len(out))
			for i, p := range out {
				bufs[i] = make([]byte, vpcOffset+len(p))
				sizes[i] = copy(bufs[i][vpcOffset:], p)
			}
			r.e.vpcBatch(bufs, sizes)
		}
	})
	for w := range 2 {
		wg.Go(func() {
			h := ethernetHeader(ourMAC, hostMAC, false)
			for i := range rounds * 10 {
				b := pkttest.TCP("10.0.0.10:80", fmt.Sprintf("10.0.0.1:%d", 5000+(i+w)%32), ipkt.SYN|ipkt.ACK, 1, 2, "")
				r.e.Deliver(testNet, [][]byte{append(h[:], b...)})
			}
		})
	}
	wg.Go(func() {
		for i := range rounds {
			n := testNetwork()
			n.MTU -= i % 2
			if err := r.e.SetNetworks([]Network{n}); err != nil {
				t.Error(err)
			}
			r.e.SetPolicy(policy.New(policy.Accept, nil))
			r.e.Flows(FlowFilter{})
			r.e.Explain(Question{Protocol: 6, Src: pkttest.Addr("172.31.0.10:5000"), Dst: pkttest.Addr("10.0.0.10:80")})
			r.e.tick(r.e.clock())
		}
	})
	wg.Wait()
	r.drain()
	r.account()
}
