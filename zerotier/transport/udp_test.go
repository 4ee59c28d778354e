package transport

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ztgate/internal/testwait"

	"github.com/google/go-cmp/cmp"

	"ztgate/zerotier/ztnode"
)

var loopback = []netip.Addr{netip.MustParseAddr("127.0.0.1")}

func open(t testing.TB, cfg Config) *UDP {
	t.Helper()
	if cfg.Bind == nil {
		cfg.Bind = loopback
	}
	u, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	return u
}

// sink runs a UDP that keeps copies of what it receives, in order.
type sink struct {
	*UDP
	got     chan []byte
	batches atomic.Uint64
	froms   sync.Map
}

func newSink(t testing.TB, cfg Config) *sink {
	t.Helper()
	s := &sink{UDP: open(t, cfg), got: make(chan []byte, 1<<16)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- s.Run(ctx, func(_ int, _ SocketID, from netip.AddrPort, d []byte) {
			s.froms.Store(from, true)
			s.got <- bytes.Clone(d)
		}, func(int) { s.batches.Add(1) })
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s
}

func (s *sink) next(t testing.TB) []byte {
	t.Helper()
	select {
	case b := <-s.got:
		return b
	case <-time.After(10 * time.Second):
		t.Fatal("no datagram within 10 s")
		return nil
	}
}

func (s *sink) endpoint() netip.AddrPort { return s.LocalEndpoints()[0] }

// datagram makes a recognisable datagram of n >= 5 bytes.
func datagram(flow byte, i, n int) []byte {
	b := make([]byte, n)
	b[0] = flow
	binary.BigEndian.PutUint32(b[1:], uint32(i))
	for j := 5; j < n; j++ {
		b[j] = byte(i + j)
	}
	return b
}

func TestMixedSizesKeepOrder(t *testing.T) {
	for _, tt := range []struct {
		name     string
		tx, rx   bool // offload
		gso, gro bool
	}{
		{name: "both", tx: true, rx: true},
		{name: "no receive offload", tx: true},
		{name: "no send offload", rx: true},
		{name: "none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := newSink(t, Config{NoOffload: !tt.rx, NoSecondary: true})
			b := newSink(t, Config{NoOffload: !tt.rx, NoSecondary: true})
			u := open(t, Config{NoOffload: !tt.tx, NoSecondary: true})
			id := u.Sockets()[0].ID
			tx := u.NewSender()

			// Sizes as of split packets: equal, off by one, odd ones between; two
			// flows interleaved.
			sizes := []int{1432, 1432, 1432, 700, 1432, 1433, 1432, 1432, 60, 60, 1400, 1401, 5, 1432}
			want := map[byte][][]byte{}
			dst := map[byte]*sink{'a': a, 'b': b}
			const rounds = 40
			for i := range rounds * len(sizes) {
				flow := byte('a')
				if i%3 == 1 {
					flow = 'b'
				}
				d := datagram(flow, i, sizes[i%len(sizes)])
				want[flow] = append(want[flow], d)
				cut := min(16, len(d))
				tx.Send(id, dst[flow].endpoint(), d[:cut], d[cut:])
				if i%100 == 99 {
					tx.Flush()
				}
			}
			tx.Flush()
			for flow, list := range want {
				for i, w := range list {
					if got := dst[flow].next(t); !bytes.Equal(got, w) {
						t.Fatalf("flow %c datagram %d: got %d bytes %x..., want %d bytes %x...",
							flow, i, len(got), got[:5], len(w), w[:5])
					}
				}
			}
			st := u.Stats()
			if n := uint64(rounds * len(sizes)); st.Tx.Datagrams != n || st.Drops != [numDropReasons]uint64{} {
				t.Errorf("stats = %+v, want %d sent and no drops", st, n)
			}
			if tt.tx && u.Sockets()[0].GSO && st.Tx.Offloaded == 0 {
				t.Error("nothing was segmented by the kernel")
			}
			if !tt.tx && st.Tx.Offloaded != 0 {
				t.Error("segmented by the kernel with offload off")
			}
			if tt.tx && tt.rx && a.Sockets()[0].GRO && a.Stats().Rx.Offloaded == 0 {
				t.Error("nothing was received coalesced")
			}
		})
	}
}

