package gateway

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"ztgate/internal/nettest"
	"ztgate/internal/ownnet"
	"ztgate/router/config"
	"ztgate/router/host"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

func TestCheckHost(t *testing.T) {
	ownnet.Run(t, testCheckHost)
}

func testCheckHost(t *testing.T) {
	set := func(key, value string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join("/proc/sys/net", key), []byte(value), 0); err != nil {
			t.Skip(err)
		}
	}
	failed := func() []string {
		var out []string
		for _, c := range checkHost(config.VPCConfig{TUN: "lo", Interfaces: []string{"nosuch0"}, Sources: nettest.Prefixes("fd00::/32")}, host.Sysctl) {
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

// TestWaysAreBounded: however many routes a controller pushes, the kernel is asked for few
// ways in one look, those to the targets among them.
func TestWaysAreBounded(t *testing.T) {
	cfg, err := config.Load(config.Sources{NoFile: true, Flags: map[string][]string{"source": {"172.31.0.0/16"}, "target": {"icmp://10.255.0.1"}}})
	if err != nil {
		t.Fatal(err)
	}
	g := &gateway{service: &service{}}
	g.conf.Store(cfg)
	p := &plan.Plan{}
	for i := range 4096 {
		p.Routes = append(p.Routes, plan.Route{Route: ztnode.Route{Target: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(255 - i>>8), byte(i), 0}), 24)}})
	}
	if got := g.destinations(p); len(got) != maxWays || got[0] != cfg.Targets[0].Addr.Addr() {
		t.Errorf("%d ways, the first to %v", len(got), got[:1])
	}
}

// TestDescriptors: forwards on the host's addresses leave descriptors to everything else.
func TestDescriptors(t *testing.T) {
	for files, want := range map[int]int{64: 1, 160: 1, 256: 96, 1024: 864, 65536: 2048} {
		if got := hostConnections(files); got != want {
			t.Errorf("%d open files: %d connections, want %d", files, got, want)
		}
	}
}
