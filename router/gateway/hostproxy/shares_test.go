package hostproxy

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/config"
)

// holder makes entries of clients that are numbered.
func holder(client int) *entry {
	return &entry{client: clientOf(netip.AddrFrom4([4]byte{10, 0, byte(client >> 8), byte(client)}))}
}

func TestClientOf(t *testing.T) {
	for a, want := range map[string]string{
		"172.31.0.10": "172.31.0.10/32", "::ffff:172.31.0.10": "172.31.0.10/32",
		"fd00::1:2:3:4": "fd00::/64", "fe80::1%eth0": "fe80::/64",
	} {
		if got := clientOf(netip.MustParseAddr(a)).prefix; got.String() != want {
			t.Errorf("%s is client %s, want %s", a, got, want)
		}
	}
}

func TestShares(t *testing.T) {
	const all = 2048
	fill := func(t *testing.T, s *shares, client, n int, now time.Duration) (got int) {
		t.Helper()
		for range n {
			e := holder(client)
			e.touch(now)
			if _, ok := s.admit(e, now); ok {
				got++
			}
		}
		return got
	}
	t.Run("one client", func(t *testing.T) {
		s := newShares(all, fairShare(all))
		if n := fill(t, s, 1, 4200, 0); n != all/clientShare {
			t.Errorf("one client holds %d, want %d", n, all/clientShare)
		}
		if n := fill(t, s, 2, 1, 0); n != 1 {
			t.Error("another client is refused")
		}
		// Later one that is idle gives way to a new one.
		if n := fill(t, s, 1, 1, spareAfter); n != 1 || s.held[holder(1).client] != all/clientShare {
			t.Errorf("%d of a client's new ones admitted, %d held", n, s.held[holder(1).client])
		}
	})
	t.Run("many clients", func(t *testing.T) {
		s := newShares(all, fairShare(all))
		for client := range clientShare {
			fill(t, s, client, all, 0)
		}
		if len(s.open) != all {
			t.Fatalf("%d are open", len(s.open))
		}
		// All is taken: a new client gets as much as the others keep.
		if n := fill(t, s, 100, all, 1); n < all/(clientShare+1) {
			t.Errorf("a new client gets %d, want its share of %d", n, all/(clientShare+1))
		}
		for client, n := range s.held {
			if n < all/(clientShare+1) || n > all/(clientShare+1)+1 {
				t.Errorf("%v holds %d", client, n)
			}
		}
		if len(s.open) != all {
			t.Errorf("%d are open", len(s.open))
		}
	})
	t.Run("everybody has one", func(t *testing.T) {
		s := newShares(all, fairShare(all))
		for client := range all {
			fill(t, s, client, 1, 0)
		}
		if n := fill(t, s, 5000, 1, 0); n != 0 {
			t.Error("somebody's only one gave way")
		}
	})
	t.Run("the unanswered first", func(t *testing.T) {
		s := newShares(2, 2)
		old, fresh := holder(1), holder(1)
		old.answered.Store(true)
		fresh.touch(time.Minute)
		s.admit(old, 0)
		s.admit(fresh, time.Minute)
		if gone, ok := s.admit(holder(2), time.Minute); !ok || gone != fresh {
			t.Errorf("%v gave way, %v", gone, ok)
		}
	})
}

func TestBlame(t *testing.T) {
	b := blame{}
	for client := range 1000 {
		b.add(holder(client).client.prefix)
	}
	for range 500 {
		b.add(holder(7).client.prefix)
	}
	if list := b.list(); len(list) != maxBlamed || list[0].Client != holder(7).client.prefix || list[0].Count < 500 {
		t.Errorf("%d clients, first %v", len(list), list[0])
	}
}

// TestOneClientTakesAll: whatever one client opens, another one is served.
func TestOneClientTakesAll(t *testing.T) {
	greedy, other := netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.3")
	b := newBetween(t, loopbacks["IPv4"], Limits{Connections: 256})
	hosts := make(chan net.Conn, 256)
	go func() {
		defer close(hosts)
		for {
			c, err := b.host.Accept()
			if err != nil {
				return
			}
			hosts <- c
		}
	}()
	t.Cleanup(func() {
		_ = b.host.Close()
		for c := range hosts {
			_ = c.Close()
		}
	})
	share := fairShare(256)
	for i := range share {
		b.dial(t, greedy)
		hosts <- <-hosts
		testwait.For(t, patience, "connection", func() bool {
			b.mu.Lock()
			defer b.mu.Unlock()
			return len(b.tcp.open) == i+1 && len(b.dials.open) == 0
		})
	}
	for range 3 {
		b.refused(t, greedy)
	}
	testwait.For(t, patience, "the count", func() bool { return b.results(t, "tcp", relayLimit) == 3 })
	if list := b.Refused(); len(list) != 1 || list[0] != (Refused{netip.PrefixFrom(greedy, 32), 3}) {
		t.Errorf("refused: %v", list)
	}
	c := b.dial(t, other)
	testwait.For(t, time.Second, "another client's connection", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.tcp.held[clientOf(other)] == 1
	})
	_ = c.Close()
}