func TestAllSocketsOfFamily(t *testing.T) {
	rx := newSink(t, Config{NoSecondary: true})
	u := open(t, Config{})
	tx := u.NewSender()
	tx.Send(0, rx.endpoint(), nil, []byte("hello"))
	tx.Send(12345, rx.endpoint(), nil, []byte("gone!")) // a socket that no longer exists
	tx.Flush()
	for range 4 {
		rx.next(t)
	}
	for _, ep := range u.LocalEndpoints() {
		if _, ok := rx.froms.Load(ep); !ok {
			t.Errorf("nothing was sent from %v", ep)
		}
	}
	tx.Send(0, netip.MustParseAddrPort("[2001:db8::1]:9993"), nil, []byte("no such family"))
	tx.Send(u.Sockets()[0].ID, netip.AddrPortFrom(loopback[0], 0), nil, []byte("no port"))
	tx.Send(u.Sockets()[0].ID, netip.AddrPort{}, nil, []byte("no address"))
	tx.Flush()
	if d := u.Stats().Drops; d[DropNoSocket] != 1 || d[DropAddress] != 2 {
		t.Errorf("drops = %v, want 1 no_socket and 2 address", d)
	}
}

func TestIPv6(t *testing.T) {
	u, err := Open(Config{Bind: []netip.Addr{netip.IPv6Loopback()}, NoSecondary: true})
	if err != nil {
		t.Skipf("no IPv6 on loopback: %v", err)
	}
	defer u.Close()
	rx := newSink(t, Config{Bind: []netip.Addr{netip.IPv6Loopback()}, NoSecondary: true})
	tx := u.NewSender()
	for i := range 10 {
		tx.Send(u.Sockets()[0].ID, rx.endpoint(), nil, datagram('a', i, 1000))
	}
	tx.Flush()
	for i := range 10 {
		if got := rx.next(t); !bytes.Equal(got, datagram('a', i, 1000)) {
			t.Fatalf("datagram %d differs", i)
		}
	}
	if _, ok := rx.froms.Load(u.LocalEndpoints()[0]); !ok {
		t.Errorf("sender isn't %v", u.LocalEndpoints()[0])
	}
}

