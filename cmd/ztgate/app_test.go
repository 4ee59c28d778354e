package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
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

// result is what a command line did.
type result struct {
	code     int
	out, err string
}

type harness struct {
	dir, socket string
	environ     []string
	node        *gatewaytest.Node
	office      *gatewaytest.Office
	engine      *netstack.Engine
	vpc         *gatewaytest.Device
	ran         *config.Config // configuration that run or member started with
	runErr      error
}

func newHarness(t *testing.T) *harness {
	t.Helper()
	dir, err := os.MkdirTemp("", "ztg") // short enough for a unix socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := &harness{dir: dir, socket: filepath.Join(dir, "s"), node: gatewaytest.NewNode(), office: gatewaytest.NewOffice()}
	h.environ = []string{"ZTGATE_SOCKET=" + h.socket, "ZTGATE_HOME=" + dir, "ZTGATE_LISTEN="}
	return h
}

func (h *harness) run(t *testing.T, stdin string, args ...string) result {
	t.Helper()
	start := func(_ context.Context, cfg *config.Config, log *slog.Logger) error {
		h.ran = cfg
		log.Info("started")
		return h.runErr
	}
	var out, errOut bytes.Buffer
	a := &app{in: strings.NewReader(stdin), out: &out, errOut: &errOut, environ: h.environ, runGateway: start, runMember: start}
	return result{a.main(t.Context(), args), out.String(), errOut.String()}
}

// serve runs a gateway between a VPC and an office in memory behind the socket.
func (h *harness) serve(t *testing.T) {
	t.Helper()
	cfg, err := config.Load(config.Sources{Environ: h.environ, NoFile: true})
	if err != nil {
		t.Fatal(err)
	}
	h.engine, h.vpc = gatewaytest.NewEngine(t, h.node)
	h.node.SetOffice(h.office)
	ctx, stop := context.WithCancel(context.Background())
	var parts errgroup.Group
	parts.Go(func() error { return h.node.Run(ctx) })
	parts.Go(func() error {
		return gateway.Serve(ctx, cfg, control.ModeGateway, slog.New(slog.DiscardHandler), h.node, h.engine)
	})
	t.Cleanup(func() {
		stop()
		if err := parts.Wait(); err != nil {
			t.Error(err)
		}
	})
	testwait.For(t, patience, "start", func() bool { _, err := control.NewClient(h.socket).Info(ctx); return err == nil })
}

// patience is for what takes milliseconds on an idle machine.
const patience = 10 * time.Second

const nwid = ztnode.NetworkID(0x8056c2e21c000001)

