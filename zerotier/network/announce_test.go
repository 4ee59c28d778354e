package network_test

import (
	"net/netip"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/network"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/simnet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// arpGroup is where others look for a host's address.
func arpGroup(h *host) vl2.MulticastGroup { return vl2.ResolutionGroup(ipOf(h.id.Address())) }

// knows reports whether a node keeps another one in the group for its address.
func (h *host) knows(id vl2.NetworkID, of *host) bool {
	return h.layer.InGroup(id, arpGroup(of), of.id.Address())
}

func from(h *host, ep netip.AddrPort) bool { return h.port.Endpoints()[0] == ep }

// Lengths of sealed packets by which these tests tell them apart.
const (
	likeLen = packet.HeaderLen + 18 // MULTICAST_LIKE of one group, or shorter than what follows
	credLen = 150                   // NETWORK_CREDENTIALS are longer
)

// Announcements overtake the certificate without which they are ignored: the member
// is in its groups soon all the same, whether it is asked for its certificate or,
// as by the reference, is not.
func TestAnnouncementOvertakesCertificate(t *testing.T) {
	for name, simple := range map[string]bool{"asked": false, "not asked": true} {
		t.Run(name, func(t *testing.T) {
			n, r, a, b, id := up(t)
			r.ctl.config = func(c *vl2.NetworkConfig) { c.Flags = 0 } // one group each
			talk(n, a, b, id)
			n.Run(65 * time.Second)
			if !a.direct(b) || !b.direct(a) {
				t.Fatal("not in direct contact")
			}
			n.Delay = func(f, to netip.AddrPort, d []byte) time.Duration {
				if from(a, f) && from(b, to) && len(d) >= credLen {
					return time.Second
				}
				return 0
			}
			b.simple = simple
			a.layer.Forget(id, b.id.Address())
			b.layer.Forget(id, a.id.Address())
			b.layer.Unregister(id, arpGroup(a), a.id.Address())
			// B shows its certificate, so that A announces its groups to it.
			b.write(n, id, vl2.MACOf(id, a.id.Address()), vl2.EtherTypeIPv4, frame)
			if !n.RunUntil(6*time.Second, func() bool { return b.knows(id, a) }) {
				t.Error("A isn't in its group at B after 6 s")
			}
		})
	}
}

// A member that sends its groups and then its certificate, as the reference may, has
// them registered; the certificate is asked for at most once a second, and of the
// revoked not at all.
func TestAnnouncementIsKept(t *testing.T) {
	n, r, a, b, id := up(t)
	n.Run(2 * time.Second)
	b.layer.Forget(id, a.id.Address())
	s, _ := a.layer.Network(id)
	group := vl2.MulticastGroup{MAC: vl2.MAC{1, 0, 0x5e, 1, 2, 3}}
	like := group.Append(id.Append(nil))
	asked := func() (n int) {
		for _, x := range b.peers.replies {
			if x[:5] == "ERROR" {
				n++
			}
		}
		return n
	}
	b.peers.replies = nil
	certificate := true
	n.Drop = func(f, to netip.AddrPort, d []byte) bool { return from(a, f) && (len(d) >= credLen) == certificate }
	a.send(n, b, packet.VerbMulticastLike, like)
	n.Run(200 * time.Millisecond)
	if b.layer.InGroup(id, group, a.id.Address()) {
		t.Fatal("registered without a certificate")
	}
	if got := asked(); got != 1 {
		t.Errorf("asked %d times for the certificate", got)
	}
	certificate = false // now that is lost what would repeat the announcement
	a.send(n, b, packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, s.Config.COM))
	n.Run(time.Second)
	if !b.layer.InGroup(id, group, a.id.Address()) {
		t.Error("not registered when the certificate came")
	}
	n.Drop = nil

	r.ctl.revoke = append(r.ctl.revoke, a.id.Address())
	n.Run(3 * time.Second)
	b.peers.replies = nil
	for range 20 {
		a.send(n, b, packet.VerbMulticastLike, like)
		n.Run(100 * time.Millisecond)
	}
	if got := asked(); got != 0 {
		t.Errorf("a revoked member was asked %d times", got)
	}
}

// A member that was started anew, and asks for a certificate when a frame comes, is
// told the groups again.
func TestRestartedMemberLearnsGroups(t *testing.T) {
	n, _, a, b, id := up(t)
	talk(n, a, b, id)
	n.Run(10 * time.Second)
	if !b.knows(id, a) {
		t.Fatal("B doesn't know A's groups")
	}
	b.simple = true
	b.layer.Forget(id, a.id.Address())
	b.layer.Unregister(id, arpGroup(a), a.id.Address())
	a.write(n, id, vl2.MACOf(id, b.id.Address()), vl2.EtherTypeIPv4, frame)
	if !n.RunUntil(6*time.Second, func() bool { return b.knows(id, a) }) {
		t.Error("B doesn't know A's groups 6 s after a frame")
	}
}

