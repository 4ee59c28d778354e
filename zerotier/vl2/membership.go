package vl2

import (
	"maps"
	"net/netip"
	"slices"

	"ztgate/zerotier/identity"
)

// Membership is what we hold of another member's credentials (chapter 03 §3.7).
// The zero value holds nothing. One that is shared must not be changed any more:
// change a [Membership.Clone] and share that.
type Membership struct {
	com     *COM
	comVoid int64 // certificates of membership up to this time are void
	tags    []*Tag
	caps    []*Capability
	coos    []*COO
	void    map[voidKey]int64
}

type voidKey struct {
	typ uint8
	id  uint32
}

const (
	maxHeldTags  = MaxTags
	maxHeldCaps  = MaxCapabilities
	maxHeldCOOs  = 2 * MaxCOOs
	maxHeldVoids = 1024
)

// OfferResult is what became of an offered credential.
type OfferResult uint8

const (
	OfferRejected OfferResult = iota
	OfferKnown
	OfferNew
)

// Knows reports whether exactly this credential is held and not void, so that its
// signature need not be checked again. Revocations are not kept, so they are never
// known.
func (m *Membership) Knows(c Credential) bool {
	same := func(o Credential) bool { return string(o.Append(nil)) == string(c.Append(nil)) }
	switch c := c.(type) {
	case *COM:
		return m.com != nil && m.com.Timestamp() == c.Timestamp() && c.Timestamp() > m.comVoid && same(m.com)
	case *Tag:
		return slices.ContainsFunc(m.tags, func(o *Tag) bool { return o.ID == c.ID && same(o) })
	case *Capability:
		return slices.ContainsFunc(m.caps, func(o *Capability) bool { return o.ID == c.ID && same(o) })
	case *COO:
		return slices.ContainsFunc(m.coos, func(o *COO) bool { return o.ID == c.ID && same(o) })
	}
	return false
}

// Judge tells what [Membership.Offer] would do with a credential if its signature is
// good, so that signatures of what is useless need not be checked. own is our
// configuration, nil = none.
func (m *Membership) Judge(own *NetworkConfig, c Credential) OfferResult {
	if m.Knows(c) {
		return OfferKnown
	}
	switch c := c.(type) {
	case *COM:
		if c.Timestamp() <= m.comVoid || m.com != nil && c.Timestamp() < m.com.Timestamp() && !own.setBack(m.com.Timestamp(), c.Timestamp()) {
			return OfferRejected
		}
		return OfferNew
	case *Tag:
		return judge(m, own, m.tags, c, maxHeldTags, TypeTag)
	case *Capability:
		return judge(m, own, m.caps, c, maxHeldCaps, TypeCapability)
	case *COO:
		return judge(m, own, m.coos, c, maxHeldCOOs, TypeCOO)
	case *Revocation:
		return m.judgeRevocation(c)
	}
	return OfferRejected
}

// Offer considers a credential whose signature was verified. own is as for
// [Membership.Judge].
func (m *Membership) Offer(own *NetworkConfig, c Credential) OfferResult {
	res := m.Judge(own, c)
	if res != OfferNew {
		return res
	}
	switch c := c.(type) {
	case *COM:
		m.com = c
	case *Tag:
		m.tags = hold(m.tags, c)
	case *Capability:
		m.caps = hold(m.caps, c)
	case *COO:
		m.coos = hold(m.coos, c)
	case *Revocation:
		m.revoke(c)
	}
	return OfferNew
}

// numbered is a credential of which a member may have several.
type numbered interface {
	comparable
	number() uint32
	issued() int64
}

func (t *Tag) number() uint32        { return t.ID }
func (t *Tag) issued() int64         { return t.Timestamp }
func (c *Capability) number() uint32 { return c.ID }
func (c *Capability) issued() int64  { return c.Timestamp }
func (c *COO) number() uint32        { return c.ID }
func (c *COO) issued() int64         { return c.Timestamp }

