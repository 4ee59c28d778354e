package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func tryText(t *testing.T, text string) (*Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ztgate.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(Sources{Flags: map[string][]string{"config": {path}, "home": {t.TempDir()}}})
}

// TestNATAddresses: not more addresses than there is memory for, however they are written.
func TestNATAddresses(t *testing.T) {
	for list, ok := range map[string]bool{
		`10.0.0.1, "fd00::1"`: true, "10.0.0.0/26": true, `"fd00::/122"`: true, "10.0.0.0/26, 10.1.0.1": false, "10.0.0.0/25": false, `"fd00::/64"`: false,
		`"::/0"`: false, "10.0.0.1/24": false, "host.example": false,
	} {
		if _, err := tryText(t, "nat: {addresses: ["+list+"]}\n"); err == nil != ok {
			t.Errorf("%s: %v", list, err)
		}
	}
}

// TestForwardHeaders: PROXY headers are for TCP from the VPC, and instead of routed
// packets.
func TestForwardHeaders(t *testing.T) {
	for text, want := range map[string]string{
		`listen: tcp/25, to: "10.0.0.10:25", proxy_protocol: v1`:                                        "tcp/0.0.0.0:25 to 10.0.0.10:25 with PROXY v1",
		`listen: tcp/25, to: "10.0.0.10:25", accept_proxy: [172.31.5.0/28, "fd00::1"]`:                  "tcp/0.0.0.0:25 to 10.0.0.10:25 behind 172.31.5.0/28,fd00::1/128",
		`listen: tcp/25, to: "mail.office.example:25", proxy_protocol: v2, accept_proxy: "172.31.5.1"`:  "tcp/25 to mail.office.example:25 with PROXY v2 behind 172.31.5.1/32",
		`listen: udp/25, to: "10.0.0.10:25", proxy_protocol: v2`:                                        "error: which UDP has none",
		`listen: udp/25, to: "mail.office.example:25", accept_proxy: "172.31.5.1"`:                      "error: which UDP has none",
		`listen: tcp/25, to: "172.31.0.10:25", from: overlay, proxy_protocol: v2`:                       "error: from the vpc",
		`listen: "tcp/192.0.2.1:25", to: "10.0.0.10:25", masquerade: false, accept_proxy: "172.31.5.1"`: "error: remove masquerade: false",
		`listen: tcp/25, to: "10.0.0.10:25", proxy_protocol: v3`:                                        "error: use one of v1, v2",
		`listen: tcp/25, to: "10.0.0.10:25", accept_proxy: []`:                                          "error: is empty",
		`listen: tcp/25, to: "10.0.0.10:25", accept_proxy: lb.example`:                                  "error: give ADDRESS/BITS",
	} {
		cfg, err := tryText(t, "forwards: [{"+text+"}]\n")
		says, bad := strings.CutPrefix(want, "error: ")
		switch {
		case bad && (err == nil || !strings.Contains(err.Error(), says)):
			t.Errorf("%s: %v, want %q", text, err, says)
		case !bad && err != nil:
			t.Errorf("%s: %v", text, err)
		case !bad:
			for _, v := range cfg.Values() {
				if v.Key == "forwards[0]" && v.Value != want {
					t.Errorf("%s is shown as %q, want %q", text, v.Value, want)
				}
			}
		}
	}
}
