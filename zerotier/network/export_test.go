package network

import (
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

// LearnBridge notes that a host is behind a bridge.
func (l *Layer) LearnBridge(n vl2.NetworkID, host vl2.MAC, via identity.Address, now time.Time) {
	l.net(n).learnBridge(host, via, now)
}

// LearnBehind notes that a host behind us uses a group, and returns how many there are.
func (l *Layer) LearnBehind(n vl2.NetworkID, g vl2.MulticastGroup, now time.Time) int {
	j := l.net(n)
	j.learnBehind(g, now)
	return len(j.behind)
}

// Replicate spreads a member's multicast as a replicator does.
func (l *Layer) Replicate(n vl2.NetworkID, origin identity.Address, f *vl2.MulticastFrame, now time.Time) {
	j := l.net(n)
	j.replicate(l.peers.NewWorker().Begin(nil, now), j.snap.Load(), origin, vl2.MACOf(n, origin), f)
}

// Record returns what a node knows of another member, nil if nothing.
func (l *Layer) Record(n vl2.NetworkID, a identity.Address) *vl2.Membership {
	if m := l.net(n).member(a); m != nil {
		return m.record.Load()
	}
	return nil
}

// InGroup reports whether a node keeps another one in a group.
func (l *Layer) InGroup(n vl2.NetworkID, g vl2.MulticastGroup, a identity.Address) bool {
	l.groups.mu.Lock()
	defer l.groups.mu.Unlock()
	x := l.groups.m[groupKey{n, g}]
	if x == nil {
		return false
	}
	_, ok := x.members[a]
	return ok
}

// Unregister takes a node out of a group.
func (l *Layer) Unregister(n vl2.NetworkID, g vl2.MulticastGroup, a identity.Address) {
	l.groups.remove(groupKey{n, g}, a)
}

// Forget removes the record of another member.
func (l *Layer) Forget(n vl2.NetworkID, a identity.Address) {
	j := l.net(n)
	j.memberMu.Lock()
	defer j.memberMu.Unlock()
	if m := j.members[a]; m != nil {
		j.forgetLocked(m)
	}
}
