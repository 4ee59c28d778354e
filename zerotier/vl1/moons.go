package vl1

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"ztgate/zerotier/identity"
)

// maxMoons bounds the moons that are held and, apart from that, waited for: what
// HELLO lists.
const maxMoons = maxMoonsInHello

// ErrTooManyMoons says that no more moons can be orbited.
var ErrTooManyMoons = errors.New("too many moons")

// MoonInfo describes a moon that is orbited.
type MoonInfo struct {
	ID    uint64
	Seed  identity.Address // while waiting
	World *World           // nil while waiting
}

// Orbit makes the node look for a moon at one of its roots. It waits until that
// root has told it (chapter 02 §3.5). Orbiting a moon that is held does nothing.
func (c *Core) Orbit(id uint64, seed identity.Address) error {
	if id == 0 || seed.Reserved() || seed == c.self {
		return fmt.Errorf("orbit moon %016x: %s can't be a seed", id, seed)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.moon(id) != nil {
		return nil
	}
	if _, ok := c.waiting[id]; !ok && len(c.waiting) >= maxMoons {
		return ErrTooManyMoons
	}
	c.waiting[id] = seed
	return nil
}

// OrbitWorld adds a moon that the operator trusts, e.g. from a file. One that is
// held is replaced by a newer, properly signed revision only.
func (c *Core) OrbitWorld(w *World) error {
	if !w.Moon || w.ID == 0 {
		return fmt.Errorf("orbit moon %016x: not a moon", w.ID)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.addMoonLocked(w)
}

// addMoonLocked installs a moon without asking where it came from.
func (c *Core) addMoonLocked(w *World) error {
	set := c.worlds.Load()
	moons := slices.Clone(set.moons)
	switch i := slices.IndexFunc(moons, func(m *World) bool { return m.ID == w.ID }); {
	case i < 0 && len(moons) >= maxMoons:
		return ErrTooManyMoons
	case i < 0:
		moons = append(moons, w)
	case w.Replaces(moons[i]):
		moons[i] = w
	default:
		return nil
	}
	delete(c.waiting, w.ID)
	c.setWorldsLocked(set.planet, moons)
	return nil
}

// Deorbit forgets a moon. It reports whether it was held or waited for.
func (c *Core) Deorbit(id uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, had := c.waiting[id]
	delete(c.waiting, id)
	if c.moon(id) != nil {
		had = true
		set := c.worlds.Load()
		c.setWorldsLocked(set.planet, slices.DeleteFunc(slices.Clone(set.moons), func(m *World) bool { return m.ID == id }))
	}
	return had
}

// Moons lists the moons that are orbited, ordered by ID.
func (c *Core) Moons() []MoonInfo {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []MoonInfo
	for _, m := range c.worlds.Load().moons {
		out = append(out, MoonInfo{ID: m.ID, World: m})
	}
	for id, seed := range c.waiting {
		out = append(out, MoonInfo{ID: id, Seed: seed})
	}
	slices.SortFunc(out, func(a, b MoonInfo) int { return strings.Compare(MoonFile(a.ID), MoonFile(b.ID)) })
	return out
}

// moon returns a moon that is orbited, nil if it isn't.
func (c *Core) moon(id uint64) *World {
	for _, m := range c.worlds.Load().moons {
		if m.ID == id {
			return m
		}
	}
	return nil
}

// isSeedLocked reports whether a is a root of a moon we wait for.
func (c *Core) isSeedLocked(a identity.Address) bool {
	for _, seed := range c.waiting {
		if seed == a {
			return true
		}
	}
	return false
}

// awaitedLocked reports whether w is a moon we wait for that lists the seed we were
// told.
func (c *Core) awaitedLocked(w *World) bool {
	seed, ok := c.waiting[w.ID]
	return ok && w.Moon && slices.ContainsFunc(w.Roots, func(r Root) bool { return r.Identity.Address() == seed })
}

// moonRefsLocked lists the moons for HELLO, those waited for with timestamp 0.
func (c *Core) moonRefsLocked() []worldRef {
	var refs []worldRef
	for _, m := range c.worlds.Load().moons {
		refs = append(refs, worldRef{m.ID, m.Timestamp})
	}
	for _, id := range slices.Sorted(maps.Keys(c.waiting)) {
		if len(refs) < maxMoonsInHello {
			refs = append(refs, worldRef{id, 0})
		}
	}
	return refs
}

const moonSuffix = ".moon"

// MoonFile returns the name of a moon's file in the directory moons.d of a home
// (chapter 02 §3.6).
func MoonFile(id uint64) string { return fmt.Sprintf("%016x", id) + moonSuffix }

// ParseMoonFile is the inverse of [MoonFile].
func ParseMoonFile(name string) (id uint64, ok bool) {
	return parseFileName(name, moonSuffix, 16)
}
