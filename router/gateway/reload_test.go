package gateway_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"ztgate/internal/nettest"
	"ztgate/internal/testwait"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/gateway"
	"ztgate/router/gateway/gatewaytest"
	"ztgate/router/host/tuntap"
	"ztgate/zerotier/ztnode"
)

// change is a change of the configuration file, and what a running gateway makes of
// it. A file is the common one with these lines instead of its own of the same key.
type change struct {
	before, after string
	said          []string                // keys, if others than the key itself
	probe         func(*reloading) string // of what is in force; nil = the values of the configuration
	was, is       string                  // results of probe, for keys that apply
}

// reloading is a gateway whose configuration changes.
type reloading struct {
	*started
	t      *testing.T
	nl     *netlink.Handle
	node   *gatewaytest.Node
	dir    string
	common []string
}

func (r *reloading) file() string { return filepath.Join(r.dir, "ztgate.yaml") }

// write makes a file of the common lines and others, which replace those of the same
// top-level key.
func (r *reloading) write(lines string) {
	r.t.Helper()
	text := lines + "\n"
	for _, c := range r.common {
		key, _, _ := strings.Cut(c, ":")
		if !strings.HasPrefix(lines, key+":") && !strings.Contains(lines, "\n"+key+":") {
			text += c + "\n"
		}
	}
	if err := os.WriteFile(r.file(), []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

func (r *reloading) reload() control.Reloaded {
	r.t.Helper()
	got, err := r.client.Reload(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	return got
}

// values returns the configuration as the gateway has it.
func (r *reloading) values() map[string]string {
	r.t.Helper()
	c, err := r.client.Config(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	out := map[string]string{}
	for _, v := range c.Values {
		out[v.Key] = fmt.Sprint(v.Value)
	}
	return out
}

// explain asks what becomes of a packet: from a VPC host, or from a member with @.
func explain(proto, from, to string) func(*reloading) string {
	return func(r *reloading) string {
		r.t.Helper()
		q := control.Question{Protocol: proto}
		if s, ok := strings.CutPrefix(from, "@"); ok {
			from, q.FromOverlay, q.Network = s, true, nwid
		}
		q.Source, q.Destination = netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
		if q.FromOverlay {
			from = "@" + from
		}
		x, err := r.client.Explain(r.t.Context(), q)
		if err != nil {
			r.t.Fatal(err)
		}
		if x.Verdict != "forward" {
			return x.Verdict
		}
		return strings.Join([]string{x.Verdict, x.Source.Addr().String(), "to", x.Destination.String()}, " ")
	}
}

// told returns what the host of a forward is told of its clients.
func told(r *reloading) string {
	r.t.Helper()
	x, err := r.client.Explain(r.t.Context(), control.Question{Protocol: "tcp", Source: netip.MustParseAddrPort("172.31.0.10:4000"), Destination: netip.MustParseAddrPort("10.147.17.5:8443")})
	if err != nil {
		r.t.Fatal(err)
	}
	return regexp.MustCompile(`PROXY v[12]`).FindString(x.Detail)
}

func joined(r *reloading) string {
	r.t.Helper()
	nets, err := r.client.Networks(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	var out []string
	for _, n := range nets.Networks {
		out = append(out, n.ID.String()[:4])
	}
	return strings.Join(out, " ")
}

func targets(r *reloading) string {
	r.t.Helper()
	st, err := r.client.Status(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	var out []string
	for _, x := range st.Targets {
		out = append(out, x.Target)
	}
	return strings.Join(out, " ")
}

func resolved(name string) func(*reloading) string {
	return func(r *reloading) string {
		r.t.Helper()
		x, err := r.client.Resolve(r.t.Context(), control.ResolveRequest{Name: name})
		if err != nil {
			return "nobody is asked"
		}
		out := x.Code
		for _, record := range x.Records {
			out += " " + record.Value
		}
		return out
	}
}

// names tells of the name server for clients.
func names(r *reloading) string {
	r.t.Helper()
	st, err := r.client.Status(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	if st.DNS == nil {
		return "off"
	}
	var out []string
	for _, l := range st.DNS.Listen {
		out = append(out, l.Address.String()+l.Error)
	}
	for _, d := range st.DNS.Domains {
		out = append(out, d.Domain+">"+d.Servers[0].String())
	}
	return strings.Join(out, " ")
}

func sealed(r *reloading) string { return r.node.SealedHello().String() }

func installed(prefix string) func(*reloading) string {
	return func(r *reloading) string {
		r.t.Helper()
		for _, p := range table(r.t, r.nl) {
			if p == prefix+" ztgt9" {
				return "installed"
			}
		}
		return "not installed"
	}
}

// changes has a change of every key of the file.
var changes = func() map[string]change {
	tcp := func(to string) func(*reloading) string { return explain("tcp", "172.31.0.10:4000", to) }
	https, masked, kept := tcp("10.0.0.10:443"), "forward 10.147.17.5 to 10.0.0.10:443", "forward 172.31.0.10 to 10.0.0.10:443"
	https6 := explain("tcp", "[fd00:31::10]:4000", "[fd00:10::10]:443")
	rule := func(s string) string { return "policy: {rules: [{" + s + "}]}" }
	const net1, net2 = `"8056c2e21c000001"`, `"1111111111000002"`
	const db = "db.8056c2e21c000001.zt.internal"
	own := tcp("10.147.17.5:8443")
	out := map[string]change{
		"networks":               {after: "networks: [" + net1 + ", " + net2 + "]", probe: joined, was: "8056", is: "1111 8056"},
		"networks.id":            {before: "networks: [{id: " + net1 + "}, {id: " + net2 + "}]", after: "networks: [{id: " + net1 + "}]", said: []string{"networks"}, probe: joined, was: "1111 8056", is: "8056"},
		"networks.masquerade":    {after: "networks: [{id: " + net1 + ", masquerade: false}]", probe: https, was: masked, is: kept},
		"networks.allow_global":  {after: "networks: [{id: " + net1 + ", allow_global: true}]", probe: installed("8.8.8.0/24"), was: "not installed", is: "installed"},
		"networks.allow_default": {after: "networks: [{id: " + net1 + ", allow_default: false}]", said: []string{}},
		"nat.masquerade":         {after: "nat: {masquerade: false}", probe: https, was: masked, is: kept},
		"nat.masquerade6":        {after: "nat: {masquerade6: true}", probe: https6, was: "forward fd00:31::10 to [fd00:10::10]:443", is: "forward fd00:147::5 to [fd00:10::10]:443"},
		"nat.exempt":             {after: "nat: {exempt: [10.0.0.0/24]}", probe: https, was: masked, is: kept},
		"nat.addresses":          {after: "nat: {addresses: [10.50.0.3]}", probe: https, was: masked, is: "forward 10.50.0.3 to 10.0.0.10:443"},
		"policy.default":         {after: "policy: {default: drop}", probe: https, was: masked, is: "drop"},
		"policy.allow":           {after: "policy: {allow: [\"tcp:10.0.0.10:22\"]}", said: []string{"policy.default", "policy.allow"}, probe: https, was: masked, is: "drop"},
		"policy.rules.action":    {before: rule("action: accept"), after: rule("action: reject"), probe: https, was: masked, is: "reject"},
		"policy.rules.proto":     {before: rule("action: drop, proto: udp"), after: rule("action: drop, proto: tcp"), probe: https, was: masked, is: "drop"},
		"policy.rules.from":      {before: rule("action: drop, from: 172.31.0.11"), after: rule("action: drop, from: 172.31.0.10"), probe: https, was: masked, is: "drop"},
		"policy.rules.to":        {before: rule("action: drop, to: 10.0.0.11"), after: rule("action: drop, to: 10.0.0.10"), probe: https, was: masked, is: "drop"},
		"policy.rules.ports":     {before: rule("action: drop, proto: tcp, ports: 80"), after: rule("action: drop, proto: tcp, ports: 443"), probe: https, was: masked, is: "drop"},
		"policy.rules.direction": {before: rule("action: drop, direction: in"), after: rule("action: drop, direction: out"), probe: https, was: masked, is: "drop"},
		"policy.rules.network":   {before: rule("action: drop, network: " + net2), after: rule("action: drop, network: " + net1), probe: https, was: masked, is: "drop"},
		"sealed_hello":           {after: "sealed_hello: auto", probe: sealed, was: "off", is: "auto"},
		"targets":                {after: "targets: [\"tcp://10.0.0.10:443\"]", probe: targets, is: "tcp://10.0.0.10:443"},
		"forwards.listen": {before: `forwards: [{listen: tcp/8444, to: "10.0.0.10:443"}]`, after: `forwards: [{listen: tcp/8443, to: "10.0.0.10:443"}]`,
			probe: own, was: "local", is: "forward 10.147.17.5 to 10.0.0.10:443"},
		"forwards.to": {before: `forwards: [{listen: tcp/8443, to: "10.0.0.11:443"}]`, after: `forwards: [{listen: tcp/8443, to: "10.0.0.10:443"}]`,
			probe: own, was: "forward 10.147.17.5 to 10.0.0.11:443", is: "forward 10.147.17.5 to 10.0.0.10:443"},
		"forwards.masquerade": {before: "nat: {exempt: [10.0.0.0/24]}\n" + `forwards: [{listen: "tcp/10.147.17.5:8443", to: "10.0.0.10:443"}]`, after: "nat: {exempt: [10.0.0.0/24]}\n" + `forwards: [{listen: "tcp/10.147.17.5:8443", to: "10.0.0.10:443", masquerade: false}]`,
			probe: own, was: "forward 10.147.17.5 to 10.0.0.10:443", is: "forward 172.31.0.10 to 10.0.0.10:443"},
		"forwards.from": {before: `forwards: [{listen: "tcp/10.147.17.5:2222", to: "172.31.0.10:22"}]`, after: `forwards: [{listen: "tcp/10.147.17.5:2222", to: "172.31.0.10:22", from: overlay}]`,
			probe: explain("tcp", "@10.147.17.9:4000", "10.147.17.5:2222"), was: "drop", is: "forward 10.147.17.5 to 172.31.0.10:22"},
		"forwards.proxy_protocol": {before: `forwards: [{listen: "tcp/10.147.17.5:8443", to: "10.0.0.10:443"}]`, after: `forwards: [{listen: "tcp/10.147.17.5:8443", to: "10.0.0.10:443", proxy_protocol: v2}]`,
			probe: told, was: "", is: "PROXY v2"},
		"forwards.accept_proxy": {before: `forwards: [{listen: "tcp/10.147.17.5:8443", to: "10.0.0.10:443", accept_proxy: 172.31.0.10}]`, after: `forwards: [{listen: "tcp/10.147.17.5:8443", to: "10.0.0.10:443", accept_proxy: 172.31.0.11}]`,
			probe: own, was: "forward 10.147.17.5 to 10.0.0.10:443", is: "reject"},
		"maps.network": {before: `maps: [{hosts: overlay, real: 10.0.0.0/24, alias: 10.88.0.0/24, network: ` + net2 + `}]`, after: `maps: [{hosts: overlay, real: 10.0.0.0/24, alias: 10.88.0.0/24, network: ` + net1 + `}]`,
			probe: tcp("10.88.0.10:443"), was: "reject", is: masked},
		"maps.hosts": {before: `maps: [{hosts: vpc, real: 172.31.0.0/24, alias: 10.77.0.0/24}]`, after: `maps: [{hosts: overlay, real: 172.31.0.0/24, alias: 10.77.0.0/24}]`,
			probe: explain("tcp", "@10.0.0.10:4000", "10.77.0.10:22"), was: "forward 10.0.0.10 to 172.31.0.10:22", is: "drop"},
		"maps.real": {before: `maps: [{hosts: overlay, real: 10.0.1.0/24, alias: 10.88.0.0/24}]`, after: `maps: [{hosts: overlay, real: 10.0.0.0/24, alias: 10.88.0.0/24}]`,
			probe: tcp("10.88.0.10:443"), was: "reject", is: masked},
		"maps.alias": {before: `maps: [{hosts: overlay, real: 10.0.0.0/24, alias: 10.89.0.0/24}]`, after: `maps: [{hosts: overlay, real: 10.0.0.0/24, alias: 10.88.0.0/24}]`,
			probe: tcp("10.88.0.10:443"), was: "reject", is: masked},
		"physical.network":      {after: "physical: [{network: 10.0.0.0/8}]"},
		"physical.mtu":          {after: "physical: [{network: 10.0.0.0/8, mtu: 1400}]"},
		"physical.blacklist":    {after: "physical: [{network: 10.0.0.0/8, blacklist: true}]"},
		"physical.trusted_path": {after: "physical: [{network: 10.0.0.0/8, trusted_path: 5}]"},
		"virtual.id":            {after: `virtual: [{id: "a1b2c3d4e5"}]`},
		"virtual.try":           {after: `virtual: [{id: "a1b2c3d4e5", try: ["198.51.100.7:9993"]}]`},
		"virtual.blacklist":     {after: `virtual: [{id: "a1b2c3d4e5", blacklist: [10.0.0.0/8]}]`},
		"identity.public":       {after: "identity: {public: x, secret: y}", said: []string{"identity.secret", "identity.public"}},
		"webhook.url": {after: "controller: true\nwebhook: {url: https://hooks.example/, secret: whsec_" + strings.Repeat("a", 32) + "}",
			said: []string{"controller", "webhook.url", "webhook.secret"}},
		"webhook.secret": {after: "controller: true\nwebhook: {url: https://hooks.example/, secret: whsec_" + strings.Repeat("b", 32) + "}",
			said: []string{"controller", "webhook.url", "webhook.secret"}},
		"dns.listen": {after: "dns: {listen: [172.31.0.1]}", probe: names, was: "off", is: "172.31.0.1:53"},
		"dns.upstreams": {before: `dns: {listen: ["172.31.0.1:54"]}`, after: `dns: {listen: ["172.31.0.1:54"], upstreams: [172.31.0.2]}`,
			probe: names, was: "172.31.0.1:54", is: "172.31.0.1:54 >172.31.0.2:53"},
		"dns.rate_per_client": {after: "dns: {rate_per_client: 7}"},
		"dns.zone": {before: "dns: {hosts: [{name: db, network: " + net1 + ", addresses: [10.0.0.10]}]}", after: "dns: {zone: lan, hosts: [{name: db, network: " + net1 + ", addresses: [10.0.0.10]}]}",
			probe: resolved("db.8056c2e21c000001.lan"), was: "nobody is asked", is: "NOERROR 10.0.0.10"},
		"dns.hosts.name": {before: "dns: {hosts: [{name: web, network: " + net1 + ", addresses: [10.0.0.10]}]}", after: "dns: {hosts: [{name: db, network: " + net1 + ", addresses: [10.0.0.10]}]}",
			probe: resolved(db), was: "NXDOMAIN", is: "NOERROR 10.0.0.10"},
		"dns.hosts.network": {before: "dns: {hosts: [{name: db, network: " + net2 + ", addresses: [10.0.0.10]}]}", after: "dns: {hosts: [{name: db, network: " + net1 + ", addresses: [10.0.0.10]}]}",
			probe: resolved(db), was: "NXDOMAIN", is: "NOERROR 10.0.0.10"},
		"dns.hosts.addresses": {before: "dns: {hosts: [{name: db, network: " + net1 + ", addresses: [10.0.0.10, 172.31.0.9, 127.0.0.1]}]}", after: "dns: {hosts: [{name: db, network: " + net1 + ", addresses: [10.0.0.11]}]}",
			probe: resolved(db), was: "NOERROR 10.0.0.10", is: "NOERROR 10.0.0.11"},
		"networks.allow_dns": {before: "networks: [{id: " + net1 + "}]\ndns: {listen: [\"172.31.0.1:54\"]}", after: "networks: [{id: " + net1 + ", allow_dns: true}]\ndns: {listen: [\"172.31.0.1:54\"]}",
			probe: names, was: "172.31.0.1:54", is: "172.31.0.1:54 office.example>10.0.0.53:53"},
	}
	for key, value := range map[string]string{
		"home": "/nonexistent", "socket": "/nonexistent/s", "port": "9994", "listen": "127.0.0.1:9", "log.level": "debug", "log.format": "json",
		"planet": "/nonexistent", "controller": "true", "api.listen": "127.0.0.1:9", "api.allow_from": "[10.0.0.0/8]", "identity.secret": "x", "tcp_relay": "off", "low_bandwidth": "true",
		"port_mapping": "false", "vpc.tun": "ztgt8", "vpc.sources": "[10.99.0.0/16]", "vpc.address": "[100.127.255.2/32]", "vpc.nat_address": "[10.99.0.7, host]", "vpc.mtu": "1500", "vpc.io_uring": "off", "exit": "true",
		"vpc.interfaces": "[eth7]", "nat.max_flows_per_client": "100", "nat.max_ports_per_client": "100", "nat.max_half_open": "100",
		"nat.flow_rate_per_client": "100", "nat.port_sharing": "by_destination", "nat.filtering": "endpoint_independent", "nat.pickup": "false",
		"nat.window_check": "false", "nat.port_rest": "3m", "nat.max_flows": "4096", "nat.timeouts.tcp_established": "3h",
		"nat.timeouts.tcp_transitory": "5m", "nat.timeouts.tcp_opening": "5m", "nat.timeouts.tcp_half_closed": "5m", "nat.timeouts.tcp_closing": "5m",
		"nat.timeouts.tcp_reset": "5m", "nat.timeouts.udp_unanswered": "3m", "nat.timeouts.udp": "6m", "nat.timeouts.icmp": "2m",
	} {
		section, leaf, nested := strings.Cut(key, ".")
		if section == "vpc" {
			lines := map[string]string{"tun": "ztgt9", "sources": "[172.31.0.0/16, fd00:31::/64]"}
			lines[leaf] = value
			out[key] = change{after: "vpc:"}
			for k, v := range lines {
				c := out[key]
				c.after += "\n  " + k + ": " + v
				out[key] = c
			}
			continue
		}
		if !nested {
			out[key] = change{after: key + ": " + value}
			continue
		}
		out[key] = change{after: section + ": {" + strings.ReplaceAll(leaf, ".", ": {") + ": " + value + strings.Repeat("}", strings.Count(leaf, ".")+1)}
	}
	return out
}()

// sole are keys whose other values this program or test can't have.
var sole = []string{"node", "vpc.ingress"}

// TestReloadEveryKey: every key of the file is changed in a running gateway. What
// reload says is in force is, and what waits for a restart isn't.
func TestReloadEveryKey(t *testing.T) { inNamespace(t, testReloadEveryKey) }

func testReloadEveryKey(t *testing.T, nl *netlink.Handle) {
	dir := shortDir(t)
	r := &reloading{t: t, nl: nl, dir: dir, common: []string{
		"home: " + dir, "socket: " + filepath.Join(dir, "s"), `listen: ""`, `networks: ["8056c2e21c000001"]`, "port: 0",
		"vpc: {tun: ztgt9, sources: [172.31.0.0/16, fd00:31::/64]}",
	}}
	r.write("policy: {default: accept}")
	cfg, err := config.Load(config.Sources{Flags: map[string][]string{"config": {r.file()}}})
	if err != nil {
		t.Fatal(err)
	}
	vpc, err := tuntap.OpenTUN("vpc0", tuntap.Writev)
	if err != nil {
		t.Fatal(err)
	}
	defer vpc.Close()
	setUp(t, nl, "vpc0", "172.31.0.1/16", "fd00:31::1/64")
	for _, key := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/net/"+key, []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}
	node := gatewaytest.NewNode()
	node.SetOnline(true)
	node.SetOffice(gatewaytest.NewOffice())
	n := okNetwork()
	n.Addresses = nettest.Prefixes("10.147.17.5/24", "fd00:147::5/64")
	n.Routes = append(n.Routes, ztnode.Route{Target: netip.MustParsePrefix("fd00:10::/64"), Via: netip.MustParseAddr("fd00:147::9")},
		ztnode.Route{Target: netip.MustParsePrefix("8.8.8.0/24"), Via: netip.MustParseAddr("10.147.17.9")},
		ztnode.Route{Target: netip.MustParsePrefix("10.50.0.0/28"), Via: netip.MustParseAddr("10.147.17.5")})
	n.DNSDomain, n.DNSServers = "Office.Example.", []netip.Addr{netip.MustParseAddr("10.0.0.53")}
	node.SetNetwork(n)
	r.node, r.started = node, startGateway(t, cfg, node)
	defer r.end(t)
	testwait.For(t, patience, "the network", func() bool { return installed("10.0.0.0/24")(r) == "installed" })
	for _, key := range config.Keys() {
		t.Run(key.Name, func(t *testing.T) {
			r.t = t
			c, ok := changes[key.Name]
			if slices.Contains(sole, key.Name) {
				return
			}
			if !ok {
				t.Fatal("no change of this key is tried")
			}
			said := c.said
			if said == nil {
				said = []string{key.Name}
				if key.Section != "" {
					said = []string{key.Section}
				}
			}
			if c.before == "" {
				c.before = "policy: {default: accept}"
			}
			r.write(c.before)
			r.reload()
			if again := r.reload(); len(again.Changed)+len(again.Restart) > 0 {
				t.Errorf("without a change: %+v", again)
			}
			values := r.values()
			if c.probe != nil {
				if got := c.probe(r); got != c.was {
					t.Errorf("before: %s, want %s", got, c.was)
				}
			}
			r.write(c.after)
			got := r.reload()
			changed, waits := said, []string{}
			if !key.Live {
				changed, waits = waits, changed
			}
			if d := cmp.Diff(changed, got.Changed); d != "" {
				t.Errorf("changed: %s", d)
			}
			if d := cmp.Diff(waits, got.Restart); d != "" {
				t.Errorf("needs a restart: %s", d)
			}
			if c.probe != nil {
				if got := c.probe(r); got != c.is {
					t.Errorf("after: %s, want %s", got, c.is)
				}
			}
			now := r.values()
			if same := cmp.Equal(values, now); same == (key.Live && len(said) > 0) {
				t.Errorf("the configuration in force is the same: %v\n%s", same, cmp.Diff(values, now))
			}
			if again := r.reload(); len(again.Changed) > 0 || !slices.Equal(again.Restart, waits) {
				t.Errorf("once more: %+v", again)
			}
		})
	}
	r.t = t
	for key := range changes {
		if !slices.ContainsFunc(config.Keys(), func(k config.Key) bool { return k.Name == key }) {
			t.Errorf("there is no key %s", key)
		}
	}
}

// TestReloadWithoutFile: a configuration file that is gone or empty opens nothing, at
// a reload or at the next start.
func TestReloadWithoutFile(t *testing.T) { inNamespace(t, testReloadWithoutFile) }

func testReloadWithoutFile(t *testing.T, nl *netlink.Handle) {
	dir := shortDir(t)
	r := &reloading{t: t, nl: nl, dir: dir, common: []string{
		"home: " + dir, "socket: " + filepath.Join(dir, "s"), `listen: ""`, "port: 0", "vpc: {tun: ztgt9}", `networks: ["8056c2e21c000001", "1111111111000002"]`}}
	r.write("policy: {default: drop}")
	sources := config.Sources{Flags: map[string][]string{"config": {r.file()}}}
	cfg, err := config.Load(sources)
	if err != nil {
		t.Fatal(err)
	}
	node := gatewaytest.NewNode()
	r.started = startGateway(t, cfg, node)
	refused := func(what, want string) {
		t.Helper()
		_, err := r.client.Reload(t.Context())
		if fault.ExitCode(err) != 2 || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", what, err)
		}
		if v := r.values()["policy.default"]; v != "drop" {
			t.Errorf("%s: the policy is %s now", what, v)
		}
	}
	for _, text := range []string{"", "# nothing\n", "---\n", "null\n"} {
		if err := os.WriteFile(r.file(), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		refused(fmt.Sprintf("a file with %q", text), "is empty")
	}
	if err := os.Remove(r.file()); err != nil {
		t.Fatal(err)
	}
	refused("no file", "is gone")
	testwait.For(t, patience, "the networks", func() bool { return joined(r) == "1111 8056" })
	if _, err := r.client.Join(t.Context(), (second + 1).String()); err != nil {
		t.Fatal(err)
	}
	r.end(t)
	flags := map[string][]string{"home": {dir}, "socket": {filepath.Join(dir, "s")}, "listen": {""}, "tun": {"ztgt9"}}
	again := func(flags map[string][]string, noFile bool) error {
		t.Helper()
		cfg, err := config.Load(config.Sources{Flags: flags, NoFile: noFile})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		stop() // what is refused is refused before that
		return gateway.RunWith(ctx, cfg, slog.New(slog.DiscardHandler), gatewaytest.NewNode().Start)
	}
	if err := again(flags, true); fault.ExitCode(err) != 2 || !strings.Contains(err.Error(), r.file()+" was in force") || !strings.Contains(err.Error(), "--config=") {
		t.Errorf("a start without the file: %v", err)
	}
	// A network that the file doesn't name any more is left, one joined by command is not.
	r.write("policy: {default: drop}\nnetworks: [\"8056c2e21c000001\"]")
	if cfg, err = config.Load(sources); err != nil {
		t.Fatal(err)
	}
	node = gatewaytest.NewNode()
	for _, id := range []ztnode.NetworkID{nwid, second, second + 1} {
		if err := node.Join(id); err != nil {
			t.Fatal(err)
		}
	}
	r.started = startGateway(t, cfg, node)
	if got := joined(r); got != "1111 8056" || slices.ContainsFunc(node.Networks(), func(n ztnode.Network) bool { return n.ID == second }) {
		t.Errorf("joined: %s", got)
	}
	// By command it can't be left for good.
	if _, err := r.client.Leave(t.Context(), nwid.String()); fault.ExitCode(err) != 2 ||
		!strings.Contains(err.Error(), "networks, from file "+r.file()) || !strings.Contains(err.Error(), "ztgate reload") {
		t.Errorf("leave of a network of the file: %v", err)
	}
	if _, err := r.client.Leave(t.Context(), (second + 1).String()); err != nil || joined(r) != "8056" {
		t.Errorf("leave of one that was joined by command: %v, joined %s", err, joined(r))
	}
	r.end(t)
	flags["config"] = []string{""}
	if err := again(flags, false); err != nil {
		t.Errorf("a start without a file on purpose: %v", err)
	}
	delete(flags, "config")
	if err := again(flags, true); err != nil {
		t.Errorf("the one after it: %v", err)
	}
}
