package localapi

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ztgate/internal/disk"
	"ztgate/router/fault"
)

const token = "0123456789abcdefghijklmn"

type gate struct {
	*Guard
	now  time.Time
	logs bytes.Buffer
}

func newGate(t *testing.T) *gate {
	g := &gate{now: time.Unix(1_800_000_000, 0)}
	next := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "in") })
	g.Guard = NewGuard(next, token, []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("fd00::/8")},
		slog.New(slog.NewTextHandler(&g.logs, nil)), func() time.Time { return g.now })
	return g
}

func (g *gate) ask(from, target string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest("GET", target, nil)
	r.RemoteAddr = from
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	g.ServeHTTP(w, r)
	return w
}

const here = "127.0.0.1:4000"

func TestToken(t *testing.T) {
	g := newGate(t)
	for _, tt := range []struct {
		name, from, target string
		headers            []string
		code               int
	}{
		{"header", here, "/status", []string{"X-ZT1-Auth", token}, 200},
		{"header, in lower case, with space", here, "/status", []string{"x-zt1-auth", " " + token + " "}, 200},
		{"query", here, "/status?auth=" + token, nil, 200},
		{"bearer", here, "/status", []string{"Authorization", "Bearer " + token}, 200},
		{"IPv6", "[fd00::7]:4000", "/status", []string{"X-ZT1-Auth", token}, 200},
		{"IPv4 in IPv6", "[::ffff:127.0.0.1]:4000", "/status", []string{"X-ZT1-Auth", token}, 200},
		{"health needs none", here, "/health", nil, 200},
		{"authorization without its kind", here, "/status", []string{"Authorization", token}, 401},
		{"none", here, "/status", nil, 401},
		{"empty", here, "/status", []string{"X-ZT1-Auth", ""}, 401},
		{"wrong", here, "/status", []string{"X-ZT1-Auth", token[1:]}, 401},
		{"longer", here, "/status", []string{"X-ZT1-Auth", token + "x"}, 401},
		{"the first one decides", here, "/status?auth=" + token, []string{"X-ZT1-Auth", "wrong"}, 401},
		{"a cookie", here, "/status", []string{"Cookie", "auth=" + token}, 401},
		{"metrics need one too", here, "/metrics", nil, 401},
		{"elsewhere", "192.0.2.1:4000", "/status", []string{"X-ZT1-Auth", token}, 401},
		{"elsewhere, health", "192.0.2.1:4000", "/health", nil, 401},
		{"elsewhere, through a proxy that lies", "192.0.2.1:4000", "/status", []string{"X-ZT1-Auth", token, "X-Forwarded-For", "127.0.0.1"}, 401},
	} {
		g.now = g.now.Add(time.Minute)
		w := g.ask(tt.from, tt.target, tt.headers...)
		if in := w.Body.String() == "in"; w.Code != tt.code || in != (tt.code == 200) {
			t.Errorf("%s: %d %q, want %d", tt.name, w.Code, w.Body, tt.code)
		}
		for _, h := range []string{"Access-Control-Allow-Origin", "Set-Cookie", "Www-Authenticate"} {
			if w.Header().Get(h) != "" {
				t.Errorf("%s: %s is %q", tt.name, h, w.Header().Get(h))
			}
		}
		if w.Header().Get("Cache-Control") != "no-store" || w.Header().Get("Referrer-Policy") != "no-referrer" {
			t.Errorf("%s: headers %v", tt.name, w.Header())
		}
	}
	if strings.Contains(g.logs.String(), token) {
		t.Errorf("the log has the token: %s", &g.logs)
	}
}

// TestWrongTokens: tries are limited for each source, and never keep the right token
// out.
func TestWrongTokens(t *testing.T) {
	g := newGate(t)
	codes := map[int]int{}
	for range 1000 {
		codes[g.ask(here, "/status", "X-ZT1-Auth", "wrong").Code]++
	}
	if codes[401] != wrongBurst || codes[429] != 1000-wrongBurst {
		t.Errorf("answers %v", codes)
	}
	w := g.ask(here, "/status", "X-ZT1-Auth", "wrong")
	if w.Header().Get("Retry-After") == "" || w.Header().Get("Connection") != "close" {
		t.Errorf("headers %v", w.Header())
	}
	if w := g.ask(here, "/status", "X-ZT1-Auth", token); w.Code != 200 {
		t.Errorf("the right token: %d", w.Code)
	}
	if w := g.ask("[fd00:0:0:1::7]:1", "/status"); w.Code != 401 {
		t.Errorf("somebody else: %d", w.Code)
	}
	g.now = g.now.Add(2 * wrongEvery)
	if w := g.ask(here, "/status"); w.Code != 401 {
		t.Errorf("later: %d", w.Code)
	}
	if c := &g.Count; c.Accepted.Load() != 1 || c.WrongToken.Load() != wrongBurst+2 || c.Limited.Load() != 1000-wrongBurst+1 {
		t.Errorf("counted %d, %d, %d", c.Accepted.Load(), c.WrongToken.Load(), c.Limited.Load())
	}
	if n := strings.Count(g.logs.String(), "\n"); n != 1 {
		t.Errorf("%d lines in the log: %s", n, &g.logs)
	}
	// From a whole /64, and from more sources than are remembered.
	for i := range 100 {
		g.ask(fmt.Sprintf("[fd00:0:0:9::%x]:1", i+1), "/status")
	}
	if got := g.ask("[fd00:0:0:9::ffff]:1", "/status").Code; got != 429 {
		t.Errorf("another address of a /64: %d", got)
	}
	for i := range 2 * maxWrong {
		g.ask(fmt.Sprintf("[fd01:0:%x:%x::1]:1", i>>16, i&0xffff), "/status")
	}
	if got := g.ask("[fd02::1]:1", "/status").Code; got != 429 {
		t.Errorf("a source beyond the bound: %d", got)
	}
	if got := g.ask("[fd02::1]:1", "/status", "X-ZT1-Auth", token).Code; got != 200 {
		t.Errorf("the right token of that source: %d", got)
	}
}

func TestTokenFile(t *testing.T) {
	home := t.TempDir()
	made, err := Token(disk.OS{}, home)
	fi, statErr := os.Stat(filepath.Join(home, tokenFile))
	if err != nil || len(made) != tokenLength || statErr != nil || fi.Mode().Perm() != 0o600 {
		t.Fatalf("%q, %v, %v", made, err, statErr)
	}
	if again, err := Token(disk.OS{}, home); err != nil || again != made {
		t.Errorf("%q, %v, want %q", again, err, made)
	}
	for _, tt := range []struct {
		text string
		mode os.FileMode
		ok   bool
	}{
		{" " + made + "\n", 0o600, true}, {made, 0o640, true}, {made, 0o644, false},
		{"", 0o600, false}, {"short", 0o600, false}, {"has a blank in its middle", 0o600, false},
	} {
		path := filepath.Join(home, tokenFile)
		if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, tt.mode); err != nil {
			t.Fatal(err)
		}
		got, err := Token(disk.OS{}, home)
		if (err == nil) != tt.ok || tt.ok && got != made || err != nil && (fault.ExitCode(err) != 2 || strings.Contains(err.Error(), made)) {
			t.Errorf("%q, %v: %q, %v", tt.text, tt.mode, got, err)
		}
	}
}
