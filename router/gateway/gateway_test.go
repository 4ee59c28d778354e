package gateway_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/internal/ownnet"
	"ztgate/internal/testwait"
	"ztgate/router/admin"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/gateway"
	"ztgate/router/gateway/gatewaytest"
	"ztgate/router/host/tuntap"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/ztnode"
)

// inNamespace runs the rest of a test in a network namespace of its own, whose
// loopback is up.
func inNamespace(t *testing.T, f func(t *testing.T, nl *netlink.Handle)) {
	t.Helper()
	if _, err := os.Stat(tuntap.Path); err != nil {
		t.Skip("needs " + tuntap.Path)
	}
	ownnet.Run(t, func(t *testing.T) {
		nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			t.Fatal(err)
		}
		defer nl.Close()
		setUp(t, nl, "lo")
		sysctl(t, "ipv4/ip_forward", "1")
		f(t, nl)
	})
}

// setUp gives an interface addresses and sets it up.
func setUp(t *testing.T, nl *netlink.Handle, name string, addresses ...string) {
	t.Helper()
	l, err := nl.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		if err := nl.AddrAdd(l, addr); err != nil {
			t.Fatal(err)
		}
	}
	if err := nl.LinkSetUp(l); err != nil {
		t.Fatal(err)
	}
}

// sysctl sets a parameter of the kernel's network.
func sysctl(t *testing.T, key, value string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join("/proc/sys/net", key), []byte(value), 0); err != nil {
		t.Skipf("set %s: %v", key, err)
	}
}

// connect connects from a host of the VPC to one of the overlay, through the
// kernel. Port 0 of from stands for any.
func connect(from, to string) (net.Conn, error) {
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(from)), Timeout: 5 * time.Second}
	return d.Dial("tcp", to)
}

// started is a gateway that runs in this test's namespace.
type started struct {
	client *control.Client
	logs   *gatewaytest.Log
	stop   context.CancelFunc
	done   chan error
}

// startGateway runs a gateway until stop is called.
func startGateway(t *testing.T, cfg *config.Config, node *gatewaytest.Node) *started {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	g := &started{client: control.NewClient(cfg.Socket), logs: &gatewaytest.Log{}, stop: stop, done: make(chan error, 1)}
	go func() {
		g.done <- gateway.RunWith(ctx, cfg, slog.New(slog.NewTextHandler(g.logs, nil)), node.Start)
	}()
	testwait.For(t, patience, "start", func() bool { _, err := g.client.Info(ctx); return err == nil })
	return g
}

// end stops the gateway.
func (g *started) end(t *testing.T) {
	t.Helper()
	g.stop()
	began := time.Now()
	if err := <-g.done; err != nil || time.Since(began) > 20*time.Second {
		t.Errorf("run: %v, %v after it was stopped", err, time.Since(began))
	}
}

// patience is for what takes milliseconds on an idle machine.
const patience = 10 * time.Second

func TestGatewayLife(t *testing.T) { inNamespace(t, testGatewayLife) }

