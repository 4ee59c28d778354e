package controller

import (
	"encoding/binary"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/testvec"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
)

type netconf struct {
	Identities []struct {
		Name   string `json:"name"`
		Secret string `json:"identity_secret"`
	} `json:"identities"`
	Configs []struct {
		Name      string          `json:"name"`
		NetworkID string          `json:"network_id"`
		Network   json.RawMessage `json:"controller_record_network"`
		Member    json.RawMessage `json:"controller_record_member"`
		Request   *struct {
			Payload  testvec.Hex `json:"payload"`
			PacketID string      `json:"packet_id"`
		} `json:"request"`
		Dictionary testvec.Hex `json:"dictionary_hex"`
		Parsed     struct {
			Timestamp int64 `json:"timestamp"`
		} `json:"parsed"`
	} `json:"configs"`
}

// nodes are the identities of the vectors.
func nodes(t testing.TB) (netconf, map[string]*identity.Identity) {
	t.Helper()
	var v netconf
	testvec.Load(t, "netconf.json", &v)
	out := map[string]*identity.Identity{}
	for _, n := range v.Identities {
		id, err := identity.Parse(n.Secret)
		if err != nil {
			t.Fatal(err)
		}
		out[n.Name] = id
	}
	return v, out
}

// rig is a controller with a clock that stands still and everything it sent.
type rig struct {
	t   testing.TB
	c   *Controller
	ids map[string]*identity.Identity
	now time.Time
	dir string

	sent   []message
	nextID packet.ID
}

func newRig(t testing.TB) *rig {
	t.Helper()
	_, ids := nodes(t)
	r := &rig{t: t, ids: ids, now: time.UnixMilli(1_760_000_000_000), dir: filepath.Join(t.TempDir(), "controller.d"), nextID: 1}
	r.restart()
	return r
}

