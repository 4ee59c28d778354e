package network_test

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"ztgate/zerotier/controller"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/network"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
)

// A small organisation on our own root and controller.
func TestSite(t *testing.T) {
	b := newBoard(t, 3)
	x, y, z := b.order[1], b.order[2], b.order[3]
	n := b.create(nil)
	b.join(n, x, y, z)
	if atY, atX := b.talk(n, x, y); !atY || !atX {
		t.Fatalf("no traffic: %v %v", atY, atX)
	}
	b.talk(n, x, z)
	request := x.arp(t, n, z.ip4(t, n))
	x.write(n, vl2.BroadcastMAC, vl2.EtherTypeARP, request)
	b.run(time.Second, 250*time.Millisecond)
	if z.count(n, request) != 1 || y.count(n, request) != 0 {
		t.Errorf("ARP for Z: Z got %d, Y got %d", z.count(n, request), y.count(n, request))
	}

	// Out, and the others cut it off in both directions; X's addresses go.
	b.member(n, x, func(m *controller.Member) { m.Authorized = false })
	b.run(time.Second, 250*time.Millisecond)
	if got := x.status(n); got != network.StatusAccessDenied || x.config(n) != nil {
		t.Errorf("X is %v with %v", got, x.config(n))
	}
	for _, other := range []*seat{y, z} {
		if at, back := b.talk(n, x, other); at || back {
			t.Errorf("traffic after de-authorisation: %v %v", at, back)
		}
	}
	if at, back := b.talk(n, y, z); !at || !back {
		t.Error("the others can't talk any more")
	}

	// In again.
	b.member(n, x, func(m *controller.Member) { m.Authorized = true })
	b.run(3*time.Second, 250*time.Millisecond)
	b.talk(n, x, y)
	if at, back := b.talk(n, x, y); !at || !back {
		t.Errorf("no traffic after re-authorisation: %v %v", at, back)
	}

	// The controller forgets nothing by a restart and goes on with newer certificates.
	before := x.config(n).Timestamp
	b.startController(b.root)
	b.run(2*time.Minute, time.Second)
	if x.status(n) != network.StatusOK {
		t.Errorf("after the controller's restart: %v", x.status(n))
	} else if after := x.config(n).Timestamp; after <= before {
		t.Errorf("time stamps went back from %d to %d", before, after)
	}
}

func TestSeveralNetworks(t *testing.T) {
	b := newBoard(t, 2)
	x, y := b.order[1], b.order[2]
	var ids []vl2.NetworkID
	for i := range 3 {
		ids = append(ids, b.create(func(n *controller.Network) {
			n.Routes = []controller.Route{{Target: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(20 + i), 0, 0}), 16)}}
			n.IPAssignmentPools = []controller.Pool{{Start: netip.AddrFrom4([4]byte{10, byte(20 + i), 0, 1}), End: netip.AddrFrom4([4]byte{10, byte(20 + i), 0, 99})}}
			n.MTU = 1400 + i
		}))
	}
	for _, n := range ids {
		b.join(n, x, y)
	}
	for i, n := range ids {
		if got := x.ip4(t, n).As4(); got[1] != byte(20+i) || x.config(n).MTU != 1400+i {
			t.Errorf("network %d: %v", i, x.config(n).Addresses)
		}
		if at, back := b.talk(n, x, y); !at || !back {
			t.Errorf("network %d: no traffic", i)
		}
		for _, other := range ids {
			if other != n && len(y.got[other]) > 0 {
				t.Errorf("a frame of network %d turned up in another", i)
			}
		}
	}
	// Out of one, still in the others.
	b.member(ids[0], x, func(m *controller.Member) { m.Authorized = false })
	b.run(time.Second, 250*time.Millisecond)
	if at, back := b.talk(ids[0], x, y); at || back {
		t.Error("traffic in the network X was put out of")
	}
	if at, back := b.talk(ids[1], x, y); !at || !back {
		t.Error("no traffic in another network")
	}
	x.layer.Leave(ids[1])
	if _, back := b.talk(ids[1], y, x); back {
		t.Error("traffic in a network X left")
	}
	if at, back := b.talk(ids[2], x, y); !at || !back {
		t.Error("no traffic in the third network")
	}
}