func indexOf[T numbered](list []T, c T) int {
	return slices.IndexFunc(list, func(o T) bool { return o.number() == c.number() })
}

func judge[T numbered](m *Membership, own *NetworkConfig, list []T, c T, most int, typ uint8) OfferResult {
	i := indexOf(list, c)
	switch {
	case i >= 0 && list[i].issued() > c.issued() && !own.setBack(list[i].issued(), c.issued()),
		c.issued() <= m.voidUntil(typ, c.number()) && m.voidUntil(typ, c.number()) != never,
		i < 0 && len(list) >= most:
		return OfferRejected
	}
	return OfferNew
}

func hold[T numbered](list []T, c T) []T {
	if i := indexOf(list, c); i >= 0 {
		list[i] = c
		return list
	}
	return append(list, c)
}

func (m *Membership) judgeRevocation(r *Revocation) OfferResult {
	switch r.Type {
	case TypeCOM:
		if r.Threshold <= m.comVoid {
			return OfferKnown
		}
		return OfferNew
	case TypeTag, TypeCapability, TypeCOO:
		old, ok := m.void[voidKey{r.Type, r.CredentialID}]
		switch {
		case ok && old >= r.Threshold:
			return OfferKnown
		case !ok && len(m.void) >= maxHeldVoids:
			return OfferRejected
		}
		return OfferNew
	}
	return OfferRejected
}

func (m *Membership) revoke(r *Revocation) {
	if r.Type == TypeCOM {
		m.comVoid = r.Threshold
		return
	}
	if m.void == nil {
		m.void = make(map[voidKey]int64)
	}
	m.void[voidKey{r.Type, r.CredentialID}] = r.Threshold
}

// setBack reports whether the controller's clock was set back since the credential that is
// held was issued: it is outside of our own window, while the one that is offered is
// inside. The older one counts then, else members could not talk to each other
// until the clock has caught up.
func (own *NetworkConfig) setBack(held, offered int64) bool {
	return own != nil && !own.Near(held) && own.Near(offered)
}

// Near reports whether a time is within the window of the own configuration (chapter 03
// §3.6).
func (own *NetworkConfig) Near(ts int64) bool {
	return uint64(max(ts, own.Timestamp))-uint64(min(ts, own.Timestamp)) <= uint64(own.TimeDelta)
}

// Clone returns a copy that can be changed; m may be nil.
func (m *Membership) Clone() *Membership {
	if m == nil {
		return &Membership{}
	}
	c := *m
	c.tags, c.caps, c.coos, c.void = slices.Clone(m.tags), slices.Clone(m.caps), slices.Clone(m.coos), maps.Clone(m.void)
	return &c
}

// HasCOM reports whether a certificate of membership is held, good or void.
func (m *Membership) HasCOM() bool { return m.com != nil }

// Revoked reports whether the certificate held is void.
func (m *Membership) Revoked() bool {
	return m.comVoid > 0 && (m.com == nil || m.com.Timestamp() <= m.comVoid)
}

// Agrees reports whether the member passes the gate of a private network
// (chapter 03 §3.11).
func (m *Membership) Agrees(own *NetworkConfig, id *identity.Identity) bool {
	return m.com != nil && own.COM != nil && m.com.Timestamp() > m.comVoid && own.COM.Agrees(m.com, id)
}

// usable applies the time window of the own configuration (chapter 03 §3.6).
func (m *Membership) usable(own *NetworkConfig, typ uint8, id uint32, timestamp int64) bool {
	return own.Near(timestamp) && timestamp > m.voidUntil(typ, id)
}

func (m *Membership) voidUntil(typ uint8, id uint32) int64 {
	if v, ok := m.void[voidKey{typ, id}]; ok {
		return v
	}
	return never
}

// never is before all times.
const never = -1 << 63

