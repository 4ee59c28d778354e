package gateway_test

import (
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"ztgate/internal/testwait"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

// hostile are texts as a network may send them.
var hostile = []string{"red\x1b[31m\x1b]0;x\x07", "exe\u202egnp.\u2066", "two\r\nlines", "null\x00", "bad\xff\xc3", "C1\u009b31m", "zero\u200bwidth",
	"<script>alert(1)</script>", strings.Repeat("é\x1b", 400)}

// shown checks that a text may be shown anywhere. Lines may end and be indented.
func shown(t *testing.T, where, text string) {
	t.Helper()
	if !utf8.ValidString(text) {
		t.Errorf("%s: not UTF-8: %q", where, text)
	}
	for _, r := range text {
		if r != '\n' && r != '\t' && !unicode.IsPrint(r) {
			t.Fatalf("%s: has %U: %.300q", where, r, text)
		}
	}
}

// TestHostileTexts: what networks, peers and moons call themselves can do no harm
// where it is shown.
func TestHostileTexts(t *testing.T) {
	r := serve(t, control.ModeGateway, nil)
	for i, text := range hostile {
		nw := okNetwork()
		nw.ID = nwid + ztnode.NetworkID(i)
		nw.Addresses, nw.Routes = nil, nil
		nw.Name, nw.DNSDomain, nw.AuthURL = text, text, "https://sso.example/"+text
		if i%2 == 1 {
			nw.Status = ztnode.StatusAuth // its URL becomes a reason
		}
		r.node.SetNetwork(nw)
	}
	var peers []ztnode.Peer
	for _, text := range hostile {
		peers = append(peers, ztnode.Peer{Address: "0123456789", Role: ztnode.RoleLeaf, Version: text})
	}
	r.node.SetPeers(peers...)
	ctx := t.Context()
	testwait.For(t, patience, "the networks", func() bool {
		nets, err := r.client.Networks(ctx)
		return err == nil && len(nets.Networks) == len(hostile)
	})
	all := map[string]any{}
	ask := func(name string, v any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		all[name] = v
	}
	st, err := r.client.Status(ctx)
	ask("status", st, err)
	nets, err := r.client.Networks(ctx)
	ask("networks", nets, err)
	list, err := r.client.Peers(ctx)
	ask("peers", list, err)
	health, err := r.client.Health(ctx)
	ask("health", health, err)
	for name, v := range all {
		var decoded any
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, &decoded); err != nil {
			t.Fatal(err)
		}
		eachString(decoded, func(s string) { shown(t, name, s) })
	}
	for _, n := range nets.Networks {
		if len(n.Name) > ztnode.MaxText || len(n.DNSDomain) > ztnode.MaxText {
			t.Errorf("a name of %d bytes, a domain of %d", len(n.Name), len(n.DNSDomain))
		}
	}
	for _, path := range []string{"/", "/metrics", "/readyz"} {
		resp, err := http.Get("http://" + r.cfg.Listen + path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		shown(t, path, string(b))
		if strings.Contains(string(b), "<script>") {
			t.Errorf("%s: a name is not escaped", path)
		}
	}
	shown(t, "the log", r.logs.String())
	if !strings.Contains(r.logs.String(), "red?[31m") {
		t.Errorf("the log lacks the names: %s", r.logs)
	}
}

// eachString calls f for all strings of a JSON value.
func eachString(v any, f func(string)) {
	switch v := v.(type) {
	case string:
		f(v)
	case []any:
		for _, x := range v {
			eachString(x, f)
		}
	case map[string]any:
		for k, x := range v {
			f(k)
			eachString(x, f)
		}
	}
}

// TestJoinLimit: what can't be joined is refused, with the remedy.
func TestJoinLimit(t *testing.T) {
	r := serve(t, control.ModeMember, nil)
	ctx := t.Context()
	for i := range ztnode.MaxNetworks {
		if _, err := r.client.Join(ctx, (nwid + ztnode.NetworkID(i)).String()); err != nil {
			t.Fatalf("network %d: %v", i+1, err)
		}
	}
	_, err := r.client.Join(ctx, (nwid + 1000).String())
	if fault.ExitCode(err) != 2 || !strings.Contains(err.Error(), "64 networks") || !strings.Contains(err.Error(), "ztgate leave NWID") {
		t.Errorf("one more: %v", err)
	}
	nets, err := r.client.Leave(ctx, nwid.String())
	if err != nil || len(nets.Networks) != 1 {
		t.Errorf("leave: %+v, %v", nets, err)
	}
	if _, err := r.client.Join(ctx, (nwid + 1000).String()); err != nil {
		t.Errorf("in its place: %v", err)
	}
}

// TestLeaveConfigured: a network of the configuration would be joined again.
func TestLeaveConfigured(t *testing.T) {
	r := serve(t, control.ModeMember, map[string][]string{"network": {nwid.String()}})
	if _, err := r.client.Leave(t.Context(), nwid.String()); fault.ExitCode(err) != 2 ||
		!strings.Contains(err.Error(), "networks, from flag --network") || !strings.Contains(err.Error(), "remove it there and restart") {
		t.Errorf("%v", err)
	}
}

// TestLeaveNotJoined: a typo is refused.
func TestLeaveNotJoined(t *testing.T) {
	r := serve(t, control.ModeMember, nil)
	ctx := t.Context()
	if _, err := r.client.Leave(ctx, nwid.String()); fault.ExitCode(err) != 2 || !strings.Contains(err.Error(), "no other one") {
		t.Errorf("without any network: %v", err)
	}
	if _, err := r.client.Join(ctx, nwid.String()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.Leave(ctx, (nwid + 1).String()); fault.ExitCode(err) != 2 || !strings.Contains(err.Error(), "did you mean "+nwid.String()) {
		t.Errorf("a typo: %v", err)
	}
	if nets, err := r.client.Networks(ctx); err != nil || !slices.ContainsFunc(nets.Networks, func(n control.NetworkView) bool { return n.ID == nwid }) {
		t.Errorf("%+v, %v", nets, err)
	}
}
