package controller

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

// Networks lists the networks by ascending ID.
func (c *Controller) Networks() []Network {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]Network, 0, len(c.networks))
	for _, n := range c.networks {
		out = append(out, n.rec.clone())
	}
	slices.SortFunc(out, func(a, b Network) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// Network returns a network record.
func (c *Controller) Network(id vl2.NetworkID) (Network, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.networks[id]
	if n == nil {
		return Network{}, false
	}
	return n.rec.clone(), true
}

// CreateNetwork stores a new network, under a random ID if rec has none. Errors:
// [ErrExists], [ErrInvalid], or of the file system.
func (c *Controller) CreateNetwork(rec Network) (Network, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	rec = rec.clone()
	if err := c.chooseID(&rec); err != nil {
		return Network{}, fmt.Errorf("create network: %w", err)
	}
	if err := rec.normalize(); err != nil {
		return Network{}, fmt.Errorf("create network: %w", wrap(err, ErrInvalid))
	}
	rec.CreationTime, rec.Revision = c.now().UnixMilli(), 1
	if err := c.store.addNetwork(&rec); err != nil {
		return Network{}, fmt.Errorf("create network: %w", err)
	}
	c.networks[rec.ID] = newNetwork(rec)
	c.publish()
	return rec.clone(), nil
}

func (c *Controller) chooseID(rec *Network) error {
	const low = 1<<24 - 1
	taken := func() bool { return c.networks[rec.ID] != nil || c.broken[rec.ID] }
	if rec.ID == 0 {
		for rec.ID&low == 0 || taken() {
			rec.ID = vl2.NetworkID(c.self)<<24 | vl2.NetworkID(randomUint64()&low)
		}
		return nil
	}
	switch {
	case rec.ID.Controller() != c.self || rec.ID&low == 0:
		return fmt.Errorf("%w: %s is no network of controller %s", ErrInvalid, rec.ID, c.self)
	case taken():
		return fmt.Errorf("network %s %w", rec.ID, ErrExists)
	}
	return nil
}

// UpdateNetwork changes a network and pushes the change to the members that are
// online. f changes a copy; it must not call the controller. Errors: [ErrNotFound],
// [ErrInvalid], the one of f, or of the file system.
func (c *Controller) UpdateNetwork(id vl2.NetworkID, f func(*Network) error) (Network, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.networks[id]
	if n == nil {
		return Network{}, fmt.Errorf("network %s %w", id, ErrNotFound)
	}
	rec := n.rec.clone()
	if err := f(&rec); err != nil {
		return Network{}, fmt.Errorf("update network: %w", err)
	}
	rec.ID, rec.CreationTime, rec.Revision = id, n.rec.CreationTime, n.rec.Revision
	if rec.extra == nil {
		rec.extra = n.rec.extra // f assigned a fresh record
	}
	if err := rec.normalize(); err != nil {
		return Network{}, fmt.Errorf("update network: %w", wrap(err, ErrInvalid))
	}
	if same, err := equal(n.rec, rec); err != nil || same {
		return rec.clone(), err
	}
	rec.Revision++
	if err := c.store.writeRecord(c.store.networkPath(id), rec); err != nil {
		return Network{}, fmt.Errorf("update network: %w", err)
	}
	n.rec = rec
	c.changedAll(n, c.now())
	return rec.clone(), nil
}

// changedAll queues pushes to all members that are online, in an order that simulations
// can repeat.
func (c *Controller) changedAll(n *network, now time.Time) {
	for _, a := range slices.Sorted(maps.Keys(n.members)) {
		c.changed(n.members[a], now, false)
	}
}

// DeleteNetwork removes a network and its members and revokes the memberships. Error:
// [ErrNotFound], or of the file system.
func (c *Controller) DeleteNetwork(id vl2.NetworkID) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.networks[id]
	if n == nil {
		return fmt.Errorf("network %s %w", id, ErrNotFound)
	}
	now := c.now()
	threshold, err := c.timestamp(n, now)
	if err != nil {
		return fmt.Errorf("delete network: %w", err)
	}
	var list []*vl2.Revocation
	for a, m := range n.members {
		if !m.rec.Authorized || len(list) == maxOutbox {
			continue // the others learn it when they ask, within a minute
		}
		r, err := c.newRevocation(n, a, threshold, uint32(randomUint64()))
		if err != nil {
			return fmt.Errorf("delete network: %w", err)
		}
		list = append(list, r)
	}
	if err := c.store.removeNetwork(id); err != nil {
		return fmt.Errorf("delete network: %w", err)
	}
	delete(c.networks, id)
	c.publish()
	c.announce(n, now, list...)
	for a := range n.members {
		c.withdraw(id, a)
	}
	return nil
}

// withdraw ends what a member may do besides.
func (c *Controller) withdraw(id vl2.NetworkID, a identity.Address) {
	c.gate.Lock()
	defer c.gate.Unlock()
	delete(c.granted, memberKey{id, a})
}

// Members lists the members of a network by ascending address; nil if there is no
// such network.
func (c *Controller) Members(nwid vl2.NetworkID) []Member {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.networks[nwid]
	if n == nil {
		return nil
	}
	out := make([]Member, 0, len(n.members))
	for _, m := range n.members {
		out = append(out, m.rec.clone())
	}
	slices.SortFunc(out, func(a, b Member) int { return cmp.Compare(a.Address, b.Address) })
	return out
}

