package gateway

import (
	"crypto/rand"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ztgate/router/admin"
	"ztgate/router/config"
	"ztgate/router/fault"
	"ztgate/zerotier/controller"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/ztnode"
)

// compatNode has a real controller.
type compatNode struct {
	Node
	ctl Controller
}

func (n compatNode) Controller() Controller { return n.ctl }

func (n compatNode) Info() ztnode.Info {
	return ztnode.Info{Address: "0123456789", Version: "1.14.1", PrimaryPort: 9993, SecondaryPort: 30000, TertiaryPort: 40000, PortMapping: true,
		Listening: []netip.AddrPort{netip.MustParseAddrPort("192.168.1.2:9993"), netip.MustParseAddrPort("[fd00::2]:9993")}}
}

// Port mapping is shown where the reference shows it (chapter 04 §15.3).
func TestStatusOfTheReference(t *testing.T) {
	s := newService(&config.Config{}, slog.New(slog.DiscardHandler), compatNode{}, time.Now())
	w := httptest.NewRecorder()
	s.controlHandler().ServeHTTP(w, httptest.NewRequest("GET", "/status", nil))
	for _, want := range []string{`"portMappingEnabled":true`, `"primaryPort":9993`, `"secondaryPort":30000`, `"tertiaryPort":40000`,
		`"listeningOn":["192.168.1.2/9993","fd00::2/9993"]`, `"surfaceAddresses":[]`} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("no %s in %s", want, w.Body)
		}
	}
}

func TestControllerAPIOfTheReference(t *testing.T) {
	id, err := identity.Generate(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c, err := controller.New(controller.Config{Identity: id, Dir: filepath.Join(t.TempDir(), "controller.d")})
	if err != nil {
		t.Fatal(err)
	}
	rules := filepath.Join(t.TempDir(), "rules")
	if err := os.WriteFile(rules, []byte("drop not ethertype ipv4; accept;"), 0o600); err != nil {
		t.Fatal(err)
	}
	patch, err := admin.NetworkSpec{Name: "x", Rules: rules}.Patch()
	if err != nil || !strings.Contains(string(patch), `"rulesSource"`) {
		t.Errorf("%v, %v", patch, err)
	}
	if p, err := (admin.MemberSpec{Tags: []string{"7=5"}, Caps: []uint{3}}).Patch(); err != nil || !strings.Contains(string(p), `"tags"`) || !strings.Contains(string(p), `"capabilities"`) {
		t.Errorf("%v, %v", p, err)
	}
	if _, err := (admin.MemberSpec{Tags: []string{"7"}}).Patch(); fault.ExitCode(err) != 2 {
		t.Errorf("a tag without value: %v", err)
	}
	call := func(n Node, method, path, body string) (int, string) {
		s := newService(&config.Config{}, slog.New(slog.DiscardHandler), n, time.Now())
		w := httptest.NewRecorder()
		s.controlHandler().ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
		return w.Code, w.Body.String()
	}
	node := compatNode{ctl: goController{c}}
	if code, _ := call(compatNode{}, "GET", "/controller", ""); code != http.StatusNotFound {
		t.Errorf("no controller: %d", code)
	}
	if code, body := call(node, "GET", "/controller", ""); code != 200 || !strings.Contains(body, `"controller":true`) {
		t.Errorf("%d %s", code, body)
	}
	if code, body := call(node, "GET", "/status", ""); code != 200 || !strings.Contains(body, `"address":"0123456789"`) {
		t.Errorf("%d %s", code, body)
	}
	if code, body := call(node, "POST", "/controller/network/"+id.Address().String()+"______", `{"name":"x","rulesSource":"drop not ethertype ipv4; accept;"}`); code != 200 {
		t.Errorf("%d %s", code, body)
	}
	list := c.Networks()
	if len(list) != 1 || list[0].Name != "x" || len(list[0].Rules) != 3 {
		t.Fatalf("networks %+v", list)
	}
	if code, _ := call(node, "POST", "/controller/network/"+list[0].ID.String()+"/member/0000000001", `{"authorized":true}`); code != 200 {
		t.Errorf("member: %d", code)
	}
	if m := c.Members(list[0].ID); len(m) != 1 || !m[0].Authorized {
		t.Errorf("members %+v", m)
	}
}
