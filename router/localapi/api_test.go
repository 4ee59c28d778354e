package localapi

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

// process is one that the API shows.
type process struct {
	peers  []ztnode.Peer
	nets   []control.NetworkView
	ctl    http.Handler
	refuse error
}

func (p *process) Info() control.Info {
	return control.Info{Home: "/home", Info: ztnode.Info{Address: "0123456789", Identity: "0123456789:0:aa", Online: true, Version: "1.16.0", PrimaryPort: 9993,
		SecondaryPort: 30000, PlanetID: 7, PlanetTimestamp: 8, Listening: []netip.AddrPort{netip.MustParseAddrPort("192.168.1.2:9993")}}}
}
func (p *process) Peers() []ztnode.Peer             { return p.peers }
func (p *process) Networks() []control.NetworkView  { return p.nets }
func (p *process) Allowed(ztnode.NetworkID) Allowed { return Allowed{} }
func (p *process) Controller() http.Handler         { return p.ctl }
func (p *process) Join(id ztnode.NetworkID) error {
	if p.refuse == nil {
		p.nets = append(p.nets, control.NetworkView{Network: ztnode.Network{ID: id, Status: ztnode.StatusRequesting}})
	}
	return p.refuse
}
func (p *process) Leave(ztnode.NetworkID) error {
	p.nets = nil
	return p.refuse
}

func call(t *testing.T, p *process, method, path, body string, out any) (int, string) {
	t.Helper()
	a := &API{Process: p, Now: func() time.Time { return time.UnixMilli(1_800_000_000_000) }, AllowFrom: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}
	w := httptest.NewRecorder()
	a.Handler().ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
	if out != nil {
		if err := json.Unmarshal(w.Body.Bytes(), out); err != nil {
			t.Fatalf("%s %s: %v in %q", method, path, err, w.Body)
		}
	}
	return w.Code, w.Body.String()
}

// The keys are those of chapter 04 §15.3.
func TestStatus(t *testing.T) {
	_, body := call(t, &process{}, "GET", "/status", "", nil)
	for _, want := range []string{`"address":"0123456789"`, `"publicIdentity":"0123456789:0:aa"`, `"online":true`, `"tcpFallbackActive":false`, `"version":"1.16.0"`,
		`"versionMajor":1`, `"versionMinor":16`, `"versionRev":0`, `"versionBuild":0`, `"clock":1800000000000`, `"planetWorldId":7`, `"planetWorldTimestamp":8`,
		`"primaryPort":9993`, `"secondaryPort":30000`, `"tertiaryPort":0`, `"homeDir":"/home"`, `"listeningOn":["192.168.1.2/9993"]`, `"surfaceAddresses":[]`,
		`"allowManagementFrom":["127.0.0.0/8"]`} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s in %s", want, body)
		}
	}
	if _, body := call(t, &process{}, "GET", "/health", "", nil); !strings.Contains(body, `"online":true`) || strings.Contains(body, "0123456789") {
		t.Errorf("health %s", body)
	}
}

// TestPeers: by latency, version and paths front ends tell whether a member is online,
// and where.
func TestPeers(t *testing.T) {
	direct := ztnode.Peer{Address: "1111111111", Role: "LEAF", Version: "1.14.1", Latency: 12.6, Paths: []ztnode.Path{
		{Endpoint: netip.MustParseAddrPort("[::ffff:10.0.0.5]:9993"), Preferred: true, LastReceive: time.UnixMilli(1_799_999_999_000)},
		{Endpoint: netip.MustParseAddrPort("10.9.0.5:9993"), Expired: true},
	}}
	relayed := ztnode.Peer{Address: "2222222222", Role: "LEAF", Version: "-", Latency: 40, Relayed: true, Paths: direct.Paths}
	unmeasured := ztnode.Peer{Address: "3333333333", Role: "PLANET", Version: "1.2", Latency: -1}
	p := &process{peers: []ztnode.Peer{direct, relayed, unmeasured}}
	var list []peer
	call(t, p, "GET", "/peer", "", &list)
	if len(list) != 3 || len(list[0].Paths) != 2 {
		t.Fatalf("%+v", list)
	}
	if x := list[0]; x.Latency != 13 || x.Major != 1 || x.Minor != 14 || x.Rev != 1 || x.Paths[0] != (path{Active: true, Address: "10.0.0.5/9993", Preferred: true,
		LastReceive: 1_799_999_999_000}) || x.Paths[1].Active || !x.Paths[1].Expired {
		t.Errorf("direct: %+v", x)
	}
	if x := list[1]; x.Latency != -1 || len(x.Paths) != 0 || x.version != (version{"-1.-1.-1", -1, -1, -1}) {
		t.Errorf("relayed: %+v", x)
	}
	if x := list[2]; x.Latency != -1 || x.Major != -1 || x.Role != "PLANET" {
		t.Errorf("unmeasured: %+v", x)
	}
	var one peer
	if call(t, p, "GET", "/peer/1111111111", "", &one); one.Address != "1111111111" {
		t.Errorf("%+v", one)
	}
	if code, body := call(t, p, "GET", "/peer/4444444444", "", nil); code != 200 || strings.TrimSpace(body) != "{}" {
		t.Errorf("unknown: %d %s", code, body)
	}
}

