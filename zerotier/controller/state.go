package controller

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

// stateRecord is what must survive a restart besides the records.
type stateRecord struct {
	Timestamp   int64              `json:"timestamp"` // ms; none above was given out
	Revocations []revocationRecord `json:"revocations"`
}

type revocationRecord struct {
	ID        uint32 `json:"id"`
	Target    string `json:"target"`
	Threshold int64  `json:"threshold"`
}

func (c *Controller) writeState(n *network) error {
	s := stateRecord{Timestamp: n.reserved, Revocations: []revocationRecord{}}
	for _, r := range n.revocations {
		s.Revocations = append(s.Revocations, revocationRecord{r.ID, r.Target.String(), r.Threshold})
	}
	return c.store.writeRecord(c.store.statePath(n.rec.ID), s)
}

func (c *Controller) readState(n *network) error {
	var s stateRecord
	if err := c.store.readRecord(c.store.statePath(n.rec.ID), &s); errors.Is(err, fs.ErrNotExist) {
		return nil // made by another controller
	} else if err != nil {
		return err
	}
	n.last, n.reserved = s.Timestamp, s.Timestamp
	for _, r := range s.Revocations {
		target, err := identity.ParseAddress(r.Target)
		if err != nil {
			return fmt.Errorf("read revocations of %s: %w", n.rec.ID, err)
		}
		rev, err := c.newRevocation(n, target, r.Threshold, r.ID)
		if err != nil {
			return err
		}
		n.revocations = append(n.revocations, rev)
	}
	return nil
}

func newNetwork(rec Network) *network {
	return &network{
		rec: rec, members: map[identity.Address]*member{}, broken: map[identity.Address]bool{}, taken: map[netip.Addr]int{},
	}
}

func (c *Controller) load() error {
	if err := c.store.init(); err != nil {
		return err
	}
	names, err := c.store.names(c.store.networks(), ".json", 16)
	if err != nil {
		return err
	}
	for _, name := range names {
		id, err := vl2.ParseNetworkID(name)
		if err != nil {
			continue
		}
		n, err := c.loadNetwork(id)
		if err != nil {
			c.log.Error("network is not served", "network", id, "error", err)
			c.broken[id] = true
			continue
		}
		c.networks[id] = n
	}
	return nil
}

func (c *Controller) loadNetwork(id vl2.NetworkID) (*network, error) {
	var rec Network
	if err := c.store.readRecord(c.store.networkPath(id), &rec); err != nil {
		return nil, err
	}
	if rec.ID != id {
		return nil, fmt.Errorf("record is of network %s", rec.ID)
	}
	n := newNetwork(rec)
	if err := c.readState(n); err != nil {
		return nil, err
	}
	names, err := c.store.names(c.store.memberDir(id), ".json", 10)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		a, err := identity.ParseAddress(name)
		if err != nil {
			continue
		}
		var m Member
		err = c.store.readRecord(c.store.memberPath(id, a), &m)
		if err == nil && m.Address != a {
			err = fmt.Errorf("record is of member %s", m.Address)
		}
		if err != nil {
			c.log.Error("member is not served", "network", id, "member", a, "error", err)
			n.broken[a] = true
			continue
		}
		m.Network = id
		n.put(m)
	}
	return n, nil
}

// put adds or replaces a record in memory.
func (n *network) put(rec Member) *member {
	m := n.members[rec.Address]
	if m == nil {
		m = &member{}
		n.members[rec.Address] = m
	} else {
		n.uncount(m)
	}
	m.rec = rec
	if !rec.Authorized {
		n.strangers++
	}
	for _, a := range rec.IPAssignments {
		n.taken[a]++
	}
	return m
}

func (n *network) remove(m *member) {
	n.uncount(m)
	delete(n.members, m.rec.Address)
}

func (n *network) uncount(m *member) {
	if !m.rec.Authorized {
		n.strangers--
	}
	for _, a := range m.rec.IPAssignments {
		if n.taken[a]--; n.taken[a] <= 0 {
			delete(n.taken, a)
		}
	}
}
