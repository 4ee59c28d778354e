package plan_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ztgate/router/config"
	"ztgate/router/plan"
)

// TestRefusedForward warns of forwards that nobody can use, and of no others.
func TestRefusedForward(t *testing.T) {
	const out, in = `{listen: "tcp/8443", to: "10.0.0.10:443"}`, `{listen: "tcp/2222", to: "172.31.0.10:22", from: overlay}`
	for _, tt := range []struct {
		name, forward, policy string
		want                  string // of the warning; "" = none
	}{
		{"no policy", out, ``, ""},
		{"no rule", out, `{default: drop}`, "{action: accept, direction: out, proto: tcp, to: 10.0.0.10, ports: [443]}"},
		{"no rule, from the overlay", in, `{default: reject}`, "{action: accept, direction: in, proto: tcp, to: 172.31.0.10, ports: [22]}"},
		{"allow", out, `{allow: ["tcp:10.0.0.0/24:400-500"]}`, ""},
		{"allow another port", out, `{allow: ["tcp:10.0.0.10:80"]}`, "the policy refuses"},
		{"allow another host", out, `{allow: ["tcp:10.0.0.11"]}`, "the policy refuses"},
		{"allow is for the VPC", in, `{allow: ["tcp:172.31.0.10"]}`, "the policy refuses"},
		{"the port it listens at", out, `{allow: ["tcp:10.0.0.10:8443"]}`, "ports: [443]"},
		{"rule for some clients", in, `{default: drop, rules: [{action: accept, from: 10.0.0.9}]}`, ""},
		{"other direction", in, `{default: drop, rules: [{action: accept, direction: out}]}`, "the policy refuses"},
		{"other protocol", out, `{default: drop, rules: [{action: accept, proto: udp}]}`, "the policy refuses"},
		{"refused first", out, `{rules: [{action: drop, to: 10.0.0.0/24}, {action: accept}]}`, "the policy refuses"},
		{"some are refused first", out, `{default: drop, rules: [{action: drop, from: 172.31.9.0/24}, {action: accept}]}`, ""},
		{"another is refused first", out, `{rules: [{action: drop, to: 10.0.1.0/24}]}`, ""},
		{"name", out, `{allow: ["tcp:db.office.example"]}`, ""}, // which may be its name
		{"name refused", out, `{rules: [{action: drop, to: db.office.example}]}`, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "ztgate.yaml")
			text := "vpc: {sources: [172.31.0.0/16]}\nforwards: [" + tt.forward + "]\npolicy: " + tt.policy + "\n"
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			cfg, err := config.Load(config.Sources{Flags: map[string][]string{"config": {path}}})
			if err != nil {
				t.Fatal(err)
			}
			got := ""
			for _, p := range plan.Make(plan.Input{Config: cfg}).Problems {
				got += p.String()
			}
			if (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
				t.Errorf("problems %q, want %q", got, tt.want)
			}
		})
	}
}

func TestUnusable(t *testing.T) {
	for a, want := range map[string]string{
		"10.0.0.1": "", "8.8.8.8": "", "fd00::1": "", "127.0.0.1": "loopback", "0.0.0.0": "never forwarded", "::": "never forwarded", "::ffff:127.0.0.1": "loopback",
		"169.254.169.254": "link-local", "100.100.100.200": "metadata", "64:ff9b::a9fe:a9fe": "metadata", "64:ff9b::a00:1": "", "ff02::1": "multicast", "fe80::1%eth0": "malformed",
	} {
		if got := plan.Unusable(netip.MustParseAddr(a)); (got == "") != (want == "") || !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", a, got, want)
		}
	}
}