func solicitation(from, target netip.Addr) []byte {
	d := make([]byte, 72)
	d[0], d[5], d[6], d[7] = 0x60, 32, 58, 255
	copy(d[8:], from.AsSlice())
	copy(d[24:], []byte{0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff})
	copy(d[37:], target.AsSlice()[13:])
	d[40] = 135
	copy(d[48:], target.AsSlice())
	return d
}

// 6PLANE and RFC 4193 addresses need no multicast to be found.
func TestComputedIPv6(t *testing.T) {
	b := newBoard(t, 2)
	x, y := b.order[1], b.order[2]
	n := b.create(func(n *controller.Network) {
		n.V6AssignMode.RFC4193, n.V6AssignMode.SixPlane, n.MulticastLimit = true, true, 0
	})
	b.join(n, x, y)
	inside := vl2.SixPlane(n, y.address()).Addr().As16()
	inside[15] = 77 // behind Y
	for _, target := range []netip.Addr{vl2.RFC4193(n, y.address()).Addr(), vl2.SixPlane(n, y.address()).Addr(), netip.AddrFrom16(inside)} {
		x.got = map[vl2.NetworkID][][]byte{}
		sent := b.sent
		mac := vl2.MAC{0x33, 0x33, 0xff, 1, 2, 3}
		if !x.write(n, mac, vl2.EtherTypeIPv6, solicitation(x.config(n).Addresses[0].Addr(), target)) {
			t.Fatal("not accepted")
		}
		if b.sent != sent {
			t.Error("something was sent")
		}
		b.run(time.Second, 250*time.Millisecond)
		if len(x.got[n]) != 1 {
			t.Fatalf("%s: %d answers", target, len(x.got[n]))
		}
		f := x.got[n][0]
		dst, src, mine, his := vl2.MAC(f[:6]), vl2.MAC(f[6:12]), x.mac(n), y.mac(n)
		if dst != mine || src != his || netip.AddrFrom16([16]byte(f[14+8:14+24])) != target || !bytes.Equal(f[14+66:14+72], his[:]) {
			t.Errorf("%s: answer %x", target, f)
		}
	}
}

