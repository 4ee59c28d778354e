package vl1_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
)

// narrow makes the way between the leaves, or one direction of it, lose datagrams above
// a size without a word.
func (n *internet) narrow(size int, forward, back bool) {
	a, b := leafAt(nil, "8.0.0.1")[0].Addr(), leafAt(nil, "8.0.0.2")[0].Addr()
	n.Drop = func(from, to netip.AddrPort, d []byte) bool {
		return len(d) > size && (forward && from.Addr() == a && to.Addr() == b || back && from.Addr() == b && to.Addr() == a)
	}
}

// mtu returns what a node says of the path to another.
func mtu(from, to *host) int {
	for _, p := range from.core.Peers() {
		for _, pa := range p.Paths {
			if p.Address == to.id.Address() && pa.Preferred {
				return pa.MTU
			}
		}
	}
	return 0
}

// stream sends large packets one way, one every 10 ms, and returns the longest time
// without one that arrived.
func (n *internet) stream(from, to *host, size int, d time.Duration) (gap time.Duration) {
	last := n.Now
	for end := n.Now.Add(d); n.Now.Before(end); {
		got := to.got
		from.send(n.Net, to, size)
		n.Run(10 * time.Millisecond)
		if to.got > got {
			last = n.Now
		}
		gap = max(gap, n.Now.Sub(last))
	}
	return gap
}

// A path that loses large datagrams is no trouble from the start, and its size is found
// to within the steps of the search.
func TestPathSizeFromStart(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1500, 1441, 1440, 1432, 1425, 1400, 1372, 1300, 1252, 1209, 1200, 1100, 972, 600, 548} {
		for name, way := range map[string][2]bool{"both": {true, true}, "forward": {true, false}, "back": {false, true}} {
			t.Run(fmt.Sprintf("%d %s", size, name), func(t *testing.T) {
				t.Parallel()
				n := newInternet(t, 1, nats{})
				n.narrow(size, way[0], way[1])
				n.connect(t, 35*time.Second)
				n.Run(6 * time.Second)
				for _, h := range [][2]*host{{n.a, n.b}, {n.b, n.a}} {
					for _, frame := range []int{1350, 1404, 2800} {
						if gap := n.stream(h[0], h[1], frame, time.Second); gap > 60*time.Millisecond {
							t.Errorf("packets of %d bytes: none arrived for %v", frame, gap)
						}
					}
					got := mtu(h[0], h[1])
					if most := min(size, packet.DefaultMTU); got > most || got < most*80/100 {
						t.Errorf("%d bytes found, %d possible", got, size)
					}
				}
			})
		}
	}
}

// A path becomes narrow under traffic, and wide again.
func TestPathSizeChanges(t *testing.T) {
	t.Parallel()
	for name, way := range map[string][2]bool{"both": {true, true}, "forward": {true, false}} {
		for _, size := range []int{1400, 1250, 1150, 560} {
			t.Run(fmt.Sprintf("%d %s", size, name), func(t *testing.T) {
				t.Parallel()
				n := newInternet(t, 1, nats{})
				n.connect(t, 35*time.Second)
				if n.stream(n.a, n.b, 1400, 5*time.Second); mtu(n.a, n.b) != packet.DefaultMTU {
					t.Fatalf("%d bytes found", mtu(n.a, n.b))
				}
				n.narrow(size, way[0], way[1])
				gap := n.stream(n.a, n.b, 1400, 10*time.Second)
				t.Logf("no packet for %v, then %d bytes", gap, mtu(n.a, n.b))
				if gap > 2*time.Second {
					t.Errorf("no packet arrived for %v", gap)
				}
				if got := mtu(n.a, n.b); got > size || got < size*80/100 {
					t.Errorf("%d bytes found, %d possible", got, size)
				}
				if holes := n.a.core.Stats().BlackHoles; holes != 1 {
					t.Errorf("%d black holes counted, want 1", holes)
				}
				n.Drop = nil
				if gap := n.stream(n.a, n.b, 1400, time.Minute); gap > 50*time.Millisecond {
					t.Errorf("no packet arrived for %v while the path was good", gap)
				}
				if got := mtu(n.a, n.b); got != packet.DefaultMTU {
					t.Errorf("%d bytes a minute after the path got wide again", got)
				}
			})
		}
	}
}

// Slow traffic finds a black hole too, and a path that changes while it is idle is
// asked again when it is used.
func TestPathSizeOfSlowTraffic(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	n.connect(t, 35*time.Second)
	n.Run(5 * time.Second)
	n.narrow(1300, true, true)
	n.Run(time.Minute)
	if gap := n.stream(n.a, n.b, 1400, 3*time.Second); gap > 1200*time.Millisecond {
		t.Errorf("no packet arrived for %v after silence", gap)
	}
	n.narrow(1210, true, true)
	arrived := 0
	for range 20 {
		got := n.b.got
		n.a.send(n.Net, n.b, 1300)
		n.Run(time.Second)
		arrived += n.b.got - got
	}
	if arrived < 8 {
		t.Errorf("%d of 20 packets, one a second, arrived", arrived)
	}
}

// Lost datagrams are no black hole for long.
func TestPathSizeUnderLoss(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	n.connect(t, 35*time.Second)
	random := rand.New(rand.NewPCG(1, 2))
	n.Drop = func(netip.AddrPort, netip.AddrPort, []byte) bool { return random.IntN(20) == 0 }
	full := 0
	for range 300 {
		n.stream(n.a, n.b, 1400, time.Second)
		if mtu(n.a, n.b) == packet.DefaultMTU {
			full++
		}
	}
	t.Logf("full size for %d of 300 s with 5 %% of all datagrams lost, %d black holes", full, n.a.core.Stats().BlackHoles)
	if full < 200 {
		t.Errorf("full size for %d of 300 s only", full)
	}
}

