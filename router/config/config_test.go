package config

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ztgate/router/fault"
)

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ztgate.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const goodFile = `
networks:
  - id: "8056c2e21c000001"
    masquerade: false
  - id: 1234567890123456
  - 9778dd29dd246907
home: /srv/zt
listen: 127.0.0.1:9100
vpc:
  ingress: tun
  sources: [172.31.0.0/16, "fd00:31::/32"]
  address: none
nat:
  max_flows: 2000
  port_sharing: by_destination
  max_ports_per_client: 1000
  exempt: [10.9.0.0/16]
  timeouts: {udp: 90s}
forwards:
  - {listen: "tcp/8443", to: "10.0.0.10:443"}
  - {listen: "udp/10.147.17.5:53", to: "172.31.0.53:53", from: overlay, masquerade: false}
maps:
  - {network: "8056c2e21c000001", hosts: vpc, real: 172.31.0.0/24, alias: 10.77.0.0/24}
policy:
  default: drop
  rules:
    - {action: accept, proto: tcp, to: "10.0.0.10/32", ports: ["443", 8000-8099]}
    - {action: reject, from: 172.31.9.0/24}
    - {action: drop, direction: out, network: "8056c2e21c000001"}
targets: ["tcp://10.0.0.10:443", "icmp://10.0.0.11"]
`

func TestLoadFile(t *testing.T) {
	path := writeFile(t, goodFile)
	c, err := Load(Sources{Flags: map[string][]string{"config": {path}}})
	if err != nil {
		t.Fatal(err)
	}
	if c.Home != "/srv/zt" || c.Listen != "127.0.0.1:9100" || c.NAT.MaxFlows != 2000 || c.NAT.Timeouts.UDP != 90*time.Second {
		t.Errorf("scalars: %+v", c)
	}
	if c.Masquerade(0x8056c2e21c000001) || !c.Masquerade(0x1234567890123456) || !c.Masquerade(0x9778dd29dd246907) || len(c.Networks) != 3 {
		t.Errorf("networks: %+v", c.Networks)
	}
	if f := c.Forwards; len(f) != 2 || f[0].Listen.String() != "0.0.0.0:8443" || !f[0].Masquerade || f[0].Side != SideVPC ||
		f[1].Proto != "udp" || f[1].Masquerade || f[1].Side != SideOverlay {
		t.Errorf("forwards: %+v", f)
	}
	if m := c.Maps; len(m) != 1 || m[0].Hosts != SideVPC || m[0].Network != 0x8056c2e21c000001 || m[0].Alias.String() != "10.77.0.0/24" {
		t.Errorf("maps: %+v", m)
	}
	if c.NAT.PortSharing != "by_destination" || c.NAT.MaxPortsPerClient != 1000 || len(c.NAT.Exempt) != 1 {
		t.Errorf("nat: %+v", c.NAT)
	}
	if r := c.Policy.Rules[2]; r.Direction != "out" || r.Network != 0x8056c2e21c000001 {
		t.Errorf("rule: %+v", r)
	}
	if len(c.VPC.Address) != 0 || len(c.VPC.Sources) != 2 {
		t.Errorf("vpc: %+v", c.VPC)
	}
	want := []PolicyRule{
		{Action: "accept", Proto: "tcp", To: []netip.Prefix{netip.MustParsePrefix("10.0.0.10/32")}, Ports: []PortRange{{443, 443}, {8000, 8099}}},
		{Action: "reject", From: []netip.Prefix{netip.MustParsePrefix("172.31.9.0/24")}},
		{Action: "drop", Direction: "out", Network: 0x8056c2e21c000001},
	}
	if d := cmp.Diff(want, c.Policy.Rules, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
		t.Error(d)
	}
	if len(c.Targets) != 2 || c.Targets[0].String() != "tcp://10.0.0.10:443" || c.Targets[1].String() != "icmp://10.0.0.11" {
		t.Errorf("targets: %v", c.Targets)
	}
	for key, want := range map[string]string{
		"home": path + ":7", "networks.8056c2e21c000001.masquerade": path + ":3", "vpc.sources": path + ":11", "port": "default",
	} {
		if got := c.Origin(key); !strings.HasSuffix(got, want) {
			t.Errorf("origin of %s is %q, want %q", key, got, want)
		}
	}
}