// A flood of requests for our certificate does not make us flood.
func TestAnnouncementsAreBounded(t *testing.T) {
	n, r, a, b, id := up(t)
	r.ctl.config = func(c *vl2.NetworkConfig) { c.Flags = 0 }
	talk(n, a, b, id)
	n.Run(65 * time.Second)
	likes := 0
	n.Seen = func(f, to netip.AddrPort, d []byte) {
		if from(a, f) && from(b, to) && len(d) == likeLen {
			likes++
		}
	}
	const seconds = 60
	for range seconds * 20 {
		b.send(n, a, packet.VerbError, id.Append(append(make([]byte, 9), byte(packet.ErrorNeedMembershipCertificate))))
		n.Run(time.Second / 20)
	}
	if likes > seconds/5+3 {
		t.Errorf("%d announcements in %d s", likes, seconds)
	}
	likes = 0
	n.Run(5 * time.Minute)
	if likes > 6 {
		t.Errorf("%d announcements in five quiet minutes", likes)
	}
}

// A root that was started anew gets the groups at once, and so does one that could not
// be reached at first.
func TestRootLearnsGroupsAgain(t *testing.T) {
	n, r, a, b, id := up(t)
	n.Run(5 * time.Second)
	if !r.knows(id, a) || !r.knows(id, b) {
		t.Fatal("the root doesn't know the groups")
	}
	planet := a.core.Planet()
	sock := r.port.Endpoints()[0]
	n.Detach(r.port)
	n.Run(30 * time.Second)
	ctl := &authority{n: id, authorized: r.ctl.authorized, members: r.ctl.members}
	r = newHost(t, n, r.id, planet, ctl, sock)
	if !n.RunUntil(15*time.Second, func() bool { return r.knows(id, a) && r.knows(id, b) }) {
		t.Error("15 s after the root's restart it doesn't know the groups")
	}
	// A member starts from its cache while the root can't be reached.
	s, _ := a.layer.Network(id)
	at := a.port.Endpoints()[0]
	n.Detach(a.port)
	n.Drop = func(f, to netip.AddrPort, _ []byte) bool { return f == sock || to == sock }
	a2 := newHost(t, n, a.id, planet, nil, at)
	if err := a2.layer.Join(a2.port, n.Now, id, s.Config); err != nil {
		t.Fatal(err)
	}
	n.Run(11 * time.Minute) // what was known is forgotten
	if r.knows(id, a2) || a2.status(id) != network.StatusOK {
		t.Fatal("the root knows a member it can't hear, or that isn't up")
	}
	n.Drop = nil
	if !n.RunUntil(15*time.Second, func() bool { return r.knows(id, a2) }) {
		t.Error("15 s after the root came back it doesn't know the member's groups")
	}
}

// An anchor, a network relay or a replicator is kept in contact without traffic, and told the groups
// together with the certificate that it wants to see.
func TestSpecialistsAreKeptInContact(t *testing.T) {
	for name, role := range map[string]uint64{"anchor": vl2.RoleAnchor, "relay": vl2.RoleRelay, "replicator": vl2.RoleReplicator} {
		t.Run(name, func(t *testing.T) {
			n, r, a, b, id := lab(t)
			r.ctl.authorized[a.id.Address()], r.ctl.authorized[b.id.Address()] = true, true
			r.ctl.config = func(c *vl2.NetworkConfig) {
				c.Specialists = []vl2.Specialist{{Address: b.id.Address(), Roles: role}}
			}
			b.simple = true
			b.join(t, n, id)
			a.join(t, n, id)
			if !n.RunUntil(40*time.Second, func() bool { return a.direct(b) && b.knows(id, a) }) {
				t.Fatalf("direct %v, in its groups %v", a.direct(b), b.knows(id, a))
			}
			for range 20 {
				n.Run(30 * time.Second)
				if !a.direct(b) || !b.knows(id, a) {
					t.Fatalf("contact lost: direct %v, in its groups %v", a.direct(b), b.knows(id, a))
				}
			}
			// It is asked for members of groups.
			got, request := 0, arp(a, id, netip.MustParseAddr("10.0.0.77"))
			b.got = nil
			n.Seen = func(f, to netip.AddrPort, d []byte) {
				if from(a, f) && from(b, to) && len(d) > credLen {
					got++
				}
			}
			a.write(n, id, vl2.BroadcastMAC, vl2.EtherTypeARP, request)
			n.Run(time.Second)
			if got == 0 && role != vl2.RoleReplicator {
				t.Error("not asked who is in a group")
			}
			if b.count(request) == 0 && role == vl2.RoleReplicator {
				t.Error("not given the request to replicate")
			}
			n.Seen = nil
			r.ctl.config = nil
			n.Run(11 * time.Minute)
			if !n.RunUntil(time.Minute, func() bool { return !a.direct(b) }) { // they still exchange groups now and then
				t.Error("kept in contact though no network wants it")
			}
		})
	}
}