func testGatewayLife(t *testing.T, nl *netlink.Handle) {
	dir := shortDir(t)
	home := filepath.Join(dir, "home")
	id, err := identity.Generate(nil)
	if err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte(id.SecretString()), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(config.Sources{NoFile: true, Environ: []string{"ZEROTIER_IDENTITY_SECRET=file:" + secret},
		Flags: map[string][]string{"home": {home}, "socket": {filepath.Join(dir, "s")}, "listen": {freePort(t)}, "tun": {"ztgt2"},
			"network": {nwid.String()}, "source": {"172.31.0.0/16"}}})
	if err != nil {
		t.Fatal(err)
	}
	setUp(t, nl, "lo", "172.31.0.10/32") // a host of the VPC
	node := gatewaytest.NewNode()
	node.SetOffice(gatewaytest.NewOffice())
	g := startGateway(t, cfg, node)
	testwait.For(t, patience, "join", func() bool { return len(node.Networks()) == 1 })
	testwait.For(t, patience, "what the gateway is waiting for", func() bool { return strings.Contains(g.logs.String(), "OFFLINE") })
	node.SetOnline(true)
	nw := okNetwork()
	nw.Addresses = append(nw.Addresses, netip.MustParsePrefix("fd00:77::5/64"))
	nw.Routes = append(nw.Routes, ztnode.Route{Target: netip.MustParsePrefix("172.16.0.0/12"), Via: netip.MustParseAddr("10.147.17.9")})
	node.SetNetwork(nw)
	testwait.For(t, patience, "routes", func() bool { return strings.Join(routes(nl), " ") == "10.0.0.0/24 10.147.17.0/24" })
	testwait.For(t, patience, "groups", func() bool { return len(node.Groups(nwid)) == 1 })
	if !testwait.Poll(patience, func() bool { return strings.Contains(g.logs.String(), "msg=ready ") }) {
		t.Fatalf("not ready:\n%s", g.logs)
	}
	for from, to := range map[string]string{"172.31.0.10:4000": "10.0.0.10:443", "172.31.0.10:4001": "10.147.17.9:443"} {
		c, err := connect(from, to)
		if err != nil {
			t.Error(err)
			continue
		}
		defer c.Close()
	}
	var flows control.Flows
	testwait.Poll(patience, func() bool { // what completes a handshake is on its way
		flows, err = g.client.Flows(t.Context(), control.FlowQuery{})
		return err == nil && !slices.ContainsFunc(flows.Flows, func(f control.Flow) bool { return f.State != "established" })
	})
	if err != nil || len(flows.Flows) != 2 || flows.Flows[0].Translated.Addr() != nw.Addresses[0].Addr() {
		t.Errorf("flows %+v, %v", flows, err)
	}
	if body := get(t, "http://"+cfg.Listen+"/metrics"); !strings.Contains(body, "\nztgate_route_conflicts 1\n") {
		t.Errorf("the route that isn't used is not counted:\n%s", body)
	}
	nets, err := g.client.Networks(t.Context())
	if err != nil || len(nets.Networks) != 1 || nets.Networks[0].Device != "ztgt2" ||
		!strings.Contains(strings.Join(nets.Networks[0].Problems, "\n"), "172.16.0.0/12 is not used: it covers the VPC's own 172.31.0.0/16") {
		t.Errorf("networks %+v, %v", nets, err)
	}
	node.Receive(nwid, []byte("frame"))
	nw.Status = ztnode.StatusDenied
	node.SetNetwork(nw)
	testwait.For(t, patience, "loss of routes", func() bool { return len(routes(nl)) == 0 })
	if got := guards(nl); strings.Join(got, " ") != "10.0.0.0/24 10.147.17.0/24" {
		t.Errorf("without the network, guards %v keep its targets off other routes", got)
	}
	testwait.For(t, patience, "loss of readiness", func() bool { return strings.Contains(g.logs.String(), "no longer ready") })
	g.end(t)
	if _, err := nl.LinkByName("ztgt2"); err == nil {
		t.Error("the TUN is still there")
	}
	if left := guards(nl); len(left) > 0 {
		t.Errorf("guards are still there: %v", left)
	}
	if !node.Closed() {
		t.Error("the node still runs")
	}
	for _, want := range []string{"waiting", "OFFLINE", "ACCESS_DENIED", "stopping"} {
		if !strings.Contains(g.logs.String(), want) {
			t.Errorf("log lacks %q:\n%s", want, g.logs)
		}
	}
	if fi, err := os.Stat(home); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("home: %v, %v, want mode 0700", fi, err)
	}
	if b, err := os.ReadFile(filepath.Join(home, "identity.secret")); err != nil || string(b) != id.SecretString() {
		t.Errorf("identity in home: %q, %v", b, err)
	}
	b, err := os.ReadFile(filepath.Join(home, "nat-mappings.json"))
	lines := slices.Sorted(strings.Lines(string(b)))
	if want := []string{
		`{"protocol":6,"client":"172.31.0.10:4000","external":"10.147.17.5:4000","target":"10.0.0.10:443","server":"10.0.0.10:443","network":9247793161240051713}` + "\n",
		`{"protocol":6,"client":"172.31.0.10:4000","external":"10.147.17.5:4000"}` + "\n",
		`{"protocol":6,"client":"172.31.0.10:4001","external":"10.147.17.5:4001","target":"10.147.17.9:443","server":"10.147.17.9:443","network":9247793161240051713}` + "\n",
		`{"protocol":6,"client":"172.31.0.10:4001","external":"10.147.17.5:4001"}` + "\n"}; err != nil || !slices.Equal(lines, want) {
		t.Errorf("mappings in home: %q, %v, want %q", lines, err, want)
	}
	if _, err := os.Stat(cfg.Socket); err == nil {
		t.Error("the control socket is still there")
	}
}

// get returns what an HTTP server answers.
func get(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func routes(nl *netlink.Handle) []string { return routesOfType(nl, unix.RTN_UNICAST) }

func guards(nl *netlink.Handle) []string { return routesOfType(nl, unix.RTN_BLACKHOLE) }

func routesOfType(nl *netlink.Handle, kind int) []string {
	list, err := nl.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return []string{err.Error()}
	}
	var out []string
	for _, r := range list {
		if r.Type == kind {
			out = append(out, r.Dst.String())
		}
	}
	slices.Sort(out)
	return out
}

// TestGatewayTarget: a target that is configured is asked for at once, and nobody in
// the office answers.
func TestGatewayTarget(t *testing.T) { inNamespace(t, testGatewayTarget) }