func TestPrecedence(t *testing.T) {
	path := writeFile(t, "port: 1000\nhome: /file\nlog: {level: warn}\nnetworks: [{id: 8056c2e21c000001, masquerade: false}]\n")
	env := []string{"ZTGATE_PORT=2000", "ZTGATE_HOME=/env", "ZTGATE_CONFIG=" + path, "ZTGATE_NETWORK=8056c2e21c000001,9778dd29dd246907"}
	c, err := Load(Sources{Flags: map[string][]string{"port": {"3000"}}, Environ: env})
	if err != nil {
		t.Fatal(err)
	}
	if c.Port != 3000 || c.Origin("port") != "flag --port" {
		t.Errorf("port %d from %s, want the flag's", c.Port, c.Origin("port"))
	}
	if c.Home != "/env" || c.Origin("home") != "environment ZTGATE_HOME" {
		t.Errorf("home %s from %s, want the environment's", c.Home, c.Origin("home"))
	}
	if got := c.Origin("log.level"); !strings.HasPrefix(got, "file ") {
		t.Errorf("log.level from %s, want the file", got)
	}
	if len(c.Networks) != 2 || c.Masquerade(0x8056c2e21c000001) {
		t.Errorf("networks %+v: the options of the file should stay", c.Networks)
	}
}

func TestMTU(t *testing.T) {
	for file, want := range map[string]int{"": 0, "vpc: {mtu: 0}": 0, "vpc: {mtu: 1280}": 1280, "vpc: {mtu: 65535}": 65535} {
		c, err := Load(Sources{Flags: map[string][]string{"config": {writeFile(t, file)}}})
		if err != nil || c.VPC.MTU != want {
			t.Errorf("%q: %v, want MTU %d", file, err, want)
		}
	}
}

func TestDefaultRoute(t *testing.T) {
	for _, want := range []bool{false, true} {
		path := writeFile(t, fmt.Sprintf("networks: [{id: 8056c2e21c000001, allow_default: %v}]", want))
		c, err := Load(Sources{Flags: map[string][]string{"config": {path}}})
		if err != nil || c.Networks[0].AllowDefault != want {
			t.Errorf("%v: %v, %+v", want, err, c)
		}
	}
}

func TestReload(t *testing.T) {
	path := writeFile(t, "networks: [{id: 8056c2e21c000001}]\nport: 1\n")
	c, err := Load(Sources{Flags: map[string][]string{"config": {path}}})
	if err != nil {
		t.Fatal(err)
	}
	text := "networks: [{id: 8056c2e21c000001, masquerade: false}]\nport: 2\nphysical: [{network: 10.0.0.0/8}]\nforwards: [{listen: tcp/1, to: \"10.0.0.1:1\"}]\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	next, changed, restart, err := c.Reload()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"networks", "forwards"}, changed); d != "" {
		t.Error("changed: " + d)
	}
	if d := cmp.Diff([]string{"port", "physical"}, restart); d != "" {
		t.Error("restart: " + d)
	}
	if next.Port != 1 || len(next.Underlay.Physical) != 0 || len(next.Forwards) != 1 || len(c.Forwards) != 0 || !c.Masquerade(c.Networks[0].ID) {
		t.Errorf("running %+v, next %+v", c, next)
	}
	if _, again, _, err := next.Reload(); err != nil || len(again) != 0 {
		t.Errorf("reload without a change: %v, %v", again, err)
	}
}

func TestAliases(t *testing.T) {
	env := []string{"ZEROTIER_ONE_NETWORK_IDS=8056c2e21c000001; 9778dd29dd246907", "ZT_PRIMARY_PORT=9994",
		"ZEROTIER_ONE_GATEWAY_MODE=outbound", "ZEROTIER_ONE_LOCAL_PHYS=eth0 eth1", "ZTGATE_PORT=tcp://10.0.0.1:9993",
		"ZTGATE_SERVICE_HOST=10.0.0.1", "ZTGATE_NETWROK=x"}
	c, err := Load(Sources{Environ: env, NoFile: true})
	if err != nil {
		t.Fatal(err)
	}
	if c.Port != 9994 || len(c.Networks) != 2 || len(c.VPC.Interfaces) != 2 {
		t.Errorf("got port %d, networks %v, interfaces %v", c.Port, c.Networks, c.VPC.Interfaces)
	}
	if len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "did you mean ZTGATE_NETWORK?") {
		t.Errorf("warnings %q, want one that names ZTGATE_NETWORK", c.Warnings)
	}
}

