package controller

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
)

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func TestAssign(t *testing.T) {
	const nwid, a = 0x9778dd29dd246907, identity.Address(0xfcd8055969)
	pool := func(s, e string) Pool { return Pool{netip.MustParseAddr(s), netip.MustParseAddr(e)} }
	route := func(s string) Route { return Route{Target: netip.MustParsePrefix(s)} }
	via := func(s, v string) Route { return Route{netip.MustParsePrefix(s), netip.MustParseAddr(v)} }
	for _, x := range []struct {
		name   string
		net    Network
		rec    Member
		others []netip.Addr
		want   string
	}{
		{name: "observed", want: "192.168.191.178/24", net: Network{
			V4AssignMode: V4AssignMode{true}, Routes: []Route{route("192.168.191.0/24")},
			IPAssignmentPools: []Pool{pool("192.168.191.1", "192.168.191.254")},
		}},
		{name: "taken", want: "192.168.191.179/24", others: addrs("192.168.191.178"), net: Network{
			V4AssignMode: V4AssignMode{true}, Routes: []Route{route("192.168.191.0/24")},
			IPAssignmentPools: []Pool{pool("192.168.191.1", "192.168.191.254")},
		}},
		{name: "formulas", want: "fd97:78dd:29dd:2469:799:93fc:d805:5969/88 fc4a:5cb4:2efc:d805:5969::1/40 192.168.191.7/24", net: Network{
			V6AssignMode: V6AssignMode{RFC4193: true, SixPlane: true}, Routes: []Route{route("192.168.0.0/16"), route("192.168.191.0/24"), via("0.0.0.0/0", "192.168.1.1")},
		}, rec: Member{IPAssignments: addrs("192.168.191.7", "10.0.0.1")}},
		{name: "no automatic", want: "192.168.191.7/24", net: Network{
			V4AssignMode: V4AssignMode{true}, V6AssignMode: V6AssignMode{RFC4193: true}, Routes: []Route{route("192.168.191.0/24")},
			IPAssignmentPools: []Pool{pool("192.168.191.1", "192.168.191.254")},
		}, rec: Member{NoAutoAssignIPs: true, IPAssignments: addrs("192.168.191.7")}},
		{name: "one address", want: "10.0.0.9/8", net: Network{
			V4AssignMode: V4AssignMode{true}, Routes: []Route{via("10.0.0.0/8", "10.0.0.1")}, IPAssignmentPools: []Pool{pool("10.0.0.9", "10.0.0.9")},
		}},
		{name: "full", want: "", others: addrs("10.0.0.9"), net: Network{
			V4AssignMode: V4AssignMode{true}, Routes: []Route{route("10.0.0.0/8")}, IPAssignmentPools: []Pool{pool("10.0.0.9", "10.0.0.9")},
		}},
		{name: "host bits and default route", want: "", net: Network{
			V4AssignMode: V4AssignMode{true}, Routes: []Route{route("10.0.0.1/8"), via("0.0.0.0/0", "10.0.0.1")},
			IPAssignmentPools: []Pool{pool("10.0.0.1", "10.0.0.200")},
		}},
		{name: "last octet 255", want: "", net: Network{
			V4AssignMode: V4AssignMode{true}, Routes: []Route{route("10.0.0.0/8")}, IPAssignmentPools: []Pool{pool("10.0.0.255", "10.0.0.255")},
		}},
		{name: "second pool", want: "10.1.0.5/16", net: Network{
			V4AssignMode: V4AssignMode{true}, Routes: []Route{route("10.1.0.0/16")},
			IPAssignmentPools: []Pool{pool("10.0.0.1", "10.0.0.9"), pool("10.1.0.5", "10.1.0.5")},
		}},
		{name: "IPv6 with the member's address", want: "fd00::fc:d805:5969/64", net: Network{
			V6AssignMode: V6AssignMode{ZT: true}, Routes: []Route{via("fd00::/48", "fd00::1"), route("fd00::/64")},
			IPAssignmentPools: []Pool{pool("fd00::", "fd00::ffff:ffff:ffff")},
		}},
		{name: "IPv6 random", want: "fd00:77::1/64", net: Network{
			V6AssignMode: V6AssignMode{ZT: true}, Routes: []Route{route("fd00:77::/64")},
			IPAssignmentPools: []Pool{pool("fd00:77::1", "fd00:77::2")},
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			x.net.ID, x.rec.Address = nwid, a
			n := newNetwork(x.net)
			n.put(Member{Address: 0x1234567890, IPAssignments: x.others})
			got, _ := n.assign(&x.rec)
			var text []string
			for _, p := range got {
				text = append(text, p.String())
			}
			if s := strings.Join(text, " "); s != x.want {
				t.Errorf("got %s, want %s", s, x.want)
			}
			again, _ := n.assign(&x.rec)
			if len(again) != len(got) {
				t.Errorf("then %v", again)
			}
		})
	}
}