func testGatewayTarget(t *testing.T, nl *netlink.Handle) {
	dir := shortDir(t)
	cfg := load(t, map[string][]string{"home": {dir}, "socket": {filepath.Join(dir, "s")}, "listen": {freePort(t)}, "tun": {"ztgt4"},
		"target": {"icmp://10.0.0.9"}})
	node := gatewaytest.NewNode()
	node.SetNetwork(okNetwork())
	g := startGateway(t, cfg, node)
	testwait.For(t, patience, "routes", func() bool { return len(routes(nl)) == 2 })
	testwait.For(t, patience, "ARP request", func() bool { return len(node.Written()) > 0 })
	if f, err := g.client.Flows(t.Context(), control.FlowQuery{}); err != nil || f.Limit != 262144 {
		t.Errorf("flows: %+v, %v", f, err)
	}
	g.end(t)
}

func TestGatewayNodeFails(t *testing.T) { inNamespace(t, testGatewayNodeFails) }

func testGatewayNodeFails(t *testing.T, _ *netlink.Handle) {
	dir := shortDir(t)
	cfg := load(t, map[string][]string{"home": {dir}, "socket": {filepath.Join(dir, "s")}, "listen": {""}, "tun": {"ztgt3"}})
	node := gatewaytest.NewNode()
	broken := errors.New("broken")
	node.Fail(broken)
	go func() {
		<-node.Ready()
		node.Fail(broken)
	}()
	err := gateway.RunWith(context.Background(), cfg, slog.New(slog.DiscardHandler), node.Start)
	if !errors.Is(err, broken) {
		t.Errorf("got %v, want the node's error", err)
	}
}