func (r *rig) restart() {
	r.t.Helper()
	c, err := New(Config{
		Identity: r.ids["ctrl"], Dir: r.dir, Now: func() time.Time { return r.now },
		Send: func(dst identity.Address, v packet.Verb, payload []byte, compress bool) {
			if len(payload) > 9928-packet.HeaderLen {
				r.t.Errorf("%s of %d bytes", v, len(payload))
			}
			r.sent = append(r.sent, message{dst, v, payload, compress})
		},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	r.c = c
}

// advance lets time pass in steps in which everything due is done.
func (r *rig) advance(d time.Duration) {
	for end := r.now.Add(d); r.now.Before(end); {
		next := r.c.Work(r.now)
		if !next.After(r.now) {
			r.t.Fatal("work is due for ever")
		}
		if next.After(end) {
			next = end
		}
		r.now = next
	}
	r.c.Work(r.now)
}

// take returns what was sent since the last call.
func (r *rig) take() []message {
	out := r.sent
	r.sent = nil
	return out
}

// ask lets a node ask, and returns what was sent thereupon.
func (r *rig) ask(from *identity.Identity, n vl2.NetworkID, metadata []byte) []message {
	r.nextID++
	r.c.HandleRequest(from.Public(), r.nextID, n, metadata)
	r.advance(time.Millisecond)
	return r.take()
}

func (r *rig) join(name string, n vl2.NetworkID) []message {
	r.now = r.now.Add(2 * time.Second)
	return r.ask(r.ids[name], n, vl2.RequestMetadata())
}

func (r *rig) addr(name string) identity.Address { return r.ids[name].Address() }

func (r *rig) create(change func(*Network)) Network {
	r.t.Helper()
	n := DefaultNetwork()
	n.Name = "test"
	n.V4AssignMode.ZT = true
	n.Routes = []Route{{Target: netip.MustParsePrefix("192.168.191.0/24")}}
	n.IPAssignmentPools = []Pool{{netip.MustParseAddr("192.168.191.1"), netip.MustParseAddr("192.168.191.254")}}
	if change != nil {
		change(&n)
	}
	n, err := r.c.CreateNetwork(n)
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

func (r *rig) update(n vl2.NetworkID, a identity.Address, f func(*Member)) Member {
	r.t.Helper()
	m, err := r.c.UpdateMember(n, a, func(m *Member) error { f(m); return nil })
	if err != nil {
		r.t.Fatal(err)
	}
	return m
}

func (r *rig) authorize(n vl2.NetworkID, names ...string) {
	r.t.Helper()
	for _, name := range names {
		r.update(n, r.addr(name), func(m *Member) { m.Authorized = true })
	}
}

// config decodes the configuration that one of the messages carries to a node, and
// checks its signatures.
func (r *rig) config(list []message, to string, push bool) *vl2.NetworkConfig {
	r.t.Helper()
	dict := r.dictionary(list, to, push)
	cfg, err := vl2.DecodeNetworkConfig(dict)
	if err != nil {
		r.t.Fatal(err)
	}
	ctrl := r.ids["ctrl"].Public()
	if cfg.COM == nil || !cfg.COM.Verify(ctrl) || !cfg.COM.Agrees(cfg.COM, r.ids[to]) {
		r.t.Errorf("%s: certificate of membership is no good", to)
	}
	for _, x := range cfg.COOs {
		if !x.Verify(ctrl) || x.IssuedTo != r.addr(to) {
			r.t.Errorf("%s: certificate of ownership is no good", to)
		}
	}
	for _, x := range cfg.Tags {
		if !x.Verify(ctrl) || x.IssuedTo != r.addr(to) {
			r.t.Errorf("%s: tag is no good", to)
		}
	}
	for _, x := range cfg.Capabilities {
		if !x.Verify(ctrl) || x.Holder() != r.addr(to) {
			r.t.Errorf("%s: capability is no good", to)
		}
	}
	if cfg.Member != r.addr(to) {
		r.t.Errorf("configuration for %s sent to %s", cfg.Member, to)
	}
	return cfg
}

func (r *rig) dictionary(list []message, to string, push bool) []byte {
	r.t.Helper()
	var a vl2.Assembler
	for _, m := range list {
		b := m.payload
		switch {
		case m.to != r.addr(to):
			continue
		case m.verb == packet.VerbOK && !push:
			if b[0] != byte(packet.VerbNetworkConfigRequest) || packet.ID(binary.BigEndian.Uint64(b[1:])) != r.nextID {
				r.t.Fatalf("reply to something else: %x", b[:9])
			}
			b = b[9:]
		case m.verb == packet.VerbNetworkConfig && push:
		default:
			continue
		}
		if !m.compress {
			r.t.Error("configuration is not compressed")
		}
		c, err := vl2.ParseChunk(b)
		if err != nil || !c.Verify(r.ids["ctrl"].Public()) {
			r.t.Fatalf("chunk is no good: %v", err)
		}
		if dict, _ := a.Add(r.now, c); dict != nil {
			return dict
		}
	}
	r.t.Fatalf("no configuration for %s in %d messages", to, len(list))
	return nil
}

func (r *rig) refused(list []message, to string, code packet.ErrorCode) {
	r.t.Helper()
	if len(list) != 1 || list[0].to != r.addr(to) || list[0].verb != packet.VerbError || len(list[0].payload) < 18 ||
		packet.ErrorCode(list[0].payload[9]) != code {
		r.t.Fatalf("sent %v, want one ERROR %#x to %s", list, code, to)
	}
}

// revoked lists whom messages to a node revoke.
func (r *rig) revoked(list []message, to string) (targets []identity.Address) {
	r.t.Helper()
	for _, m := range list {
		if m.to != r.addr(to) || m.verb != packet.VerbNetworkCredentials {
			continue
		}
		creds, err := vl2.ParseCredentials(m.payload)
		if err != nil {
			r.t.Fatal(err)
		}
		for _, c := range creds {
			if !c.IsRevocation() || !c.Verify(r.ids["ctrl"].Public()) || !c.FastPropagate() {
				r.t.Errorf("sent %T that is no good", c)
			}
			targets = append(targets, c.Holder())
		}
	}
	return targets
}

// TestReferenceConfigs builds the reference's configurations from its records, to the
// byte.
func TestReferenceConfigs(t *testing.T) {
	v, ids := nodes(t)
	for _, x := range v.Configs {
		t.Run(x.Name, func(t *testing.T) {
			r := &rig{t: t, ids: ids, dir: t.TempDir(), now: time.UnixMilli(x.Parsed.Timestamp)}
			nwid, err := vl2.ParseNetworkID(x.NetworkID)
			if err != nil {
				t.Fatal(err)
			}
			s := store{dir: r.dir}
			if err := os.MkdirAll(s.memberDir(nwid), 0o700); err != nil {
				t.Fatal(err)
			}
			bridge := newMember(nwid, r.addr("dave"), 0)
			bridge.ActiveBridge, bridge.Authorized = strings.HasPrefix(x.Name, "routes"), true
			files := map[string][]byte{s.networkPath(nwid): x.Network, s.memberPath(nwid, r.addr("alice")): x.Member}
			if files[s.memberPath(nwid, bridge.Address)], err = json.Marshal(bridge); err != nil {
				t.Fatal(err)
			}
			for path, b := range files {
				if err := os.WriteFile(path, b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			r.restart()
			var got []byte
			metadata := vl2.RequestMetadata()
			if x.Request != nil {
				if _, metadata, err = vl2.ParseConfigRequest(x.Request.Payload); err != nil {
					t.Fatal(err)
				}
			}
			got = r.dictionary(r.ask(ids["alice"], nwid, metadata), "alice", false)
			if string(got) != string(x.Dictionary) {
				t.Errorf("configuration differs:\n got %q\nwant %q", got, []byte(x.Dictionary))
			}
		})
	}
}

func TestJoin(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	r.refused(r.join("alice", n.ID+1), "alice", packet.ErrorObjectNotFound)
	r.refused(r.join("alice", n.ID), "alice", packet.ErrorNetworkAccessDenied)
	if m, ok := r.c.Member(n.ID, r.addr("alice")); !ok || m.Authorized || m.Identity != r.ids["alice"].Public().String() {
		t.Fatalf("record %+v", m)
	}
	if r.c.Authorized(n.ID, r.addr("alice"), r.now) {
		t.Error("authorized before")
	}
	r.authorize(n.ID, "alice")
	r.advance(pushInterval)
	cfg := r.config(r.take(), "alice", true)
	if len(cfg.Addresses) != 1 || len(cfg.Routes) != 1 || len(cfg.COOs) != 1 || !cfg.AcceptsAll() || !cfg.Broadcast() || cfg.Public {
		t.Errorf("configuration %+v", cfg)
	}
	m, _ := r.c.Member(n.ID, r.addr("alice"))
	if m.LastAuthorizedCredentialType != "api" || m.LastAuthorizedTime == 0 || len(m.IPAssignments) != 1 {
		t.Errorf("record %+v", m)
	}
	again := r.config(r.join("alice", n.ID), "alice", false)
	if again.Timestamp <= cfg.Timestamp || again.Addresses[0] != cfg.Addresses[0] {
		t.Errorf("second configuration %+v", again)
	}
	if m, _ = r.c.Member(n.ID, r.addr("alice")); m.VMajor != 1 || m.VMinor != 16 || m.VProto != packet.ProtocolVersion {
		t.Errorf("version %+v", m)
	}
	if !r.c.Authorized(n.ID, r.addr("alice"), r.now.Add(authorizedFor-time.Second)) ||
		r.c.Authorized(n.ID, r.addr("alice"), r.now.Add(authorizedFor+time.Second)) {
		t.Error("Authorized is not 180 s")
	}
}

func TestForeignNetworkIsIgnored(t *testing.T) {
	r := newRig(t)
	if out := r.join("alice", 0x3dc70a7406000001); len(out) != 0 {
		t.Errorf("sent %v", out)
	}
}

func TestRequestInterval(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	r.refused(r.join("alice", n.ID), "alice", packet.ErrorNetworkAccessDenied)
	if out := r.ask(r.ids["alice"], n.ID, nil); len(out) != 0 {
		t.Errorf("sent %v within a second", out)
	}
	r.refused(r.ask(r.ids["bob"], n.ID, nil), "bob", packet.ErrorNetworkAccessDenied)
	r.advance(1001 * time.Millisecond)
	r.refused(r.ask(r.ids["alice"], n.ID, nil), "alice", packet.ErrorNetworkAccessDenied)
	if s := r.c.Stats(); s.TooSoon != 1 || s.Requests != 4 || s.Refused != 3 {
		t.Errorf("stats %+v", s)
	}
	for i := range vl2.NetworkID(1000) {
		r.c.HandleRequest(r.ids["carol"], 1, n.ID&^0xffffff|i<<4, nil)
	}
	if r.advance(0); len(r.take()) > 2 {
		t.Error("a node is answered for many unknown networks at once")
	}
}

func TestPublicNetworkAndToken(t *testing.T) {
	r := newRig(t)
	n := r.create(func(n *Network) {
		n.AuthTokens = AuthTokens{"good": 0, "old": r.now.UnixMilli()}
		n.Capabilities = []Capability{{ID: 7, Default: true, Rules: []vl2.Rule{{Type: vl2.ActionAccept}}}}
		five := uint32(5)
		n.Tags = []Tag{{ID: 3, Default: &five}, {ID: 2}}
	})
	for name, token := range map[string]string{"alice": "\na=token:good", "bob": "\na=token:old", "carol": "\na=token:"} {
		out := r.ask(r.ids[name], n.ID, append(vl2.RequestMetadata(), token...))
		if name != "alice" {
			r.refused(out, name, packet.ErrorNetworkAccessDenied)
			continue
		}
		cfg := r.config(out, name, false)
		if len(cfg.Capabilities) != 1 || cfg.Capabilities[0].ID != 7 || len(cfg.Tags) != 1 || cfg.Tags[0].Value != 5 {
			t.Errorf("capabilities %v, tags %v", cfg.Capabilities, cfg.Tags)
		}
		if m, _ := r.c.Member(n.ID, r.addr(name)); m.LastAuthorizedCredentialType != "token" || m.LastAuthorizedCredential != "good" {
			t.Errorf("record %+v", m)
		}
	}
	// Making it public lets in those that wait.
	if _, err := r.c.UpdateNetwork(n.ID, func(n *Network) error { n.Private = false; return nil }); err != nil {
		t.Fatal(err)
	}
	r.advance(pushInterval)
	if cfg := r.config(r.take(), "bob", true); !cfg.Public || len(cfg.Capabilities) != 1 || cfg.Revision != 2 {
		t.Errorf("configuration %+v", cfg)
	}
	// An old node without a rules engine.
	r.now = r.now.Add(2 * time.Second)
	if cfg := r.config(r.ask(r.ids["dave"], n.ID, nil), "dave", false); len(cfg.Capabilities)+len(cfg.Tags) != 0 || !cfg.AcceptsAll() {
		t.Errorf("configuration without revr %+v", cfg)
	}
}

func TestIdentityIsPinned(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	alice := r.addr("alice")
	if _, err := r.c.UpdateMember(n.ID, alice, func(m *Member) error { m.Identity = r.ids["bob"].String(); return nil }); err == nil {
		t.Error("identity of another address was taken")
	}
	r.update(n.ID, alice, func(m *Member) { m.Identity, m.Authorized = r.ids["alice"].String(), true })
	// Another key under the same address, as after a collision.
	text := strings.Replace(r.ids["bob"].Public().String(), r.addr("bob").String(), alice.String(), 1)
	other, err := identity.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	r.refused(r.ask(other, n.ID, nil), "alice", packet.ErrorNetworkAccessDenied)
	r.config(r.join("alice", n.ID), "alice", false)
	r.now = r.now.Add(2 * time.Second)
	r.refused(r.ask(other, n.ID, nil), "alice", packet.ErrorNetworkAccessDenied)
	if _, err := r.c.UpdateMember(n.ID, alice, func(m *Member) error { m.Identity = ""; return nil }); err == nil {
		t.Error("identity was removed")
	}
}

func TestTimestampsIncrease(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	r.authorize(n.ID, "alice", "bob")
	last := int64(0)
	check := func(name string) {
		t.Helper()
		r.now = r.now.Add(2 * time.Second)
		cfg := r.config(r.ask(r.ids[name], n.ID, vl2.RequestMetadata()), name, false)
		if cfg.Timestamp <= last {
			t.Errorf("time stamp %d after %d", cfg.Timestamp, last)
		}
		last = cfg.Timestamp
	}
	check("alice")
	check("bob")
	r.now = r.now.Add(-time.Hour)
	check("alice")
	r.now = r.now.Add(-time.Hour)
	r.restart()
	check("alice")
	check("bob")
}

func TestRestart(t *testing.T) {
	r := newRig(t)
	n := r.create(func(n *Network) { n.CertificateTimeoutWindowSize = 400000; n.RemoteTraceTarget = "1680bf1ff0" })
	path := store{dir: r.dir}.networkPath(n.ID)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b = append([]byte(`{"somebodyElses":[1,2],`), b[1:]...)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	r.restart()
	r.authorize(n.ID, "alice")
	before := r.config(r.join("alice", n.ID), "alice", false)
	if _, err := r.c.UpdateNetwork(n.ID, func(n *Network) error { return n.Patch([]byte(`{"name":"x","mtu":100,"id":"no"}`)) }); err != nil {
		t.Fatal(err)
	}
	want := r.c.Networks()
	for path, suffix := range map[string]string{r.dir + "/network/": n.ID.String() + ".json", store{dir: r.dir}.memberDir(n.ID) + "/": r.addr("alice").String() + ".json"} {
		if err := os.WriteFile(path+"."+suffix+".123", []byte("{"), 0o600); err != nil { // interrupted write
			t.Fatal(err)
		}
		if st, err := os.Stat(path + suffix); err != nil || st.Mode() != 0o600 {
			t.Errorf("mode %v, %v", st.Mode(), err)
		}
	}
	r.restart()
	got, _ := json.Marshal(r.c.Networks())
	if w, _ := json.Marshal(want); string(got) != string(w) || !strings.Contains(string(got), `"somebodyElses":[1,2]`) ||
		!strings.Contains(string(got), `"mtu":1280`) {
		t.Errorf("networks after restart:\n got %s\nwant %s", got, w)
	}
	if left, _ := filepath.Glob(r.dir + "/network/.*"); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
	after := r.config(r.join("alice", n.ID), "alice", false)
	if after.Addresses[0] != before.Addresses[0] || after.Timestamp <= before.Timestamp || after.TimeDelta != 400000 {
		t.Errorf("after restart %+v, before %+v", after, before)
	}
	if st, err := os.Stat(r.dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("directory mode %v, %v", st.Mode(), err)
	}
}

// TestUnreadableRecords: nothing is answered, so members keep what they have.
func TestUnreadableRecords(t *testing.T) {
	r := newRig(t)
	n, other := r.create(nil), r.create(nil)
	r.authorize(n.ID, "alice", "bob")
	for _, path := range []string{store{dir: r.dir}.networkPath(other.ID), store{dir: r.dir}.memberPath(n.ID, r.addr("alice"))} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.restart()
	if out := append(r.join("alice", n.ID), r.join("bob", other.ID)...); len(out) != 0 {
		t.Errorf("sent %v", out)
	}
	r.config(r.join("bob", n.ID), "bob", false)
	if _, err := r.c.CreateNetwork(Network{ID: other.ID}); err == nil {
		t.Error("unreadable network was replaced")
	}
	if err := r.c.DeleteMember(n.ID, r.addr("alice")); err != nil {
		t.Error(err)
	}
	r.advance(time.Millisecond)
	if got := r.revoked(r.take(), "bob"); len(got) != 1 {
		t.Errorf("bob was told %v", got)
	}
	r.refused(r.join("alice", n.ID), "alice", packet.ErrorNetworkAccessDenied)
}

// TestFailedWrite: what is not on disk is not sent.
func TestFailedWrite(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	r.authorize(n.ID, "alice")
	if err := os.RemoveAll(r.dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(r.dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if out := r.join("alice", n.ID); len(out) != 0 {
		t.Errorf("sent %v", out)
	}
	if _, err := r.c.UpdateMember(n.ID, r.addr("alice"), func(m *Member) error { m.Authorized = false; return nil }); err == nil {
		t.Error("no error")
	}
	if m, _ := r.c.Member(n.ID, r.addr("alice")); !m.Authorized || len(m.IPAssignments) != 0 {
		t.Errorf("record changed: %+v", m)
	}
	if len(r.c.networks[n.ID].revocations) != 0 {
		t.Error("a revocation stayed")
	}
}
