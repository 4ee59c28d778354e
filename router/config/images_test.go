package config

import (
	"strings"
	"testing"
)

// The gateway modes of the router image, and what counts more than they do.
func TestGatewayMode(t *testing.T) {
	const in, rules = "accept direction in", "policy: {rules: [{action: accept, proto: icmp, direction: in}]}"
	for _, tt := range []struct {
		name, env, file string
		policy, rules   string // default and rules
		host            bool
		warning         string
	}{
		{"outbound", "outbound", "", "accept", "", false, ""},
		{"inbound", "inbound", "", "drop", in, true, ""},
		{"both", "both", "", "accept", in, true, ""},
		{"not said", "", "", "accept", "", false, "say inbound, outbound or both"},
		{"inbound with allow", "inbound", `policy: {allow: ["tcp:10.0.0.10:443"]}`, "drop", "accept proto tcp to 10.0.0.10/32 ports 443 direction out, " + in, true, ""},
		{"inbound with a default", "inbound", "policy: {default: reject}", "reject", in, true, ""},
		{"inbound with rules", "inbound", rules, "drop", "accept proto icmp direction in", true, "policy.rules says what the overlay may open"},
		{"both with an address", "both", "vpc: {nat_address: 172.31.0.250}", "accept", in, false, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			env := []string{"ZEROTIER_ONE_LOCAL_PHYS=eth0", "ZEROTIER_ONE_USE_IPTABLES_NFT=true", "PUID=999", "TZ=Etc/UTC", "ZEROTIER_ONE_GATEWAY_MODE=" + tt.env}
			c, err := Load(Sources{Environ: env, Flags: map[string][]string{"config": {writeFile(t, tt.file)}}})
			if err != nil {
				t.Fatal(err)
			}
			if c.Policy.Default != tt.policy || strings.Join(texts(c.Policy.Rules), ", ") != tt.rules || c.VPC.NAT.Host != tt.host {
				t.Errorf("default %s, rules %q, %+v", c.Policy.Default, texts(c.Policy.Rules), c.VPC.NAT)
			}
			warnings := strings.Join(c.Warnings, "\n")
			if tt.warning == "" && warnings != "" || !strings.Contains(warnings, tt.warning) {
				t.Errorf("warnings %q, want %q", warnings, tt.warning)
			}
			if tt.host && !strings.Contains(c.Origin("vpc.nat_address"), "ZEROTIER_ONE_GATEWAY_MODE") {
				t.Errorf("nat_address comes from %s", c.Origin("vpc.nat_address"))
			}
			if _, changed, restart, err := c.Reload(); err != nil || len(changed)+len(restart) > 0 {
				t.Errorf("read again: %v %v %v", changed, restart, err)
			}
		})
	}
}

func TestImageSwitches(t *testing.T) {
	c, err := Load(Sources{NoFile: true, Environ: []string{"ZT_PORT_MAPPING_ENABLED=false", "ZT_ALLOW_TCP_FALLBACK_RELAY=false"}})
	if err != nil || c.Underlay.PortMapping || c.Underlay.TCPRelay != "off" {
		t.Errorf("%v: %+v", err, c)
	}
	c, err = Load(Sources{NoFile: true, Environ: []string{"ZTGATE_TCP_RELAY=198.51.100.1:443", "ZT_ALLOW_TCP_FALLBACK_RELAY=false"}})
	if err != nil || c.Underlay.TCPRelay != "198.51.100.1:443" {
		t.Errorf("%v: %+v", err, c)
	}
}