// Tag returns the value of a usable tag.
func (m *Membership) Tag(own *NetworkConfig, id uint32) (uint32, bool) {
	for _, t := range m.tags {
		if t.ID == id && m.usable(own, TypeTag, id, t.Timestamp) {
			return t.Value, true
		}
	}
	return 0, false
}

// Capabilities calls f for the usable capabilities until it returns false.
func (m *Membership) Capabilities(own *NetworkConfig, f func(*Capability) bool) {
	for _, c := range m.caps {
		if m.usable(own, TypeCapability, c.ID, c.Timestamp) && !f(c) {
			return
		}
	}
}

// Owns reports whether a usable certificate of ownership lists a thing.
func (m *Membership) Owns(own *NetworkConfig, t Thing) bool {
	for _, c := range m.coos {
		if m.usable(own, TypeCOO, c.ID, c.Timestamp) && slices.Contains(c.Things, t) {
			return true
		}
	}
	return false
}

// OwnsIP is Owns for an IP address, with the extension for addresses that follow
// from the network ID (chapter 03 §3.5).
func (m *Membership) OwnsIP(own *NetworkConfig, a netip.Addr) bool {
	return m.Owns(own, ipThing(a)) || impliedOwner(own, a)
}

// Certified is Owns for an IP address.
func (m *Membership) Certified(own *NetworkConfig, a netip.Addr) bool { return m.Owns(own, ipThing(a)) }

func impliedOwner(own *NetworkConfig, a netip.Addr) bool {
	if own.Flags&FlagNDPEmulation == 0 || !a.Is6() {
		return false
	}
	x := a.As16()
	for _, p := range own.Addresses {
		if !p.Addr().Is6() {
			continue
		}
		y := p.Addr().As16()
		if p == SixPlane(own.ID, own.Member) && [5]byte(x[:5]) == [5]byte(y[:5]) ||
			p == RFC4193(own.ID, own.Member) && [11]byte(x[:11]) == [11]byte(y[:11]) {
			return true
		}
	}
	return false
}

func ipThing(a netip.Addr) (t Thing) {
	if a.Is4() {
		b := a.As4()
		t.Type = ThingIPv4
		copy(t.Value[:], b[:])
	} else {
		t.Type, t.Value = ThingIPv6, a.As16()
	}
	return t
}

// outdated reports whether nothing of that time can be usable any more.
func (own *NetworkConfig) outdated(ts int64) bool {
	return ts < own.Timestamp && uint64(own.Timestamp)-uint64(ts) > uint64(own.TimeDelta)
}

// Vital reports whether something revoked could be used again if the record were
// forgotten.
func (m *Membership) Vital(own *NetworkConfig) bool {
	if m.comVoid > 0 && !own.outdated(m.comVoid) {
		return true
	}
	for _, ts := range m.void {
		if !own.outdated(ts) {
			return true
		}
	}
	return false
}

// Outdated reports whether [Membership.Expire] would forget something.
func (m *Membership) Outdated(own *NetworkConfig) bool {
	for _, t := range m.tags {
		if own.outdated(t.Timestamp) {
			return true
		}
	}
	for _, t := range m.caps {
		if own.outdated(t.Timestamp) {
			return true
		}
	}
	for _, t := range m.coos {
		if own.outdated(t.Timestamp) {
			return true
		}
	}
	for _, ts := range m.void {
		if own.outdated(ts) {
			return true
		}
	}
	return false
}

// Expire forgets credentials that can't become usable again, and thresholds below
// which nothing can be usable.
func (m *Membership) Expire(own *NetworkConfig) {
	old := own.outdated
	m.tags = slices.DeleteFunc(m.tags, func(t *Tag) bool { return old(t.Timestamp) })
	m.caps = slices.DeleteFunc(m.caps, func(c *Capability) bool { return old(c.Timestamp) })
	m.coos = slices.DeleteFunc(m.coos, func(c *COO) bool { return old(c.Timestamp) })
	maps.DeleteFunc(m.void, func(_ voidKey, ts int64) bool { return old(ts) })
}
