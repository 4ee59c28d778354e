package gateway

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ztgate/router/config"
	"ztgate/zerotier/controller"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
	"ztgate/zerotier/ztnode"
)

// frontend is a controller that a recorded session of a front end is played to.
//
// The sessions were recorded between the front ends' own code and a zerotier-one 1.14.1
// with two members: making a network, its name, routes, pools, modes, name servers,
// rules; members that ask, are let in, changed, put out and deleted; its end. ztncui ran
// as it is, of ZTNET its API client, its routers and its synchronisation of members.
type frontend struct {
	t      *testing.T
	c      *controller.Controller
	nodes  []*identity.Identity
	now    time.Time
	peers  []ztnode.Peer
	server *httptest.Server
	asked  packet.ID
	last   map[string]json.RawMessage // answers of the reference, by path

	recorded, ours string // ID of the network
}

// step is one line of a session.
type step struct {
	Do     string          `json:"do"` // ask: the members ask for the network
	Method string          `json:"method"`
	Path   string          `json:"path"`
	Body   json.RawMessage `json:"body"`
	Code   int             `json:"code"` // 0 = 200
	Answer json.RawMessage `json:"answer"`
	Same   bool            `json:"same"` // as the last one of that path
}

const frontendToken = "f0123456789abcdefghijklm"

func newFrontend(t *testing.T) *frontend {
	b, err := os.ReadFile(filepath.Join("testdata", "frontends", "nodes.json"))
	if err != nil {
		t.Fatal(err)
	}
	var nodes struct {
		Controller string
		Members    []string
	}
	if err := json.Unmarshal(b, &nodes); err != nil {
		t.Fatal(err)
	}
	f := &frontend{t: t, now: time.UnixMilli(1_796_000_000_000), last: map[string]json.RawMessage{}}
	parse := func(text string) *identity.Identity {
		id, err := identity.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	for _, m := range nodes.Members {
		f.nodes = append(f.nodes, parse(m))
	}
	home := t.TempDir()
	if err := os.WriteFile(filepath.Join(home, "authtoken.secret"), []byte(frontendToken+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	id := parse(nodes.Controller)
	if f.c, err = controller.New(controller.Config{Identity: id, Dir: filepath.Join(home, "controller.d"),
		Send: func(identity.Address, packet.Verb, []byte, bool) {}, Now: func() time.Time { return f.now }}); err != nil {
		t.Fatal(err)
	}
	cfg := &config.Config{Home: home}
	cfg.API.AllowFrom = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	s := newService(cfg, slog.New(slog.DiscardHandler), frontendNode{f: f, id: id}, f.now)
	s.now = func() time.Time { return f.now }
	guard, err := s.guardedAPI(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "metric 1") }))
	if err != nil {
		t.Fatal(err)
	}
	f.server = httptest.NewServer(guard)
	t.Cleanup(f.server.Close)
	return f
}

// frontendNode is the controller's node.
type frontendNode struct {
	Node
	f  *frontend
	id *identity.Identity
}

func (n frontendNode) Controller() Controller     { return goController{n.f.c} }
func (n frontendNode) Peers() []ztnode.Peer       { return slices.Clone(n.f.peers) }
func (n frontendNode) Networks() []ztnode.Network { return nil }
func (n frontendNode) Info() ztnode.Info {
	return ztnode.Info{Address: n.id.Address().String(), Identity: n.id.Public().String(), Online: true, Version: "1.16.0"}
}

// TestFrontEnds plays the sessions and holds our answers against the reference's.
func TestFrontEnds(t *testing.T) {
	for _, name := range []string{"ztncui", "ztnet"} {
		t.Run(name, func(t *testing.T) {
			f := newFrontend(t)
			file, err := os.Open(filepath.Join("testdata", "frontends", name+".jsonl"))
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			lines := bufio.NewScanner(file)
			lines.Buffer(nil, 1<<20)
			steps := 0
			for lines.Scan() {
				var s step
				if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
					t.Fatal(err)
				}
				f.play(s)
				steps++
			}
			if err := lines.Err(); err != nil || steps < 60 {
				t.Errorf("%d steps, %v", steps, err)
			}
		})
	}
}

func (f *frontend) play(s step) {
	f.now = f.now.Add(1500 * time.Millisecond)
	if s.Do == "ask" {
		f.ask()
		return
	}
	want := s.Answer
	if s.Same {
		want = f.last[s.Path]
	}
	if s.Method == "GET" {
		f.last[s.Path] = want
	}
	if list := peersOf(want, s.Path); list != nil {
		f.meet(list)
	}
	code, got := f.call(s.Method, s.Path, s.Body)
	if s.Code == 0 {
		s.Code = http.StatusOK
	}
	f.c.Work(f.now)
	if code != s.Code {
		f.t.Errorf("%s %s %s: %d %.200s, want %d", s.Method, s.Path, s.Body, code, got, s.Code)
	}
	if want == nil || code != http.StatusOK {
		return
	}
	f.learn(s, want, got)
	f.compare(s, f.translate(want), got)
}

// ask lets the members ask for the network, as they do every few seconds.
func (f *frontend) ask() {
	nwid, err := vl2.ParseNetworkID(f.ours)
	if err != nil {
		f.t.Fatal(err)
	}
	for _, id := range f.nodes {
		f.asked++
		f.c.HandleRequest(id, f.asked, nwid, vl2.RequestMetadata())
	}
	f.c.Work(f.now)
}