// A controller that names many nodes that nobody knows makes members ask and send little.
func TestManySpecialists(t *testing.T) {
	n, r, a, b, id := lab(t)
	r.ctl.authorized[a.id.Address()], r.ctl.authorized[b.id.Address()] = true, true
	for _, many := range []bool{false, true} {
		r.ctl.config = func(c *vl2.NetworkConfig) {
			for i := range vl2.MaxSpecialists {
				c.Specialists = append(c.Specialists, vl2.Specialist{Address: identity.Address(0x1000000000 + i), Roles: vl2.RoleRelay | vl2.RoleReplicator | vl2.RoleBridge})
			}
			if !many {
				c.Specialists = nil
			}
		}
		a.join(t, n, id)
		n.Run(2 * time.Minute) // the configuration is renewed
		sent, most := 0, 0
		n.Seen = func(f, _ netip.AddrPort, d []byte) {
			if from(a, f) {
				sent += len(d)
			}
		}
		for range 60 {
			before := sent
			a.write(n, id, vl2.BroadcastMAC, vl2.EtherTypeARP, arp(a, id, netip.MustParseAddr("10.0.0.77")))
			n.Run(time.Second)
			most = max(most, sent-before)
		}
		n.Seen = nil
		t.Logf("%v: %d bytes in a minute, %d in a second", many, sent, most)
		if sent > 250_000 || most > 20_000 {
			t.Errorf("%d bytes in a minute, %d in a second", sent, most)
		}
	}
}

// All bridges get a multicast, and besides as many members as the limit allows; once many bytes
// went to bridges in a short time they count like others.
func TestBridgesAndTheLimit(t *testing.T) {
	n, r, a, b, id := lab(t)
	c := newHost(t, n, testIDs(t)[3], &vl1.World{ID: 1, Timestamp: 1, Roots: []vl1.Root{{Identity: testIDs(t)[0].Public(), Endpoints: []netip.AddrPort{ap("203.0.113.1:9993")}}}}, nil, ap("203.0.113.4:9993"))
	r.ctl.config = func(cfg *vl2.NetworkConfig) {
		cfg.MulticastLimit = 1
		cfg.Flags |= vl2.FlagBroadcast
		cfg.Specialists = []vl2.Specialist{{Address: b.id.Address(), Roles: vl2.RoleBridge}}
	}
	for _, h := range []*host{a, b, c} {
		r.ctl.authorized[h.id.Address()] = true
		h.join(t, n, id)
	}
	send := func(count, size int) (toB, toC int) {
		b.got, c.got = nil, nil
		frame := make([]byte, size)
		for range count {
			a.write(n, id, vl2.BroadcastMAC, 0x88b5, frame)
		}
		n.Run(time.Second)
		return b.count(frame), c.count(frame)
	}
	if !n.RunUntil(30*time.Second, func() bool {
		b, c := send(1, 64)
		return b == 1 && c == 1
	}) {
		t.Fatal("bridge and member don't both get a multicast")
	}
	if b, c := send(1500, 1400); b != 1500 || c > 1000 {
		t.Errorf("of 1,500 large multicasts the bridge got %d, and the member %d", b, c)
	}
}

// direct reports whether there is a direct path to another node.
func (h *host) direct(to *host) bool {
	for _, p := range h.core.Peers() {
		if p.Address == to.id.Address() {
			return !p.Relayed
		}
	}
	return false
}

// A member in low-bandwidth mode speaks far less by itself, and stays a member that
// others find and hear.
func TestLowBandwidth(t *testing.T) {
	ids := testIDs(t)
	n := simnet.New()
	planet := &vl1.World{ID: 1, Timestamp: 1, Roots: []vl1.Root{{Identity: ids[0].Public(), Endpoints: []netip.AddrPort{ap("203.0.113.1:9993")}}}}
	id := vl2.NetworkID(ids[0].Address())<<24 | 0x1
	ctl := &authority{n: id, authorized: map[identity.Address]bool{ids[1].Address(): true, ids[2].Address(): true},
		asked: make(map[identity.Address]int), members: make(map[identity.Address]bool)}
	newHost(t, n, ids[0], planet, ctl, ap("203.0.113.1:9993"))
	a := newHost(t, n, ids[1], planet, nil, ap("203.0.113.2:9993"), func(c *network.Config) { c.LowBandwidth = true })
	b := newHost(t, n, ids[2], planet, nil, ap("203.0.113.3:9993"))
	a.join(t, n, id)
	b.join(t, n, id)
	n.Run(10 * time.Second)
	for i := range 18 {
		n.Run(10 * time.Minute)
		if toB, toA := talk(n, a, b, id); !toA || !toB {
			t.Fatalf("after %d0 min: frames arrived at B %v, at A %v", i+1, toB, toA)
		}
		if !b.knows(id, a) {
			t.Errorf("after %d0 min A isn't in its group at B", i+1)
		}
	}
	if low, other := ctl.asked[a.id.Address()], ctl.asked[b.id.Address()]; low > 30 || other < 150 {
		t.Errorf("asked the controller %d times in three hours, the other one %d times; want at most 30 and at least 150", low, other)
	}
}
