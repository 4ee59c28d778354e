package gateway

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ztgate/internal/nettest"
	"ztgate/router/config"
)

// TestBetterIngress: where the kernel forwards, packet sockets would see every packet
// twice.
func TestBetterIngress(t *testing.T) {
	for name, tt := range map[string]struct {
		interfaces, sources []string
		sysctl              map[string]string
		open                error
		want, says          string
	}{
		"set up for it":       {[]string{"eth0"}, nil, nil, nil, "packet", "packet sockets work"},
		"no interface":        {nil, nil, nil, nil, "tun", "no single interface"},
		"two interfaces":      {[]string{"eth0", "eth1"}, nil, nil, nil, "tun", "no single interface"},
		"forwards":            {[]string{"eth0"}, nil, map[string]string{"ipv4/conf/eth0/forwarding": "1"}, nil, "tun", "forwards packets that come by eth0"},
		"forwards IPv6":       {[]string{"eth0"}, []string{"172.31.0.0/16"}, map[string]string{"ipv6/conf/all/forwarding": "1"}, nil, "packet", ""},
		"forwards IPv6 of it": {[]string{"eth0"}, []string{"fd31::/64"}, map[string]string{"ipv6/conf/all/forwarding": "1"}, nil, "tun", "forwards packets"},
		"forced IPv6":         {[]string{"eth0"}, []string{"fd31::/64"}, map[string]string{"ipv6/conf/eth0/force_forwarding": "1"}, nil, "tun", "forwards packets"},
		"no privilege":        {[]string{"eth0"}, nil, nil, errors.New("give the capability NET_RAW"), "tun", "NET_RAW"},
	} {
		vpc := config.VPCConfig{Interfaces: tt.interfaces, Sources: nettest.Prefixes(tt.sources...)}
		sysctl := func(key string) string {
			if v, ok := tt.sysctl[key]; ok {
				return v
			}
			return "0"
		}
		if got, why := betterIngress(vpc, sysctl, func(string) error { return tt.open }); got != tt.want || !strings.Contains(why, tt.says) {
			t.Errorf("%s: %s, since %s; want %s, since %s", name, got, why, tt.want, tt.says)
		}
	}
}

// TestPickIngress: what was picked stays at a reload, and what the operator says counts.
func TestPickIngress(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ztgate.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("vpc: {ingress: auto, interfaces: [eth0]}")
	cfg, err := config.Load(config.Sources{Flags: map[string][]string{"config": {file}}})
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.PickIngress(config.IngressPacket, "auto: it works").FitFlows(50000, "x")
	for text, want := range map[string][]string{
		"vpc: {ingress: auto, interfaces: [eth0]}":   {},
		"vpc: {ingress: packet, interfaces: [eth0]}": {},
		"vpc: {ingress: tun, interfaces: [eth0]}":    {"vpc.ingress"},
	} {
		write(text)
		next, changed, restart, err := cfg.Reload()
		if err != nil || len(changed) > 0 || !slices.Equal(restart, want) || next.VPC.Ingress != config.IngressPacket {
			t.Errorf("%s: %q in force, changed %q, restart %q, %v", text, next.VPC.Ingress, changed, restart, err)
		}
	}
}