// TestSilentHost: connections to a host that doesn't answer hold few places.
func TestSilentHost(t *testing.T) {
	b := newBetween(t, loopbacks["IPv4"], Limits{Connections: 256})
	b.plane.silent.Store(true)
	each := b.dials.each
	if each >= b.tcp.each {
		t.Fatalf("%d of %d connections may wait", each, b.tcp.each)
	}
	for range each {
		b.dial(t, netip.MustParseAddr("127.0.0.2"))
	}
	testwait.For(t, patience, "the dials", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.dials.open) == each
	})
	b.refused(t, netip.MustParseAddr("127.0.0.2"))
	b.dial(t, netip.MustParseAddr("127.0.0.3"))
	testwait.For(t, patience, "the other client's dial", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.dials.open) == each+1
	})
}

// TestManySessions: the sessions of one client leave room for those of others, and
// those that nobody answers end soon.
func TestManySessions(t *testing.T) {
	b := newBetween(t, loopbacks["IPv4"], Limits{PerClient: 8})
	host, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	b.plane.to = host.LocalAddr().String()
	if err := b.Set([]config.Forward{{Proto: "udp", Side: config.SideVPC, Listen: b.at, To: netip.MustParseAddrPort("10.0.0.10:53")}}); err != nil {
		t.Fatal(err)
	}
	ask := func(from string) *net.UDPConn {
		c, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.ParseIP(from)}, net.UDPAddrFromAddrPort(b.at))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		if _, err := c.Write([]byte("?")); err != nil {
			t.Fatal(err)
		}
		return c
	}
	for range 12 {
		ask("127.0.0.2")
	}
	last := ask("127.0.0.3")
	buf := make([]byte, 100)
	_ = host.SetReadDeadline(time.Now().Add(patience))
	var from netip.AddrPort
	for range 9 {
		if _, from, err = host.ReadFromUDPAddrPort(buf); err != nil {
			t.Fatal(err)
		}
	}
	if n := b.results(t, "udp", relayLimit); n != 4 {
		t.Errorf("%v refused, want 4", n)
	}
	if _, err := host.WriteToUDPAddrPort([]byte("!"), from); err != nil {
		t.Fatal(err)
	}
	_ = last.SetReadDeadline(time.Now().Add(patience))
	if _, err := last.Read(buf); err != nil {
		t.Fatal(err)
	}
	b.expire(b.now() + unanswered + time.Second)
	testwait.For(t, patience, "the end of unanswered sessions", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.udp.open) == 1
	})
	b.expire(b.now() + DefaultIdleUDP + time.Second)
	if n := b.results(t, "udp", relayOK); n != 9 {
		t.Errorf("%v sessions ended, want 9", n)
	}
}

func BenchmarkPipe(bm *testing.B) {
	for _, size := range []int{1 << 10, 64 << 10} {
		bm.Run(fmt.Sprint(size), func(bm *testing.B) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				bm.Fatal(err)
			}
			defer l.Close()
			pair := func() (net.Conn, net.Conn) {
				a, err := net.Dial("tcp", l.Addr().String())
				if err != nil {
					bm.Fatal(err)
				}
				b, err := l.Accept()
				if err != nil {
					bm.Fatal(err)
				}
				return a, b
			}
			client, in := pair()
			out, host := pair()
			r := &Proxy{start: time.Now(), streams: newBuffers(streamBuffer)}
			c := &conn{r: r}
			go func() { _ = c.pipe(out, in, &c.out) }()
			go func() {
				b := make([]byte, size)
				for range bm.N {
					if _, err := client.Write(b); err != nil {
						return
					}
				}
				_ = client.Close()
			}()
			bm.SetBytes(int64(size))
			bm.ReportAllocs()
			b := make([]byte, 256<<10)
			for {
				if _, err := host.Read(b); err != nil {
					return
				}
			}
		})
	}
}
