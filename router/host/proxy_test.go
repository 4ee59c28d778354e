package host

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"ztgate/router/plan"
)

// TestKernelProxy: the kernel answers for addresses on the links that are named, says what is
// in the way, and forgets them at the end.
func TestKernelProxy(t *testing.T) {
	inNamespace(t)
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vpc0"}, PeerName: "peer0"}
	if err := netlink.LinkAdd(v); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"vpc0", "peer0"} {
		l, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
	}
	settings := map[string]string{"ipv4/conf/vpc0/forwarding": "1", "ipv6/conf/all/forwarding": "1"}
	p, err := OpenProxy(nil)
	if err != nil {
		t.Fatal(err)
	}
	p.read = func(key string) string { return settings[key] }
	p.write = func(key, value string) error { settings[key] = value; return nil }
	list := []plan.Announcement{{Addr: netip.MustParseAddr("172.31.0.250"), Device: "vpc0"}, {Addr: netip.MustParseAddr("fd31::250"), Device: "vpc0"},
		{Addr: netip.MustParseAddr("10.44.0.9")}, {Addr: netip.MustParseAddr("10.44.0.10"), Device: "gone0"}}
	for range 2 {
		if err := p.Set(list[:3]); err != nil {
			t.Fatal(err)
		}
		if _, why := p.Missing(); why != nil {
			t.Error(why)
		}
	}
	proxies := func() (out []string) {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			l, err := netlink.NeighProxyList(v.Attrs().Index, family)
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range l {
				out = append(out, n.IP.String())
			}
		}
		return out
	}
	if got := strings.Join(proxies(), " "); got != "172.31.0.250 fd31::250" {
		t.Errorf("the kernel answers for %s", got)
	}
	for key, remedy := range map[string]string{"ipv4/conf/vpc0/forwarding": "net.ipv4.conf.vpc0.forwarding=1", "ipv6/conf/all/forwarding": "net.ipv6.conf.all.forwarding=1",
		"ipv6/conf/vpc0/proxy_ndp": "net.ipv6.conf.vpc0.proxy_ndp=1"} {
		settings[key] = "0"
		if help, why := p.Missing(); why == nil || !strings.Contains(help, remedy) {
			t.Errorf("%s is 0: %v, %s", key, why, help)
		}
		settings[key] = "1"
	}
	if err := p.nl.NeighDel(neighbourProxy(v, list[0].Addr)); err != nil {
		t.Fatal(err)
	}
	if _, why := p.Missing(); why == nil {
		t.Error("nobody misses what somebody took away")
	}
	if err := p.Set(list); err != nil {
		t.Fatal(err)
	}
	if _, why := p.Missing(); why == nil || !strings.Contains(why.Error(), "gone0") {
		t.Errorf("on a link that is gone: %v", why)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if got := proxies(); len(got) > 0 || settings["ipv6/conf/vpc0/proxy_ndp"] != "0" {
		t.Errorf("left behind: %v, %v", got, settings)
	}
}
