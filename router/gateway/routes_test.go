package gateway

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"ztgate/internal/nettest"
	"ztgate/router/config"
	"ztgate/router/host"
	"ztgate/zerotier/ztnode"
)

func TestWantedRoutes(t *testing.T) {
	n := ztnode.Network{Status: ztnode.StatusOK, Addresses: nettest.Prefixes("10.147.17.5/24", "fd00:77::5/64"), Routes: []ztnode.Route{
		{Target: netip.MustParsePrefix("10.147.17.0/24")},
		{Target: netip.MustParsePrefix("10.0.0.0/24"), Via: netip.MustParseAddr("10.147.17.9")},
		{Target: netip.MustParsePrefix("172.31.0.0/16"), Via: netip.MustParseAddr("10.147.17.5")}, // through ourselves
		{Target: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.147.17.9")},
		{Target: netip.MustParsePrefix("8.8.8.0/24")},
	}}
	targets := func(nc config.NetworkConfig) []string {
		var out []string
		for _, r := range wantedRoutes(n, nc) {
			out = append(out, r.Target.String())
		}
		return out
	}
	if got, want := targets(config.NetworkConfig{}), []string{"10.147.17.0/24", "fd00:77::/64", "10.0.0.0/24"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	want := []string{"10.147.17.0/24", "fd00:77::/64", "10.0.0.0/24", "8.8.8.0/24"}
	if got := targets(config.NetworkConfig{AllowGlobal: true}); !slices.Equal(got, want) {
		t.Errorf("with all allowed: got %v, want %v", got, want)
	}
	if got := refusedRoutes(n, config.NetworkConfig{}); len(got) != 2 {
		t.Errorf("refused: %q, want two", got)
	}
	n.Status = ztnode.StatusDenied
	if got := targets(config.NetworkConfig{}); got != nil {
		t.Errorf("denied network has routes %v", got)
	}
}

func TestConflicts(t *testing.T) {
	kernel := []host.KernelRoute{{Target: netip.MustParsePrefix("0.0.0.0/0"), Device: "eth0"}, {Target: netip.MustParsePrefix("172.31.16.0/20"), Device: "eth0"},
		{Target: netip.MustParsePrefix("10.147.17.0/24"), Device: "zt0"}, {Target: netip.MustParsePrefix("10.9.0.0/16"), Device: "ztg0"}}
	sources := nettest.Prefixes("172.31.0.0/16")
	tests := []struct {
		target string
		fatal  bool
		want   []string
	}{
		{"10.0.0.0/24", false, nil},
		{"10.9.0.0/16", false, nil}, // on our own interface
		{"172.16.0.0/12", true, []string{"covers the VPC's own 172.31.0.0/16", "more specific 172.31.16.0/20 on eth0"}},
		{"172.31.0.0/16", true, []string{"covers the VPC's own", "172.31.16.0/20 on eth0"}},
		{"172.31.99.0/24", false, []string{"lies inside the VPC's own"}},
		{"10.147.17.0/24", true, []string{"already has it on zt0"}},
	}
	for _, tt := range tests {
		got := conflicts(netip.MustParsePrefix(tt.target), sources, kernel, "ztg0")
		fatal := false
		if len(got) != len(tt.want) {
			t.Errorf("%s: got %v, want %q", tt.target, got, tt.want)
			continue
		}
		for i, c := range got {
			fatal = fatal || c.fatal
			if !strings.Contains(c.text, tt.want[i]) {
				t.Errorf("%s: got %q, want %q", tt.target, c.text, tt.want[i])
			}
		}
		if fatal != tt.fatal {
			t.Errorf("%s: fatal %v, want %v", tt.target, fatal, tt.fatal)
		}
	}
}

func TestGlobal(t *testing.T) {
	for addr, want := range map[string]bool{"10.1.2.3": false, "8.8.8.8": true, "100.64.0.1": false, "11.0.0.1": false,
		"fd00::1": false, "2001:db8::1": true, "241.0.0.1": false, "::ffff:8.8.8.8": true} {
		if got := global(netip.MustParseAddr(addr)); got != want {
			t.Errorf("global(%s) = %v, want %v", addr, got, want)
		}
	}
}

func TestNumbered(t *testing.T) {
	for _, tt := range []struct {
		name string
		i    int
		want string
	}{{"ztm0", 1, "ztm1"}, {"ztm9", 2, "ztm11"}, {"zt", 3, "zt3"}, {"abcdefghijklmno", 12, "abcdefghijklm12"}} {
		if got := numbered(tt.name, tt.i); got != tt.want {
			t.Errorf("numbered(%s, %d) = %s, want %s", tt.name, tt.i, got, tt.want)
		}
	}
}

func TestParseGroups(t *testing.T) {
	text := "4    ztm0            1     0     333300000001\n5    eth0            1     0     01005e000001\n4    ztm0            1     0     xx\n"
	got := host.ParseGroups(text, "ztm0")
	if len(got) != 1 || got[0].MAC.String() != "33:33:00:00:00:01" {
		t.Errorf("got %v", got)
	}
}