func TestMemberLife(t *testing.T) {
	dir := shortDir(t)
	cfg := load(t, map[string][]string{"home": {dir}, "socket": {filepath.Join(dir, "s")}, "listen": {""}, "controller": {"true"}})
	node, logs := gatewaytest.NewNode(), &gatewaytest.Log{}
	node.SetOnline(true)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- gateway.RunMemberWith(ctx, cfg, slog.New(slog.NewJSONHandler(logs, nil)), node.Start)
	}()
	testwait.For(t, patience, "ready", func() bool { return strings.Contains(logs.String(), `"msg":"ready"`) })
	client := control.NewClient(cfg.Socket)
	if info, err := client.Info(ctx); err != nil || info.Mode != control.ModeNode || !info.Controller {
		t.Errorf("info %+v, %v", info, err)
	}
	if _, err := client.Join(ctx, nwid.String()); fault.ExitCode(err) != 2 {
		t.Errorf("join without an interface: %v", err)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestIdentityConflict(t *testing.T) {
	dir := shortDir(t)
	var ids [2]*identity.Identity
	for i := range ids {
		var err error
		if ids[i], err = identity.Generate(nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "identity.secret"), []byte(ids[0].SecretString()), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(env ...string) error {
		cfg, err := config.Load(config.Sources{NoFile: true, Environ: append(env, "ZTGATE_LISTEN=", "ZTGATE_HOME="+dir, "ZTGATE_SOCKET="+filepath.Join(dir, "s"))})
		if err != nil {
			return err
		}
		return gateway.RunMemberWith(t.Context(), cfg, slog.New(slog.DiscardHandler), func(gateway.NodeConfig) (gateway.Node, error) { return nil, errors.New("started") })
	}
	for name, tt := range map[string]struct {
		env  string
		want string
		code int
	}{
		"other":   {"ZTGATE_IDENTITY_SECRET=" + ids[1].SecretString(), "holds another identity", 2},
		"public":  {"ZTGATE_IDENTITY_SECRET=" + ids[1].String(), "holds no secret key", 2},
		"garbage": {"ZTGATE_IDENTITY_SECRET=x", "not an identity", 2},
		"same":    {"ZTGATE_IDENTITY_SECRET=" + ids[0].SecretString(), "started", 1},
		"planet":  {"ZTGATE_PLANET=/nonexistent", "planet (from environment ZTGATE_PLANET)", 2},
	} {
		err := run(tt.env)
		if err == nil || !strings.Contains(err.Error(), tt.want) || fault.ExitCode(err) != tt.code {
			t.Errorf("%s: %v (exit code %d), want %q and %d", name, err, fault.ExitCode(err), tt.want, tt.code)
		}
		if err != nil && strings.Contains(err.Error(), strings.Split(ids[1].SecretString(), ":")[3]) {
			t.Errorf("%s: the error shows the secret", name)
		}
	}
}

func TestPlanet(t *testing.T) {
	dir := t.TempDir()
	id, err := identity.Generate(nil)
	if err != nil {
		t.Fatal(err)
	}
	pub := filepath.Join(dir, "identity.public")
	if err := os.WriteFile(pub, []byte(id.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, key := filepath.Join(dir, "planet"), filepath.Join(dir, "planet.key")
	spec := admin.PlanetSpec{ID: 77, Roots: []string{pub + "=198.51.100.1/9993,[2001:db8::1]:9993"}, Now: time.UnixMilli(1000)}
	p, err := admin.WritePlanet(spec, out, key, false)
	if err != nil {
		t.Fatal(err)
	}
	if p.ID != 77 || len(p.Roots) != 1 || p.Roots[0].Address != id.Address().String() || len(p.Roots[0].Endpoints) != 2 {
		t.Errorf("made %+v", p)
	}
	if fi, err := os.Stat(key); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v, %v, want mode 0600", fi, err)
	}
	shown, err := admin.ReadPlanet(out, nil)
	if err != nil || shown.UpdateKey != p.UpdateKey || shown.Timestamp != 1000 {
		t.Errorf("shown %+v, %v", shown, err)
	}
	if _, err := admin.WritePlanet(spec, out, key, false); fault.ExitCode(err) != 2 {
		t.Errorf("the same revision again: %v, want a usage error", err)
	}
	spec.Now, spec.ID = time.UnixMilli(2000), 0
	spec.Roots = []string{id.String() + "=198.51.100.2/9993"}
	if p, err = admin.WritePlanet(spec, out, key, false); err != nil || p.ID != 77 || p.Timestamp != 2000 {
		t.Errorf("next revision: %+v, %v", p, err)
	}
	for _, bad := range []string{"x", pub, pub + "=", pub + "=1.2.3.4/0", pub + "=name/9993", "/nonexistent=1.2.3.4/1"} {
		spec.Roots = []string{bad}
		if _, err := admin.WritePlanet(spec, out, key, true); fault.ExitCode(err) != 2 {
			t.Errorf("root %q: %v, want a usage error", bad, err)
		}
	}
	if _, err := admin.ReadPlanet("-", strings.NewReader("garbage")); err == nil {
		t.Error("garbage is shown as a planet")
	}
}

func TestNetworkSpec(t *testing.T) {
	for name, tt := range map[string]struct {
		spec admin.NetworkSpec
		want string
	}{
		"empty":  {admin.NetworkSpec{}, `{}`},
		"subnet": {admin.NetworkSpec{Subnet: "fd00:1::/64"}, `{"ipAssignmentPools":[{"ipRangeEnd":"fd00:1::ffff:ffff:ffff:ffff","ipRangeStart":"fd00:1::1"}],"routes":[{"target":"fd00:1::/64","via":null}],"v6AssignMode":{"zt":true}}`},
		"route":  {admin.NetworkSpec{Routes: []string{"10.0.0.0/24=10.147.17.5"}, Public: true}, `{"private":false,"routes":[{"target":"10.0.0.0/24","via":"10.147.17.5"}]}`},
		"json":   {admin.NetworkSpec{JSON: `{"multicastLimit":0}`, RFC4193: true}, `{"multicastLimit":0,"v6AssignMode":{"rfc4193":true}}`},
	} {
		p, err := tt.spec.Patch()
		if err != nil {
			t.Fatal(err)
		}
		var got, want any
		if err := errors.Join(err, json.Unmarshal(p, &got), json.Unmarshal([]byte(tt.want), &want)); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %s, %v, want %s", name, p, err, tt.want)
		}
	}
	for _, bad := range []admin.NetworkSpec{{Subnet: "10.0.0.1/24"}, {Subnet: "10.0.0.0/31"}, {Pools: []string{"10.0.0.9-10.0.0.1"}},
		{Routes: []string{"x"}}, {Routes: []string{"10.0.0.0/8=y"}}, {MTU: 100}, {JSON: "["}} {
		if _, err := bad.Patch(); fault.ExitCode(err) != 2 {
			t.Errorf("%+v: %v, want a usage error", bad, err)
		}
	}
}

func TestParsePingTarget(t *testing.T) {
	for in, want := range map[string]control.PingRequest{
		"10.0.0.1": {Host: "10.0.0.1"}, "10.0.0.1:443": {Host: "10.0.0.1", Port: 443}, "fd00::1": {Host: "fd00::1"},
		"[fd00::1]:22": {Host: "fd00::1", Port: 22}, "web": {Host: "web"}, "web:80": {Host: "web", Port: 80},
	} {
		if got, err := control.ParsePingTarget(in); err != nil || got != want {
			t.Errorf("%s: %+v, %v, want %+v", in, got, err, want)
		}
	}
	for _, bad := range []string{"", "web:", "web:99999", ":80", "a:b:c"} {
		if _, err := control.ParsePingTarget(bad); fault.ExitCode(err) != 2 {
			t.Errorf("%q: %v, want a usage error", bad, err)
		}
	}
}
