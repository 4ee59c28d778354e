package gateway

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"ztgate/internal/nettest"
	"ztgate/internal/ownnet"
	"ztgate/router/config"
	"ztgate/router/host"
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
