package network

import (
	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

// Record returns what a node knows of another member, nil if nothing.
func (l *Layer) Record(n vl2.NetworkID, a identity.Address) *vl2.Membership {
	if m := l.net(n).member(a); m != nil {
		return m.record.Load()
	}
	return nil
}

// Forget removes the record of another member.
func (l *Layer) Forget(n vl2.NetworkID, a identity.Address) {
	j := l.net(n)
	j.memberMu.Lock()
	defer j.memberMu.Unlock()
	if m := j.members[a]; m != nil {
		j.forget(m)
	}
}
