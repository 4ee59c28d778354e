package gateway_test

import (
	"net/http"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/internal/testwait"
	"ztgate/router/control"
	"ztgate/zerotier/ztnode"
)

// nft runs a script; there are no rules before and after it in force.
func nft(t *testing.T, script string) {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader("flush ruleset\n" + script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
}

// TestFirewall: a firewall of this host that cuts clients off makes unready, names the chain
// and the rule that helps, which then does; one that lets them through says nothing.
func TestFirewall(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip(err)
	}
	inNamespace(t, testFirewall)
}

func testFirewall(t *testing.T, nl *netlink.Handle) {
	vpcHost(t, nl)
	_, cfg, _, _ := startInVPC(t, nil)
	chain := func(family, table, name, hook, policy, rules string) string {
		if hook == "ingress" {
			hook = "ingress device vpc0"
		}
		return "table " + family + " " + table + " {\n chain " + name + " {\n type filter hook " + hook + " priority 0; policy " + policy + ";\n" + rules + "\n}\n}\n"
	}
	const (
		in   = `iifname "vpc0" oifname "ztgt5"`
		back = `iifname "ztgt5" oifname "vpc0"`
	)
	docker := chain("ip", "filter", "FORWARD", "forward", "drop", "jump DOCKER-USER\n ct state established,related accept")
	docker = strings.Replace(docker, "chain FORWARD", "chain DOCKER-USER { }\n chain FORWARD", 1)
	for _, tt := range []struct {
		name, rules string
		says        []string // nil = clients pass
	}{
		{"docker", docker, []string{"chain ip filter FORWARD (hook forward) drops by policy",
			"run iptables -I DOCKER-USER -i vpc0 -o ztgt5 -j ACCEPT && iptables -I DOCKER-USER -i ztgt5 -o vpc0 -j ACCEPT"}},
		{"policy of iptables", chain("ip", "filter", "FORWARD", "forward", "drop", ""), []string{"run iptables -I FORWARD -i vpc0 -o ztgt5 -j ACCEPT"}},
		{"policy of nft", chain("inet", "fw", "f", "forward", "drop", "ct state established,related accept"), []string{"chain inet fw f (hook forward) drops by policy",
			`nft 'insert rule inet fw f iifname "vpc0" oifname "ztgt5" accept; insert rule inet fw f iifname "ztgt5" oifname "vpc0" accept'`}},
		{"rule", chain("inet", "fw", "f", "forward", "accept", in+" drop"), []string{"a rule drops them, in a chain that starts at inet fw f (hook forward)"}},
		{"rule rejects", chain("inet", "fw", "f", "forward", "accept", in+" reject"), []string{"inet fw f"}},
		{"one of two chains", chain("inet", "fw", "f", "forward", "drop", in+" accept\n"+back+" accept") + chain("ip", "other", "g", "forward", "drop", ""),
			[]string{"chain ip other g (hook forward), or inet fw f", "run nft 'insert rule ip other g"}},
		{"only the way back is open", chain("inet", "fw", "f", "forward", "drop", back+" accept"), []string{"inet fw f"}},
		{"raw", chain("ip", "raw", "PREROUTING", "prerouting", "accept", `iifname "vpc0" drop`), []string{"ip raw PREROUTING (hook prerouting)", "nft list chain ip raw PREROUTING"}},
		{"ingress", chain("netdev", "fw", "i", "ingress", "accept", "ip daddr 10.0.0.0/24 drop"), []string{"netdev fw i (hook ingress)"}},
		{"port", chain("ip", "fw", "f", "forward", "accept", "tcp dport 443 drop"), []string{"ip fw f", "tcp://10.0.0.10:443"}},
		{"nothing", "", nil},
		{"accepts all", chain("inet", "fw", "f", "forward", "accept", "counter"), nil},
		{"drops, and accepts ours", chain("inet", "fw", "f", "forward", "drop", in+" accept\n"+back+" accept"), nil},
		{"docker, and accepts ours", strings.Replace(docker, "DOCKER-USER { }", "DOCKER-USER { "+in+" accept; "+back+" accept; }", 1), nil},
		{"accepts only what is served", chain("inet", "fw", "f", "forward", "drop", "ct state established,related accept\n"+in+" ip daddr 10.0.0.10 tcp dport 443 tcp flags & (syn|ack) == syn ct state new accept"), nil},
		{"drops others", chain("inet", "fw", "f", "forward", "accept", "iifname \"eth9\" drop"), nil},
		{"drops only IPv6", chain("ip6", "filter", "FORWARD", "forward", "drop", ""), nil},
		{"drops what ends here", chain("inet", "fw", "i", "input", "accept", "iifname { vpc0, ztgt5 } drop"), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			began := time.Now()
			nft(t, tt.rules)
			var h control.Health
			code := 0
			if tt.says == nil {
				if testwait.Poll(2500*time.Millisecond, func() bool { code, h = readiness(t, cfg); return h.State != control.Ready }) {
					t.Errorf("%d: %+v", code, h)
				}
				return
			}
			if !testwait.Poll(patience, func() bool {
				code, h = readiness(t, cfg)
				return code == http.StatusServiceUnavailable && slices.Contains(failedChecks(h), "firewall")
			}) {
				t.Fatalf("still %d: %+v", code, h)
			}
			t.Logf("after %v: %s", time.Since(began).Round(time.Millisecond), h.Failed()[0])
			for _, says := range tt.says {
				if !strings.Contains(h.Failed()[0].String(), says) {
					t.Errorf("%q, want it to say %q", h.Failed()[0], says)
				}
			}
			began = time.Now()
			if command, ok := strings.CutPrefix(h.Failed()[0].Remedy, "run nft '"); ok {
				if out, err := exec.Command("nft", strings.TrimSuffix(command, "'")).CombinedOutput(); err != nil {
					t.Errorf("the remedy: %v\n%s", err, out)
				}
			} else {
				nft(t, "")
			}
			if !testwait.Poll(patience, func() bool { code, h = readiness(t, cfg); return code == http.StatusOK && h.State == control.Ready }) {
				t.Fatalf("mended, and still %d: %+v", code, h)
			}
			t.Logf("ready again after %v", time.Since(began).Round(time.Millisecond))
		})
	}
}