// What the controller changes reaches members at once and disturbs nothing else.
func TestChangesAtRunTime(t *testing.T) {
	b := newBoard(t, 2)
	x, y := b.order[1], b.order[2]
	n := b.create(nil)
	b.join(n, x, y)
	b.talk(n, x, y)
	route := controller.Route{Target: netip.MustParsePrefix("192.168.7.0/24"), Via: y.ip4(t, n)}
	if _, err := b.ctl.UpdateNetwork(n, func(r *controller.Network) error {
		r.Routes = append(r.Routes, route)
		r.MTU, r.DNS = 1280, controller.DNS{Domain: "lab.example", Servers: []netip.Addr{netip.MustParseAddr("10.9.0.1")}}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	x.write(n, y.mac(n), vl2.EtherTypeIPv4, []byte("between"))
	b.run(time.Second, 100*time.Millisecond)
	for _, s := range []*seat{x, y} {
		c := s.config(n)
		if len(c.Routes) != 2 || c.Routes[1].Target != route.Target || c.Routes[1].Via != route.Via || c.MTU != 1280 || c.DNS.Domain != "lab.example" || len(c.DNS.Servers) != 1 {
			t.Errorf("%s has %+v", s.address(), c)
		}
	}
	if y.count(n, []byte("between")) != 1 {
		t.Error("a frame was lost by the change")
	}
	if at, back := b.talk(n, x, y); !at || !back {
		t.Error("no traffic after the change")
	}
	b.member(n, x, func(m *controller.Member) { m.IPAssignments = []netip.Addr{netip.MustParseAddr("10.9.3.3")} })
	b.run(time.Second, 100*time.Millisecond)
	if got := x.ip4(t, n); got != netip.MustParseAddr("10.9.3.3") {
		t.Errorf("X has %s", got)
	}
}

// TestChangesPutOffNoRequest: a reference controller tells changes to who has asked in the
// last two minutes, so a member whose configuration changes all the time goes on asking.
func TestChangesPutOffNoRequest(t *testing.T) {
	b := newBoard(t, 1)
	x := b.order[1]
	n := b.create(nil)
	b.join(n, x)
	requests := 0
	b.drop = func(from, _ identity.Address, v packet.Verb) bool {
		if from == x.address() && v == packet.VerbNetworkConfigRequest {
			requests++
		}
		return false
	}
	for i := range 6 {
		mtu := 1400 + i
		if _, err := b.ctl.UpdateNetwork(n, func(r *controller.Network) error { r.MTU = mtu; return nil }); err != nil {
			t.Fatal(err)
		}
		b.run(50*time.Second, 500*time.Millisecond)
		if got := x.config(n).MTU; got != mtu {
			t.Errorf("change %d: MTU %d", i, got)
		}
	}
	if requests < 4 || requests > 5 {
		t.Errorf("%d requests in five minutes", requests)
	}
}

func TestTagsFromSource(t *testing.T) {
	b := newBoard(t, 3)
	sales, eng, boss := b.order[1], b.order[2], b.order[3]
	n := b.create(func(n *controller.Network) {
		if err := n.Patch([]byte(`{"rulesSource":"tag dep id 7 enum 1 sales enum 2 eng; cap boss id 3 accept; ; accept teq dep sales; accept teq dep eng;"}`)); err != nil {
			t.Fatal(err)
		}
	})
	for i, s := range []*seat{sales, eng, boss} {
		b.member(n, s, func(m *controller.Member) { m.Tags = []controller.TagValue{{ID: 7, Value: uint32(i + 1)}} })
	}
	b.member(n, boss, func(m *controller.Member) { m.Capabilities = []uint32{3} })
	b.join(n, sales, eng, boss)
	b.talk(n, sales, eng) // credentials
	if at, back := b.talk(n, sales, eng); at || back {
		t.Errorf("departments talk: %v %v", at, back)
	}
	b.talk(n, boss, eng)
	if at, back := b.talk(n, boss, eng); !at || back {
		t.Errorf("boss to eng %v, back %v, want one way", at, back)
	}
	b.member(n, sales, func(m *controller.Member) { m.Tags = []controller.TagValue{{ID: 7, Value: 2}} })
	b.run(time.Second, 250*time.Millisecond)
	b.talk(n, sales, eng)
	if at, back := b.talk(n, sales, eng); !at || !back {
		t.Errorf("same department now: %v %v", at, back)
	}
}

// Sources that a member doesn't own are refused by the sender and by the receiver,
// in IPv4, ARP, IPv6 and neighbour discovery.
func TestOwnershipOfSources(t *testing.T) {
	b := newBoard(t, 2)
	x, y := b.order[1], b.order[2]
	n := b.create(func(n *controller.Network) {
		n.Routes = append(n.Routes, controller.Route{Target: netip.MustParsePrefix("fd77::/64")})
		if err := n.Patch([]byte(`{"rulesSource":"drop not chr ipauth; accept;"}`)); err != nil {
			t.Fatal(err)
		}
	})
	mine6, other6 := netip.MustParseAddr("fd77::1"), netip.MustParseAddr("fd77::2")
	b.member(n, x, func(m *controller.Member) { m.IPAssignments = []netip.Addr{netip.MustParseAddr("10.9.0.7"), mine6} })
	b.join(n, x, y)
	y.write(n, x.mac(n), vl2.EtherTypeARP, y.arp(t, n, x.ip4(t, n))) // acquaintance
	x.write(n, y.mac(n), vl2.EtherTypeARP, x.arp(t, n, y.ip4(t, n)))
	b.run(time.Second, 250*time.Millisecond)

	ipv4 := func(from netip.Addr) []byte {
		d := make([]byte, 40)
		d[0], d[9] = 0x45, 17
		copy(d[12:], from.AsSlice())
		return d
	}
	arp := func(from netip.Addr) []byte {
		d := x.arp(t, n, y.ip4(t, n))
		copy(d[14:], from.AsSlice())
		return d
	}
	ipv6 := func(from netip.Addr) []byte {
		d := make([]byte, 48)
		d[0], d[6] = 0x60, 17
		copy(d[8:], from.AsSlice())
		return d
	}
	advert := func(from netip.Addr) []byte {
		d := solicitation(mine6, from)
		d[40] = 136
		return d
	}
	mine4, other4 := x.ip4(t, n), netip.MustParseAddr("10.9.0.9")
	for _, tt := range []struct {
		name      string
		etherType uint16
		data      []byte
		ok        bool
	}{
		{"IPv4", vl2.EtherTypeIPv4, ipv4(mine4), true}, {"spoofed IPv4", vl2.EtherTypeIPv4, ipv4(other4), false},
		{"ARP", vl2.EtherTypeARP, arp(mine4), true}, {"spoofed ARP", vl2.EtherTypeARP, arp(other4), false},
		{"IPv6", vl2.EtherTypeIPv6, ipv6(mine6), true}, {"spoofed IPv6", vl2.EtherTypeIPv6, ipv6(other6), false},
		{"advertisement", vl2.EtherTypeIPv6, advert(mine6), true}, {"spoofed advertisement", vl2.EtherTypeIPv6, advert(other6), false},
	} {
		y.got = map[vl2.NetworkID][][]byte{}
		if got := x.write(n, y.mac(n), tt.etherType, tt.data); got != tt.ok {
			t.Errorf("%s: sent %v", tt.name, got)
		}
		b.run(500*time.Millisecond, 250*time.Millisecond)
		y.got = map[vl2.NetworkID][][]byte{}
		x.put(y.address(), packet.VerbFrame, append(binary.BigEndian.AppendUint16(n.Append(nil), tt.etherType), tt.data...)) // past X's own filter
		b.run(500*time.Millisecond, 250*time.Millisecond)
		if got := y.count(n, tt.data) > 0; got != tt.ok {
			t.Errorf("%s: received %v", tt.name, got)
		}
	}
}

// 500 members look for each other all at once.
func TestStormOf500Members(t *testing.T) {
	const each = 5
	members := 500
	if testing.Short() {
		members = 100
	}
	b := newBoard(t, members)
	n := b.create(func(n *controller.Network) {
		if err := n.Patch([]byte(`{"rulesSource":"drop not ethertype ipv4 and not ethertype arp and not ethertype ipv6; accept;"}`)); err != nil {
			t.Fatal(err)
		}
	})
	all := b.order[1:]
	b.join(n, all...)
	seen := make(map[netip.Addr]bool)
	for _, s := range all {
		if a := s.ip4(t, n); seen[a] {
			t.Fatalf("%s was given twice", a)
		} else {
			seen[a] = true
		}
	}
	b.run(6*time.Second, time.Second) // all have announced their groups
	type wait struct {
		at   *seat
		data []byte
	}
	var requests []wait
	for i, s := range all {
		for j := range each {
			to := all[(i+1+j*97)%members]
			data := s.arp(t, n, to.ip4(t, n))
			s.write(n, vl2.BroadcastMAC, vl2.EtherTypeARP, data)
			requests = append(requests, wait{to, data})
		}
	}
	b.run(2*time.Second, 250*time.Millisecond)
	lost, twice := 0, 0
	for _, r := range requests {
		switch got := r.at.count(n, r.data); {
		case got == 0:
			lost++
		case got > 1:
			twice++
		}
	}
	if lost > 0 || twice > 0 {
		t.Errorf("of %d requests %d were lost and %d came more than once", len(requests), lost, twice)
	}
	total := 0
	for _, s := range all {
		total += len(s.got[n])
	}
	if total != len(requests) {
		t.Errorf("%d frames for %d requests: others got some", total, len(requests))
	}
	for _, s := range b.order {
		if st := s.layer.Stats(); st.RefusedRecords != 0 || st.GatherFlood != 0 || st.CredentialFlood != 0 {
			t.Errorf("%s refused: %+v", s.address(), st)
		}
	}
}

// A day in which members come and go leaves nothing behind.
func TestDayWithoutLeak(t *testing.T) {
	const members = 3
	b := newBoard(t, members)
	n := b.create(nil)
	all := b.order[1:]
	b.join(n, all...)
	measure := func() []int {
		var out []int
		for _, s := range b.order {
			c := s.layer.Tables()
			out = append(out, c.Members, c.Groups, c.Memberships, c.Waiting, c.Bridges, c.Pending)
		}
		return out
	}
	hour := func(i int) {
		for j := range 12 {
			x, y := all[(i+j)%members], all[(i+j+1)%members]
			x.write(n, y.mac(n), vl2.EtherTypeIPv4, frame)
			x.write(n, vl2.BroadcastMAC, vl2.EtherTypeARP, x.arp(t, n, netip.AddrFrom4([4]byte{10, 9, byte(i), byte(j)}))) // nobody
			b.run(5*time.Minute, 5*time.Second)
		}
		for _, s := range b.order {
			s.got = map[vl2.NetworkID][][]byte{}
		}
	}
	hour(0)
	early := measure()
	hours := 24
	if testing.Short() {
		hours = 3
	}
	for i := 1; i < hours; i++ {
		hour(i)
	}
	b.run(20*time.Minute, 5*time.Second)
	for i, v := range measure() {
		if v > early[i]+8 {
			t.Errorf("table %d of node %d grew from %d to %d", i%6, i/6, early[i], v)
		}
	}
	if at, back := b.talk(n, all[0], all[2]); !at || !back {
		t.Errorf("no traffic after a day: %v %v", at, back)
	}
	if got := len(b.ctl.Members(n)); got != members {
		t.Errorf("%d member records", got)
	}
}

// A member can't fill the tables of a node that keeps groups for others.
func TestGroupsAreBoundedPerNode(t *testing.T) {
	b := newBoard(t, 2)
	x := b.order[1]
	n := b.create(nil)
	b.join(n, x)
	for i := range 40 {
		var list []byte
		for j := range 500 {
			k := i*500 + j
			list = append(n.Append(list), 0x33, 0x33, 1, byte(k>>16), byte(k>>8), byte(k), 0, 0, 0, 0)
		}
		x.put(b.root.address(), packet.VerbMulticastLike, list)
	}
	b.settle()
	if c := b.root.layer.Tables(); c.Memberships > 4096+10 || b.root.layer.Stats().RefusedRecords == 0 {
		t.Errorf("one node has %d registrations: %+v", c.Memberships, b.root.layer.Stats())
	}
	b.run(11*time.Minute, 5*time.Second)
	if c := b.root.layer.Tables(); c.Memberships > 10 {
		t.Errorf("%d registrations after they expired", c.Memberships)
	}
}

// More members than records: the revoked are not forgotten, the idle are.
func TestRecordsAreBounded(t *testing.T) {
	b := newBoard(t, 3)
	x, y := b.order[1], b.order[2]
	n := b.create(func(n *controller.Network) { n.Private = false })
	b.join(n, x, y)
	b.talk(n, x, y)
	for i := range 10100 {
		mac := vl2.MACOf(n, 0x0b00000000+identity.Address(i))
		x.write(n, mac, vl2.EtherTypeIPv4, frame)
		b.queue = b.queue[:0]
	}
	if c := x.layer.Tables(); c.Members > 10000 || x.layer.Stats().EvictedRecords == 0 {
		t.Errorf("%d records, %+v", c.Members, x.layer.Stats())
	}
	if at, back := b.talk(n, x, y); !at || !back {
		t.Error("no traffic with a full table")
	}
}

// What one node makes another do has a rate: answers to gathers, copies of its multicasts,
// and copies of its frames that rules order. Hosts behind bridges have a bound.
func TestNodesAreLimited(t *testing.T) {
	b := newBoard(t, 3)
	x, y := b.order[1], b.order[2]
	tee := append(binary.BigEndian.AppendUint64(nil, uint64(y.address())), 0, 0, 0, 0, 0, 10)
	n := b.create(func(n *controller.Network) {
		n.Rules = []vl2.Rule{{Type: vl2.ActionTee, Field: tee}, {Type: vl2.ActionAccept}}
	})
	b.join(n, x, y)
	b.talk(n, x, y)
	group := vl2.MulticastGroup{MAC: vl2.BroadcastMAC}
	const tries = 8192
	before := x.layer.Stats()
	for range tries {
		x.write(n, vl2.MACOf(n, b.root.address()), vl2.EtherTypeIPv4, frame)
		b.queue = b.queue[:0]
	}
	after := x.layer.Stats()
	if got := after.Diverted - before.Diverted; got > 4096 || got < 4000 || after.DivertsRefused-before.DivertsRefused != tries-got {
		t.Errorf("%d of %d copies sent at once, want 4,096", got, tries)
	}
	before = b.root.layer.Stats()
	for range tries {
		x.put(b.root.address(), packet.VerbMulticastGather, vl2.AppendGather(nil, n, group, 10, nil))
		b.settle()
	}
	if got := tries - int(b.root.layer.Stats().GatherFlood-before.GatherFlood); got > 400 || got < 300 {
		t.Errorf("%d of %d gathers answered at once, want 400", got, tries)
	}
	before = y.layer.Stats()
	for range tries {
		y.layer.Replicate(n, x.address(), &vl2.MulticastFrame{Group: group, EtherType: vl2.EtherTypeIPv4, Data: frame}, b.now)
		b.queue = b.queue[:0]
	}
	if got := tries - int(y.layer.Stats().GatherFlood-before.GatherFlood); got > 1000 || got < 900 {
		t.Errorf("%d of %d multicasts replicated at once, want 1,000", got, tries)
	}
	host := func(i int) vl2.MAC { return vl2.MAC{0x52, 0, 0, byte(i >> 16), byte(i >> 8), byte(i)} }
	behind := 0
	for i := range 20000 {
		x.layer.LearnBridge(n, host(i), y.address(), b.now)
		behind = x.layer.LearnBehind(n, vl2.MulticastGroup{MAC: host(i)}, b.now)
	}
	if c := x.layer.Tables(); c.Bridges != 16384 || behind != 1024 {
		t.Errorf("%d routes to hosts behind bridges, %d groups of hosts behind us; want 16,384 and 1,024", c.Bridges, behind)
	}
}

func TestAdHocIPv6(t *testing.T) {
	b := newBoard(t, 2)
	x, y := b.order[1], b.order[2]
	for _, id := range []vl2.NetworkID{0xff00160020000000, 0xff0a000000000001} {
		for _, s := range []*seat{x, y} {
			if err := s.layer.Join(nil, b.now, id, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	id := vl2.NetworkID(0xff00160020000000)
	if x.status(id) != network.StatusOK || x.config(id).Addresses[0] != vl2.SixPlane(id, x.address()) {
		t.Fatalf("%v %+v", x.status(id), x.config(id))
	}
	udp := func(port uint16, tcp bool) []byte {
		d := make([]byte, 60+int(port&1)) // differ
		d[0], d[6] = 0x60, 17
		if tcp {
			d[6], d[53] = 6, 2 // SYN
		}
		binary.BigEndian.PutUint16(d[42:], port)
		return d
	}
	for _, tt := range []struct {
		data []byte
		ok   bool
	}{{udp(0x18, true), true}, {udp(0x15, true), false}, {udp(0x21, true), false}} {
		if got := x.write(id, y.mac(id), vl2.EtherTypeIPv6, tt.data); got != tt.ok {
			t.Errorf("port %x sent: %v", tt.data[42:44], got)
		}
		x.put(y.address(), packet.VerbFrame, append(append(id.Append(nil), 0x86, 0xdd), tt.data...))
		b.settle()
		if got := y.count(id, tt.data) > 0; got != tt.ok {
			t.Errorf("port %x received: %v", tt.data[42:44], got)
		}
	}
	for _, bad := range []vl2.NetworkID{0xff00200016000000, 0xff00000000000005} {
		if err := x.layer.Join(nil, b.now, bad, nil); err != nil {
			t.Fatal(err)
		}
	}
	if got := x.status(0xff00200016000000); got != network.StatusNotFound {
		t.Errorf("a reversed range: %v", got)
	}
	if got := x.status(0xff00000000000005); got != network.StatusRequesting {
		t.Errorf("an unknown form: %v", got)
	}
	b.drop = func(_, to identity.Address, _ packet.Verb) bool {
		if to.Reserved() {
			t.Errorf("something was sent to %s", to)
		}
		return false
	}
	b.run(2*time.Minute, time.Second)
}

// A login that is needed is shown with its address, and nothing passes.
func TestLoginNeeded(t *testing.T) {
	b := newBoard(t, 1)
	x := b.order[1]
	n := b.create(func(n *controller.Network) { n.SSOEnabled = true })
	b.member(n, x, func(m *controller.Member) { m.Authorized = true })
	if err := x.layer.Join(nil, b.now, n, nil); err != nil {
		t.Fatal(err)
	}
	b.run(3*time.Second, 500*time.Millisecond)
	if got := x.status(n); got != network.StatusAuthenticationRequired {
		t.Fatalf("status %v", got)
	}
	b.member(n, x, func(m *controller.Member) { m.AuthenticationExpiryTime = b.now.Add(time.Hour).UnixMilli() })
	b.run(12*time.Second, 500*time.Millisecond)
	if got := x.status(n); got != network.StatusOK {
		t.Fatalf("status %v after the login", got)
	}
	b.run(65*time.Minute, 5*time.Second)
	if got := x.status(n); got != network.StatusAuthenticationRequired || x.config(n) != nil {
		t.Errorf("status %v when the login ran out", got)
	}
}

// FuzzMember throws packets of members, strangers, the root and the controller at a
// node: nothing may panic, tables stay in their bounds, and a good member is still
// served afterwards.
func FuzzMember(f *testing.F) {
	b := newBoard(f, 3)
	x, y, stranger := b.order[1], b.order[2], b.order[3]
	n := b.create(func(n *controller.Network) { n.V6AssignMode.SixPlane = true })
	b.join(n, x, y)
	b.talk(n, x, y)
	senders := []*seat{y, stranger, b.root}
	verbs := []packet.Verb{packet.VerbFrame, packet.VerbExtFrame, packet.VerbMulticastFrame, packet.VerbMulticastLike, packet.VerbMulticastGather,
		packet.VerbNetworkCredentials, packet.VerbNetworkConfigRequest, packet.VerbNetworkConfig, packet.VerbOK, packet.VerbError}
	for i := range verbs {
		f.Add([]byte{byte(i), 40, 0, 0, 0, 0, 0, 0, 0, 1, 8, 0, 1, 2, 3})
	}
	com := vl2.AppendCredentials(nil, y.config(n).COM)
	f.Add(append([]byte{5, 0xff, byte(len(com) >> 8), byte(len(com))}, com...))
	f.Fuzz(func(t *testing.T, script []byte) {
		for steps := 0; len(script) >= 3 && steps < 16; steps++ {
			verb, flags, size := verbs[int(script[0])%len(verbs)], script[1], int(script[2])
			script = script[3:]
			payload := script[:min(size, len(script))]
			script = script[len(payload):]
			if flags&4 == 0 {
				payload = append(n.Append(nil), payload...)
			}
			if flags&8 != 0 {
				payload = append([]byte{byte(packet.VerbNetworkConfigRequest), 0, 0, 0, 0, 0, 0, 0, 0}, payload...)
			}
			senders[int(flags&3)%len(senders)].put(x.address(), verb, payload)
			b.settle()
			if flags&0x80 != 0 {
				b.run(time.Second, 500*time.Millisecond)
			}
		}
		c := x.layer.Tables()
		if c.Members > 10 || c.Memberships > 4200 || c.Waiting > 1024 {
			t.Fatalf("tables grew: %+v", c)
		}
		x.got, y.got = map[vl2.NetworkID][][]byte{}, map[vl2.NetworkID][][]byte{}
		if x.status(n) != network.StatusOK {
			b.run(70*time.Second, 500*time.Millisecond)
		}
		b.talk(n, x, y)
		if at, back := b.talk(n, x, y); !at || !back {
			t.Fatalf("no traffic afterwards: %v %v, %v", at, back, x.status(n))
		}
	})
}