func TestSecretFromFile(t *testing.T) {
	path := writeFile(t, " text\n")
	c, err := Load(Sources{Environ: []string{"ZEROTIER_IDENTITY_SECRET=file:" + path}, NoFile: true})
	if err != nil {
		t.Fatal(err)
	}
	if c.IdentitySecret != "text" {
		t.Errorf("secret %q, want the content of the file", c.IdentitySecret)
	}
	for _, v := range c.Values() {
		if v.Key == "identity.secret" && v.Value != "(secret)" {
			t.Errorf("secret is shown: %v", v.Value)
		}
	}
}

func TestLoadErrors(t *testing.T) {
	tests := []struct {
		name, file string
		env        []string
		flags      map[string][]string
		want       string
	}{
		{"typo", "vpc: {sorces: [10.0.0.0/8]}", nil, nil, "unknown key vpc.sorces: did you mean vpc.sources?"},
		{"wrong section", "sources: [10.0.0.0/8]", nil, nil, "did you mean vpc.sources?"},
		{"typo in network", "networks: [{id: 8056c2e21c000001, masqerade: true}]", nil, nil, "did you mean networks.masquerade?"},
		{"typo in rule", "policy: {rules: [{acton: drop}]}", nil, nil, "did you mean policy.rules.action?"},
		{"far off", "xyzzy: 1", nil, nil, "unknown key xyzzy: known here are"},
		{"reserved", "vpc: {packet: x}", nil, nil, "vpc.packet is not supported yet"},
		{"forward without target", "forwards: [{listen: tcp/8443}]", nil, nil, "has no to"},
		{"forward protocol", "forwards: [{listen: sctp/8443, to: 10.0.0.10:443}]", nil, nil, "give tcp/PORT"},
		{"forward families", "forwards: [{listen: \"tcp/[fd00::1]:1\", to: 10.0.0.10:443}]", nil, nil, "different families"},
		{"map lengths", "maps: [{real: 10.0.0.0/24, alias: 10.77.0.0/16}]", nil, nil, "same length"},
		{"map without alias", "maps: [{real: 10.0.0.0/24}]", nil, nil, "give real and alias"},
		{"rule direction", "policy: {rules: [{action: drop, direction: up}]}", nil, nil, "use one of out, in"},
		{"port sharing", "nat: {port_sharing: some}", nil, nil, "none, by_destination"},
		{"reserved ingress", "vpc: {ingress: geneve}", nil, nil, `"geneve" is not supported yet: use tun`},
		{"packets of no interface", "vpc: {ingress: packet}", nil, nil, "packet takes packets from one interface"},
		{"packets of two interfaces", "vpc: {ingress: packet, interfaces: [eth0, eth1]}", nil, nil, "packet takes packets from one interface"},
		{"unknown ingress", "vpc: {ingress: tnu}", nil, nil, "use tun"},
		{"network", "networks: [8056c2e2]", nil, nil, "want 16 hex digits"},
		{"network twice", "networks: [8056c2e21c000001, 8056c2e21c000001]", nil, nil, "listed twice"},
		{"networks no list", "networks: {id: 8056c2e21c000001}", nil, nil, "want a list"},
		{"port", "port: 70000", nil, nil, "number from 0 to 65535"},
		{"port flag", "", nil, map[string][]string{"port": {"http"}}, `port (from flag --port): "http"`},
		{"source", "", []string{"ZTGATE_SOURCE=172.31.0.1/16"}, nil, "host bits are set: write 172.31.0.0/16"},
		{"no list", "vpc: [1]", nil, nil, "vpc: want keys with values"},
		{"list for scalar", "home: [a, b]", nil, nil, "home: want one value"},
		{"key twice", "home: /a\nhome: /b", nil, nil, "home"},
		{"two documents", "home: /a\n---\nhome: /b", nil, nil, "more than one document"},
		{"no yaml", "home: [", nil, nil, "read "},
		{"target", "targets: [\"10.0.0.1:443\"]", nil, nil, "give tcp://HOST:PORT"},
		{"many targets", "targets: [" + strings.Repeat("\"icmp://10.0.0.1\", ", 64) + "\"icmp://10.0.0.2\"]", nil, nil, "65 are too many"},
		{"target address", "targets: [\"tcp://10.0.0.300:443\"]", nil, nil, "an IPv4 address has four numbers up to 255"},
		{"policy", "policy: {default: deny}", nil, nil, "use one of accept, drop, reject"},
		{"rule without action", "policy: {rules: [{to: 10.0.0.0/8}]}", nil, nil, "has no action"},
		{"ports without proto", "policy: {rules: [{action: drop, ports: [1]}]}", nil, nil, "set proto to tcp or udp"},
		{"empty match", "policy: {rules: [{action: accept, to: []}]}", nil, nil, "is empty"},
		{"bool", "controller: maybe", nil, nil, "use true or false"},
		{"level", "log: {level: loud}", nil, nil, "use one of debug, info, warn, error"},
		{"listen", "listen: here", nil, nil, "give ADDRESS:PORT"},
		{"small mtu", "", []string{"ZTGATE_MTU=1"}, nil, "number from 1280 to 65535, or 0"},
		{"list for one", "policy: {rules: [{action: [drop]}]}", nil, nil, "policy.rules.action: want one value"},
		{"mtu", "vpc: {mtu: 500}", nil, nil, "number from 1280"},
		{"tun", "vpc: {tun: \"a b\"}", nil, nil, "no interface name"},
		{"mode", "", []string{"ZEROTIER_ONE_GATEWAY_MODE=up"}, nil, "use inbound, outbound or both"},
		{"public alone", "identity: {public: x}", nil, nil, "give both or none"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			flags := map[string][]string{"config": {writeFile(t, tt.file)}}
			for k, v := range tt.flags {
				flags[k] = v
			}
			_, err := Load(Sources{Flags: flags, Environ: tt.env})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
			if fault.ExitCode(err) != 2 {
				t.Errorf("exit code %d, want 2", fault.ExitCode(err))
			}
		})
	}
}

