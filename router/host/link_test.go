package host

import (
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"ztgate/internal/nettest"
	"ztgate/router/host/tuntap"
	"ztgate/zerotier/ztnode"
)

// inNamespace moves the test's thread into a network namespace of its own.
func inNamespace(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to make a network namespace")
	}
	if _, err := os.Stat(tuntap.Path); err != nil {
		t.Skip("needs " + tuntap.Path)
	}
	runtime.LockOSThread() // for ever: the thread ends with the test's goroutine
	old, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Skipf("make a network namespace: %v", err)
	}
	t.Cleanup(func() {
		_ = netns.Set(old)
		_ = ns.Close()
		_ = old.Close()
	})
}

var discard = slog.New(slog.DiscardHandler)

func routesOf(t *testing.T, k *Link) []string {
	t.Helper()
	list, err := k.ownRoutes()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, r := range list {
		s := r.Dst.String()
		if r.Src != nil {
			s += " src " + r.Src.String()
		}
		if r.Gw != nil {
			s += " via " + r.Gw.String()
		}
		out = append(out, s)
	}
	slices.Sort(out)
	return out
}

func TestKernelSetUp(t *testing.T) {
	inNamespace(t)
	dev, err := tuntap.OpenTUN("ztgt0", tuntap.Writev)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if _, err := tuntap.OpenTUN("ztgt0", tuntap.Writev); err == nil || !strings.Contains(err.Error(), "another process uses it") {
		t.Errorf("second open: %v", err)
	}
	k, err := OpenLink("ztgt0", discard)
	if err != nil {
		t.Fatal(err)
	}
	k.Quiet()
	for range 2 { // idempotent
		if err := k.Up(2800); err != nil {
			t.Fatal(err)
		}
		if err := k.SetAddresses(nettest.Prefixes("100.127.255.1/32", "fd00:9::1/128")); err != nil {
			t.Fatal(err)
		}
		if err := k.SetRoutes([]ztnode.Route{{Target: netip.MustParsePrefix("10.0.0.0/24"), Via: netip.MustParseAddr("10.147.17.9")},
			{Target: netip.MustParsePrefix("10.147.17.0/24")}, {Target: netip.MustParsePrefix("fd00:77::/64")},
			{Target: netip.MustParsePrefix("0.0.0.0/0")}}); err != nil {
			t.Fatal(err)
		}
		want := []string{"10.0.0.0/24 src 100.127.255.1", "10.147.17.0/24 src 100.127.255.1", "fd00:77::/64 src fd00:9::1"}
		if got := routesOf(t, k); !slices.Equal(got, want) {
			t.Errorf("routes %q, want %q", got, want)
		}
	}
	// Set down by somebody, and up again: the routes are back at once.
	if k.Toggled() {
		t.Error("toggled without reason")
	}
	for _, set := range []func(netlink.Link) error{k.nl.(*netlink.Handle).LinkSetDown, k.nl.LinkSetUp} {
		if err := set(k.l); err != nil {
			t.Fatal(err)
		}
		if !k.Toggled() || k.Toggled() {
			t.Error("a change of the interface isn't noticed once")
		}
	}
	if mtu, err := dev.MTU(); err != nil || mtu != 2800 {
		t.Errorf("MTU %d, %v", mtu, err)
	}
	if err := k.SetRoutes([]ztnode.Route{{Target: netip.MustParsePrefix("10.147.17.0/24")}}); err != nil {
		t.Fatal(err)
	}
	if got := routesOf(t, k); len(got) != 1 {
		t.Errorf("after a route went: %q", got)
	}
	// What a killed process leaves on an interface that outlives it.
	again, err := OpenLink("ztgt0", discard)
	if err != nil {
		t.Fatal(err)
	}
	if got := routesOf(t, again); len(got) != 0 {
		t.Errorf("left routes are not removed: %q", got)
	}
	again.Undo()
	addrs, err := k.nl.AddrList(k.l, netlink.FAMILY_V4)
	if err != nil || len(addrs) != 0 {
		t.Errorf("addresses after undo: %v, %v", addrs, err)
	}
	k.Undo()
}