// TestFirewall6: each family is measured, also where no target is configured.
func TestFirewall6(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip(err)
	}
	inNamespace(t, testFirewall6)
}

func testFirewall6(t *testing.T, nl *netlink.Handle) {
	vpc := vpcHost(t, nl)
	addr, err := netlink.ParseAddr("fd31::1/64")
	if err != nil {
		t.Fatal(err)
	}
	addr.Flags = unix.IFA_F_NODAD
	if err := nl.AddrAdd(vpc, addr); err != nil {
		t.Fatal(err)
	}
	sysctl(t, "ipv6/conf/all/forwarding", "1")
	_, cfg, node, _ := startInVPC(t, map[string][]string{"source": {"172.31.0.0/16", "fd31::/64"}})
	n := okNetwork()
	n.Addresses = append(n.Addresses, netip.MustParsePrefix("fd10::1/64"))
	n.Routes = append(n.Routes, ztnode.Route{Target: netip.MustParsePrefix("fd10::/64")})
	node.SetNetwork(n)
	testwait.For(t, patience, "the route", func() bool {
		list, err := nl.RouteList(nil, netlink.FAMILY_V6)
		return err == nil && slices.ContainsFunc(list, func(r netlink.Route) bool { return r.Dst != nil && r.Dst.String() == "fd10::/64" })
	})
	for _, tt := range []struct{ rules, says string }{
		{"table ip6 filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }", "fd10::1; chain ip6 filter FORWARD"},
		{"table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }", "tcp://10.0.0.10:443; chain ip filter FORWARD"},
		{"table inet filter { chain f { type filter hook forward priority 0; policy drop; }; }", "tcp://10.0.0.10:443, fd10::1; chain inet filter f"},
	} {
		nft(t, tt.rules)
		var h control.Health
		if !testwait.Poll(patience, func() bool {
			_, h = readiness(t, cfg)
			return h.State == control.Down && strings.Contains(strings.Join(h.Reasons, "\n"), tt.says)
		}) {
			t.Errorf("%+v, want it to say %q", h, tt.says)
		}
		nft(t, "")
		testwait.For(t, patience, "ready", func() bool { _, h = readiness(t, cfg); return h.State == control.Ready })
	}
}

// TestFirewallForEverybody: the firewall is measured also where no sources are configured,
// with an address next to the VPC's interface, as long as it is clear which one that is.
func TestFirewallForEverybody(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip(err)
	}
	for name, tt := range map[string]struct {
		interfaces []string
		second     bool
		want       control.State
	}{
		"the only interface": {nil, false, control.Down},
		"it is named":        {[]string{"vpc0"}, true, control.Down},
		"another is named":   {[]string{"other0"}, true, control.Ready},
		"which isn't clear":  {nil, true, control.Ready},
	} {
		t.Run(name, func(t *testing.T) {
			inNamespace(t, func(t *testing.T, nl *netlink.Handle) {
				vpcHost(t, nl)
				if tt.second {
					if err := nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "other0"}, PeerName: "other1"}); err != nil {
						t.Fatal(err)
					}
					setUp(t, nl, "other1")
					setUp(t, nl, "other0", "192.168.77.1/24")
				}
				_, cfg, _, _ := startInVPC(t, map[string][]string{"source": nil, "target": nil, "interface": tt.interfaces})
				nft(t, `table ip fw { chain f { type filter hook forward priority 0; policy accept; iifname "vpc0" oifname "ztg*" drop; }; }`)
				var h control.Health
				wait := patience
				if tt.want == control.Ready {
					wait = 2500 * time.Millisecond
				}
				down := testwait.Poll(wait, func() bool {
					_, h = readiness(t, cfg)
					return h.State == control.Down && slices.Contains(failedChecks(h), "firewall")
				})
				if down != (tt.want == control.Down) {
					t.Errorf("%+v, want %s", h, tt.want)
				}
			})
		})
	}
}