// populate gives the gateway a network with an office, and a VPC host a connection
// to it.
func (h *harness) populate(t *testing.T) {
	t.Helper()
	h.node.SetOnline(true)
	h.node.SetController(gatewaytest.NewController())
	n := ztnode.Network{ID: nwid, Name: "office\x1b[31m", Status: ztnode.StatusOK, Type: "PRIVATE", MTU: 2800,
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.147.17.5/24")}}
	h.node.SetNetwork(n)
	gatewaytest.SetNetworks(t, h.engine, n)
	h.node.SetPeers(ztnode.Peer{Address: "778cde7190", Role: "PLANET", Version: "1.14.1", Latency: 12,
		Paths: []ztnode.Path{{Endpoint: netip.MustParseAddrPort("198.51.100.1:9993"), Preferred: true, LastSend: time.Now()}}},
		ztnode.Peer{Address: gatewaytest.OfficeAddress.String(), Role: "LEAF", Version: "-", Latency: -1, Relayed: true, LastReceive: time.Now()})
	h.vpc.Connect(t, netip.MustParseAddrPort("172.31.0.9:40000"), netip.MustParseAddrPort("10.147.17.9:443"), nil)
	testwait.For(t, patience, "use of the network and connection", func() bool {
		nets, err := control.NewClient(h.socket).Networks(t.Context())
		return err == nil && nets.Networks[0].Device != "" && len(h.engine.Flows(netstack.FlowFilter{State: "established"})) == 1
	})
}

// refuse sends what the gateway drops: a packet of a stranger in the VPC, and one that
// nobody asked for.
func (h *harness) refuse(t *testing.T) {
	t.Helper()
	h.vpc.Send(gatewaytest.UDP(netip.MustParseAddrPort("192.0.2.1:53"), netip.MustParseAddrPort("10.147.17.9:53"), []byte("x")))
	us, them := ztnode.MAC{}, ztnode.MACOf(nwid, 0x1122334455) // the harness gives us no MAC
	frame := append(append(us[:], them[:]...), 0x08, 0)
	frame = append(frame, gatewaytest.UDP(netip.MustParseAddrPort("10.147.17.66:53"), netip.MustParseAddrPort("10.147.17.5:50"), []byte("x"))...)
	h.node.Receive(nwid, frame)
	testwait.For(t, patience, "two drops", func() bool {
		d, err := control.NewClient(h.socket).Drops(t.Context())
		return err == nil && len(d.Drops) == 2
	})
}

func TestQueries(t *testing.T) {
	h := newHarness(t)
	h.serve(t)
	h.populate(t)
	h.refuse(t)
	for _, tt := range []struct {
		args string
		want []string // in the table
		json []string // in the JSON
	}{
		{"status", []string{"fcd8055969 ONLINE, ready", "8056c2e21c000001", "peers: 1 direct"}, []string{`"ready": true`}},
		{"info", []string{"ADDRESS", "fcd8055969", "ONLINE"}, []string{`"address": "fcd8055969"`, `"online": true`}},
		{"networks", []string{"office?[31m", "OK", "10.147.17.5/24"}, []string{`"id": "8056c2e21c000001"`, `"status": "OK"`}},
		{"listnetworks", []string{"8056c2e21c000001"}, nil},
		{"peers", []string{"778cde7190", "PLANET", "DIRECT", "198.51.100.1:9993"}, []string{`"link": "DIRECT"`}},
		{"flows --top 5 --to 10.147.17.0/24", []string{"172.31.0.9:40000", "10.147.17.5:40000"}, []string{`"state": "established"`}},
		{"drops", []string{"source_not_allowed", "192.0.2.1:53", "10.147.17.9:53", "no_flow", "1122334455", "10.147.17.66:53",
			"The source is not one that may send. Add it to vpc.sources"}, []string{`"reason": "source_not_allowed"`, `"meaning": "The source is not`, `"count": 1`, `"member": "1122334455"`}},
		{"status", []string{"DROPPED BECAUSE", "192.0.2.1:53", "1122334455"}, []string{`"reason": "no_flow"`}},
		{"flows --to 10.99.0.1", []string{"PROTO"}, []string{`"total": 0`}},
		{"health", []string{"online", "ok"}, []string{`"ready": true`}},
		{"wait --for ready --timeout 5s", []string{"ready"}, []string{`"ready": true`}},
		{"wait --for online", []string{"online"}, nil},
		{"ping 10.147.17.9 -c 1", []string{"answer from 10.147.17.9 by " + gatewaytest.OfficeAddress.String() + " RELAY in ", " ms\n"}, []string{`"milliseconds": `}},
		{"ping 10.147.17.9:443 -c 2 -i 1ms", []string{"answer from 10.147.17.9:443"}, []string{`"port": 443`}},
		{"explain 172.31.0.9:50000 10.147.17.9:443", []string{"forward", "10.147.17.5 (masquerade)", "10.147.17.0/24 in 8056c2e21c000001, next hop 10.147.17.9", gatewaytest.OfficeAddress.String() + " RELAY"}, []string{`"verdict": "forward"`}},
		{"explain 10.9.0.1 10.147.17.9:443", []string{"drop, reason source_not_allowed"}, []string{`"reason": "source_not_allowed"`}},
		{"doctor 10.147.17.9:443 --from 172.31.0.9", []string{"ok", "gateway", "to tcp://10.147.17.9:443", gatewaytest.OfficeAddress.String() + " has 10.147.17.9", "answers in"}, []string{`"running": true`, `"state": "ok"`}},
		{"join 9778dd29dd246907", []string{"joined 9778dd29dd246907"}, []string{`"9778dd29dd246907"`}},
		{"leave 9778dd29dd246907", []string{"left 9778dd29dd246907"}, nil},
		{"orbit 8056c2e21c", []string{"0000008056c2e21c", "waiting for 8056c2e21c"}, []string{`"waiting": true`}},
		{"moons", []string{"0000008056c2e21c"}, []string{`"seed": "8056c2e21c"`}},
		{"deorbit 8056c2e21c", []string{"left 8056c2e21c"}, nil},
		{"version", []string{"ztgate "}, []string{`"goVersion"`}},
		{"config show", []string{"socket", "environment ZTGATE_SOCKET"}, []string{`"origin": "default"`}},
		{"config check", []string{"the configuration is valid"}, []string{`"values"`}},
		{"completion bash", []string{"bash completion"}, nil},
		{"help run", []string{"--network"}, nil},
	} {
		t.Run(tt.args, func(t *testing.T) {
			r := h.run(t, "", strings.Fields(tt.args)...)
			if r.code != 0 {
				t.Fatalf("exit code %d: %s", r.code, r.err)
			}
			for _, want := range tt.want {
				if !strings.Contains(r.out, want) {
					t.Errorf("output lacks %q:\n%s", want, r.out)
				}
			}
			if strings.ContainsRune(r.out, 0x1b) {
				t.Error("a control character from the network reaches the terminal")
			}
			if tt.json == nil {
				return
			}
			r = h.run(t, "", append(strings.Fields(tt.args), "-j")...)
			dec := json.NewDecoder(strings.NewReader(r.out))
			for dec.More() {
				var v struct{ Schema int }
				if err := dec.Decode(&v); err != nil || v.Schema != control.Schema {
					t.Errorf("JSON: schema %d, %v:\n%s", v.Schema, err, r.out)
					break
				}
			}
			for _, want := range tt.json {
				if !strings.Contains(r.out, want) {
					t.Errorf("JSON lacks %q:\n%s", want, r.out)
				}
			}
		})
	}
}

func TestProblems(t *testing.T) {
	h := newHarness(t)
	path := filepath.Join(h.dir, "ztgate.yaml")
	if err := os.WriteFile(path, []byte(`forwards: [{listen: tcp/8443, to: "192.168.7.1:443"}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	h.environ = append(h.environ, "ZTGATE_CONFIG="+path)
	h.serve(t)
	h.populate(t)
	want := "configuration: forward tcp/0.0.0.0:8443 to 192.168.7.1:443: no joined network has a route to 192.168.7.1; see ztgate networks"
	if r := h.run(t, "", "status"); !strings.Contains(r.out, want) {
		t.Errorf("status lacks %q:\n%s", want, r.out)
	}
}

func TestNotReady(t *testing.T) {
	h := newHarness(t)
	h.serve(t)
	for args, want := range map[string]string{
		"health":                            "OFFLINE",
		"wait --timeout 100ms":              "no network is joined",
		"wait --for online --timeout 100ms": "OFFLINE",
	} {
		r := h.run(t, "", strings.Fields(args)...)
		if r.code != 4 || !strings.Contains(r.err, want) {
			t.Errorf("%s: exit code %d, %q, want 4 and %q", args, r.code, r.err, want)
		}
	}
	if r := h.run(t, "", "doctor"); r.code != 4 || !strings.Contains(r.err, "node: node fcd8055969 is OFFLINE") || !strings.Contains(r.out, "not reached") {
		t.Errorf("doctor: %+v, want exit code 4 and the first broken link", r)
	}
	h.populate(t)
	h.office.SwitchOff(true)
	if r := h.run(t, "", "ping", "10.147.17.9", "-c", "2", "-i", "1ms", "--timeout", "100ms"); r.code != 1 || !strings.Contains(r.err, "no answer") {
		t.Errorf("ping without an answer: %+v", r)
	}
}

func TestNotRunning(t *testing.T) {
	h := newHarness(t)
	for _, args := range []string{"status", "info", "networks", "peers", "flows", "drops", "health", "join 8056c2e21c000001",
		"leave 8056c2e21c000001", "ping 10.0.0.1", "wait --timeout 100ms", "controller list", "controller create"} {
		r := h.run(t, "", strings.Fields(args)...)
		if r.code != 3 || !strings.Contains(r.err, "not running") || r.out != "" {
			t.Errorf("%s: %+v, want exit code 3", args, r)
		}
	}
	r := h.run(t, "", "-j", "status")
	var v control.ErrorView
	if err := json.Unmarshal([]byte(r.err), &v); err != nil || v.Error.Kind != fault.KindNotRunning {
		t.Errorf("error as JSON: %q, %v", r.err, err)
	}
}

func TestUsageErrors(t *testing.T) {
	h := newHarness(t)
	for _, args := range []string{"bogus", "status extra", "--bogus", "identity", "identity bogus", "join", "run --port", "run extra",
		"run --port x", "run --port 1 --port 2", "run --network 12", "wait --for ever", "ping a:b:c", "planet make", "config check /nonexistent",
		"controller create --subnet x", "controller authorize 8056c2e21c000001 0123456789 --ip x", "identity show /nonexistent", "flows --top x"} {
		r := h.run(t, "", strings.Fields(args)...)
		if r.code != 2 || r.err == "" || r.out != "" {
			t.Errorf("%s: %+v, want exit code 2 and a line on standard error", args, r)
		}
	}
	r := h.run(t, "", "bogus", "-j")
	var v control.ErrorView
	if err := json.Unmarshal([]byte(r.err), &v); err != nil || v.Error.Kind != fault.KindUsage {
		t.Errorf("error as JSON: %q, %v", r.err, err)
	}
}

func TestController(t *testing.T) {
	h := newHarness(t)
	h.serve(t)
	if r := h.run(t, "", "controller", "list"); r.code != 2 || !strings.Contains(r.err, "--controller") {
		t.Errorf("no controller: %+v", r)
	}
	h.populate(t)
	r := h.run(t, "", "controller", "network", "create", "--name", "office", "--subnet", "10.147.17.0/24")
	id := strings.TrimSpace(r.out)
	if _, err := ztnode.ParseNetworkID(id); err != nil || r.code != 0 {
		t.Fatalf("create: %+v", r)
	}
	for _, tt := range []struct{ args, want string }{
		{"controller list", "office"},
		{"controller network list", "10.147.17.0/24"},
		{"controller show " + id, `"name": "office"`},
		{"controller set " + id + " --mtu 1500", `"mtu": 1500`},
		{"controller authorize " + id + " 0123456789 --ip 10.147.17.7 --name web", "authorized 0123456789"},
		{"controller member authorise " + id + " 1123456789 2123456789", "authorized 2123456789"},
		{"controller members " + id, "10.147.17.7"},
		{"controller member list " + id, "web"},
		{"controller deauthorise " + id + " 0123456789", "deauthorized"},
		{"controller member deauthorize " + id + " 0123456789", "deauthorized"},
		{"controller member delete " + id + " 0123456789", "deleted"},
		{"controller delete " + id, "deleted"},
	} {
		if r := h.run(t, "", strings.Fields(tt.args)...); r.code != 0 || !strings.Contains(r.out, tt.want) {
			t.Errorf("%s: %+v, want %q", tt.args, r, tt.want)
		}
	}
}

// TestAuthorizeAndWait: scripts go on when the member is there, and learn what it lacks.
func TestAuthorizeAndWait(t *testing.T) {
	h := newHarness(t)
	h.serve(t)
	h.populate(t)
	ctl := gatewaytest.NewController()
	h.node.SetController(ctl)
	id := strings.TrimSpace(h.run(t, "", "controller", "create").out)
	authorize := func(timeout string, more ...string) result {
		return h.run(t, "", append([]string{"controller", "authorize", id, "0123456789", "--wait", "--timeout", timeout}, more...)...)
	}
	for want, st := range map[string]control.MemberState{
		"has not asked for the network": {},
		"has not asked in the last":     {Asked: true},
		"waits for its configuration":   {Asked: true, LastRequest: time.Now()},
	} {
		ctl.SetState("0123456789", st)
		if r := authorize("1ms"); r.code != 4 || !strings.Contains(r.err, want) || !strings.Contains(r.out, "authorized 0123456789") || strings.Contains(r.out, "online") {
			t.Errorf("%+v, want %q", r, want)
		}
	}
	done := make(chan result)
	go func() { done <- authorize("1m") }()
	testwait.For(t, patience, "authorization", func() bool {
		b, err := ctl.Member(mustID(t, id), "0123456789")
		return err == nil && strings.Contains(string(b), `"authorized":true`)
	})
	ctl.SetState("0123456789", control.MemberState{Asked: true, Online: true, LastRequest: time.Now()})
	if r := <-done; r.code != 0 || !strings.HasSuffix(r.out, "online 0123456789\n") {
		t.Errorf("%+v", r)
	}
	if r := authorize("1ms", "1123456789"); r.code != 4 || !strings.Contains(r.out, "online 0123456789") || !strings.Contains(r.err, "member 1123456789") {
		t.Errorf("one of two: %+v", r)
	}
	var v control.Record
	if r := authorize("1m", "-j"); r.code != 0 || json.Unmarshal([]byte(r.out), &v) != nil || v.State == nil || !v.State.Online {
		t.Errorf("as JSON: %+v", r)
	}
	if r := h.run(t, "", "controller", "members", id); r.code != 0 || !strings.Contains(r.out, "ONLINE") {
		t.Errorf("members: %+v", r)
	}
}

func mustID(t *testing.T, s string) ztnode.NetworkID {
	t.Helper()
	id, err := ztnode.ParseNetworkID(s)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestMigration moves a controller here and back.
func TestMigration(t *testing.T) {
	h := newHarness(t)
	home, back := filepath.Join(h.dir, "moved"), filepath.Join(h.dir, "back")
	from := filepath.Join("..", "..", "router", "admin", "testdata", "zerotier-one")
	if r := h.run(t, "", "controller", "import", from, "--home", home); r.code != 0 || !strings.Contains(r.out, "imported 1 networks and 3 members") || !strings.Contains(r.out, "note: ") {
		t.Errorf("%+v", r)
	}
	if r := h.run(t, "", "controller", "import", from, "--home", home); r.code != 2 || !strings.Contains(r.err, "nothing is imported") {
		t.Errorf("again: %+v", r)
	}
	var v admin.Migration
	if r := h.run(t, "", "controller", "export", back, "--home", home, "-j"); r.code != 0 || json.Unmarshal([]byte(r.out), &v) != nil || v.Members != 3 {
		t.Errorf("%+v", r)
	}
}

func TestIdentityAndPlanet(t *testing.T) {
	h := newHarness(t)
	secret, public := filepath.Join(h.dir, "secret"), filepath.Join(h.dir, "public")
	if r := h.run(t, "", "identity", "new", secret, public); r.code != 0 {
		t.Fatalf("new: %+v", r)
	}
	if fi, err := os.Stat(secret); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("secret: %v, %v, want mode 0600", fi, err)
	}
	if r := h.run(t, "", "identity", "new", secret); r.code != 2 || !strings.Contains(r.err, "--force") {
		t.Errorf("overwrite: %+v", r)
	}
	text, err := os.ReadFile(secret)
	if err != nil {
		t.Fatal(err)
	}
	r := h.run(t, string(text), "identity", "show", "-")
	if r.code != 0 || strings.Contains(r.out, string(text)) || strings.Count(r.out, ":") != 2 {
		t.Errorf("show: %+v, want the public form", r)
	}
	if r := h.run(t, "", "identity", "validate", public); r.code != 0 {
		t.Errorf("validate: %+v", r)
	}
	bad := "0123456789" + r.out[10:]
	if r := h.run(t, bad, "identity", "validate", "-"); r.code != 1 {
		t.Errorf("validate a wrong address: %+v", r)
	}
	if r := h.run(t, "", "identity", "new"); r.code != 0 || strings.Count(r.out, ":") != 3 {
		t.Errorf("new without a file: %+v", r)
	}
	planet := filepath.Join(h.dir, "planet")
	if r := h.run(t, "", "planet", "make", "--root", public+"=198.51.100.1/9993", "-o", planet, "--key", planet+".key", "--id", "5"); r.code != 0 {
		t.Errorf("planet make: %+v", r)
	}
	if r := h.run(t, "", "planet", "show", planet); r.code != 0 || !strings.Contains(r.out, "planet 5") || !strings.Contains(r.out, "198.51.100.1:9993") {
		t.Errorf("planet show: %+v", r)
	}
}

func TestRunAndMember(t *testing.T) {
	h := newHarness(t)
	if r := h.run(t, "", "run", "--network", nwid.String(), "--port", "0", "--controller", "--source", "172.31.0.0/16,10.9.0.0/16"); r.code != 0 || !strings.Contains(r.err, "started") {
		t.Fatalf("run: %+v", r)
	}
	if h.ran.Port != 0 || !h.ran.Controller || len(h.ran.VPC.Sources) != 2 || h.ran.VPC.TUN != config.DefaultTUN || h.ran.Home != h.dir {
		t.Errorf("run started with %+v", h.ran)
	}
	if r := h.run(t, "", "member", "--network", nwid.String(), "--network", "9778dd29dd246907"); r.code != 0 {
		t.Fatalf("member: %+v", r)
	}
	if h.ran.VPC.TUN != gateway.MemberTUN || len(h.ran.Networks) != 2 {
		t.Errorf("member started with %+v", h.ran)
	}
	h.runErr = errors.New("broken")
	if r := h.run(t, "", "run"); r.code != 1 || !strings.Contains(r.err, "ztgate: broken") {
		t.Errorf("failing run: %+v", r)
	}
	h.runErr = context.Canceled
	if r := h.run(t, "", "run"); r.code != 0 {
		t.Errorf("stopped run: %+v", r)
	}
	path := filepath.Join(h.dir, "c.yaml")
	if err := os.WriteFile(path, []byte("prot: 1\nhmoe: x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := h.run(t, "", "run", "--config", path)
	if r.code != 2 || !strings.Contains(r.err, "did you mean port?") || strings.Count(r.err, "\n") != 2 {
		t.Errorf("faulty file: %+v, want two lines", r)
	}
}

// TestManualExamples checks the manual's files as an operator would.
func TestManualExamples(t *testing.T) {
	manual, err := os.ReadFile(filepath.Join("..", "..", "docs", "operator.md"))
	if err != nil {
		t.Fatal(err)
	}
	h := newHarness(t)
	files := 0
	for i, part := range strings.Split(string(manual), "```") {
		text, ok := strings.CutPrefix(part, "yaml\n")
		if !ok || i%2 == 0 {
			continue
		}
		files++
		path := filepath.Join(h.dir, "manual.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if r := h.run(t, "", "config", "check", path); r.code != 0 || r.out != "the configuration is valid\n" {
			t.Errorf("%+v:\n%s", r, text)
		}
	}
	if files == 0 {
		t.Error("the manual has no example")
	}
}

func TestConfigCheck(t *testing.T) {
	h := newHarness(t)
	path := filepath.Join(h.dir, "c.yaml")
	for text, want := range map[string]result{
		`forwards: [{listen: "tcp/8443", to: "10.0.0.10:443"}]`:                                      {0, "the configuration is valid\n", ""},
		`{forwards: [{listen: "tcp/8443", to: "10.0.0.10:443"}], policy: {allow: ["tcp:10.0.0.9"]}}`: {0, "the policy refuses", ""},
		`forwards: [{listen: "tcp/8443", to: "127.0.0.1:443"}]`:                                      {2, "", "never forwarded"},
		`forwards: [{listen: "tcp/8443", to: "10.0.0.300:443"}]`:                                     {2, "", "four numbers up to 255"},
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		r := h.run(t, "", "config", "check", path)
		if r.code != want.code || !strings.Contains(r.out, want.out) || !strings.Contains(r.err, want.err) {
			t.Errorf("%s: %+v, want %+v", text, r, want)
		}
	}
	if r := h.run(t, "", "config", "show", "--allow", "tcp:10.0.0.10:443", "--allow", "icmp:db.office.example"); r.code != 0 ||
		!strings.Contains(r.out, "accept proto icmp to db.office.example direction out") || !strings.Contains(r.out, "policy.allow") {
		t.Errorf("show: %+v", r)
	}
}

// TestTree walks all commands for what people read.
func TestTree(t *testing.T) {
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Short == "" || c.Short[0] < 'A' || c.Short[0] > 'Z' || strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: short text %q, want a capital and no full stop", c.CommandPath(), c.Short)
		}
		if c.Name() != "ztgate" && c.RunE == nil && c.Run == nil {
			t.Errorf("%s does nothing", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk((&app{}).command())
}
