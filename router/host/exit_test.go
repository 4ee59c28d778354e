package host

import (
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"ztgate/internal/nettest"
	"ztgate/router/plan"
)

// ip runs ip in the test's namespace.
func ip(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("ip", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// wayOf returns the interface that packets to an address leave by, "" if they don't.
func wayOf(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("ip", append([]string{"route", "get"}, args...)...).CombinedOutput()
	if err != nil {
		return ""
	}
	f := strings.Fields(string(out))
	for i, w := range f {
		if w == "dev" {
			return f[i+1]
		}
	}
	t.Fatalf("ip route get %v: %s", args, out)
	return ""
}

// exitHost makes a host with a default route by eth0 and an interface of a network.
func exitHost(t *testing.T) *Link {
	t.Helper()
	inNamespace(t)
	links := openLinks(t, "ztm0", "eth0", "wlan0")
	if err := links[0].SetAddresses(nettest.Prefixes("10.0.0.7/24", "fd00:10::7/64")); err != nil {
		t.Fatal(err)
	}
	ip(t, "addr", "add", "192.168.1.7/24", "dev", "eth0")
	ip(t, "addr", "add", "2001:db8:1::7/64", "dev", "eth0", "nodad")
	ip(t, "route", "add", "default", "via", "192.168.1.1")
	ip(t, "-6", "route", "add", "default", "via", "2001:db8:1::1")
	ip(t, "route", "add", "172.20.0.0/16", "via", "192.168.1.9")
	return links[0]
}

func openExits(t *testing.T) *Exits {
	t.Helper()
	x, err := OpenExits(discard)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(x.Close)
	return x
}

var detour = plan.Detour{From: []netip.Addr{netip.MustParseAddr("192.168.1.7"), netip.MustParseAddr("2001:db8:1::7")},
	To: nettest.Prefixes("169.254.0.0/16", "172.31.0.0/16", "fd00:ec2::/32")}

// ways are where packets go, as arguments of ip route get.
func ways(t *testing.T, want map[string]string) {
	t.Helper()
	for args, dev := range want {
		if got := wayOf(t, strings.Fields(args)...); got != dev {
			t.Errorf("%s goes by %q, want %q", args, got, dev)
		}
	}
}

var ownWays = map[string]string{
	"8.8.8.8": "eth0", "200.1.1.1": "eth0", "2600::1": "eth0", "8.8.8.8 oif eth0": "eth0", "172.20.0.1": "eth0", "169.254.169.254": "eth0",
	"10.0.0.9": "ztm0", "172.31.5.5": "eth0",
}

func TestExits(t *testing.T) {
	k := exitHost(t)
	x := openExits(t)
	before := ip(t, "rule") + ip(t, "-6", "rule")
	via4, via6 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00:10::1")
	set := func(s ExitState) {
		t.Helper()
		s.Detour = detour
		for range 2 { // the second changes nothing
			if err := x.Set(s); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Not in force, only what is bound to the interface takes it.
	set(ExitState{Ways: []ExitWay{{Link: k, Via: via4}}})
	ways(t, ownWays)
	ways(t, map[string]string{"8.8.8.8 oif ztm0": "ztm0"})

	// In force: the underlay, known by mark, source or interface, local subnets and what
	// has a route of its own keep their way.
	set(ExitState{Ways: []ExitWay{{Link: k, Via: via4, InForce: true}, {Link: k, Via: via6, InForce: true}}})
	ways(t, map[string]string{
		"8.8.8.8": "ztm0", "200.1.1.1": "ztm0", "2600::1": "ztm0",
		"8.8.8.8 mark 0x7a740000": "eth0", "8.8.8.8 from 192.168.1.7": "eth0", "8.8.8.8 oif eth0": "eth0", "2600::1 from 2001:db8:1::7": "eth0",
		"192.168.1.50": "eth0", "172.20.0.1": "eth0", "10.0.0.9": "ztm0", "169.254.169.254": "eth0", "172.31.5.5": "eth0", "fd00:ec2::254": "eth0",
	})
	// The way of the underlay follows changes by itself.
	ip(t, "addr", "add", "192.168.2.7/24", "dev", "wlan0")
	ip(t, "route", "replace", "default", "via", "192.168.2.1")
	ways(t, map[string]string{"8.8.8.8": "ztm0", "8.8.8.8 mark 0x7a740000": "wlan0", "8.8.8.8 oif wlan0": "wlan0", "169.254.169.254": "wlan0"})
	ip(t, "route", "replace", "default", "via", "192.168.1.1")

	// IPv4 alone: IPv6 doesn't leak.
	set(ExitState{Ways: []ExitWay{{Link: k, Via: via4, InForce: true}}, BlockIPv6: true})
	ways(t, map[string]string{"8.8.8.8": "ztm0", "2600::1": "", "2600::1 from 2001:db8:1::7": "", "2600::1 mark 0x7a740000": "eth0", "2001:db8:1::8": "eth0", "fd00:10::8": "ztm0"})
	if c, err := net.Dial("udp", "[2600::1]:9"); err == nil {
		t.Errorf("IPv6 leaks: a socket comes from %s", c.LocalAddr())
	}
	if c, err := net.Dial("udp", "8.8.8.8:9"); err != nil || !strings.HasPrefix(c.LocalAddr().String(), "10.0.0.7:") {
		t.Errorf("IPv4: a socket comes from %v, %v", c, err)
	}

	// Another member on the same host leaves it alone, and says so.
	if _, err := OpenExits(discard); !errors.Is(err, ErrExitsInUse) {
		t.Errorf("a second one: %v", err)
	}

	set(ExitState{})
	ways(t, ownWays)
	if after := ip(t, "rule") + ip(t, "-6", "rule"); after != before {
		t.Errorf("rules before:\n%s\nafter:\n%s", before, after)
	}
	if out := ip(t, "route", "show", "table", "all") + ip(t, "-6", "route", "show", "table", "all"); strings.Contains(out, "31348") {
		t.Errorf("routes stay:\n%s", out)
	}
}

// A process that is killed takes the interface with it: nothing is led astray, and the
// next start tidies up.
func TestExitsKilled(t *testing.T) {
	k := exitHost(t)
	x := openExits(t)
	s := ExitState{Ways: []ExitWay{{Link: k, Via: netip.MustParseAddr("10.0.0.1"), InForce: true}}, BlockIPv6: true, Detour: detour}
	if err := x.Set(s); err != nil {
		t.Fatal(err)
	}
	ip(t, "link", "del", "ztm0")
	for args, dev := range ownWays {
		if dev == "eth0" && args != "2600::1" {
			ways(t, map[string]string{args: dev})
		}
	}
	openExits(t)
	ways(t, map[string]string{"2600::1": "eth0"})
	if out := ip(t, "rule") + ip(t, "-6", "rule") + ip(t, "route", "show", "table", "all"); strings.Contains(out, "31348") {
		t.Errorf("the next start leaves:\n%s", out)
	}
}
