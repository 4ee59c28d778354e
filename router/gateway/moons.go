package gateway

import (
	"fmt"

	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/ztnode"
)

func (s *service) orbiter() (orbiter, error) {
	o, ok := s.node.orbiter()
	if !ok {
		return nil, fault.Usagef("moons: this node can't use moons: run ztgate with --node go")
	}
	return o, nil
}

func (s *service) moons() (any, error) {
	o, err := s.orbiter()
	if err != nil {
		return nil, err
	}
	return control.Moons{Schema: control.Schema, Moons: o.Moons()}, nil
}

// orbit begins to use a moon. Without a seed the moon's ID is the address of its
// root, as zerotier-cli has it.
func (s *service) orbit(text, seed string) (any, error) {
	id, err := control.ParseMoonID(text)
	if err != nil {
		return nil, err
	}
	o, err := s.orbiter()
	if err != nil {
		return nil, err
	}
	if seed == "" {
		seed = fmt.Sprintf("%010x", id)
	}
	root, err := identity.ParseAddress(seed)
	if err != nil {
		return nil, fault.Usagef("orbit %s: seed %q: want the address of one of the moon's roots, 10 hex digits", ztnode.MoonID(id), seed)
	}
	if err := o.Orbit(id, root); err != nil {
		return nil, fmt.Errorf("orbit %s: %w", ztnode.MoonID(id), err)
	}
	return s.moons()
}

func (s *service) deorbit(text string) (any, error) {
	id, err := control.ParseMoonID(text)
	if err != nil {
		return nil, err
	}
	o, err := s.orbiter()
	if err != nil {
		return nil, err
	}
	used, err := o.Deorbit(id)
	if err != nil {
		return nil, err
	}
	if !used {
		return nil, fault.Usagef("moon %s is not orbited: see ztgate moons", ztnode.MoonID(id))
	}
	return s.moons()
}