func TestSendTTL(t *testing.T) {
	rx := newSink(t, Config{NoSecondary: true})
	u := open(t, Config{NoSecondary: true})
	id := u.Sockets()[0].ID
	tx := u.NewSender()
	tx.Send(id, rx.endpoint(), nil, []byte("aaaa"))
	tx.SendTTL(id, rx.endpoint(), []byte("bbbb"), 2)
	tx.Send(id, rx.endpoint(), nil, []byte("cccc"))
	tx.Flush()
	for _, want := range []string{"aaaa", "bbbb", "cccc"} {
		if got := string(rx.next(t)); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestPortInUse(t *testing.T) {
	u := open(t, Config{NoSecondary: true})
	_, err := Open(Config{Bind: loopback, Port: u.Ports()[0], NoSecondary: true})
	pe, ok := errors.AsType[*PortInUseError](err)
	if !ok || !errors.Is(err, ztnode.ErrPortInUse) || pe.Endpoint != u.LocalEndpoints()[0] {
		t.Errorf("Open on a taken port: %v, want a PortInUseError for %v", err, u.LocalEndpoints()[0])
	}
}

// The wanted secondary port is used unless it is taken, and left when asked to.
func TestWantSecondary(t *testing.T) {
	first := open(t, Config{})
	want := first.Ports()[1]
	if u := open(t, Config{WantSecondary: want}); u.Ports()[1] == want || u.Ports()[1] == 0 {
		t.Errorf("secondary port %d, want another than the taken %d", u.Ports()[1], want)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	u := open(t, Config{WantSecondary: want})
	if got := u.Ports()[1]; got != want {
		t.Errorf("secondary port %d, want %d", got, want)
	}
	if err := u.RebindSecondary(); err != nil || u.Ports()[1] == want {
		t.Errorf("moved to %d, %v", u.Ports()[1], err)
	}
}

func TestRebindSecondary(t *testing.T) {
	u := newSink(t, Config{})
	before := u.Ports()
	if err := u.RebindSecondary(); err != nil {
		t.Fatal(err)
	}
	after := u.Ports()
	if len(after) != 2 || after[0] != before[0] || after[1] == before[1] {
		t.Errorf("ports %v became %v, want the same primary and another secondary", before, after)
	}
	peer := open(t, Config{NoSecondary: true})
	tx := peer.NewSender()
	tx.Send(0, netip.AddrPortFrom(loopback[0], uint16(after[1])), nil, []byte("to the new port"))
	tx.Flush()
	u.next(t)
}

// The tertiary port is opened when it is asked for, and is another one if the wanted
// one is taken. Moving the secondary port leaves it alone.
func TestTertiary(t *testing.T) {
	u := newSink(t, Config{NoSecondary: true})
	if first, second, third := u.PortNumbers(); first == 0 || second != 0 || third != 0 {
		t.Errorf("ports %d, %d and %d, want the first alone", first, second, third)
	}
	taken := open(t, Config{NoSecondary: true}).Ports()[0]
	port, err := u.OpenTertiary(taken)
	if err != nil || port == taken || port == 0 {
		t.Fatalf("port %d, %v: want another than the taken %d", port, err, taken)
	}
	if again, err := u.OpenTertiary(taken); again != port || err != nil {
		t.Errorf("asked again: port %d, %v, want %d", again, err, port)
	}
	if err := u.RebindSecondary(); err != nil {
		t.Fatal(err)
	}
	if got := u.Ports(); len(got) != 2 || got[1] != port {
		t.Errorf("ports %v, want the tertiary %d", got, port)
	}
	tx := open(t, Config{NoSecondary: true}).NewSender()
	tx.Send(0, netip.AddrPortFrom(loopback[0], uint16(port)), nil, []byte("to the tertiary"))
	tx.Flush()
	u.next(t)

	v := open(t, Config{})
	if got, err := v.OpenTertiary(port); err != nil || got == port {
		t.Errorf("port %d, %v: want another than the taken %d", got, err, port)
	}
	if _, second, third := v.PortNumbers(); second == 0 || third == 0 || !slices.Contains(v.Ports(), third) {
		t.Errorf("ports %v, want three", v.Ports())
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := v.OpenTertiary(0); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestRunEnds(t *testing.T) {
	before := runtime.NumGoroutine()
	u, err := Open(Config{Exclude: func(string, netip.Addr) bool { return true }})
	if err != nil {
		t.Fatal(err)
	}
	v, err := Open(Config{Bind: loopback})
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range []*UDP{u, v} {
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(10*time.Millisecond, cancel)
		if err := u.Run(ctx, func(int, SocketID, netip.AddrPort, []byte) {}, func(int) {}); err != nil {
			t.Errorf("Run: %v", err)
		}
		if err := u.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
		tx := u.NewSender()
		tx.Send(0, netip.MustParseAddrPort("127.0.0.1:9"), nil, []byte("after close"))
		tx.Flush()
		if err := u.Run(context.Background(), nil, nil); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Run after Close: %v", err)
		}
	}
	testwait.Goroutines(t, before)
}

func TestInterfaceRules(t *testing.T) {
	for name, want := range map[string]bool{"lo": true, "zt0": true, "tun3": true, "tap0": true, "ztg0": true, "ztmabc": true, "eth0": false, "wlan0": false} {
		if got := excludedInterface(name); got != want {
			t.Errorf("excludedInterface(%q) = %v, want %v", name, got, want)
		}
	}
	got := map[string]bool{}
	for _, a := range []string{"127.0.0.1", "169.254.1.1", "fe80::2", "::1", "224.0.0.1", "0.0.0.0", "10.1.2.3", "100.64.0.1", "8.8.8.8", "2001:db8::1", "fd00::1", "203.0.113.9"} {
		got[a] = usable(netip.MustParseAddr(a))
	}
	want := map[string]bool{"127.0.0.1": false, "169.254.1.1": false, "fe80::2": false, "::1": false, "224.0.0.1": false, "0.0.0.0": false,
		"10.1.2.3": true, "100.64.0.1": true, "8.8.8.8": true, "2001:db8::1": true, "fd00::1": true, "203.0.113.9": true}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("usable (-want +got):\n%s", d)
	}
}
