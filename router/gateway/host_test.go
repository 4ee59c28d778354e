package gateway_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/internal/testwait"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/gateway/gatewaytest"
	"ztgate/zerotier/ztnode"
)

// vpcHost makes an interface into a VPC in which nobody answers.
func vpcHost(t *testing.T, nl *netlink.Handle) netlink.Link {
	t.Helper()
	if err := nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vpc0"}, PeerName: "vpc1"}); err != nil {
		t.Fatal(err)
	}
	setUp(t, nl, "vpc1")
	setUp(t, nl, "vpc0", "172.31.0.1/24")
	l, err := nl.LinkByName("vpc0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// readiness asks as a load balancer does.
func readiness(t *testing.T, cfg *config.Config) (int, control.Health) {
	t.Helper()
	resp, err := http.Get("http://" + cfg.Listen + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var h control.Health
	if err := json.NewDecoder(resp.Body).Decode(&h); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, h
}

// startInVPC starts a gateway between a VPC and an office that answers, and waits until
// it is ready.
func startInVPC(t *testing.T, flags map[string][]string) (*started, *config.Config, *gatewaytest.Node, *gatewaytest.Office) {
	t.Helper()
	dir := shortDir(t)
	all := map[string][]string{"home": {dir}, "socket": {filepath.Join(dir, "s")}, "listen": {freePort(t)}, "tun": {"ztgt5"},
		"source": {"172.31.0.0/16"}, "target": {"tcp://10.0.0.10:443"}}
	for k, v := range flags {
		all[k] = v
	}
	cfg := load(t, all)
	node, office := gatewaytest.NewNode(), gatewaytest.NewOffice()
	node.SetOffice(office)
	node.SetOnline(true)
	node.SetNetwork(okNetwork())
	node.SetPeers(ztnode.Peer{Address: gatewaytest.OfficeAddress.String(), Role: ztnode.RoleLeaf, Latency: 3, LastReceive: time.Now(),
		Paths: []ztnode.Path{{Endpoint: netip.MustParseAddrPort("198.51.100.7:9993"), Preferred: true, LastReceive: time.Now()}}})
	g := startGateway(t, cfg, node)
	t.Cleanup(func() { g.end(t) })
	if !testwait.Poll(patience, func() bool { code, _ := readiness(t, cfg); return code == http.StatusOK }) {
		_, h := readiness(t, cfg)
		t.Fatalf("not ready: %+v\n%s", h, g.logs)
	}
	return g, cfg, node, office
}

func failedChecks(h control.Health) []string {
	var out []string
	for _, c := range h.Failed() {
		out = append(out, c.Name)
	}
	return out
}

// TestHostChanges: whatever somebody does to the host that stops clients makes unready
// with the cause, and its end ready again.
func TestHostChanges(t *testing.T) { inNamespace(t, testHostChanges) }

func testHostChanges(t *testing.T, nl *netlink.Handle) {
	vpc := vpcHost(t, nl)
	_, cfg, _, _ := startInVPC(t, nil)
	tun, err := nl.LinkByName("ztgt5")
	if err != nil {
		t.Fatal(err)
	}
	prefix := func(s string) *net.IPNet {
		_, n, err := net.ParseCIDR(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	foreign := func(target string) netlink.Route {
		return netlink.Route{Dst: prefix(target), LinkIndex: vpc.Attrs().Index, Scope: netlink.SCOPE_LINK}
	}
	whole, half, other := foreign("10.0.0.0/24"), foreign("10.0.0.0/25"), foreign("10.0.0.0/24")
	other.Table = 99
	rule := netlink.NewRule()
	rule.Dst, rule.Table, rule.Family, rule.Priority = prefix("10.0.0.0/24"), 99, unix.AF_INET, 100
	refuse := netlink.NewRule()
	refuse.Dst, refuse.Type, refuse.Family, refuse.Priority = prefix("10.0.0.10/32"), unix.FR_ACT_PROHIBIT, unix.AF_INET, 101
	forward := func(v string) func() error {
		return func() error { sysctl(t, "ipv4/ip_forward", v); return nil }
	}
	for _, tt := range []struct {
		name        string
		breaks, fix func() error
		check, says string
	}{
		{"forwarding off", forward("0"), forward("1"), "ip_forward", "sysctl -w net.ipv4.ip_forward=1"},
		{"TUN down", func() error { return nl.LinkSetDown(tun) }, func() error { return nl.LinkSetUp(tun) }, "tun", "ip link set ztgt5 up"},
		{"route replaced", func() error { return nl.RouteReplace(&whole) }, func() error { return nl.RouteDel(&whole) }, "routes", "10.0.0.0/24"},
		{"more specific route", func() error { return nl.RouteAdd(&half) }, func() error { return nl.RouteDel(&half) }, "routes", "10.0.0.0/25"},
		{"rule", func() error { return errors.Join(nl.RouteAdd(&other), nl.RuleAdd(rule)) },
			func() error { return errors.Join(nl.RuleDel(rule), nl.RouteDel(&other)) }, "kernel_routes", "vpc0"},
		{"prohibiting rule", func() error { return nl.RuleAdd(refuse) }, func() error { return nl.RuleDel(refuse) }, "kernel_routes", "10.0.0.10"},
		{"VPC interface down", func() error { return nl.LinkSetDown(vpc) }, func() error { return nl.LinkSetUp(vpc) }, "kernel_routes", "172.31.0.2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			began := time.Now()
			if err := tt.breaks(); err != nil {
				t.Fatal(err)
			}
			var h control.Health
			code := 0
			if !testwait.Poll(patience, func() bool {
				code, h = readiness(t, cfg)
				return code == http.StatusServiceUnavailable && slices.Contains(failedChecks(h), tt.check)
			}) {
				t.Errorf("still %d: %+v", code, h)
			}
			t.Logf("%s after %v", h.Reasons, time.Since(began).Round(time.Millisecond))
			if h.State != control.Down || !strings.Contains(strings.Join(h.Reasons, "\n"), tt.says) {
				t.Errorf("%s: %q, want it to say %q", h.State, h.Reasons, tt.says)
			}
			began = time.Now()
			if err := tt.fix(); err != nil {
				t.Fatal(err)
			}
			if !testwait.Poll(patience, func() bool { code, h = readiness(t, cfg); return code == http.StatusOK && h.State == control.Ready }) {
				t.Fatalf("mended, and still %d: %+v", code, h)
			}
			t.Logf("ready again after %v", time.Since(began).Round(time.Millisecond))
		})
	}
	t.Run("put right", func(t *testing.T) {
		addr, err := netlink.ParseAddr("100.127.255.1/32")
		if err != nil {
			t.Fatal(err)
		}
		ours := netlink.Route{Dst: prefix("10.0.0.0/24"), LinkIndex: tun.Attrs().Index}
		if err := errors.Join(nl.AddrDel(tun, addr), nl.LinkSetMTU(tun, 1400)); err != nil {
			t.Fatal(err)
		}
		if err := nl.RouteDel(&ours); err != nil && !errors.Is(err, unix.ESRCH) { // it may be put back already
			t.Fatal(err)
		}
		testwait.NoError(t, patience, func() error {
			l, err := nl.LinkByName("ztgt5")
			if err != nil {
				return err
			}
			addrs, err := nl.AddrList(l, unix.AF_INET)
			if err == nil && (len(addrs) != 1 || l.Attrs().MTU != 2800 || !slices.Contains(routes(nl), "10.0.0.0/24")) {
				err = errors.New("address, MTU or route are not put back")
			}
			return err
		})
	})
}

// TestProbeWay: a probe goes where packets of clients go, and says so.
func TestProbeWay(t *testing.T) {
	for name, tt := range map[string]struct {
		flags         map[string][]string
		through, note string
	}{
		"as a client":            {nil, "kernel", ""},
		"icmp":                   {map[string][]string{"target": {"icmp://10.0.0.10"}}, "kernel", ""},
		"policy lets it through": {map[string][]string{"allow": {"tcp:10.0.0.10:443"}}, "kernel", ""},
		"policy refuses all":     {map[string][]string{"allow": {"tcp:10.0.0.10:444"}}, "plane", "the policy (default drop) refuses it to clients"},
		"no address":             {map[string][]string{"address": {"none"}}, "plane", ""},
		"not translated":         {map[string][]string{"masquerade": {"false"}}, "plane", ""},
	} {
		t.Run(name, func(t *testing.T) {
			inNamespace(t, func(t *testing.T, nl *netlink.Handle) {
				vpcHost(t, nl)
				g, _, _, _ := startInVPC(t, tt.flags)
				var st control.Status
				want := map[bool]control.State{true: control.Ready, false: control.Degraded}[tt.note == ""]
				testwait.Poll(patience, func() bool { // the first probe may be early
					var err error
					st, err = g.client.Status(t.Context())
					if err != nil {
						return false
					}
					got := st.Targets[0]
					return got.Up && got.Through == tt.through && got.Member != "" && st.Health.State == want
				})
				got := st.Targets[0]
				if !got.Up || got.Through != tt.through || !strings.HasPrefix(got.PolicyNote, tt.note) || (tt.note == "") != (got.PolicyNote == "") ||
					got.Member != gatewaytest.OfficeAddress.String() || got.Path != "DIRECT" {
					t.Errorf("%+v", got)
				}
				if st.Health.State != want {
					t.Errorf("%s: %+v", st.Health.State, st.Health)
				}
			})
		})
	}
}

// TestRootDown: without a root clients are served as long as members are reached.
func TestRootDown(t *testing.T) { inNamespace(t, testRootDown) }

func testRootDown(t *testing.T, nl *netlink.Handle) {
	vpcHost(t, nl)
	g, cfg, node, office := startInVPC(t, nil)
	node.SetOnline(false)
	testwait.For(t, patience, "degraded", func() bool {
		code, h := readiness(t, cfg)
		return code == http.StatusOK && h.State == control.Degraded && strings.Contains(strings.Join(h.Reasons, "\n"), "no root answers")
	})
	if h, err := g.client.Health(t.Context()); err != nil || h.Err() != nil || h.Online {
		t.Errorf("%+v, %v: want exit code 0, and offline", h, err)
	}
	if body := get(t, "http://"+cfg.Listen+"/metrics"); !strings.Contains(body, "\nztgate_health_state{state=\"degraded\"} 1\n") ||
		!strings.Contains(body, "\nztgate_health_status{check=\"online\"} 0\n") || !strings.Contains(body, "\nztgate_health_status{check=\"ready\"} 1\n") {
		t.Errorf("metrics:\n%s", body)
	}
	office.SwitchOff(true)
	heard := time.Now().Add(-5 * time.Minute)
	node.SetPeers(ztnode.Peer{Address: gatewaytest.OfficeAddress.String(), Role: ztnode.RoleLeaf, Latency: 3, LastReceive: heard,
		Paths: []ztnode.Path{{Endpoint: netip.MustParseAddrPort("198.51.100.7:9993"), Preferred: true, LastReceive: heard}}})
	var h control.Health
	if !testwait.Poll(3*patience, func() bool {
		code := 0
		code, h = readiness(t, cfg)
		return code == http.StatusServiceUnavailable && strings.Contains(strings.Join(h.Reasons, "\n"),
			"target tcp://10.0.0.10:443: no answer in 3s; member "+gatewaytest.OfficeAddress.String()+" was last heard at "+
				heard.UTC().Format("2006-01-02 15:04:05 UTC")+" over 198.51.100.7:9993")
	}) {
		t.Errorf("with the office off: %+v", h)
	}
	st, err := g.client.Status(t.Context())
	if err != nil || st.Peers.None != 1 || st.Peers.Relay != 0 || st.Targets[0].Path != "NONE" {
		t.Errorf("%+v, %v: want a peer without a path", st, err)
	}
	if body := get(t, "http://"+cfg.Listen+"/metrics"); !strings.Contains(body, "\nztgate_peers{path=\"none\",role=\"LEAF\"} 1\n") {
		t.Errorf("metrics:\n%s", body)
	}
}

// TestDegraded: what is wrong without keeping clients from anything doesn't take the
// gateway out of service, and is said everywhere in the same words.
func TestDegraded(t *testing.T) {
	silent := time.Now().Add(-time.Hour)
	for name, tt := range map[string]struct {
		breaks      func(t *testing.T, node *gatewaytest.Node)
		check, says string
	}{
		"controller": {func(t *testing.T, node *gatewaytest.Node) {
			n := okNetwork()
			n.LastController = silent
			node.SetNetwork(n)
		},
			"controller", "its controller 8056c2e21c has been silent since " + silent.UTC().Format("2006-01-02 15:04:05 UTC") + ", and the certificate ends at 2033-05-18 03:33:20 UTC"},
		"identity": {func(t *testing.T, node *gatewaytest.Node) {
			n := okNetwork()
			n.Duplicate = time.Now()
			node.SetNetwork(n)
		}, "identity", "another node uses identity " + "fcd8055969" + ": controller 8056c2e21c of network 8056c2e21c000001 answers requests that this node never sent"},
		"address": {func(t *testing.T, node *gatewaytest.Node) {
			node.SetInfo(func(i *ztnode.Info) { i.Collision = time.Now() })
		}, "identity", "by another identity"},
		"certificate": {func(t *testing.T, node *gatewaytest.Node) {
			n := okNetwork()
			n.Certificate = time.Now().Add(2 * time.Minute)
			node.SetNetwork(n)
		}, "certificate", "and isn't renewed"},
		"certificate ended": {func(t *testing.T, node *gatewaytest.Node) {
			n := okNetwork()
			n.Certificate = time.Now().Add(-time.Minute)
			node.SetNetwork(n)
		}, "certificate", "the certificate ended at "},
		"clock": {func(t *testing.T, node *gatewaytest.Node) {
			node.SetInfo(func(i *ztnode.Info) { i.ClockSet, i.ClockSetBy = time.Now(), -3600 })
		}, "clock", "the clock was set by -1h0m0s at "},
		"relay": {func(t *testing.T, node *gatewaytest.Node) {
			node.SetPeers(ztnode.Peer{Address: gatewaytest.OfficeAddress.String(), Role: ztnode.RoleLeaf, Latency: -1, Relayed: true, LastReceive: time.Now()})
		}, "paths", "is reached through a root"},
		"route refused": {func(t *testing.T, node *gatewaytest.Node) {
			n := okNetwork()
			n.Routes = append(n.Routes, ztnode.Route{Target: netip.MustParsePrefix("172.31.0.0/28")})
			node.SetNetwork(n)
		}, "routes", "172.31.0.0/28 is not used"},
		"flows": {func(t *testing.T, node *gatewaytest.Node) {
			for range 10 { // the TUN's queue is shorter than that
				for _, i := range rand.Perm(900) {
					from := &net.UDPAddr{IP: net.ParseIP([]string{"172.31.0.1", "100.127.255.1"}[i%2]), Port: 20000 + i}
					c, err := (&net.Dialer{LocalAddr: from}).Dial("udp", net.JoinHostPort("10.0.0.20", strconv.Itoa(1000+i)))
					if err != nil {
						t.Fatal(err)
					}
					_, _ = c.Write([]byte("x"))
					_ = c.Close()
				}
			}
		}, "flows", "of 1024 flows"},
	} {
		t.Run(name, func(t *testing.T) {
			inNamespace(t, func(t *testing.T, nl *netlink.Handle) {
				vpcHost(t, nl)
				// libzt doesn't tell when a controller spoke.
				g, cfg, node, _ := startInVPC(t, map[string][]string{"max-flows": {"1024"}, "node": {config.NodeGo}})
				testwait.For(t, patience, "all well", func() bool { _, h := readiness(t, cfg); return h.State == control.Ready })
				tt.breaks(t, node)
				var h control.Health
				code := 0
				if !testwait.Poll(patience, func() bool { code, h = readiness(t, cfg); return h.State != control.Ready }) {
					t.Fatalf("nothing is wrong: %+v", h)
				}
				failed := h.Failed()
				if code != http.StatusOK || h.State != control.Degraded || len(failed) != 1 || failed[0].Name != tt.check || !strings.Contains(h.Reasons[0], tt.says) {
					t.Errorf("%d %+v, want %s that says %q", code, h, tt.check, tt.says)
				}
				body := get(t, "http://"+cfg.Listen+"/metrics")
				for _, want := range []string{`ztgate_health_state{state="degraded"} 1`, `ztgate_health_status{check="` + tt.check + `"} 0`} {
					if !strings.Contains(body, "\n"+want+"\n") {
						t.Errorf("metrics lack %s", want)
					}
				}
				st, err := g.client.Status(t.Context())
				if err != nil || !slices.Equal(st.Health.Reasons, h.Reasons) {
					t.Errorf("status says %q, %v", st.Health.Reasons, err)
				}
				testwait.For(t, patience, "the log", func() bool { return strings.Contains(g.logs.String(), "msg=degraded check="+tt.check+" ") })
				if name == "controller" && (!strings.Contains(body, "ztgate_network_controller_last_heard_timestamp_seconds{network=\"8056c2e21c000001\"} ") ||
					!st.Networks[0].LastController.Equal(silent)) {
					t.Errorf("when the controller was heard: %+v\n%s", st.Networks[0], body)
				}
			})
		})
	}
}

// TestRTT: each new measurement is one observation.
func TestRTT(t *testing.T) {
	r := serve(t, control.ModeGateway, nil)
	peer := ztnode.Peer{Address: "778cde7190", Role: ztnode.RolePlanet, Paths: []ztnode.Path{{Endpoint: netip.MustParseAddrPort("198.51.100.1:9993"), Preferred: true}}}
	for i, latency := range []float64{12, 12, 13, -1, 13} {
		peer.Latency = latency
		r.node.SetPeers(peer)
		want := fmt.Sprintf("\nztgate_peer_rtt_seconds_count{path=\"direct_ipv4\"} %d\n", [...]int{1, 1, 2, 2, 3}[i])
		if body := get(t, "http://"+r.cfg.Listen+"/metrics"); !strings.Contains(body, want) {
			t.Errorf("after %v: want %s", latency, want)
		}
	}
}
