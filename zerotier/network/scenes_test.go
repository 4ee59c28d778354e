package network_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"ztgate/zerotier/controller"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/budget"
	"ztgate/zerotier/internal/testvec"
	"ztgate/zerotier/network"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
)

// vecPacket is a captured packet of vl2-packets.json or netconf.json.
type vecPacket struct {
	Time    int64       `json:"t"`
	From    string      `json:"from"`
	To      string      `json:"to"`
	Source  string      `json:"src"`
	Target  string      `json:"dst"`
	ID      string      `json:"packet_id"`
	Verb    packet.Verb `json:"verb"`
	Payload testvec.Hex `json:"payload"`
}

func (p *vecPacket) id(t *testing.T) packet.ID {
	v, err := strconv.ParseUint(p.ID, 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return packet.ID(v)
}

// stage is where the scenes that were captured around a real controller are played
// again: our nodes do what the reference's hosts did, but get the captured packets
// and not each other's. What they send must be what was captured.
type stage struct {
	*board
	t     *testing.T
	seats map[string]*seat
	names map[identity.Address]string
	dicts map[string][]byte // latest dictionary by member and network
	vec   struct {
		Groups []struct {
			Label   string      `json:"label"`
			Packets []vecPacket `json:"packets"`
		} `json:"groups"`
		Delivered map[string]any `json:"delivered"`
	}
	configs []struct {
		Network    string      `json:"network_id"`
		Member     string      `json:"member"`
		Request    *vecPacket  `json:"request"`
		Chunks     []vecPacket `json:"chunks"`
		Dictionary testvec.Hex `json:"dictionary_hex"`
	}
	sent  []string
	likes map[string]bool // groups announced so far
}

const (
	vecOne   = vl2.NetworkID(0x48ccec18eb000001)
	vecTwo   = vl2.NetworkID(0x48ccec18eb000002)
	vecThree = vl2.NetworkID(0x48ccec18eb000003)
)

func newStage(t *testing.T) *stage {
	st := &stage{t: t, seats: make(map[string]*seat), names: make(map[identity.Address]string), dicts: make(map[string][]byte), likes: make(map[string]bool)}
	testvec.Load(t, "vl2-packets.json", &st.vec)
	var nodes vecPackets
	testvec.Load(t, "vl2-packets.json", &nodes)
	var v struct {
		Configs any `json:"configs"`
	}
	v.Configs = &st.configs
	testvec.Load(t, "netconf.json", &v)
	st.board = &board{t: t, now: time.UnixMilli(st.vec.Groups[0].Packets[0].Time), nodes: make(map[identity.Address]*seat), dir: t.TempDir(), budget: budget.New(nil)}
	for _, x := range nodes.Identities {
		id, err := identity.Parse(x.Secret)
		if err != nil {
			t.Fatal(err)
		}
		st.seats[x.Name] = st.sit(id, x.Name == "ctrl")
		st.names[id.Address()] = x.Name
	}
	for _, n := range []vl2.NetworkID{vecOne, vecTwo, vecThree} {
		rec := controller.DefaultNetwork()
		rec.ID = n
		rec.V4AssignMode.ZT = true
		rec.Routes = []controller.Route{{Target: netip.MustParsePrefix("10.147.17.0/24")}}
		rec.IPAssignmentPools = []controller.Pool{{Start: netip.MustParseAddr("10.147.17.1"), End: netip.MustParseAddr("10.147.17.250")}}
		if _, err := st.ctl.CreateNetwork(rec); err != nil {
			t.Fatal(err)
		}
	}
	return st
}

func (st *stage) authorize(n vl2.NetworkID, name string, yes bool) {
	st.member(n, st.seats[name], func(m *controller.Member) { m.Authorized = yes })
}

func (st *stage) join(n vl2.NetworkID, name string) {
	if err := st.seats[name].layer.Join(nil, st.now, n, nil); err != nil {
		st.t.Fatal(err)
	}
}

// tick runs everybody's timers.
func (st *stage) tick() {
	st.ctl.Work(st.now)
	for _, s := range st.order {
		s.layer.Tick(nil, st.now)
		kept := s.kept
		s.kept = nil
		for _, q := range kept {
			s.handle(q)
		}
	}
	st.collect()
}

// collect notes what was sent and delivers nothing of it.
func (st *stage) collect() {
	for _, q := range st.queue {
		for _, x := range st.describe(q.from, q.to, q.p.Verb(), q.p.Payload()) {
			if strings.Contains(x, " LIKE ") {
				st.likes[x] = true
			} else {
				st.sent = append(st.sent, x)
			}
		}
	}
	st.queue = nil
}

var versions = regexp.MustCompile(`(?m)^(pv|majv|minv|revv)=.*\n`)

// describe says what a packet is, without what is random in it.
func (st *stage) describe(from, to identity.Address, v packet.Verb, b []byte) (out []string) {
	head := st.names[from] + ">" + st.names[to] + " "
	switch {
	case v == packet.VerbMulticastLike:
		for ; len(b) >= 18; b = b[18:] {
			out = append(out, fmt.Sprintf("%sLIKE %x", head, b[:18]))
		}
		return out
	case v == packet.VerbNetworkCredentials:
		list, err := vl2.ParseCredentials(b)
		if err != nil {
			st.t.Fatal(err)
		}
		for _, c := range list {
			if r, ok := c.(*vl2.Revocation); ok { // of our own controller: another number, time and signature
				out = append(out, fmt.Sprintf("%sREVOCATION %s of %s, type %d, flags %d", head, r.NetworkID, r.Target, r.Type, r.Flags))
			} else {
				out = append(out, fmt.Sprintf("%sCREDENTIAL %x", head, c.Append(nil)))
			}
		}
		return out
	case v == packet.VerbNetworkConfigRequest:
		n, meta, err := vl2.ParseConfigRequest(b)
		if err != nil {
			st.t.Fatal(err)
		}
		meta, _, _ = bytes.Cut(meta, []byte("\no=")) // the platform is free text
		meta = versions.ReplaceAll(meta, nil)        // the captured nodes are of an older release
		return []string{fmt.Sprintf("%sNETWORK_CONFIG_REQUEST %s %q", head, n, meta)}
	case v == packet.VerbNetworkConfig:
		return []string{fmt.Sprintf("%sCONFIG %x", head, b[:8])}
	case v == packet.VerbOK && b[0] == byte(packet.VerbNetworkConfigRequest):
		return []string{fmt.Sprintf("%sCONFIG %x in answer to %x", head, b[9:17], b[1:9])}
	}
	return []string{fmt.Sprintf("%s%s %x", head, v, b)}
}

// give hands a captured packet to the node it is for.
func (st *stage) give(p *vecPacket) {
	from, to := seatOf(st.t, st.board, p.Source), seatOf(st.t, st.board, p.Target)
	b := packet.Packet(append(make([]byte, packet.HeaderLen), p.Payload...))
	packet.PutHeader(b, p.id(st.t), to.address(), from.address(), p.Verb)
	to.handle(boardPacket{from.address(), to.address(), b})
	st.ctl.Work(st.now)
	st.collect()
}

// push gives a node the configuration that it is known to have acknowledged: most
// pushes are not in the files.
func (st *stage) push(ack *vecPacket) {
	n, update := vl2.NetworkIDFromBytes(ack.Payload[9:]), binary.BigEndian.Uint64(ack.Payload[17:])
	dict := st.dicts[ack.Source+n.String()]
	chunks, err := vl2.AppendChunks(st.seats["ctrl"].id, n, dict, update, 0)
	if err != nil {
		st.t.Fatal(err)
	}
	for i, b := range chunks {
		p := vecPacket{Source: st.seats["ctrl"].address().String(), Target: ack.Source, ID: fmt.Sprintf("%x", 0x1000+i), Verb: packet.VerbNetworkConfig, Payload: b}
		if i == len(chunks)-1 {
			p.ID = hex.EncodeToString(ack.Payload[1:9])
		}
		st.give(&p)
	}
}

// remember keeps the dictionary of a configuration that is one chunk.
func (st *stage) remember(member string, chunk []byte) {
	c, err := vl2.ParseChunk(chunk)
	if err != nil {
		st.t.Fatal(err)
	}
	st.dicts[member+c.Network.String()] = c.Data
}

// renew makes the configuration that a member would get at another time, or that
// another member would get.
func (st *stage) renew(dict []byte, member string, ts int64) []byte {
	cfg, err := vl2.DecodeNetworkConfig(dict)
	if err != nil {
		st.t.Fatal(err)
	}
	ctrl, holder := st.seats["ctrl"].id, seatOf(st.t, st.board, member)
	cfg.Member, cfg.Timestamp = holder.address(), ts
	if cfg.COM, err = vl2.NewCOM(ctrl, cfg.ID, holder.id.Public(), ts, cfg.TimeDelta); err != nil {
		st.t.Fatal(err)
	}
	for _, x := range cfg.COOs {
		x.IssuedTo, x.Timestamp = cfg.Member, ts
		if err := x.Sign(ctrl); err != nil {
			st.t.Fatal(err)
		}
	}
	return cfg.Encode()
}

// vecScene is one scene: what the hosts do, and where we are meant to differ.
type vecScene struct {
	label string
	do    func()
	// differ says why packets that begin so are sent by only one of the reference and us.
	differ map[string]string
	check  func()
}

// play plays a scene.
func (st *stage) play(c vecScene) {
	st.t.Helper()
	i := slices.IndexFunc(st.vec.Groups, func(g struct {
		Label   string      `json:"label"`
		Packets []vecPacket `json:"packets"`
	}) bool {
		return strings.HasPrefix(g.Label, c.label)
	})
	if i < 0 {
		st.t.Fatalf("no scene %q", c.label)
	}
	g := &st.vec.Groups[i]
	st.sent = nil
	begin := time.UnixMilli(g.Packets[0].Time)
	for _, s := range st.order {
		s.got = make(map[vl2.NetworkID][][]byte)
		if begin.Sub(st.now) >= 5*time.Second {
			s.kept = nil // the peer layer gives up
		}
	}
	st.now = begin
	if c.do != nil {
		c.do()
	}
	st.tick()
	var want []string
	for k := range g.Packets {
		p := &g.Packets[k]
		if at := time.UnixMilli(p.Time); at.After(st.now) {
			st.now = at
			st.tick()
		}
		if seatOf(st.t, st.board, p.Source) == st.seats[p.From] {
			for _, x := range st.describe(seatOf(st.t, st.board, p.Source).address(), seatOf(st.t, st.board, p.Target).address(), p.Verb, p.Payload) {
				if !strings.Contains(x, " LIKE ") {
					want = append(want, x)
				} else if !st.likes[x] {
					st.tick() // what is announced to who passed the gate comes with the timer
					if !st.likes[x] {
						st.t.Errorf("%s: not announced: %s", c.label, x)
					}
				}
			}
		}
		if seatOf(st.t, st.board, p.Target) != st.seats[p.To] {
			continue // on its way to the relay
		}
		inRe := ""
		if p.Verb == packet.VerbOK {
			inRe = hex.EncodeToString(p.Payload[1:9])
		}
		switch {
		case p.Verb == packet.VerbOK && p.Payload[0] == byte(packet.VerbEcho) &&
			!slices.ContainsFunc(g.Packets, func(q vecPacket) bool { return q.ID == inRe }):
			st.push(p)
		case p.Verb == packet.VerbOK && p.Payload[0] == byte(packet.VerbNetworkConfigRequest):
			st.remember(p.Target, p.Payload[9:])
		}
		st.give(p)
		for k := range st.configs { // the answers to requests are in the other file
			if x := &st.configs[k]; x.Request != nil && x.Request.ID == p.ID {
				st.dicts[p.Source+x.Network] = x.Dictionary
				for k := range x.Chunks {
					st.give(&x.Chunks[k])
				}
			}
		}
	}
	st.tick()
	slices.Sort(want)
	slices.Sort(st.sent)
	used := make(map[string]bool)
	report := func(what, x string) {
		for prefix := range c.differ {
			if strings.HasPrefix(x, prefix) {
				used[prefix] = true
				return
			}
		}
		st.t.Errorf("%s: %s: %.300s", c.label, what, x)
	}
	for a, b := want, st.sent; len(a) > 0 || len(b) > 0; {
		switch {
		case len(b) == 0 || len(a) > 0 && a[0] < b[0]:
			report("not sent", a[0])
			a = a[1:]
		case len(a) == 0 || b[0] < a[0]:
			report("sent in addition", b[0])
			b = b[1:]
		default:
			a, b = a[1:], b[1:]
		}
	}
	for prefix, why := range c.differ {
		if !used[prefix] {
			st.t.Errorf("%s: %q does not differ though %s", c.label, prefix, why)
		}
	}
	if c.check != nil {
		c.check()
	}
}

// delivered are the frames that the reference handed to a port.
func (st *stage) delivered(key string) (out []string) {
	list, _ := st.vec.Delivered[key].([]any)
	for _, x := range list {
		m := x.(map[string]any)
		out = append(out, fmt.Sprintf("%s%s%04x%s", m["dst_mac"], m["src_mac"], int(m["ethertype"].(float64)), m["payload"]))
	}
	return out
}

func (st *stage) frames(name string, n vl2.NetworkID) (out []string) {
	for _, f := range st.seats[name].got[n] {
		out = append(out, hex.EncodeToString(f))
	}
	return out
}

// payload returns the Ethernet payload of the n-th packet of a scene.
func (st *stage) payload(label string, v packet.Verb, skip int) []byte {
	for _, g := range st.vec.Groups {
		if !strings.HasPrefix(g.Label, label) {
			continue
		}
		for _, p := range g.Packets {
			if p.Verb == v {
				return p.Payload[skip:]
			}
		}
	}
	st.t.Fatalf("no %s in %q", v, label)
	return nil
}

// Where in a payload the Ethernet payload begins.
const (
	inFrame     = 8 + 2
	inMulticast = 8 + 1 + 4 + 6 + 4 + 2
)

// TestScenes plays every scene of vl2-packets.json.
func TestScenes(t *testing.T) {
	count := testvec.Count(t, "vl2-packets.json", "groups")
	t.Run("around a controller", func(t *testing.T) { testScenesAroundController(t, count) })
	t.Run("bridges and rules", func(t *testing.T) { testScenesOfFrames(t, count) })
}

func testScenesAroundController(t *testing.T, count *testvec.Tally) {
	st := newStage(t)
	alice, bob := st.seats["alice"], st.seats["bob"]
	status := func(s *seat, n vl2.NetworkID, want network.Status) func() {
		return func() {
			t.Helper()
			if got := s.status(n); got != want {
				t.Errorf("%s: %v, want %v", st.names[s.address()], got, want)
			}
		}
	}
	got := func(name string, want ...string) {
		t.Helper()
		if have := st.frames(name, vecOne); !slices.Equal(have, want) {
			t.Errorf("%s got %v, want %v", name, have, want)
		}
	}
	bobs := vl2.NetworkID(bob.address())<<24 | 1
	unicast := func(from, to *seat, label string) func() {
		return func() {
			from.write(vecOne, to.mac(vecOne), vl2.EtherTypeIPv4, st.payload(label, packet.VerbFrame, inFrame))
		}
	}
	broadcast := func(label string, etherType uint16) func() {
		return func() {
			alice.write(vecOne, vl2.BroadcastMAC, etherType, st.payload(label, packet.VerbMulticastFrame, inMulticast))
		}
	}
	framesAt := st.delivered("bob")
	const (
		elsewhere = "the configurations that the controller sent are in netconf.json, and TestConfigs of package controller compares them"
		proof     = "our certificate goes before the groups that are nothing without it, so that the next frame needs none"
		strict    = "a member that was put out neither sends nor accepts, and nothing is sent to it (chapter 03 §3.11, §3.12: SHOULD)"
		thrice    = "nobody acknowledges a revocation: our controller sends it three times (chapter 04 §11)"
	)
	compared := map[string]string{ // what the reference was observed to do, and why we differ
		"alice": "", "bob": "", "bob_missing_credentials_after_1500ms": "", "bob_status_after_deauthorisation": "", "alice_allows_bob": "",
		"bob_missing_credentials_immediately":        "a frame is retried at once when the certificate comes",
		"errors_sent_while_credentials_lost_over_7s": "one a second: TestStrangersAreBounded",
		"credential_pushes_attempted":                "one for each of the former",
		"large_push_receiver_capabilities":           "three packets are looked at, not one: TestCredentialRate",
		"large_push_receiver_tags":                   "the same",
		"bob_still_has_config":                       strict,
		"bob_allows_alice":                           strict,
	}
	for key := range st.vec.Delivered {
		if _, ok := compared[key]; !ok {
			t.Errorf("%q is not compared", key)
		}
	}
	for _, c := range []vecScene{
		{label: "join private network while not authorised", do: func() { st.join(vecOne, "alice") }, check: status(alice, vecOne, network.StatusAccessDenied)},
		{label: "join a network the controller does not have", do: func() { st.join(0x48ccec18eb00dead, "alice") },
			check: status(alice, 0x48ccec18eb00dead, network.StatusNotFound)},
		{label: "join a network whose controller address is a node without", do: func() {
			alice.layer.Leave(0x48ccec18eb00dead)
			st.join(bobs, "alice")
		}, check: status(alice, bobs, network.StatusNotFound)},
		{label: "request after authorisation", do: func() {
			alice.layer.Leave(bobs)
			st.authorize(vecOne, "alice", true)
		}, differ: map[string]string{"ctrl>alice CONFIG": elsewhere}, check: status(alice, vecOne, network.StatusOK)},
		{label: "alice subscribes to her ARP group"},
		{label: "bob joins (already authorised)", do: func() {
			st.authorize(vecOne, "bob", true)
			st.join(vecOne, "bob")
		}, differ: map[string]string{"ctrl>bob CONFIG 48ccec18eb000001": "our controller doesn't send a configuration twice"},
			check: status(bob, vecOne, network.StatusOK)},
		{label: "bob subscribes to two groups", do: func() {
			bob.layer.SetGroups(vecOne, []vl2.MulticastGroup{{MAC: vl2.MAC{1, 0, 0x5e, 0, 0, 1}}})
		}},
		{label: "alice: first ARP request for bob", do: broadcast("alice: first ARP request", vl2.EtherTypeARP),
			differ: map[string]string{"bob>alice CREDENTIAL": proof, "alice>bob ERROR": "the certificate is asked for that the captured announcement lacks"},
			check:  func() { got("bob", framesAt[0]) }},
		{label: "bob: unicast ARP reply", do: func() {
			bob.write(vecOne, alice.mac(vecOne), vl2.EtherTypeARP, st.payload("bob: unicast ARP reply", packet.VerbFrame, inFrame))
		}, differ: map[string]string{"bob>alice CREDENTIAL": proof}, check: func() { got("alice", st.delivered("alice")[0]) }},
		{label: "alice: first unicast IPv4 frame", do: unicast(alice, bob, "alice: first unicast IPv4"), check: func() { got("bob", framesAt[1]) }},
		{label: "bob: unicast IPv4 reply", do: unicast(bob, alice, "bob: unicast IPv4"), check: func() { got("alice", st.delivered("alice")[1]) }},
		{label: "alice: 2800 byte frame", do: unicast(alice, bob, "alice: 2800 byte frame"), check: func() {
			if have := st.frames("bob", vecOne); len(have) != 1 || len(have[0]) != 2*(14+2800) {
				t.Errorf("bob got %d frames", len(have))
			}
		}},
		{label: "peer has no credentials", do: func() {
			bob.layer.Forget(vecOne, alice.address())
			unicast(alice, bob, "peer has no credentials")()
		}, differ: map[string]string{"bob>alice CREDENTIAL": proof}, check: func() { got("bob", st.delivered("bob_missing_credentials_after_1500ms")...) }},
		{label: "alice: second ARP request", do: broadcast("alice: second ARP request", vl2.EtherTypeARP), check: func() {
			if len(st.frames("bob", vecOne)) != 1 {
				t.Error("bob did not get the request")
			}
		}},
		{label: "alice: broadcast frame", do: broadcast("alice: broadcast frame", vl2.EtherTypeIPv4), check: func() {
			if len(st.frames("bob", vecOne)) != 1 {
				t.Error("bob did not get the broadcast")
			}
		}},
		{label: "controller pushes a changed config", do: func() {
			st.dicts[alice.address().String()+vecOne.String()] = st.configs[1].Dictionary
			old := st.dicts[bob.address().String()+vecOne.String()]
			st.dicts[bob.address().String()+vecOne.String()] = st.renew(old, bob.address().String(), st.now.UnixMilli())
		}, check: func() {
			for _, s := range []*seat{alice, bob} {
				if ts := s.config(vecOne).Timestamp; ts != st.now.UnixMilli() {
					t.Errorf("%s: a configuration of %d", st.names[s.address()], ts)
				}
			}
		}},
		{label: "join network with routes, DNS", do: func() {
			st.authorize(vecTwo, "alice", true)
			st.join(vecTwo, "alice")
		}, differ: map[string]string{"ctrl>alice CONFIG": elsewhere}, check: func() {
			if c := alice.config(vecTwo); c == nil || !bytes.Equal(c.Encode(), mustDecode(t, st.configs[2].Dictionary).Encode()) {
				t.Error("not the configuration that was sent")
			}
		}},
		{label: "join network with a config of several chunks", do: func() {
			st.authorize(vecThree, "alice", true)
			st.join(vecThree, "alice")
		}, differ: map[string]string{"ctrl>alice CONFIG": elsewhere}, check: func() {
			if c := alice.config(vecThree); c == nil || !bytes.Equal(c.Encode(), mustDecode(t, st.configs[3].Dictionary).Encode()) {
				t.Error("not the configuration that was sent")
			}
		}},
		{label: "credential push too large for one packet", do: func() {
			ts := st.configs[3].Request.Time
			chunks, err := vl2.AppendChunks(st.seats["ctrl"].id, vecThree, st.renew(st.configs[3].Dictionary, bob.address().String(), ts), 99, 0)
			if err != nil {
				t.Fatal(err)
			}
			st.join(vecThree, "bob")
			for _, b := range chunks {
				st.give(&vecPacket{Source: st.seats["ctrl"].address().String(), Target: bob.address().String(), ID: "77", Verb: packet.VerbNetworkConfig, Payload: b})
			}
			st.queue, st.sent = nil, nil
			start := st.now
			alice.write(vecThree, bob.mac(vecThree), vl2.EtherTypeIPv4, frame) // the rules refuse it
			st.give(&vecPacket{Source: bob.address().String(), Target: alice.address().String(), ID: "78", Verb: packet.VerbError,
				Payload: vecThree.Append(append(make([]byte, 9), byte(packet.ErrorNeedMembershipCertificate)))})
			for range 8 { // ours are spaced, so that none is lost
				st.now = st.now.Add(500 * time.Millisecond)
				st.tick()
			}
			st.now = start
		}, check: func() {
			r := bob.layer.Record(vecThree, alice.address())
			if r == nil {
				t.Fatal("nothing known")
			}
			// The reference knows 14 and 18 of them then: it looks at the first packet only.
			caps, tags, own, hers := 0, 0, bob.config(vecThree), alice.config(vecThree)
			r.Capabilities(own, func(*vl2.Capability) bool { caps++; return true })
			for _, x := range hers.Tags {
				if v, ok := r.Tag(own, x.ID); ok && v == x.Value {
					tags++
				}
			}
			if caps != len(hers.Capabilities) || tags != len(hers.Tags) || caps == 0 || tags == 0 {
				t.Errorf("%d capabilities and %d tags of a push that was not spaced", caps, tags)
			}
		}},
		{label: "controller deauthorises bob", do: func() { st.authorize(vecOne, "bob", false) },
			differ: map[string]string{"bob>ctrl NETWORK_CONFIG_REQUEST": "who was put out asks at once whether that is so"}, check: func() {
				if !bob.layer.Record(vecOne, alice.address()).HasCOM() || !alice.layer.Record(vecOne, bob.address()).Revoked() {
					t.Error("bob isn't revoked at alice, or forgot her")
				}
			}},
		{label: "bob sends a frame after the revocation", do: unicast(bob, alice, "bob sends a frame after"),
			differ: map[string]string{"bob>alice": strict}, check: func() {
				got("alice")
				if r := alice.layer.Record(vecOne, bob.address()); !r.Revoked() || r.Agrees(alice.config(vecOne), bob.id.Public()) != st.vec.Delivered["alice_allows_bob"].(bool) {
					t.Error("the old certificate was taken again")
				}
			}},
		{label: "alice sends a frame to deauthorised bob", do: unicast(alice, bob, "alice sends a frame to"),
			differ: map[string]string{"alice>bob": strict}, check: func() { got("bob") }},
		{label: "bob's next config requests", do: func() { // the capture is of bob's network only
			for _, n := range []vl2.NetworkID{vecOne, vecTwo, vecThree} {
				alice.layer.Leave(n)
			}
			bob.layer.Leave(vecThree)
		}, differ: map[string]string{"bob>ctrl NETWORK_CONFIG_REQUEST": "after a minute of refusals we ask less often (chapter 03 §1.3: SHOULD)",
			"ctrl>alice REVOCATION": thrice, "ctrl>bob REVOCATION": thrice},
			check: func() {
				if got, want := int(bob.status(vecOne)), int(st.vec.Delivered["bob_status_after_deauthorisation"].(float64)); got != want {
					t.Errorf("bob's status is %d, want %d", got, want)
				}
			}},
	} {
		st.play(c)
		count.Judge()
	}
}

func mustDecode(t *testing.T, dict []byte) *vl2.NetworkConfig {
	c, err := vl2.DecodeNetworkConfig(dict)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
