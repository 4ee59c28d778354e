package gateway

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ztgate/netstack"
	"ztgate/netstack/policy"
	"ztgate/router/config"
)

// loadText loads a configuration file with this text.
func loadText(t *testing.T, text string) *config.Config {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ztgate.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(config.Sources{Flags: map[string][]string{"config": {path}}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCompilePolicy(t *testing.T) {
	p := compilePolicy(loadText(t, `
policy:
  default: drop
  rules:
    - {action: accept, proto: tcp, to: "10.0.0.10/32", ports: ["443", 8000-8099]}
    - {action: reject, from: 172.31.9.0/24}
`).Policy)
	for _, tt := range []struct {
		proto    uint8
		src, dst string
		port     uint16
		want     policy.Action
	}{
		{6, "172.31.0.9", "10.0.0.10", 443, policy.Accept},
		{6, "172.31.0.9", "10.0.0.10", 8050, policy.Accept},
		{17, "172.31.0.9", "10.0.0.10", 443, policy.Drop},
		{6, "172.31.9.9", "10.0.0.11", 443, policy.Reject},
		{1, "172.31.0.9", "10.0.0.11", 0, policy.Drop},
	} {
		if got, _ := p.Match(&policy.Flow{Proto: tt.proto, Src: netip.MustParseAddr(tt.src), Dst: netip.MustParseAddr(tt.dst), Port: tt.port}); got != tt.want {
			t.Errorf("protocol %d from %s to %s:%d: %v, want %v", tt.proto, tt.src, tt.dst, tt.port, got, tt.want)
		}
	}
	if got, _ := compilePolicy(config.PolicyConfig{Default: "accept"}).Match(&policy.Flow{Proto: 6, Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("10.0.0.2"), Port: 1}); got != policy.Accept {
		t.Errorf("default %v, want accept", got)
	}
}

func TestNATSettings(t *testing.T) {
	load := func(nat string) netstack.NAT {
		t.Helper()
		return natSettings(loadText(t, "nat: {"+nat+"}\n").NAT, [32]byte{})
	}
	if s := load(""); s.NoWindow || s.NoPickup || s.PortQuarantine != 2*time.Minute || s.Timeouts.TCPHalfClosed != 0 {
		t.Errorf("defaults: %+v", s)
	}
	s := load("window_check: false, pickup: false, port_rest: 1s, timeouts: {tcp_half_closed: 1h}")
	if !s.NoWindow || !s.NoPickup || s.PortQuarantine != time.Second || s.Timeouts.TCPHalfClosed != time.Hour {
		t.Errorf("got %+v", s)
	}
}