// Member returns a member record.
func (c *Controller) Member(nwid vl2.NetworkID, a identity.Address) (Member, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := c.networks[nwid]; n != nil && n.members[a] != nil {
		return n.members[a].rec.clone(), true
	}
	return Member{}, false
}

// UpdateMember changes a member, or makes the record of a node that has not asked
// yet. The member gets its new configuration at once if it is online, also if it was
// refused so far; one that is no longer authorised is revoked. f is as in
// [Controller.UpdateNetwork], and so are the errors. Addresses must be inside a route
// and not another member's.
//
// On a public network a member that is no longer authorised becomes one again by its
// next request.
func (c *Controller) UpdateMember(nwid vl2.NetworkID, a identity.Address, f func(*Member) error) (Member, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.networks[nwid]
	switch {
	case n == nil:
		return Member{}, fmt.Errorf("network %s %w", nwid, ErrNotFound)
	case a == 0 || a.Reserved():
		return Member{}, fmt.Errorf("update member: %w: address %s", ErrInvalid, a)
	case n.broken[a]:
		return Member{}, fmt.Errorf("update member: record of %s can't be read; delete it first", a)
	}
	now := c.now()
	old := newMember(nwid, a, now.UnixMilli())
	if m := n.members[a]; m != nil {
		old = m.rec
	}
	rec := old.clone()
	if err := f(&rec); err != nil {
		return Member{}, fmt.Errorf("update member: %w", err)
	}
	if rec.extra == nil {
		rec.extra = old.extra
	}
	if err := rec.normalize(&old); err != nil {
		return Member{}, fmt.Errorf("update member: %w", wrap(err, ErrInvalid))
	}
	if err := n.checkAddresses(&rec, &old); err != nil {
		return Member{}, fmt.Errorf("update member: %w", wrap(err, ErrInvalid))
	}
	m, err := c.change(n, rec, &old, now)
	if err != nil {
		return Member{}, fmt.Errorf("update member: %w", err)
	}
	return m.rec.clone(), nil
}

// change stores a record and tells whom it concerns.
func (c *Controller) change(n *network, rec Member, old *Member, now time.Time) (*member, error) {
	kept := n.revocations
	var revoked *vl2.Revocation
	switch {
	case rec.Authorized && !old.Authorized:
		n.rec.grant(&rec, "api", "", now.UnixMilli())
	case !rec.Authorized && old.Authorized:
		var err error
		if revoked, err = c.revoke(n, rec.Address, now); err != nil {
			return nil, err
		}
		rec.LastDeauthorizedTime = now.UnixMilli()
	}
	revision := uint64(0)
	if m := n.members[rec.Address]; m != nil {
		revision = m.rec.Revision
	}
	m, err := c.save(n, rec)
	if err != nil {
		n.revocations = kept
		return nil, err
	}
	if revoked != nil {
		c.withdraw(n.rec.ID, rec.Address)
		c.announce(n, now, revoked)
		if m.session != nil {
			m.session.served = false
		}
	}
	if m.rec.Revision == revision {
		return m, nil
	}
	if was, is := old.ActiveBridge && old.Authorized, rec.ActiveBridge && rec.Authorized; was != is {
		c.changedAll(n, now) // all configurations list the bridges
	}
	c.changed(m, now, true)
	return m, nil
}

// checkAddresses refuses new addresses that the member couldn't use.
func (n *network) checkAddresses(rec, old *Member) error {
	for i, a := range rec.IPAssignments {
		switch {
		case slices.Contains(rec.IPAssignments[:i], a):
			return fmt.Errorf("ipAssignments: %s is there twice", a)
		case slices.Contains(old.IPAssignments, a):
			continue
		}
		if _, ok := n.rec.inRoute(a); !ok || !usableAddr(a) {
			return fmt.Errorf("ipAssignments: %s is in no route of the network", a)
		}
		if !n.free(a, rec) {
			return fmt.Errorf("ipAssignments: %s is another member's", a)
		}
	}
	return nil
}

// DeleteMember removes a member record and revokes the membership. Its addresses are
// free again and its identity is no longer pinned. Error: [ErrNotFound], or of the
// file system.
func (c *Controller) DeleteMember(nwid vl2.NetworkID, a identity.Address) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.networks[nwid]
	if n == nil || n.members[a] == nil && !n.broken[a] {
		return fmt.Errorf("member %s of network %s %w", a, nwid, ErrNotFound)
	}
	now := c.now()
	m := n.members[a]
	kept := n.revocations
	var revoked *vl2.Revocation
	if m == nil || m.rec.Authorized {
		var err error
		if revoked, err = c.revoke(n, a, now); err != nil {
			return fmt.Errorf("delete member: %w", err)
		}
	}
	if err := c.store.removeMember(nwid, a); err != nil {
		n.revocations = kept
		return fmt.Errorf("delete member: %w", err)
	}
	delete(n.broken, a)
	c.withdraw(nwid, a)
	if revoked != nil {
		c.announce(n, now, revoked)
	}
	if m != nil {
		n.remove(m)
		if m.rec.ActiveBridge && m.rec.Authorized {
			c.changedAll(n, now)
		}
	}
	return nil
}