// TestGuards: what a network reached goes nowhere else while the network is
// down, and after a kill.
func TestGuards(t *testing.T) {
	inNamespace(t)
	var links []*Link
	for _, name := range []string{"ztgt0", "ztgt1"} {
		dev, err := tuntap.OpenTUN(name, tuntap.Writev)
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		k, err := OpenLink(name, discard)
		if err != nil {
			t.Fatal(err)
		}
		links = append(links, k)
	}
	targets := func(list ...string) (out []ztnode.Route) {
		for _, p := range list {
			out = append(out, ztnode.Route{Target: netip.MustParsePrefix(p)})
		}
		return out
	}
	check := func(k *Link, want ...string) {
		t.Helper()
		list, err := guardsOf(k.nl, k.name)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, r := range list {
			got = append(got, r.Dst.String())
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("guards of %s are %q, want %q", k.name, got, want)
		}
	}
	guard := func(k *Link, keep bool, list ...string) {
		t.Helper()
		if err := k.Guard(targets(list...), keep); err != nil {
			t.Fatal(err)
		}
	}
	a, b := links[0], links[1]
	for range 2 {
		guard(a, false, "10.0.0.0/24", "fd00:77::/64", "0.0.0.0/0")
		guard(b, false, "10.0.0.0/24")
		check(a, "10.0.0.0/24", "fd00:77::/64")
		check(b, "10.0.0.0/24")
	}
	guard(a, true, "10.9.0.0/16") // a network that is down says nothing of its targets
	check(a, "10.0.0.0/24", "10.9.0.0/16", "fd00:77::/64")
	table, err := OpenTable()
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	if h, err := table.State(a, b); err != nil || len(h.Routes) != 0 {
		t.Errorf("guards count as other people's routes: %+v, %v", h, err)
	}
	again, err := OpenLink("ztgt0", discard) // after a kill
	if err != nil {
		t.Fatal(err)
	}
	check(again, "10.0.0.0/24", "10.9.0.0/16", "fd00:77::/64")
	guard(again, false, "10.9.0.0/16")
	check(again, "10.9.0.0/16")
	again.Failed = true
	again.Undo()
	if again, err = OpenLink("ztgt0", discard); err != nil {
		t.Fatal(err)
	}
	check(again, "10.9.0.0/16")
	again.Undo()
	check(a)
	check(b, "10.0.0.0/24")
	b.Undo()
	check(b)
	a.Undo()
}

func TestTAP(t *testing.T) {
	inNamespace(t)
	mac := ztnode.MAC{2, 1, 2, 3, 4, 5}
	p, err := OpenTAP(0x8056c2e21c000001, "ztmt0", mac, tuntap.Writev, discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Link.Up(2800); err != nil {
		t.Fatal(err)
	}
	if err := p.Link.SetAddresses(nettest.Prefixes("10.147.17.5/24")); err != nil {
		t.Fatal(err)
	}
	if err := p.Link.SetRoutes([]ztnode.Route{{Target: netip.MustParsePrefix("10.0.0.0/24"), Via: netip.MustParseAddr("10.147.17.9")}}); err != nil {
		t.Fatal(err)
	}
	if got := routesOf(t, p.Link); !slices.Equal(got, []string{"10.0.0.0/24 via 10.147.17.9"}) {
		t.Errorf("routes %q", got)
	}
	if g := p.Link.Groups(); len(g) == 0 {
		t.Error("no multicast groups, want those of the kernel")
	}
	sink := &frameSink{frames: make(chan []byte, 64)}
	done := make(chan error, 1)
	go func() { done <- p.Read(sink) }()
	// An ARP request of somebody on the network gets the kernel's answer.
	request := []byte("\xff\xff\xff\xff\xff\xff\x02\x09\x09\x09\x09\x09\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01" +
		"\x02\x09\x09\x09\x09\x09\x0a\x93\x11\x09\x00\x00\x00\x00\x00\x00\x0a\x93\x11\x05")
	p.Deliver([][]byte{request})
	deadline := time.After(5 * time.Second)
	for answered := false; !answered; {
		select {
		case f := <-sink.frames:
			answered = len(f) >= 42 && string(f[:6]) == string(request[6:12]) && string(f[6:12]) == string(mac[:]) && f[13] == 6 && f[21] == 2
		case <-deadline:
			t.Fatal("no ARP reply")
		}
	}
	if got, ok := p.Link.Neighbour(netip.MustParseAddr("10.147.17.9")); !ok || got.String() != "02:09:09:09:09:09" {
		t.Errorf("neighbour %v, %v, want the sender of the request", got, ok)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Errorf("reader: %v", err)
	}
}

// frameSink is a node of which only the frames matter.
type frameSink struct {
	frames chan []byte
}

func (s *frameSink) WriteFrames(_ uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	for i := range bufs {
		select {
		case s.frames <- slices.Clone(bufs[i][offset : offset+sizes[i]]):
		default:
		}
	}
	return len(bufs), nil
}
