package vl1

import (
	"net/netip"
	"testing"

	"ztgate/zerotier/internal/testvec"
)

// A configured MTU is limited as in the reference.
func TestConfiguredMTU(t *testing.T) {
	var v struct {
		Cases []struct {
			Configured int `json:"configured_mtu"`
			Effective  int `json:"effective_mtu"`
		}
	}
	testvec.Load(t, "mtu-510.json", &v)
	count := testvec.Count(t, "mtu-510.json", "cases")
	for _, c := range v.Cases {
		count.Judge()
		core := &Core{cfg: Config{Physical: []PhysicalNetwork{{Prefix: netip.MustParsePrefix("192.0.2.0/24"), MTU: c.Configured}}}}
		if got := core.mtu(netip.MustParseAddr("192.0.2.1")); got != c.Effective {
			t.Errorf("%d: %d, want %d", c.Configured, got, c.Effective)
		}
	}
}
