package router

import (
	"net/netip"
	"testing"

	"ztgate/netstack/policy"
)

func TestCompilePolicy(t *testing.T) {
	c, err := Load(Sources{Flags: map[string][]string{"config": {writeFile(t, goodFile)}}})
	if err != nil {
		t.Fatal(err)
	}
	p := compilePolicy(c.Policy)
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
	if got, _ := compilePolicy(PolicyConfig{Default: "accept"}).Match(&policy.Flow{Proto: 6, Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("10.0.0.2"), Port: 1}); got != policy.Accept {
		t.Errorf("default %v, want accept", got)
	}
}
