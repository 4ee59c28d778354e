package network

import (
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

func newGroups() *groupTable {
	t := &groupTable{}
	t.init(gatherEvery)
	return t
}

func groupNumber(i int) groupKey {
	return groupKey{1, vl2.MulticastGroup{MAC: vl2.MAC{0x33, 0x33, 0, byte(i >> 16), byte(i >> 8), byte(i)}}}
}

// TestGroupsAreBounded: whoever subscribes, and to whatever, groups, their members and all
// registrations together are bounded, and go with their time.
func TestGroupsAreBounded(t *testing.T) {
	now := time.Unix(1e9, 0)
	for _, tt := range []struct {
		name  string
		add   func(t *groupTable, i int) bool
		tries int
		want  int
	}{
		{"groups of one node", func(g *groupTable, i int) bool { return g.add(groupNumber(i), 1, now) }, 2 * maxPeerGroups, maxPeerGroups},
		{"members of a group", func(g *groupTable, i int) bool { return g.add(groupNumber(0), identity.Address(1+i), now) }, 2 * maxGroupMembers, maxGroupMembers},
		{"groups", func(g *groupTable, i int) bool { return g.add(groupNumber(i), identity.Address(1+i/4000), now) }, maxGroups + 1000, maxGroups},
		{"registrations", func(g *groupTable, i int) bool { return g.add(groupNumber(i%1000), identity.Address(1+i/1000), now) }, maxMemberships + 1000, maxMemberships},
	} {
		g := newGroups()
		got := 0
		for i := range tt.tries {
			if tt.add(g, i) {
				got++
			}
		}
		if got != tt.want || g.total != tt.want {
			t.Errorf("%s: %d taken, %d in all, want %d", tt.name, got, g.total, tt.want)
		}
		if !tt.add(g, 0) {
			t.Errorf("%s: one that is registered can't be refreshed", tt.name)
		}
		if g.expire(now.Add(groupExpiry)); g.total != 0 || len(g.m) != 0 || len(g.perPeer) != 0 {
			t.Errorf("%s: %d registrations, %d groups and %d nodes after their time", tt.name, g.total, len(g.m), len(g.perPeer))
		}
	}
}

// TestWaitingFramesAreBounded: frames wait for members of a group for a while, the latest
// of each group, and of so many groups.
func TestWaitingFramesAreBounded(t *testing.T) {
	g, now := newGroups(), time.Unix(1e9, 0)
	frames := make([]multicast, 2*maxWaiting)
	for i := range frames {
		g.wait(groupNumber(0), waitingFrame{frame: &frames[i], sent: map[identity.Address]bool{}, born: now}, now)
	}
	if w := g.m[groupNumber(0)].waiting; len(w) != maxWaiting || w[0].frame != &frames[maxWaiting] {
		t.Errorf("%d frames wait, want the latest %d", len(w), maxWaiting)
	}
	for i := range 2 * maxWaitingGroups {
		g.wait(groupNumber(i), waitingFrame{frame: &frames[0], sent: map[identity.Address]bool{}, born: now}, now)
	}
	if len(g.waiting) != maxWaitingGroups {
		t.Errorf("frames wait in %d groups, want %d", len(g.waiting), maxWaitingGroups)
	}
	if g.expire(now.Add(5*time.Second - 1)); len(g.waiting) != maxWaitingGroups {
		t.Errorf("%d groups have frames before their time", len(g.waiting))
	}
	if g.expire(now.Add(5 * time.Second)); len(g.waiting) != 0 {
		t.Errorf("%d groups have frames after their time", len(g.waiting))
	}
	if g.expire(now.Add(gatherEvery)); len(g.m) != 0 {
		t.Errorf("%d groups are left", len(g.m))
	}
}

// sink takes what is sent, and does nothing else.
type sink struct {
	Peers
	sent map[identity.Address]int
}

func (s *sink) Send(_ *vl1.Worker, dst identity.Address, _ packet.Verb, _ []byte, _ vl1.SendOpts) {
	s.sent[dst]++
}

// TestPendingIsBounded: of credentials in several packets every member gets the first, and
// the others are kept for so many members; who has his place keeps it.
func TestPendingIsBounded(t *testing.T) {
	now := time.Unix(1e9, 0)
	peers := &sink{sent: make(map[identity.Address]int)}
	n := &joined{l: &Layer{peers: peers}}
	s := &state{credentials: [][]byte{{1}, {2}, {3}}}
	push := func(i int) { n.push((&vl1.Worker{}).Begin(nil, now), &member{addr: identity.Address(1 + i)}, s) }
	for i := range 2 * maxPending {
		push(i)
	}
	if len(n.pending) != maxPending || len(peers.sent) != 2*maxPending || n.l.stats.refusedRecords.Load() != maxPending {
		t.Errorf("%d members are kept, %d got a packet, %d refusals are counted", len(n.pending), len(peers.sent), n.l.stats.refusedRecords.Load())
	}
	if push(0); n.l.stats.refusedRecords.Load() != maxPending {
		t.Error("a member that is kept was refused")
	}
	for range 2 {
		now = now.Add(pushInterval)
		n.continuePushes((&vl1.Worker{}).Begin(nil, now))
	}
	if len(n.pending) != 0 || peers.sent[2] != len(s.credentials) || peers.sent[1+maxPending] != 1 {
		t.Errorf("%d members are still kept; one of them got %d packets, one of the others %d", len(n.pending), peers.sent[2], peers.sent[1+maxPending])
	}
}