// TestPoolIsShared: all addresses are different, and no more are given than there are.
func TestPoolIsShared(t *testing.T) {
	r := newRig(t)
	n := r.create(func(n *Network) { n.IPAssignmentPools[0].End = netip.MustParseAddr("192.168.191.4") })
	seen := map[netip.Addr]string{}
	for _, name := range []string{"alice", "bob", "carol", "dave"} {
		r.authorize(n.ID, name)
		cfg := r.config(r.join(name, n.ID), name, false)
		for _, p := range cfg.Addresses {
			if seen[p.Addr()] != "" {
				t.Errorf("%s for %s and %s", p, seen[p.Addr()], name)
			}
			seen[p.Addr()] = name
		}
	}
	if len(seen) != 3 {
		t.Errorf("given: %v", seen)
	}
	for a, name := range seen {
		if err := r.c.DeleteMember(n.ID, r.addr(name)); err != nil {
			t.Fatal(err)
		}
		r.update(n.ID, r.addr("root"), func(m *Member) { m.IPAssignments = []netip.Addr{a} })
		break
	}
}

func TestUpdateMemberChecks(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	alice, bob := r.addr("alice"), r.addr("bob")
	r.update(n.ID, alice, func(m *Member) { m.IPAssignments = addrs("192.168.191.9") })
	for name, f := range map[string]func(*Member) error{
		"taken":          func(m *Member) error { m.IPAssignments = addrs("192.168.191.9"); return nil },
		"outside":        func(m *Member) error { m.IPAssignments = addrs("192.168.1.9"); return nil },
		"twice":          func(m *Member) error { m.IPAssignments = addrs("192.168.191.8", "192.168.191.8"); return nil },
		"trace":          func(m *Member) error { m.RemoteTraceTarget = "x"; return nil },
		"patch":          func(m *Member) error { return m.Patch([]byte(`{"tags":[[1]]}`)) },
		"patch no ip":    func(m *Member) error { return m.Patch([]byte(`{"ipAssignments":["192.168.191.8/24"]}`)) },
		"patch no value": func(m *Member) error { return m.Patch([]byte(`null`)) },
		"own":            func(m *Member) error { return errors.New("no") },
	} {
		if _, err := r.c.UpdateMember(n.ID, bob, f); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := r.c.UpdateMember(n.ID+1, bob, func(*Member) error { return nil }); !errors.Is(err, ErrNotFound) {
		t.Errorf("error %v", err)
	}
	if _, err := r.c.UpdateMember(n.ID, 0xff00000001, func(*Member) error { return nil }); !errors.Is(err, ErrInvalid) {
		t.Errorf("error %v", err)
	}
	m, err := r.c.UpdateMember(n.ID, bob, func(m *Member) error {
		return m.Patch([]byte(`{"authorized":true,"tags":[[9,1],[2,3],[9,4]],"capabilities":[3,1,3],"ipAssignments":["192.168.191.8"],"revision":77}`))
	})
	if err != nil || m.Revision != 1 || len(m.Tags) != 2 || m.Tags[1] != (TagValue{9, 4}) || len(m.Capabilities) != 2 {
		t.Errorf("record %+v, %v", m, err)
	}
	b, err := json.Marshal(m)
	for _, want := range []string{`"tags":[[2,3],[9,4]]`, `"objtype":"member"`, `"lastAuthorizedCredentialType":"api"`, `"lastAuthorizedCredential":null`, `"nwid":"` + n.ID.String()} {
		if err != nil || !strings.Contains(string(b), want) {
			t.Errorf("no %s in %s, %v", want, b, err)
		}
	}
	cfg := r.config(r.join("bob", n.ID), "bob", false)
	if len(cfg.Addresses) != 1 || cfg.Addresses[0].String() != "192.168.191.8/24" {
		t.Errorf("addresses %v", cfg.Addresses)
	}
}

func TestNetworkChecks(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	for _, patch := range []string{
		`[]`, `{"routes":[{"target":"10.0.0.0"}]}`, `{"routes":[{"target":"10.0.0.0/8","via":"fd00::1"}]}`, `{"routes":[{"target":"10.0.0.0/33"}]}`,
		`{"rules":[{"type":"MATCH_NOTHING"}]}`, `{"ipAssignmentPools":[{"ipRangeStart":"10.0.0.9","ipRangeEnd":"10.0.0.1"}]}`,
		`{"ipAssignmentPools":[{"ipRangeStart":"10.0.0.9"}]}`, `{"dns":{"domain":"` + strings.Repeat("x", 128) + `"}}`,
		`{"multicastLimit":-1}`, `{"name":"` + strings.Repeat("x", 128) + `"}`, `{"private":"yes"}`,
	} {
		if _, err := r.c.UpdateNetwork(n.ID, func(n *Network) error { return n.Patch([]byte(patch)) }); err == nil {
			t.Errorf("%s: no error", patch)
		}
	}
	got, err := r.c.UpdateNetwork(n.ID, func(n *Network) error {
		return n.Patch([]byte(`{"routes":[{"target":"10.1.2.3/8","via":null}],"v6AssignMode":"zt,6plane","authTokens":[null],"dns":[],
			"tags":[{"id":2,"default":1},{"id":1},{"id":2,"default":null}],"rules":[],"objtype":"x"}`))
	})
	if err != nil || got.Routes[0].Target.String() != "10.1.2.3/8" || got.V6AssignMode != (V6AssignMode{SixPlane: true, ZT: true}) ||
		len(got.Tags) != 2 || got.Tags[1].Default != nil || len(got.Rules) != 0 || got.Revision != 2 {
		t.Errorf("record %+v, %v", got, err)
	}
	r.authorize(n.ID, "alice")
	if cfg := r.config(r.join("alice", n.ID), "alice", false); len(cfg.Rules) != 0 {
		t.Error("no rules became some")
	}
	if _, err := r.c.CreateNetwork(Network{ID: n.ID}); !errors.Is(err, ErrExists) {
		t.Errorf("error %v", err)
	}
	if _, err := r.c.CreateNetwork(Network{ID: 0x3dc70a7406000001}); !errors.Is(err, ErrInvalid) {
		t.Errorf("error %v", err)
	}
}

func TestRun(t *testing.T) {
	_, ids := nodes(t)
	got := make(chan message, 16)
	c, err := New(Config{Identity: ids["ctrl"], Dir: t.TempDir(), Send: func(dst identity.Address, v packet.Verb, payload []byte, compress bool) {
		got <- message{dst, v, payload, compress}
	}})
	if err != nil {
		t.Fatal(err)
	}
	n, err := c.CreateNetwork(DefaultNetwork())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	c.HandleRequest(ids["ctrl"], 5, n.ID, vl2.RequestMetadata()) // our own node
	for _, want := range []packet.Verb{packet.VerbError, packet.VerbNetworkConfig} {
		select {
		case m := <-got:
			if m.verb != want || m.to != ids["ctrl"].Address() {
				t.Errorf("sent %s to %s, want %s", m.verb, m.to, want)
			}
		case <-ctx.Done():
			t.Fatal("nothing was sent")
		}
		if want == packet.VerbError {
			if _, err := c.UpdateMember(n.ID, ids["ctrl"].Address(), func(m *Member) error { m.Authorized = true; return nil }); err != nil {
				t.Fatal(err)
			}
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func FuzzHandleRequest(f *testing.F) {
	r := newRig(f)
	n := r.create(func(n *Network) { n.AuthTokens = AuthTokens{"x": 0} })
	f.Add(vl2.RequestMetadata())
	f.Add([]byte("revr=1\na=token:x"))
	f.Fuzz(func(_ *testing.T, metadata []byte) {
		r.now = r.now.Add(2 * time.Second)
		r.ask(r.ids["alice"], n.ID, metadata)
	})
}

func FuzzRecords(f *testing.F) {
	v, _ := nodes(f)
	f.Add([]byte(v.Configs[0].Network))
	f.Add([]byte(v.Configs[0].Member))
	f.Fuzz(func(t *testing.T, b []byte) {
		var n Network
		if json.Unmarshal(b, &n) == nil {
			if _, err := json.Marshal(n); err != nil {
				t.Error(err)
			}
		}
		var m Member
		if json.Unmarshal(b, &m) == nil {
			if _, err := json.Marshal(m); err != nil {
				t.Error(err)
			}
		}
	})
}
