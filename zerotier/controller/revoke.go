package controller

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
)

// outbox holds revocations for one node: receivers drop a second packet of
// credentials within 1000 ms (chapter 03 §3.9).
type outbox struct {
	pending []posted
	last    time.Time // sent
}

// posted is a revocation to be sent, and sent again: nobody acknowledges them, a
// packet can be lost or come too soon behind another one, and the certificate
// would be good for hours.
type posted struct {
	*vl2.Revocation
	at   time.Time // not before
	sent int
}

// repeatAfter is how long a revocation waits after each time it was sent.
var repeatAfter = [...]time.Duration{2500 * time.Millisecond, 10 * time.Second}

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
		if m.session.online(now) && m.session.served {
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
		if !slices.ContainsFunc(box.pending, func(p posted) bool { return p.Revocation == r }) {
			box.pending = append(box.pending, posted{Revocation: r})
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
	for _, to := range slices.Sorted(maps.Keys(c.outboxes)) {
		box := c.outboxes[to]
		if len(box.pending) == 0 {
			delete(c.outboxes, to)
			continue
		}
		if d := now.Sub(box.last); box.last.IsZero() || d < 0 || d >= credentialsInterval {
			if list := box.take(now); len(list) > 0 {
				box.last = now
				c.stats.revocations.Add(uint64(len(list)))
				c.send(to, packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, list...), false)
			}
		}
		t := now.Add(sweepInterval)
		for _, p := range box.pending {
			if p.at.Before(t) {
				t = p.at
			}
		}
		if gap := box.last.Add(credentialsInterval); t.Before(gap) {
			t = gap
		}
		if t.Before(next) {
			next = t
		}
	}
	return next
}

// take returns what is due, at most a packet full.
func (b *outbox) take(now time.Time) (list []vl2.Credential) {
	kept := b.pending[:0]
	for _, p := range b.pending {
		if len(list) < maxPerPacket && !now.Before(p.at) {
			list = append(list, p.Revocation)
			if p.sent == len(repeatAfter) {
				continue
			}
			p.at = now.Add(repeatAfter[p.sent])
			p.sent++
		}
		kept = append(kept, p)
	}
	clear(b.pending[len(kept):])
	b.pending = kept
	return list
}
