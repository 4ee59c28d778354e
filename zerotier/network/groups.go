package network

import (
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

// Bounds and times of groups (chapter 03 §5).
const (
	maxGroups        = 65536
	maxGroupMembers  = 10000
	maxMemberships   = 262144 // in all groups
	maxPeerGroups    = 4096   // of one node, all networks
	maxWaiting       = 32     // frames per group
	maxWaitingGroups = 1024   // groups with waiting frames
	groupExpiry      = 600 * time.Second
	gatherEvery      = 60 * time.Second
	gatherEmptyEvery = time.Second
	waitingLifetime  = 5 * time.Second
)

type groupKey struct {
	nwid  vl2.NetworkID
	group vl2.MulticastGroup
}

// group is who wants a multicast group of a network.
type group struct {
	members    map[identity.Address]time.Time
	lastGather time.Time
	waiting    []waitingFrame
}

// waitingFrame is a multicast that has not reached as many members as it may.
type waitingFrame struct {
	frame *multicast
	sent  map[identity.Address]bool
	born  time.Time
}

// groupTable holds the groups of all networks, also of networks that we serve as
// a root without having joined them.
type groupTable struct {
	mu      sync.Mutex // guards what follows; methods named …Locked need it
	m       map[groupKey]*group
	waiting map[groupKey]*group      // those with waiting frames
	perPeer map[identity.Address]int // groups a node is in
	total   int                      // memberships

	gatherEvery time.Duration
}

func (t *groupTable) init(gatherEvery time.Duration) {
	t.gatherEvery = gatherEvery
	t.m = make(map[groupKey]*group)
	t.waiting = make(map[groupKey]*group)
	t.perPeer = make(map[identity.Address]int)
}

// getLocked returns a group, making it if there is room; nil without.
func (t *groupTable) getLocked(k groupKey) *group {
	g := t.m[k]
	if g == nil && len(t.m) < maxGroups {
		g = &group{members: make(map[identity.Address]time.Time)}
		t.m[k] = g
	}
	return g
}

// add registers a node or refreshes its registration; false if there is no room.
func (t *groupTable) add(k groupKey, a identity.Address, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if g := t.m[k]; g != nil {
		if _, ok := g.members[a]; ok {
			g.members[a] = now
			return true
		}
		if len(g.members) >= maxGroupMembers {
			return false
		}
	}
	if t.perPeer[a] >= maxPeerGroups || t.total >= maxMemberships {
		return false
	}
	g := t.getLocked(k)
	if g == nil {
		return false
	}
	g.members[a] = now
	t.perPeer[a]++
	t.total++
	return true
}

func (t *groupTable) remove(k groupKey, a identity.Address) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if g := t.m[k]; g != nil {
		t.dropLocked(g, a)
	}
}

// dropLocked takes a node out of a group.
func (t *groupTable) dropLocked(g *group, a identity.Address) {
	if _, ok := g.members[a]; !ok {
		return
	}
	delete(g.members, a)
	t.total--
	if t.perPeer[a]--; t.perPeer[a] <= 0 {
		delete(t.perPeer, a)
	}
}

// list returns up to limit members in random order, without skip, and how many
// there are.
func (t *groupTable) list(k groupKey, limit int, skip identity.Address) (out []identity.Address, total int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g := t.m[k]
	if g == nil {
		return nil, 0
	}
	out = make([]identity.Address, 0, len(g.members))
	for a := range g.members {
		if a != skip {
			out = append(out, a)
		}
	}
	n := min(limit, len(out))
	for i := range n { // only what is asked for needs to be shuffled
		j := i + rand.IntN(len(out)-i)
		out[i], out[j] = out[j], out[i]
	}
	return out[:n], len(g.members)
}

func (t *groupTable) expire(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, g := range t.waiting {
		if g.dropOld(now); len(g.waiting) == 0 {
			delete(t.waiting, k)
		}
	}
	for k, g := range t.m {
		for a, at := range g.members {
			if now.Sub(at) >= groupExpiry {
				t.dropLocked(g, a)
			}
		}
		if len(g.members) == 0 && len(g.waiting) == 0 && now.Sub(g.lastGather) >= t.gatherEvery {
			delete(t.m, k)
		}
	}
}

// dropOld drops frames that waited long enough.
func (g *group) dropOld(now time.Time) {
	g.waiting = slices.DeleteFunc(g.waiting, func(f waitingFrame) bool { return now.Sub(f.born) >= waitingLifetime })
}

// wait keeps a frame for members of a group that turn up. It reports whether it is
// time to ask who they are.
func (t *groupTable) wait(k groupKey, f waitingFrame, now time.Time) (ask bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g := t.getLocked(k)
	if g == nil {
		return false
	}
	every := t.gatherEvery
	if len(g.members) == 0 {
		every = gatherEmptyEvery
	}
	if ask = g.lastGather.IsZero() || now.Sub(g.lastGather) >= every; ask {
		g.lastGather = now
	}
	if len(g.waiting) == 0 && len(t.waiting) >= maxWaitingGroups {
		return ask
	}
	if len(g.waiting) >= maxWaiting {
		g.waiting = slices.Delete(g.waiting, 0, 1)
	}
	g.waiting = append(g.waiting, f)
	t.waiting[k] = g
	return ask
}

// delivery is one copy of a waiting frame.
type delivery struct {
	to    identity.Address
	frame *multicast
}

// due returns what can be sent of the frames of a network that wait, in one group or
// in all if only is nil.
func (t *groupTable) due(nwid vl2.NetworkID, only *groupKey, limit int, now time.Time) (out []delivery) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, g := range t.waiting {
		if k.nwid != nwid || only != nil && k != *only {
			continue
		}
		g.dropOld(now)
		g.waiting = slices.DeleteFunc(g.waiting, func(f waitingFrame) bool { return len(f.sent) >= limit })
		for i := range g.waiting {
			f := &g.waiting[i]
			for a := range g.members {
				if !f.sent[a] && len(f.sent) < limit {
					f.sent[a] = true
					out = append(out, delivery{a, f.frame})
				}
			}
		}
		if len(g.waiting) == 0 {
			delete(t.waiting, k)
		}
	}
	return out
}
