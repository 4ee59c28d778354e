package router

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"ztgate/internal/nettest"
	"ztgate/router/tuntap"
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

func routesOf(t *testing.T, k *link) []string {
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
	dev, err := tuntap.OpenTUN("ztgt0")
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if _, err := tuntap.OpenTUN("ztgt0"); err == nil || !strings.Contains(err.Error(), "another process uses it") {
		t.Errorf("second open: %v", err)
	}
	k, err := openLink("ztgt0", discard)
	if err != nil {
		t.Fatal(err)
	}
	k.quiet()
	for range 2 { // idempotent
		if err := k.up(2800); err != nil {
			t.Fatal(err)
		}
		if err := k.setAddresses(nettest.Prefixes("100.127.255.1/32", "fd00:9::1/128")); err != nil {
			t.Fatal(err)
		}
		if err := k.setRoutes([]Route{{Target: netip.MustParsePrefix("10.0.0.0/24"), Via: netip.MustParseAddr("10.147.17.9")},
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
	if k.toggled() {
		t.Error("toggled without reason")
	}
	for _, set := range []func(netlink.Link) error{k.nl.LinkSetDown, k.nl.LinkSetUp} {
		if err := set(k.l); err != nil {
			t.Fatal(err)
		}
		if !k.toggled() || k.toggled() {
			t.Error("a change of the interface isn't noticed once")
		}
	}
	if mtu, err := dev.MTU(); err != nil || mtu != 2800 {
		t.Errorf("MTU %d, %v", mtu, err)
	}
	if err := k.setRoutes([]Route{{Target: netip.MustParsePrefix("10.147.17.0/24")}}); err != nil {
		t.Fatal(err)
	}
	if got := routesOf(t, k); len(got) != 1 {
		t.Errorf("after a route went: %q", got)
	}
	// What a killed process leaves on an interface that outlives it.
	again, err := openLink("ztgt0", discard)
	if err != nil {
		t.Fatal(err)
	}
	if got := routesOf(t, again); len(got) != 0 {
		t.Errorf("left routes are not removed: %q", got)
	}
	again.undo()
	addrs, err := k.nl.AddrList(k.l, netlink.FAMILY_V4)
	if err != nil || len(addrs) != 0 {
		t.Errorf("addresses after undo: %v, %v", addrs, err)
	}
	k.undo()
}

// TestGuards: what a network reached goes nowhere else while the network is
// down, and after a kill.
func TestGuards(t *testing.T) {
	inNamespace(t)
	var links []*link
	for _, name := range []string{"ztgt0", "ztgt1"} {
		dev, err := tuntap.OpenTUN(name)
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		k, err := openLink(name, discard)
		if err != nil {
			t.Fatal(err)
		}
		links = append(links, k)
	}
	targets := func(list ...string) (out []Route) {
		for _, p := range list {
			out = append(out, Route{Target: netip.MustParsePrefix(p)})
		}
		return out
	}
	check := func(k *link, want ...string) {
		t.Helper()
		list, err := k.guards()
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
	guard := func(k *link, keep bool, list ...string) {
		t.Helper()
		if err := k.guard(targets(list...), keep); err != nil {
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
	if k, err := a.others(); err != nil || len(k) != 0 {
		t.Errorf("guards count as other people's routes: %v, %v", k, err)
	}
	again, err := openLink("ztgt0", discard) // after a kill
	if err != nil {
		t.Fatal(err)
	}
	check(again, "10.0.0.0/24", "10.9.0.0/16", "fd00:77::/64")
	guard(again, false, "10.9.0.0/16")
	check(again, "10.9.0.0/16")
	again.failed = true
	again.undo()
	if again, err = openLink("ztgt0", discard); err != nil {
		t.Fatal(err)
	}
	check(again, "10.9.0.0/16")
	again.undo()
	check(a)
	check(b, "10.0.0.0/24")
	b.undo()
	check(b)
	a.undo()
}

func TestKernelOthers(t *testing.T) {
	inNamespace(t)
	for _, name := range []string{"ztgt0", "ztgt1"} {
		dev, err := tuntap.OpenTUN(name)
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
	}
	other, err := openLink("ztgt1", discard)
	if err != nil {
		t.Fatal(err)
	}
	defer other.undo()
	if err := other.up(1500); err != nil {
		t.Fatal(err)
	}
	if err := other.setAddresses(nettest.Prefixes("172.31.0.1/16")); err != nil {
		t.Fatal(err)
	}
	k, err := openLink("ztgt0", discard)
	if err != nil {
		t.Fatal(err)
	}
	defer k.undo()
	got, err := k.others()
	if err != nil || len(got) != 1 || got[0] != (kernelRoute{netip.MustParsePrefix("172.31.0.0/16"), "ztgt1"}) {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestCheckHost(t *testing.T) {
	inNamespace(t)
	set := func(key, value string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(sysctlRoot, key), []byte(value), 0); err != nil {
			t.Skip(err)
		}
	}
	failed := func() []string {
		var out []string
		for _, c := range checkHost(VPCConfig{TUN: "lo", Interfaces: []string{"nosuch0"}, Sources: nettest.Prefixes("fd00::/32")}) {
			if !c.OK {
				out = append(out, c.Name)
			}
		}
		return out
	}
	set("ipv4/ip_forward", "0")
	set("ipv6/conf/all/forwarding", "0")
	set("ipv4/conf/all/rp_filter", "1")
	if got, want := failed(), []string{"ip_forward", "ipv6_forward", "rp_filter", "interface_nosuch0"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	set("ipv4/ip_forward", "1")
	set("ipv6/conf/all/forwarding", "1")
	set("ipv4/conf/lo/rp_filter", "2")
	if got, want := failed(), []string{"interface_nosuch0"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestTAP(t *testing.T) {
	inNamespace(t)
	mac := MAC{2, 1, 2, 3, 4, 5}
	p, err := openTAP(0x8056c2e21c000001, "ztmt0", mac, discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.link.up(2800); err != nil {
		t.Fatal(err)
	}
	if err := p.link.setAddresses(nettest.Prefixes("10.147.17.5/24")); err != nil {
		t.Fatal(err)
	}
	if err := p.link.setRoutes([]Route{{Target: netip.MustParsePrefix("10.0.0.0/24"), Via: netip.MustParseAddr("10.147.17.9")}}); err != nil {
		t.Fatal(err)
	}
	if got := routesOf(t, p.link); !slices.Equal(got, []string{"10.0.0.0/24 via 10.147.17.9"}) {
		t.Errorf("routes %q", got)
	}
	if g := p.link.groups(); len(g) == 0 {
		t.Error("no multicast groups, want those of the kernel")
	}
	sink := &frameSink{frames: make(chan []byte, 64)}
	done := make(chan error, 1)
	go func() { done <- p.read(sink) }()
	// An ARP request of somebody on the network gets the kernel's answer.
	request := []byte("\xff\xff\xff\xff\xff\xff\x02\x09\x09\x09\x09\x09\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01" +
		"\x02\x09\x09\x09\x09\x09\x0a\x93\x11\x09\x00\x00\x00\x00\x00\x00\x0a\x93\x11\x05")
	p.deliver([][]byte{request})
	deadline := time.After(5 * time.Second)
	for answered := false; !answered; {
		select {
		case f := <-sink.frames:
			answered = len(f) >= 42 && string(f[:6]) == string(request[6:12]) && string(f[6:12]) == string(mac[:]) && f[13] == 6 && f[21] == 2
		case <-deadline:
			t.Fatal("no ARP reply")
		}
	}
	if got, ok := p.link.neighbour(netip.MustParseAddr("10.147.17.9")); !ok || got.String() != "02:09:09:09:09:09" {
		t.Errorf("neighbour %v, %v, want the sender of the request", got, ok)
	}
	if err := p.close(t.Context()); err != nil {
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