// Probes are few beside what they serve, and none for who isn't a member and gets
// nothing.
func TestPathSizeProbesAreFew(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	n.connect(t, 35*time.Second)
	n.Run(5 * time.Second)
	var data, probes int
	n.Seen = func(_, _ netip.AddrPort, d []byte) {
		switch {
		case len(d) == packet.HeaderLen+1390:
			data += len(d)
		case len(d) > 1300:
			probes += len(d)
		}
	}
	n.stream(n.a, n.b, 1390, time.Minute)
	if probes == 0 || probes*25 > data {
		t.Errorf("%d bytes of probes for %d bytes of data", probes, data)
	}
	n.Run(30 * time.Second)
	probes = 0
	n.Run(time.Hour)
	if probes > 3000 { // one exchange, on a path that is new
		t.Errorf("%d bytes of probes on idle paths", probes)
	}
}

// What is relayed uses the path to the root.
func TestPathSizeOfRelay(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{mapping(0), mapping(0)})
	n.online(t)
	n.Drop = func(from, to netip.AddrPort, d []byte) bool {
		direct := from.Addr() != rootEndpoint.Addr() && to.Addr() != rootEndpoint.Addr()
		return direct || len(d) > 1350
	}
	n.stream(n.a, n.b, 1400, 5*time.Second)
	if n.direct() {
		t.Fatal("direct")
	}
	if gap := n.stream(n.a, n.b, 1400, 5*time.Second); gap > 100*time.Millisecond {
		t.Errorf("no packet arrived for %v", gap)
	}
	s := n.a.core.Stats()
	if s.RelayBytes[1] < 300*1400 || s.DirectBytes[1] > s.RelayBytes[1] {
		t.Errorf("bytes sent: %d direct, %d relayed", s.DirectBytes[1], s.RelayBytes[1])
	}
	if b := n.b.core.Stats(); b.RelayBytes[0] < 300*1400 {
		t.Errorf("%d relayed bytes received", b.RelayBytes[0])
	}
}

// The operator's word is the most that is tried, above and below the usual size.
func TestPathSizeConfigured(t *testing.T) {
	t.Parallel()
	for most, want := range map[int]int{510: 510, 1300: 1300, 1432: 1432, 8900: 8900, 10324: packet.MaxPacket - 9} {
		n := newInternet(t, 1, nats{})
		n.online(t)
		n.Detach(n.a.port)
		var log bytes.Buffer
		n.a = newHostWith(t, n.Net, nil, n.ids[1], func(c *vl1.Config) {
			c.Planet, c.Logger = n.planet, slog.New(slog.NewTextHandler(&log, nil))
			c.Physical = []vl1.PhysicalNetwork{{Prefix: netip.MustParsePrefix("8.0.0.0/24"), MTU: most}}
		}, leafAt(nil, "8.0.0.1")...)
		n.connect(t, 35*time.Second)
		n.stream(n.a, n.b, 2800, 4*time.Second)
		biggest := 0
		n.Seen = func(from, _ netip.AddrPort, d []byte) {
			if from.Addr() == leafAt(nil, "8.0.0.1")[0].Addr() {
				biggest = max(biggest, len(d))
			}
		}
		n.stream(n.a, n.b, 2800, time.Second)
		n.Run(time.Second)
		if got := mtu(n.a, n.b); got != want || biggest > max(want, 600) {
			t.Errorf("configured %d: %d bytes found, want %d; datagrams of %d bytes", most, got, want, biggest)
		}
		if l := n.a.core.PacketLimit(n.b.id.Address()); l > packet.MaxPacket || packet.Datagrams(l, want) > packet.MaxFragments {
			t.Errorf("configured %d: packets of %d bytes", most, l)
		}
		// What no receiver would put together isn't sent.
		if most == 510 {
			log.Reset()
			got, long := n.b.got, n.a.core.Stats().RejectedBy(vl1.RejectTooLong)
			n.a.send(n.Net, n.b, 4000)
			n.Run(time.Second)
			if n.b.got != got || n.a.core.Stats().RejectedBy(vl1.RejectTooLong) != long+1 {
				t.Error("a packet of 4000 bytes was sent in datagrams of 510")
			}
			n.a.send(n.Net, n.b, 4000)
			if got := strings.Count(log.String(), "too long for a path"); got != 1 {
				t.Errorf("logged %d times", got)
			}
		}
	}
}

// Who isn't a member and gets nothing large isn't asked.
func TestPathSizeOfStrangers(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	n.Seen = func(from, to netip.AddrPort, d []byte) {
		if len(d) > 300 {
			t.Errorf("%d bytes from %v to %v", len(d), from, to)
		}
	}
	n.online(t)
	n.Run(5 * time.Minute)
}

// An answer counts if it came from where the question went, and only then.
func TestPathSizeAnswers(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	a, b := n.a.port.Endpoints()[0], n.b.port.Endpoints()[0]
	elsewhere := 0
	n.Drop = func(from, to netip.AddrPort, d []byte) bool {
		lost := len(d) > 1400 && from.Addr() == b.Addr()
		if lost && to == a {
			n.Inject(ap("66.0.0.1:1"), a, d)
			elsewhere++
		}
		return lost
	}
	n.connect(t, 35*time.Second)
	n.stream(n.a, n.b, 1390, 5*time.Second)
	if got := mtu(n.a, n.b); got == 0 || got > 1400 || elsewhere < 2 {
		t.Errorf("%d bytes found, %d answers came from elsewhere", got, elsewhere)
	}
}
