package controller

import (
	"fmt"
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
)

// outbox holds revocations for one node: receivers drop a second packet of
// credentials within 1000 ms (chapter 03 §3.9).
type outbox struct {
	pending []*vl2.Revocation
	last    time.Time // sent
}

func (c *Controller) newRevocation(n *network, target identity.Address, threshold int64, id uint32) (*vl2.Revocation, error) {
	r := &vl2.Revocation{
		ID: id, NetworkID: n.rec.ID, Threshold: threshold, Flags: vl2.FlagPropagate,
		Target: target, Signer: c.self, Type: vl2.TypeCOM,
	}
	if err := r.Sign(c.cfg.Identity); err != nil {
		return nil, fmt.Errorf("sign revocation: %w", err)
	}
	return r, nil
}

// revoke ends a membership now: it keeps a revocation for as long as certificates can
// be valid and returns it. It must be on disk before the record changes.
func (c *Controller) revoke(n *network, target identity.Address, now time.Time) (*vl2.Revocation, error) {
	threshold, err := c.timestamp(n, now)
	if err != nil {
		return nil, err
	}
	r, err := c.newRevocation(n, target, threshold, uint32(randomUint64()))
	if err != nil {
		return nil, err
	}
	n.expireRevocations(now)
	old := n.revocations
	n.revocations = append(slices.Clone(old), r)
	if len(n.revocations) > maxRevocations {
		c.stats.overflow.Add(1)
		n.revocations = n.revocations[1:]
	}
	if err := c.writeState(n); err != nil {
		n.revocations = old
		return nil, err
	}
	return r, nil
}

// forgive drops the revocations of a member that is authorised again.
func (n *network) forgive(target identity.Address) {
	n.dropRevocations(func(r *vl2.Revocation) bool { return r.Target == target })
}

func (n *network) expireRevocations(now time.Time) {
	oldest := now.UnixMilli() - n.rec.timeDelta()
	n.dropRevocations(func(r *vl2.Revocation) bool { return r.Threshold < oldest })
}

// dropRevocations replaces the list, so that a failed change can restore it.
func (n *network) dropRevocations(drop func(*vl2.Revocation) bool) {
	if slices.ContainsFunc(n.revocations, drop) {
		n.revocations = slices.DeleteFunc(slices.Clone(n.revocations), drop)
	}
}

// announce sends revocations to the members that are online, and to the nodes
// themselves.
func (c *Controller) announce(n *network, now time.Time, list ...*vl2.Revocation) {
	if len(list) == 0 {
		return
	}
	for a, m := range n.members {
		if m.session != nil && m.session.served && now.Sub(m.session.last) < onlineFor {
			c.post(a, list...)
		}
	}
	c.kick()
}

// resend gives the revocations it may have missed to a member that was offline
// (chapter 04 §11).
func (c *Controller) resend(n *network, to identity.Address, now time.Time) {
	n.expireRevocations(now)
	for _, r := range n.revocations {
		if r.Target != to {
			c.post(to, r)
		}
	}
}

func (c *Controller) post(to identity.Address, list ...*vl2.Revocation) {
	box := c.outboxes[to]
	if box == nil {
		box = &outbox{}
		c.outboxes[to] = box
	}
	for _, r := range list {
		if !slices.Contains(box.pending, r) {
			box.pending = append(box.pending, r)
		}
	}
	if over := len(box.pending) - maxOutbox; over > 0 {
		c.stats.overflow.Add(uint64(over))
		box.pending = slices.Delete(box.pending, 0, over)
	}
}

// flush sends what waits in the outboxes and returns when to go on.
func (c *Controller) flush(now time.Time) (next time.Time) {
	next = now.Add(sweepInterval)
	for to, box := range c.outboxes {
		d := now.Sub(box.last)
		switch {
		case !box.last.IsZero() && d >= 0 && d < credentialsInterval:
		case len(box.pending) == 0:
			delete(c.outboxes, to)
			continue
		default:
			var list []vl2.Credential
			for _, r := range box.pending[:min(len(box.pending), maxPerPacket)] {
				list = append(list, r)
			}
			box.pending = slices.Delete(box.pending, 0, len(list))
			box.last = now
			c.stats.revocations.Add(uint64(len(list)))
			c.send(to, packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, list...), false)
		}
		if t := box.last.Add(credentialsInterval); t.Before(next) {
			next = t
		}
	}
	return next
}
