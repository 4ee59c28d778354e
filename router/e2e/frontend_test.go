//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/config"
	"ztgate/router/lab"
	"ztgate/router/webhook"
	"ztgate/zerotier/ztnode"
)

const (
	hookSecret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	hookAddr   = "127.0.0.1:8099"
	apiAddr    = "127.0.0.1:9993"
)

// frontEnd is what stands beside a controller: a front end that speaks to its API, and a
// program that is told who asks.
type frontEnd struct {
	t      *testing.T
	host   *lab.Node
	client *http.Client
	token  string
	told   chan string // kind and address of what was told
	admit  bool        // nodes that ask
}

// startFrontEnd starts a controller with an API and a webhook.
func startFrontEnd(t *testing.T, m *lab.Mesh) *frontEnd {
	t.Helper()
	host, err := m.Host("ctl", 5)
	if err != nil {
		t.Fatal(err)
	}
	f := &frontEnd{t: t, host: host, client: host.NS.HTTPClient(), told: make(chan string, 64), admit: true}
	f.hook()
	file := filepath.Join(host.Home, "ztgate.yaml")
	if err := os.WriteFile(file, []byte("controller: true\nwebhook: {url: \"http://"+hookAddr+"/members\", secret: \""+hookSecret+"\"}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Topology.Start(host.NS, "ctl", options(t).Binary, "member", "--config", file, "--listen", "", "--api-listen", apiAddr,
		"--planet", m.Planet(), "--socket", f.socket()); err != nil {
		t.Fatal(err)
	}
	testwait.For(t, patience, "the API", func() bool {
		b, err := os.ReadFile(filepath.Join(host.Home, "authtoken.secret"))
		f.token = string(b)
		return err == nil && f.call("GET", "/status", nil, nil) == http.StatusOK
	})
	return f
}

func (f *frontEnd) socket() string { return filepath.Join(f.host.Home, "ztgate.sock") }

// hook is the program that is told.
func (f *frontEnd) hook() {
	key, err := config.ParseWebhookKey(hookSecret)
	if err != nil {
		f.t.Fatal(err)
	}
	l, err := f.host.NS.Listen("tcp", hookAddr)
	if err != nil {
		f.t.Fatal(err)
	}
	s := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		h := r.Header
		if err != nil || h.Get("Webhook-Signature") != webhook.Sign(key, h.Get("Webhook-Id"), h.Get("Webhook-Timestamp"), body) {
			f.t.Errorf("wrong signature: %v, %v", h, err)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		var msg struct {
			Type string
			Data struct{ Member string }
		}
		if err := json.Unmarshal(body, &msg); err != nil {
			f.t.Error(err)
		}
		f.told <- msg.Type + " " + msg.Data.Member
		if f.admit && msg.Type == ztnode.MemberRequested {
			fmt.Fprint(w, `{"authorized":true,"name":"by the program"}`)
		}
	})}
	go func() { _ = s.Serve(l) }() // until the end of the test closes it
	f.t.Cleanup(func() { _ = s.Close() })
}

// call asks the API as a front end does.
func (f *frontEnd) call(method, path string, in, out any) int {
	f.t.Helper()
	b, err := json.Marshal(in)
	if err != nil {
		f.t.Fatal(err)
	}
	req, err := http.NewRequest(method, "http://"+apiAddr+path, bytes.NewReader(b))
	if err != nil {
		f.t.Fatal(err)
	}
	req.Header.Set("X-ZT1-Auth", f.token)
	res, err := f.client.Do(req)
	if err != nil {
		return 0 // not there yet
	}
	defer res.Body.Close()
	if out != nil {
		if err := json.NewDecoder(res.Body).Decode(out); err != nil {
			f.t.Errorf("%s %s: %v", method, path, err)
		}
	}
	return res.StatusCode
}