// call asks as the front ends do.
func (f *frontend) call(method, path string, body []byte) (int, []byte) {
	f.t.Helper()
	req, err := http.NewRequest(method, f.server.URL+f.translatePath(path), bytes.NewReader(f.translate(body)))
	if err != nil {
		f.t.Fatal(err)
	}
	req.Header.Set("X-ZT1-Auth", frontendToken)
	req.Header.Set("Content-Type", "application/json")
	res, err := f.server.Client().Do(req)
	if err != nil {
		f.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return res.StatusCode, b
}

// learn notes the IDs of a new network.
func (f *frontend) learn(s step, want, got []byte) {
	if f.ours != "" || s.Method != "POST" || !strings.HasSuffix(s.Path, "______") {
		return
	}
	var theirs, ours struct{ ID string }
	if json.Unmarshal(want, &theirs) != nil || json.Unmarshal(got, &ours) != nil || len(ours.ID) != 16 {
		f.t.Fatalf("no network: %s", got)
	}
	f.recorded, f.ours = theirs.ID, ours.ID
}

func (f *frontend) translate(b []byte) []byte {
	if f.recorded == "" {
		return b
	}
	return bytes.ReplaceAll(b, []byte(f.recorded), []byte(f.ours))
}

func (f *frontend) translatePath(path string) string { return string(f.translate([]byte(path))) }

// recordedPeer is a peer in an answer of the reference.
type recordedPeer struct {
	Address, Role, Version string
	Paths                  []struct {
		Address   string
		Preferred bool
	}
}

func peersOf(answer []byte, path string) (list []recordedPeer) {
	var one recordedPeer
	switch {
	case path == "/peer" && json.Unmarshal(answer, &list) == nil:
		return list
	case strings.HasPrefix(path, "/peer/") && json.Unmarshal(answer, &one) == nil:
		return []recordedPeer{one}
	}
	return nil
}

// meet lets our node know the peers that the reference knew.
func (f *frontend) meet(list []recordedPeer) {
	f.peers = []ztnode.Peer{{Address: "0000000001", Role: ztnode.RoleLeaf, Version: "1.14.0", Latency: 7, LastReceive: f.now.Add(-time.Hour)}} // is off
	for _, r := range list {
		p := ztnode.Peer{Address: r.Address, Role: r.Role, Version: r.Version, Latency: 1.2, LastReceive: f.now}
		for _, x := range r.Paths {
			p.Paths = append(p.Paths, ztnode.Path{Endpoint: netip.MustParseAddrPort(strings.Replace(x.Address, "/", ":", 1)), Preferred: x.Preferred,
				LastSend: f.now, LastReceive: f.now})
		}
		f.peers = append(f.peers, p)
	}
}

// mayDiffer are keys whose values depend on the time, the program or the host. They
// are there, and of the same type.
var mayDiffer = []string{"clock", "creationTime", "revision", "lastAuthorizedTime", "lastDeauthorizedTime", "vMajor", "vMinor", "vRev", "vProto",
	"latency", "lastReceive", "lastSend", "localSocket", "version", "versionMinor", "versionRev", "planetWorldId", "planetWorldTimestamp",
	"primaryPort", "secondaryPort", "tertiaryPort", "listeningOn", "homeDir", "surfaceAddresses", "portMappingEnabled"}

// compare holds our answer against the reference's: all its keys, with its types, and
// but for those that may differ its values.
func (f *frontend) compare(s step, want, got []byte) {
	f.t.Helper()
	var a, b any
	if err := json.Unmarshal(want, &a); err != nil {
		f.t.Fatal(err)
	}
	if err := json.Unmarshal(got, &b); err != nil {
		f.t.Errorf("%s %s: %v in %q", s.Method, s.Path, err, got)
		return
	}
	revisions := strings.HasSuffix(s.Path, "/member")
	for _, problem := range differences("", a, b, revisions) {
		f.t.Errorf("%s %s %s: %s", s.Method, s.Path, s.Body, problem)
	}
}

func differences(at string, want, got any, volatile bool) (out []string) {
	say := func() []string { return append(out, fmt.Sprintf("%s is %v, want %v", at, got, want)) }
	switch w := want.(type) {
	case map[string]any:
		g, ok := got.(map[string]any)
		if !ok {
			return say()
		}
		for _, k := range slices.Sorted(maps.Keys(w)) {
			v, ok := g[k]
			switch {
			case k == "dns" && fmt.Sprint(w[k]) == "[]": // the reference's way to say none
				if fmt.Sprint(v) != "map[domain: servers:[]]" {
					out = append(out, fmt.Sprintf("dns is %v", v))
				}
			case k == "authTokens" && fmt.Sprint(w[k]) == "[<nil>]":
				if fmt.Sprint(v) != "map[]" {
					out = append(out, fmt.Sprintf("authTokens is %v", v))
				}
			case k == "rulesSource" && ok: // the reference forgets it
			case k == "capabilities" && fmt.Sprint(w[k], v) == "[] [1001]": // a default one, which the reference forgets where it matters (chapter 04 §4)
			case !ok && (k == "not" || k == "or") && strings.HasPrefix(fmt.Sprint(w["type"]), "ACTION_") && w[k] == false:
			case !ok:
				out = append(out, at+"."+k+" is missing")
			default:
				out = append(out, differences(at+"."+k, w[k], v, volatile || slices.Contains(mayDiffer, k))...)
			}
		}
	case []any:
		g, ok := got.([]any)
		switch {
		case !ok || !volatile && len(g) != len(w):
			return say()
		case volatile:
			return nil
		}
		for i := range w {
			out = append(out, differences(fmt.Sprintf("%s[%d]", at, i), w[i], g[i], volatile)...)
		}
	default:
		if fmt.Sprintf("%T", want) != fmt.Sprintf("%T", got) || !volatile && want != got {
			return say()
		}
	}
	return out
}