func TestMissingFile(t *testing.T) {
	_, err := Load(Sources{Flags: map[string][]string{"config": {"/nonexistent/ztgate.yaml"}}})
	if fault.ExitCode(err) != 2 {
		t.Errorf("a named file that is missing: %v, want a usage error", err)
	}
}

func TestNoFile(t *testing.T) {
	if _, err := Load(Sources{Flags: map[string][]string{"config": {""}}, Environ: []string{"ZTGATE_CONFIG=/nonexistent"}}); err != nil {
		t.Errorf("an empty name switches the file off: %v", err)
	}
}

func TestAllErrorsAtOnce(t *testing.T) {
	_, err := Load(Sources{Flags: map[string][]string{"config": {writeFile(t, "port: x\nmtu: 1\nlisten: y\n")}}})
	if err == nil || len(strings.Split(err.Error(), "\n")) != 3 {
		t.Errorf("got %v, want three lines", err)
	}
}

func TestSettingsTable(t *testing.T) {
	keys, flags := map[string]bool{}, map[string]bool{}
	for _, s := range settings {
		if keys[s.key] || s.flag != "" && flags[s.flag] {
			t.Errorf("%s is there twice", s.key)
		}
		keys[s.key], flags[s.flag] = true, true
		if s.flag != "" && s.usage == "" {
			t.Errorf("%s has no usage", s.key)
		}
	}
}

func FuzzYAML(f *testing.F) {
	f.Add(goodFile)
	f.Add("a: &a [*a]")
	f.Add("networks: [{id: *x}]")
	f.Fuzz(func(t *testing.T, text string) {
		l := newLoader(Sources{})
		for _, s := range settings {
			if err := s.set(l.cfg, s.def); err != nil {
				t.Fatal(err)
			}
		}
		l.yaml("f", []byte(text))
		if len(l.errs) == 0 {
			l.finish().Values()
		}
	})
}