func TestNetworks(t *testing.T) {
	const id = "8056c2e21c000001"
	p := &process{}
	if code, body := call(t, p, "GET", "/network", "", nil); code != 200 || strings.TrimSpace(body) != "[]" {
		t.Errorf("%d %s", code, body)
	}
	if code, _ := call(t, p, "GET", "/network/"+id, "", nil); code != 404 {
		t.Errorf("not joined: %d", code)
	}
	if code, body := call(t, p, "DELETE", "/network/"+id, "", nil); code != 200 || strings.TrimSpace(body) != "{}" {
		t.Errorf("leave: %d %s", code, body)
	}
	if code, _ := call(t, p, "POST", "/network/"+id, `{"allowGlobal":true}`, nil); code != 400 || len(p.nets) != 0 {
		t.Errorf("join, with what isn't allowed: %d, and joined %v", code, p.nets)
	}
	if code, body := call(t, p, "POST", "/network/"+id, `{"allowManaged":true}`, nil); code != 200 || !strings.Contains(body, `"nwid":"`+id+`"`) {
		t.Errorf("join: %d %s", code, body)
	}
	p.nets[0].Network.Addresses = []netip.Prefix{netip.MustParsePrefix("10.0.0.5/24")}
	p.nets[0].Network.Routes = []ztnode.Route{{Target: netip.MustParsePrefix("10.0.0.0/24")}, {Target: netip.MustParsePrefix("10.1.0.0/16"), Via: netip.MustParseAddr("10.0.0.1")}}
	_, body := call(t, p, "GET", "/network", "", nil)
	for _, want := range []string{`"assignedAddresses":["10.0.0.5/24"]`, `{"target":"10.0.0.0/24","via":null,"flags":0,"metric":0}`, `"via":"10.0.0.1"`,
		`"dns":{"domain":"","servers":[]}`, `"multicastSubscriptions":[]`, `"portError":0`, `"allowDefault":false`} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s in %s", want, body)
		}
	}
	// What the configuration decides isn't changed, nor is it said to be.
	if code, body := call(t, p, "PUT", "/network/"+id, `{"allowDefault":true}`, nil); code != 400 || !strings.Contains(body, "allowDefault") {
		t.Errorf("%d %s", code, body)
	}
	for _, bad := range []string{"[", `"x"`, strings.Repeat(" ", maxBody+1)} {
		if code, _ := call(t, p, "POST", "/network/"+id, bad, nil); code != 400 {
			t.Errorf("body %.10q: %d", bad, code)
		}
	}
	if code, _ := call(t, p, "POST", "/network/xyz", "", nil); code != 400 {
		t.Errorf("no ID: %d", code)
	}
	if code, body := call(t, p, "DELETE", "/network/"+id, "", nil); code != 200 || strings.TrimSpace(body) != `{"result":true}` {
		t.Errorf("leave: %d %s", code, body)
	}
	p.refuse = fault.Usagef("this process joins nothing")
	if code, body := call(t, p, "POST", "/network/"+id, "", nil); code != 400 || !strings.Contains(body, `"description":"this process joins nothing"`) {
		t.Errorf("%d %s", code, body)
	}
}

func TestOtherPaths(t *testing.T) {
	p := &process{}
	for path, code := range map[string]int{"/": 404, "/v1/status": 404, "/controller": 404, "/metrics": 404, "/config": 404, "/unstable/controller/network": 404} {
		if got, _ := call(t, p, "GET", path, "", nil); got != code {
			t.Errorf("%s: %d, want %d", path, got, code)
		}
	}
	p.ctl = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) })
	for _, path := range []string{"/controller", "/controller/network", "/unstable/controller/network"} {
		if code, body := call(t, p, "GET", path, "", nil); code != 200 || body != path {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
}