// command runs a command of ours against the controller.
func (f *frontEnd) command(args ...string) (string, int) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, options(f.t).Binary, append(args, "--socket", f.socket())...)
	out, err := cmd.CombinedOutput()
	if err != nil && cmd.ProcessState == nil {
		f.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

func (f *frontEnd) expect(want string) {
	f.t.Helper()
	select {
	case got := <-f.told:
		if got != want {
			f.t.Errorf("told %q, want %q", got, want)
		}
	case <-time.After(patience):
		f.t.Errorf("nobody told %q", want)
	}
}

// TestFrontEnd: a network is made over the API, a program lets in who asks, scripts wait
// for members, and the API says who is there and where.
func TestFrontEnd(t *testing.T) {
	t.Parallel()
	m := startMesh(t, lab.MeshOptions{Prefix: "fe", Members: []lab.MeshMember{{Name: "one"}, {Name: "two"}}})
	f := startFrontEnd(t, m)
	var n struct{ Nwid string }
	if code := f.call("POST", "/controller/network/"+f.host.Address+"______", map[string]any{"name": "front",
		"routes": []any{map[string]any{"target": "10.121.15.0/24", "via": nil}}, "v4AssignMode": map[string]any{"zt": "true"},
		"ipAssignmentPools": []any{map[string]any{"ipRangeStart": "10.121.15.1", "ipRangeEnd": "10.121.15.99"}}}, &n); code != http.StatusOK {
		t.Fatalf("create: %d", code)
	}
	id, err := ztnode.ParseNetworkID(n.Nwid)
	if err != nil {
		t.Fatal(err)
	}
	one, two := m.Nodes[0], m.Nodes[1]

	// The program lets the first one in.
	if err := one.Join(m.Context(), id); err != nil {
		t.Fatal(err)
	}
	f.expect(ztnode.MemberRequested + " " + one.Address)
	f.expect(ztnode.MemberJoined + " " + one.Address)
	state := joined(t, one, id)
	var member struct {
		Name          string
		IPAssignments []string `json:"ipAssignments"`
	}
	if f.call("GET", "/controller/network/"+n.Nwid+"/member/"+one.Address, nil, &member); member.Name != "by the program" || len(member.IPAssignments) != 1 ||
		member.IPAssignments[0] != state.Addresses[0].Addr().String() {
		t.Errorf("member %+v, and it has %v", member, state.Addresses)
	}
	var peer struct {
		Latency int
		Paths   []struct{ Address string }
	}
	testwait.For(t, patience, "the member's path", func() bool {
		f.call("GET", "/peer/"+one.Address, nil, &peer)
		return peer.Latency >= 0 && len(peer.Paths) > 0 && strings.HasPrefix(peer.Paths[0].Address, lab.MeshAddress(10).Addr().String()+"/")
	})

	// A script lets the second one in, which hasn't asked at first.
	f.admit = false
	if out, code := f.command("controller", "authorize", n.Nwid, two.Address, "--wait", "--timeout", "500ms"); code != 4 || !strings.Contains(out, "has not asked") {
		t.Errorf("%d %s", code, out)
	}
	if err := two.Join(m.Context(), id); err != nil {
		t.Fatal(err)
	}
	if out, code := f.command("controller", "authorize", n.Nwid, two.Address, "--wait", "--timeout", "30s"); code != 0 || !strings.Contains(out, "online "+two.Address) {
		t.Errorf("%d %s", code, out)
	}
	f.expect(ztnode.MemberJoined + " " + two.Address)
	joined(t, two, id)
	to := joined(t, one, id).Addresses[0].Addr()
	testwait.For(t, patience, "an answer from the first member", func() bool { return ping(two, to) == nil })

	// Put out over the API: nobody asks the program again.
	if code := f.call("POST", "/controller/network/"+n.Nwid+"/member/"+one.Address, map[string]any{"authorized": "false"}, nil); code != http.StatusOK {
		t.Errorf("de-authorize: %d", code)
	}
	testwait.For(t, patience, "the end of the traffic", func() bool { return ping(two, to) != nil })
	select {
	case got := <-f.told:
		t.Errorf("told %q", got)
	default:
	}
	if out, code := f.command("controller", "members", n.Nwid); code != 0 || !strings.Contains(out, lab.MeshAddress(11).Addr().String()) {
		t.Errorf("%d %s", code, out)
	}

	// Without the token nothing is to be had.
	f.token = "wrong"
	for _, path := range []string{"/status", "/peer", "/controller/network", "/metrics"} {
		if code := f.call("GET", path, nil, nil); code != http.StatusUnauthorized {
			t.Errorf("%s with a wrong token: %d", path, code)
		}
	}
}
