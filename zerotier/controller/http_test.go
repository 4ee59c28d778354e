package controller

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"ztgate/zerotier/packet"
)

// api is the HTTP API as a front end sees it.
type api struct {
	*rig
	server *httptest.Server
}

func newAPI(t *testing.T) *api {
	r := newRig(t)
	a := &api{rig: r, server: httptest.NewServer(r.c.Handler())}
	t.Cleanup(a.server.Close)
	return a
}

// call returns status and body; out, unless nil, gets the decoded body.
func (a *api) call(method, path, body string, out any) (int, string) {
	a.t.Helper()
	req, err := http.NewRequest(method, a.server.URL+path, strings.NewReader(body))
	if err != nil {
		a.t.Fatal(err)
	}
	res, err := a.server.Client().Do(req)
	if err != nil {
		a.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	if out != nil {
		if err := json.Unmarshal(b, out); err != nil {
			a.t.Fatalf("%s %s: %v in %q", method, path, err, b)
		}
	}
	return res.StatusCode, string(b)
}

type record map[string]any

// What a front end does from the first network to the last member.
func TestHTTPLifecycle(t *testing.T) {
	a := newAPI(t)
	var info record
	if code, _ := a.call("GET", "/controller", "", &info); code != 200 || info["controller"] != true || info["apiVersion"] != 4.0 {
		t.Errorf("%d %v", code, info)
	}
	var ids []string
	if a.call("GET", "/controller/network", "", &ids); len(ids) != 0 {
		t.Errorf("networks %v", ids)
	}
	var n record
	code, _ := a.call("POST", "/controller/network/"+a.addr("ctrl").String()+"______",
		`{"name":"lab","private":true,"v4AssignMode":{"zt":true},"routes":[{"target":"10.9.0.0/24","via":null}],"ipAssignmentPools":[{"ipRangeStart":"10.9.0.1","ipRangeEnd":"10.9.0.250"}],"mtu":"1400","enableBroadcast":1,"nonsense":7}`, &n)
	id, _ := n["nwid"].(string)
	if code != 200 || len(id) != 16 || n["id"] != id || n["objtype"] != "network" || n["mtu"] != 1400.0 || n["enableBroadcast"] != true || n["nonsense"] != nil || n["revision"] != 1.0 {
		t.Fatalf("%d %v", code, n)
	}
	path := "/controller/network/" + id
	if a.call("GET", "/controller/network", "", &ids); len(ids) != 1 || ids[0] != id {
		t.Errorf("networks %v", ids)
	}
	if code, _ := a.call("GET", strings.ToUpper(path[:20])+path[20:], "", nil); code != 404 {
		t.Errorf("another path: %d", code)
	}
	if code, _ := a.call("GET", "/controller/network/"+strings.ToUpper(id), "", nil); code != 200 {
		t.Errorf("upper case: %d", code)
	}

	// A node asks, is seen, and is let in.
	nw, _ := a.c.Network(a.c.Networks()[0].ID)
	a.refused(a.join("alice", nw.ID), "alice", packet.ErrorNetworkAccessDenied)
	var members map[string]uint64
	if a.call("GET", path+"/member", "", &members); members[a.addr("alice").String()] != 1 {
		t.Errorf("members %v", members)
	}
	alice := path + "/member/" + a.addr("alice").String()
	var m record
	if code, _ := a.call("POST", alice, `{"authorized":"true","tags":[[7,5]],"name":5}`, &m); code != 200 || m["authorized"] != true || m["name"] != "5" || m["lastAuthorizedCredentialType"] != "api" {
		t.Errorf("%d %v", code, m)
	}
	cfg := a.config(a.join("alice", nw.ID), "alice", false)
	if len(cfg.Addresses) != 1 || cfg.MTU != 1400 {
		t.Errorf("configuration %+v", cfg)
	}
	if a.call("GET", alice, "", &m); len(m["ipAssignments"].([]any)) != 1 || m["vMajor"] != 1.0 {
		t.Errorf("%v", m)
	}
	var all struct {
		Data []record
		Meta map[string]int
	}
	if a.call("GET", "/unstable"+path+"/member", "", &all); all.Meta["totalCount"] != 1 || all.Meta["authorizedCount"] != 1 || len(all.Data) != 1 {
		t.Errorf("%+v", all)
	}
	if a.call("GET", "/unstable/controller/network", "", &all); all.Meta["networkCount"] != 1 || all.Data[0]["meta"].(map[string]any)["authorizedMemberCount"] != 1.0 {
		t.Errorf("%+v", all)
	}

	// Out again, and all gone.
	if code, _ := a.call("DELETE", alice, "", &m); code != 200 || m["id"] != a.addr("alice").String() {
		t.Errorf("%d %v", code, m)
	}
	a.advance(pushInterval)
	if got := a.revoked(a.take(), "alice"); len(got) != 1 {
		t.Errorf("alice was told %v", got)
	}
	if code, body := a.call("GET", alice, "", nil); code != 404 || body != "" {
		t.Errorf("%d %q", code, body)
	}
	if code, _ := a.call("DELETE", path, "", &n); code != 200 || n["id"] != id {
		t.Errorf("%d %v", code, n)
	}
	if code, _ := a.call("GET", path+"/member", "", nil); code != 404 {
		t.Errorf("members of a removed network: %d", code)
	}
}

func TestHTTPRefusals(t *testing.T) {
	a := newAPI(t)
	n := a.create(nil)
	path := "/controller/network/" + n.ID.String()
	before, _ := a.c.Network(n.ID)
	for _, tt := range []struct {
		method, path, body string
		code               int
	}{
		{"POST", path, "{", 500},
		{"POST", path, "[1]", 200}, // no object: changes nothing
		{"POST", path, "", 200},
		{"POST", path, `{"routes":[{"target":"10.0.0.0","via":null}]}`, 400}, // would become /0
		{"POST", path, `{"routes":[{"target":"10.0.0.0/33"}]}`, 400},
		{"POST", path, `{"rules":[{"type":"NO_SUCH_RULE"},{"type":"ACTION_ACCEPT"}]}`, 400},
		{"POST", path, `{"rulesSource":"drop not frobnicate;"}`, 400},
		{"POST", path, `{"dns":{"domain":"` + strings.Repeat("x", 200) + `","servers":[]}}`, 400},
		{"POST", path, `{"mtu":"many"}`, 400},
		{"POST", "/controller/network/1234567890123456", "{}", 400},
		{"POST", "/controller/network/1234567890______", "{}", 400},
		{"POST", "/controller/network/xyz", "{}", 400},
		{"GET", "/controller/network/xyz", "", 404},
		{"POST", path + "/member/xyz", "{}", 404},
		{"POST", path + "/member/ff00000001", "{}", 400},
		{"POST", "/controller/network/1234567890123456/member/0000000001", "{}", 404},
		{"POST", path + "/member/0000000001", `{"ipAssignments":["1.2.3.4"]}`, 400},
		{"POST", path + "/member/0000000001", `{"ipAssignments":[7]}`, 400},
		{"DELETE", path + "/member/0000000001", "", 404},
	} {
		code, body := a.call(tt.method, tt.path, tt.body, nil)
		if code != tt.code || code >= 400 && code != 404 && !strings.Contains(body, `"description"`) {
			t.Errorf("%s %s %.60s: %d %s, want %d", tt.method, tt.path, tt.body, code, body, tt.code)
		}
	}
	after, _ := a.c.Network(n.ID)
	if same, err := equal(before, after); err != nil || !same || before.Revision != after.Revision {
		t.Error("the record changed")
	}
}

func TestRulesSource(t *testing.T) {
	a := newAPI(t)
	n := a.create(nil)
	path := "/controller/network/" + n.ID.String()
	var rec struct {
		Rules              []map[string]any
		Capabilities       []struct{ ID, Default any }
		Tags               []struct{ ID, Default any }
		TagsByName         map[string]struct{ Enums map[string]uint32 }
		CapabilitiesByName map[string]any
		RulesSource        string
	}
	src := `drop not ethertype ipv4 and not ethertype arp; tag dep id 7 enum 3 sales default sales; cap all id 9 default accept; ; accept tdiff dep 0;`
	body, err := json.Marshal(map[string]string{"rulesSource": src})
	if err != nil {
		t.Fatal(err)
	}
	code, _ := a.call("POST", path, string(body), &rec)
	if code != 200 || len(rec.Rules) != 5 || len(rec.Capabilities) != 1 || len(rec.Tags) != 1 || rec.Tags[0].Default != 3.0 ||
		rec.TagsByName["dep"].Enums["sales"] != 3 || rec.CapabilitiesByName["all"] == nil || rec.RulesSource != src {
		t.Fatalf("%d %+v", code, rec)
	}
	a.authorize(n.ID, "alice")
	cfg := a.config(a.join("alice", n.ID), "alice", false)
	if len(cfg.Rules) != 5 || len(cfg.Tags) != 1 || cfg.Tags[0].Value != 3 || len(cfg.Capabilities) != 1 {
		t.Errorf("configuration %+v", cfg)
	}
	a.restart()
	if m, _ := a.c.Network(n.ID); m.RulesSource != src || len(m.Rules) != 5 {
		t.Error("lost by a restart")
	}
	// A front end that compiles itself sends both: its rules count.
	a.server.Config.Handler = a.c.Handler()
	if code, _ = a.call("POST", path, `{"rulesSource":"drop;","rules":[{"type":"ACTION_ACCEPT"}]}`, &rec); code != 200 || len(rec.Rules) != 1 || rec.Rules[0]["type"] != "ACTION_ACCEPT" {
		t.Errorf("%d %+v", code, rec)
	}
}

// FuzzHTTP sends anything as a body: nothing may panic, and a refusal changes nothing.
func FuzzHTTP(f *testing.F) {
	f.Add(true, `{"name":"x","private":0,"routes":[{"target":"10.0.0.0/8","via":"10.0.0.1"}],"rulesSource":"accept;"}`)
	f.Add(false, `{"authorized":1,"ipAssignments":["192.168.191.7"],"tags":[[1,2]],"capabilities":[1],"identity":"x"}`)
	r := newRig(f)
	n := r.create(nil)
	h := r.c.Handler()
	path := "/controller/network/" + n.ID.String()
	f.Fuzz(func(t *testing.T, network bool, body string) {
		p := path
		if !network {
			p += "/member/0000000001"
		}
		before, _ := r.c.Network(n.ID)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("POST", p, strings.NewReader(body)))
		if after, _ := r.c.Network(n.ID); w.Code != 200 && after.Revision != before.Revision {
			t.Errorf("%d, but the network changed", w.Code)
		}
		if w.Code == 200 && !json.Valid(w.Body.Bytes()) {
			t.Errorf("answer %q", w.Body)
		}
	})
}
