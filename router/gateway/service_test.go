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
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"golang.org/x/sync/errgroup"

	"ztgate/internal/testwait"
	"ztgate/netstack"
	"ztgate/router/admin"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/gateway"
	"ztgate/router/gateway/gatewaytest"
	"ztgate/zerotier/ztnode"
)

const nwid = ztnode.NetworkID(0x8056c2e21c000001)

func okNetwork() ztnode.Network {
	return ztnode.Network{ID: nwid, Name: "office", Status: ztnode.StatusOK, Type: "PRIVATE", MAC: ztnode.MAC{2, 0, 0, 0, 0, 1}, MTU: 2800,
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.147.17.5/24")}, Certificate: time.Unix(2000000000, 0),
		Routes: []ztnode.Route{{Target: netip.MustParsePrefix("10.0.0.0/24"), Via: netip.MustParseAddr("10.147.17.9")}}}
}

// running is a served node, for a gateway with a forwarding plane between an office
// and a VPC.
type running struct {
	node   *gatewaytest.Node
	office *gatewaytest.Office
	engine *netstack.Engine
	vpc    *gatewaytest.Device
	client *control.Client
	cfg    *config.Config
	socket string
	logs   *gatewaytest.Log // as JSON
}

// shortDir returns a directory whose name fits a unix socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ztg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func load(t *testing.T, flags map[string][]string) *config.Config {
	t.Helper()
	cfg, err := config.Load(config.Sources{Flags: flags, NoFile: true})
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// serve runs the control API of a fake node until the test ends.
func serve(t *testing.T, mode string, flags map[string][]string) *running {
	t.Helper()
	dir := shortDir(t)
	all := map[string][]string{"home": {dir}, "socket": {filepath.Join(dir, "s")}, "listen": {freePort(t)}}
	for k, v := range flags {
		all[k] = v
	}
	r := &running{node: gatewaytest.NewNode(), office: gatewaytest.NewOffice(), cfg: load(t, all), logs: &gatewaytest.Log{}}
	r.socket = r.cfg.Socket
	r.client = control.NewClient(r.socket)
	if mode == control.ModeGateway {
		r.engine, r.vpc = gatewaytest.NewEngine(t, r.node)
		r.node.SetOffice(r.office)
	}
	ctx, stop := context.WithCancel(context.Background())
	var parts errgroup.Group
	parts.Go(func() error { return r.node.Run(ctx) })
	parts.Go(func() error {
		return gateway.Serve(ctx, r.cfg, mode, slog.New(slog.NewJSONHandler(r.logs, nil)), r.node, r.engine)
	})
	t.Cleanup(func() {
		stop()
		if err := parts.Wait(); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	wctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		_, err := r.client.Info(wctx)
		if err == nil {
			return r
		}
		if wctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

// setNetwork makes a network work, and waits until the gateway uses it.
func (r *running) setNetwork(t *testing.T, n ztnode.Network) {
	t.Helper()
	r.node.SetNetwork(n)
	gatewaytest.SetNetworks(t, r.engine, n)
	testwait.For(t, patience, "use of the network", func() bool {
		nets, err := r.client.Networks(t.Context())
		return err == nil && slices.ContainsFunc(nets.Networks, func(v control.NetworkView) bool { return v.ID == n.ID && v.Device != "" })
	})
}

func TestControlAPI(t *testing.T) {
	r := serve(t, control.ModeGateway, nil)
	ctx := t.Context()
	fi, err := os.Stat(r.socket)
	if err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("socket has mode %v, %v, want 0660", fi.Mode(), err)
	}
	info, err := r.client.Info(ctx)
	if err != nil || info.Address != "fcd8055969" || info.Schema != control.Schema || info.State() != "OFFLINE" {
		t.Errorf("info %+v, %v", info, err)
	}
	nets, err := r.client.Join(ctx, nwid.String())
	if err != nil || len(nets.Networks) != 1 || nets.Networks[0].Status != ztnode.StatusRequesting {
		t.Errorf("join: %+v, %v", nets, err)
	}
	if _, err := r.client.Join(ctx, "123"); fault.ExitCode(err) != 2 {
		t.Errorf("join with a bad ID: %v, want a usage error", err)
	}
	r.setNetwork(t, okNetwork())
	nets, err = r.client.Networks(ctx)
	if err != nil || nets.Networks[0].Addresses[0].String() != "10.147.17.5/24" || nets.Networks[0].MAC != (ztnode.MAC{2, 0, 0, 0, 0, 1}) {
		t.Errorf("networks: %+v, %v", nets, err)
	}
	p, err := r.client.Ping(ctx, control.PingRequest{Host: "10.147.17.9"})
	if err != nil || p.MS <= 0 || p.Network != nwid.String() || p.Peer != gatewaytest.OfficeAddress.String() {
		t.Errorf("ping: %+v, %v", p, err)
	}
	if _, err := r.client.Ping(ctx, control.PingRequest{Host: "10.0.0.10", Port: 443}); err != nil {
		t.Errorf("ping with port: %v", err)
	}
	if _, err := r.client.Ping(ctx, control.PingRequest{Host: "192.168.99.1"}); err == nil || !strings.Contains(err.Error(), "no joined network") {
		t.Errorf("ping outside: %v", err)
	}
	r.office.Refuse(true)
	if _, err := r.client.Ping(ctx, control.PingRequest{Host: "10.0.0.10", Port: 443}); fault.ExitCode(err) != 1 || !strings.Contains(err.Error(), "refused") {
		t.Errorf("ping of a closed port: %v", err)
	}
	r.office.SwitchOff(true)
	if _, err := r.client.Ping(ctx, control.PingRequest{Host: "10.0.0.10", TimeoutMS: 200}); fault.ExitCode(err) != 1 || !strings.Contains(err.Error(), "no answer") {
		t.Errorf("failed ping: %v", err)
	}
	if nets, err = r.client.Leave(ctx, nwid.String()); err != nil || len(nets.Networks) != 1 {
		t.Errorf("leave: %+v, %v", nets, err)
	}
	if nets, err = r.client.Networks(ctx); err != nil || len(nets.Networks) != 0 {
		t.Errorf("after leaving: %+v, %v", nets, err)
	}
	conf, err := r.client.Config(ctx)
	if err != nil || len(conf.Values) < 10 {
		t.Errorf("config: %+v, %v", conf, err)
	}
}

// A diagnosis walks to so many targets, and no more.
func TestDiagnosisIsBounded(t *testing.T) {
	r := serve(t, control.ModeGateway, nil)
	targets := slices.Repeat([]string{"tcp://10.0.0.10:443"}, 65)
	if _, err := r.client.Doctor(t.Context(), control.DiagnosisRequest{Targets: targets}); fault.ExitCode(err) != 2 || !strings.Contains(err.Error(), "at most 64") {
		t.Errorf("65 targets: %v", err)
	}
}

// TestConnectionsAreBounded: whoever opens connections to the two servers has so many of them:
// the oldest are closed at once, and not when their time for a request is over.
func TestConnectionsAreBounded(t *testing.T) {
	const tries, most, patience = 50, 32, 2 * time.Second
	r := serve(t, control.ModeMember, nil)
	for network, address := range map[string]string{"tcp": r.cfg.Listen, "unix": r.socket} {
		t.Run(network, func(t *testing.T) {
			var early atomic.Int32
			var reading sync.WaitGroup
			for range tries {
				c, err := net.Dial(network, address)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				dialled := time.Now()
				reading.Go(func() {
					if _, _ = c.Read(make([]byte, 1)); time.Since(dialled) < patience { // until it is closed
						early.Add(1)
					}
				})
			}
			reading.Wait()
			// The test's own client may have one of those that are left.
			if n := early.Load(); n != tries-most && n != tries-most+1 {
				t.Errorf("%d of %d are closed, want %d", n, tries, tries-most)
			}
		})
	}
	if _, err := r.client.Health(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestFlows(t *testing.T) {
	r := serve(t, control.ModeGateway, nil)
	r.setNetwork(t, okNetwork())
	ap := netip.MustParseAddrPort
	server := ap("10.0.0.10:443")
	r.vpc.Send(gatewaytest.UDP(ap("172.31.0.9:40002"), ap("10.0.0.53:53"), make([]byte, 72)))
	r.vpc.Connect(t, ap("172.31.0.9:40000"), server, nil)
	r.vpc.Connect(t, ap("172.31.0.9:40001"), server, make([]byte, 920))
	// A packet that is handed over is not yet counted.
	testwait.For(t, patience, "count of the last packet", func() bool {
		return slices.ContainsFunc(r.engine.Flows(netstack.FlowFilter{}), func(f netstack.FlowInfo) bool { return f.BytesOut == 1000 })
	})
	f, err := r.client.Flows(t.Context(), control.FlowQuery{To: "", Top: 2})
	if err != nil || f.Total != 3 || len(f.Flows) != 2 || f.Flows[0].BytesOut != 1000 || f.Flows[0].Source.Port() != 40001 {
		t.Errorf("top: %+v, %v", f, err)
	}
	f, err = r.client.Flows(t.Context(), control.FlowQuery{To: "10.0.0.53", Top: 0})
	if err != nil || len(f.Flows) != 1 || f.Flows[0].Protocol != "udp" {
		t.Errorf("to: %+v, %v", f, err)
	}
	if _, err = r.client.Flows(t.Context(), control.FlowQuery{To: "nowhere", Top: 0}); fault.ExitCode(err) != 2 {
		t.Errorf("bad --to: %v", err)
	}
	m := serve(t, control.ModeMember, nil)
	if _, err = m.client.Flows(t.Context(), control.FlowQuery{To: "", Top: 0}); fault.ExitCode(err) != 2 {
		t.Errorf("flows of a member: %v", err)
	}
}

func TestReadiness(t *testing.T) {
	r := serve(t, control.ModeGateway, map[string][]string{"target": {"tcp://10.0.0.10:443"}})
	r.office.Refuse(true)
	get := func() (int, control.Health) {
		t.Helper()
		resp, err := http.Get("http://" + r.cfg.Listen + "/readyz")
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
	code, h := get()
	if code != http.StatusServiceUnavailable || len(h.Reasons) == 0 || !strings.Contains(h.Reasons[0], "OFFLINE") {
		t.Errorf("at the start: %d %+v", code, h)
	}
	if err := h.Err(); fault.ExitCode(err) != 4 {
		t.Errorf("health: %v, want exit code 4", err)
	}
	r.node.SetOnline(true)
	denied := okNetwork()
	denied.Status = ztnode.StatusDenied
	r.node.SetNetwork(denied)
	_, h = get()
	if !strings.Contains(strings.Join(h.Reasons, "\n"), "authorise member fcd8055969") {
		t.Errorf("denied: %+v", h)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := r.client.Wait(ctx, "online"); err != nil {
		t.Errorf("wait for online: %v", err)
	}
	r.setNetwork(t, okNetwork())
	testwait.For(t, patience, "refusal by the target", func() bool {
		_, h = get()
		return strings.Contains(strings.Join(h.Reasons, "\n"), "target tcp://10.0.0.10:443: ") && strings.Contains(strings.Join(h.Reasons, "\n"), "refused")
	})
	r.office.Refuse(false)
	if _, err := r.client.Wait(ctx, "ready"); err != nil {
		t.Errorf("wait for ready: %v", err)
	}
	if code, h = get(); code != http.StatusOK || !h.Ready {
		t.Errorf("when all is well: %d %+v", code, h)
	}
	st, err := r.client.Status(ctx)
	if err != nil || !st.Health.Ready || len(st.Targets) != 1 || !st.Targets[0].Up {
		t.Errorf("status: %+v, %v", st, err)
	}
}

func TestWaitGivesUp(t *testing.T) {
	r := serve(t, control.ModeGateway, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := r.client.Wait(ctx, "ready"); fault.ExitCode(err) != 4 || !strings.Contains(err.Error(), "no network is joined") {
		t.Errorf("got %v, want what is missing", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := control.NewClient("/nonexistent/s").Wait(ctx, "ready"); fault.ExitCode(err) != 3 {
		t.Errorf("without a process: %v, want exit code 3", err)
	}
}

func TestController(t *testing.T) {
	r := serve(t, control.ModeNode, nil)
	ctx := t.Context()
	if _, err := r.client.ControllerNetworks(ctx); fault.ExitCode(err) != 2 || !strings.Contains(err.Error(), "--controller") {
		t.Errorf("without a controller: %v", err)
	}
	r.node.SetController(gatewaytest.NewController())
	patch, err := admin.NetworkSpec{Name: "office", Subnet: "10.147.17.0/24"}.Patch()
	if err != nil {
		t.Fatal(err)
	}
	n, err := r.client.CreateNetwork(ctx, patch)
	if err != nil {
		t.Fatal(err)
	}
	var rec struct {
		ID    string `json:"id"`
		Name  string `json:"name"`
		Pools []struct {
			Start string `json:"ipRangeStart"`
			End   string `json:"ipRangeEnd"`
		} `json:"ipAssignmentPools"`
	}
	if err := json.Unmarshal(n.Record, &rec); err != nil || rec.Name != "office" || rec.Pools[0].Start != "10.147.17.1" || rec.Pools[0].End != "10.147.17.254" {
		t.Errorf("record %s, %v", n.Record, err)
	}
	yes := true
	mp, err := admin.MemberSpec{Authorized: &yes, IPs: []string{"10.147.17.7"}}.Patch()
	if err != nil {
		t.Fatal(err)
	}
	if m, err := r.client.SetMember(ctx, rec.ID, "0123456789", mp); err != nil || !strings.Contains(string(m.Record), `"authorized":true`) {
		t.Errorf("authorise: %s, %v", m.Record, err)
	}
	if _, err := r.client.SetMember(ctx, rec.ID, "xyz", mp); fault.ExitCode(err) != 2 {
		t.Errorf("bad address: %v", err)
	}
	if m, err := r.client.Members(ctx, rec.ID); err != nil || len(m.Records) != 1 {
		t.Errorf("members: %+v, %v", m, err)
	}
	if _, err := r.client.DeleteMember(ctx, rec.ID, "0123456789"); err != nil {
		t.Error(err)
	}
	if _, err := r.client.DeleteNetwork(ctx, rec.ID); err != nil {
		t.Error(err)
	}
	if _, err := r.client.ControllerNetwork(ctx, rec.ID); fault.ExitCode(err) != 1 {
		t.Errorf("deleted network: %v", err)
	}
}

func TestHTTP(t *testing.T) {
	r := serve(t, control.ModeGateway, map[string][]string{"target": {"icmp://10.0.0.1"}})
	nw := okNetwork()
	nw.Name = "<script>alert(1)</script>"
	r.setNetwork(t, nw)
	r.node.SetPeers(
		ztnode.Peer{Address: "778cde7190", Role: "PLANET", Latency: 12, Paths: []ztnode.Path{{Endpoint: netip.MustParseAddrPort("198.51.100.1:9993"), Preferred: true}}},
		ztnode.Peer{Address: "0123456789", Role: "LEAF", Latency: -1, Relayed: true, LastReceive: time.Now()},
		ztnode.Peer{Address: "1123456789", Role: "LEAF", Latency: -1, Relayed: true, LastReceive: time.Now().Add(-time.Hour)})
	get := func(path string) (int, string) {
		t.Helper()
		resp, err := http.Get("http://" + r.cfg.Listen + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	if code, body := get("/healthz"); code != 200 || !strings.Contains(body, `"ok":true`) {
		t.Errorf("healthz: %d %s", code, body)
	}
	if code, body := get("/"); code != 200 || strings.Contains(body, "<script>") || !strings.Contains(body, "&lt;script&gt;") {
		t.Errorf("status page: %d, or a name from the network is not escaped", code)
	}
	if code, _ := get("/v1/info"); code != 404 {
		t.Errorf("control API over TCP: %d, want 404", code)
	}
	for _, x := range []string{"POST /v1/reload", "POST /v1/networks/1111111111000002", "DELETE /v1/networks/8056c2e21c000001", "DELETE /network/8056c2e21c000001",
		"POST /controller/network/8056c2e21c______", "PUT /", "POST /metrics", "DELETE /healthz", "POST /readyz"} {
		method, path, _ := strings.Cut(x, " ")
		req, err := http.NewRequestWithContext(t.Context(), method, "http://"+r.cfg.Listen+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if _ = resp.Body.Close(); resp.StatusCode != http.StatusNotFound && resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("%s: %d", x, resp.StatusCode)
		}
	}
	if n := len(r.node.Networks()); n != 1 {
		t.Errorf("%d networks are joined now", n)
	}
	code, body := get("/metrics")
	if code != 200 {
		t.Fatalf("metrics: %d", code)
	}
	for _, want := range []string{
		`ztgate_network_status{network="8056c2e21c000001",status="OK"} 1`,
		`ztgate_network_status{network="8056c2e21c000001",status="ACCESS_DENIED"} 0`,
		`ztgate_network_certificate_expiry_timestamp_seconds{network="8056c2e21c000001"} 2e+09`,
		`ztgate_peers{path="direct_ipv4",role="PLANET"} 1`,
		`ztgate_peers{path="relay",role="LEAF"} 1`, `ztgate_peers{path="none",role="LEAF"} 1`,
		`ztgate_peer_rtt_seconds_count{path="direct_ipv4"} 1`,
		`ztgate_target_up{target="icmp://10.0.0.1"}`,
		`ztgate_health_status{check="online"} 0`,
		`ztgate_build_info{`,
		`go_goroutines`, `process_open_fds`,
	} {
		if !strings.Contains(body, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	problems, err := promlint.New(strings.NewReader(body)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "ztgate_") {
			t.Errorf("metric %s: %s", p.Metric, p.Text)
		}
	}
}

func TestSocketOfLivingProcess(t *testing.T) {
	r := serve(t, control.ModeMember, nil)
	err := gateway.Serve(t.Context(), r.cfg, control.ModeMember, slog.New(slog.DiscardHandler), gatewaytest.NewNode(), nil)
	if err == nil || !strings.Contains(err.Error(), "another process answers") {
		t.Errorf("got %v, want that another process answers", err)
	}
}

func TestSocketLeftBehind(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	serve(t, control.ModeMember, map[string][]string{"socket": {path}})
}

func TestPortTaken(t *testing.T) {
	r := serve(t, control.ModeMember, nil)
	cfg := load(t, map[string][]string{"home": {shortDir(t)}, "socket": {filepath.Join(shortDir(t), "s")}, "listen": {r.cfg.Listen}})
	err := gateway.Serve(t.Context(), cfg, control.ModeMember, slog.New(slog.DiscardHandler), gatewaytest.NewNode(), nil)
	if err == nil || !strings.Contains(err.Error(), "choose another with --listen") {
		t.Errorf("got %v, want the remedy", err)
	}
}

func TestExitCodes(t *testing.T) {
	for want, err := range map[int]error{
		0: nil, 1: errors.New("x"), 2: fault.Usage(errors.New("x")), 3: &fault.Error{Kind: fault.KindNotRunning, Err: errors.New("x")},
		4: fault.NotReady("x"),
	} {
		if got := fault.ExitCode(err); got != want {
			t.Errorf("exit code of %v is %d, want %d", err, got, want)
		}
	}
}
