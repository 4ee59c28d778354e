package gateway_test

import (
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/gateway"
	"ztgate/router/gateway/gatewaytest"
	"ztgate/zerotier/ztnode"
)

// ask asks the API over TCP.
func ask(t *testing.T, address, path, token string) (int, string) {
	t.Helper()
	req, err := http.NewRequest("GET", "http://"+address+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-ZT1-Auth", token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

// TestLocalAPI: over TCP with a token, and who is listed is online.
func TestLocalAPI(t *testing.T) {
	at := freePort(t)
	r := serve(t, control.ModeNode, map[string][]string{"api-listen": {at}, "listen": {""}})
	b, err := os.ReadFile(filepath.Join(r.cfg.Home, "authtoken.secret"))
	if err != nil {
		t.Fatal(err)
	}
	token, now := string(b), time.Now()
	direct := []ztnode.Path{{Endpoint: netip.MustParseAddrPort("10.9.0.5:9993"), Preferred: true, LastReceive: now}}
	r.node.SetPeers(
		ztnode.Peer{Address: "1111111111", Role: ztnode.RoleLeaf, Version: "1.14.1", Latency: 3, LastReceive: now, Paths: direct},
		ztnode.Peer{Address: "2222222222", Role: ztnode.RoleLeaf, Version: "1.14.1", Latency: 3, LastReceive: now, Relayed: true},
		ztnode.Peer{Address: "3333333333", Role: ztnode.RoleLeaf, Version: "1.14.1", Latency: 3, LastReceive: now.Add(-time.Hour), Paths: direct},
		ztnode.Peer{Address: "4444444444", Role: ztnode.RolePlanet, Version: "1.14.1", Latency: 3, LastReceive: now.Add(-time.Hour), Paths: direct})
	_, body := ask(t, at, "/peer", token)
	var peers []struct {
		Address string
		Latency int
	}
	if err := json.Unmarshal([]byte(body), &peers); err != nil || len(peers) != 3 || peers[0].Latency != 3 || peers[1].Latency != -1 || peers[2].Latency != -1 {
		t.Errorf("peers %s, %v", body, err)
	}
	if code, body := ask(t, at, "/network", token); code != 200 || strings.TrimSpace(body) != "[]" {
		t.Errorf("networks %d %s", code, body)
	}
	if code, _ := ask(t, at, "/status", "wrong"); code != 401 {
		t.Errorf("wrong token: %d", code)
	}
	// Our own API isn't here, whatever one has.
	if code, _ := ask(t, at, "/v1/status", token); code != 404 {
		t.Errorf("control API: %d", code)
	}
	code, body := ask(t, at, "/metrics", token)
	for _, want := range []string{`ztgate_api_requests_total{result="ok"} `, `ztgate_api_requests_total{result="wrong_token"} 1`, `ztgate_http_connections_closed_total{server="api"} 0`} {
		if code != 200 || !strings.Contains(body, want) {
			t.Errorf("metrics %d: no %s", code, want)
		}
	}
}

// TestLocalAPIRefusals: it is off unless wanted, and what is wrong has a remedy.
func TestLocalAPIRefusals(t *testing.T) {
	r := serve(t, control.ModeNode, nil)
	if _, err := os.Stat(filepath.Join(r.cfg.Home, "authtoken.secret")); err == nil {
		t.Error("a token was made for nobody")
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	start := func(home, at string) error {
		cfg := load(t, map[string][]string{"home": {home}, "socket": {filepath.Join(home, "s")}, "listen": {""}, "api-listen": {at}})
		return gateway.Serve(t.Context(), cfg, control.ModeNode, slog.New(slog.DiscardHandler), gatewaytest.NewNode(), nil)
	}
	if err := start(shortDir(t), taken.Addr().String()); err == nil || !strings.Contains(err.Error(), "choose another with --api-listen") {
		t.Errorf("a taken port: %v", err)
	}
	home := shortDir(t)
	if err := os.WriteFile(filepath.Join(home, "authtoken.secret"), []byte("0123456789abcdefghijklmn"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := start(home, freePort(t)); fault.ExitCode(err) != 2 || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a token for everybody: %v", err)
	}
}
