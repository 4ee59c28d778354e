package router

import (
	"fmt"
	"strconv"
)

// Moons lists moons.
type Moons struct {
	Schema int    `json:"schema"`
	Moons  []Moon `json:"moons"`
}

// moonID is the text form, as zerotier-cli prints it.
func moonID(id uint64) string { return fmt.Sprintf("%016x", id) }

func parseMoonID(s string) (uint64, error) {
	id, err := strconv.ParseUint(s, 16, 64)
	if err != nil || id == 0 {
		return 0, usagef("moon %q: want its ID, up to 16 hex digits, as in 8056c2e21c", s)
	}
	return id, nil
}

func (s *service) orbiter() (orbiter, error) {
	o, ok := s.node.(orbiter)
	if !ok {
		return nil, usagef("moons: this node can't use moons: run ztgate with --node go")
	}
	return o, nil
}

func (s *service) moons() (any, error) {
	o, err := s.orbiter()
	if err != nil {
		return nil, err
	}
	return Moons{Schema, o.Moons()}, nil
}

// orbit begins to use a moon. Without a seed the moon's ID is the address of its
// root, as zerotier-cli has it.
func (s *service) orbit(text, seed string) (any, error) {
	id, err := parseMoonID(text)
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
	if err := o.Orbit(id, seed); err != nil {
		return nil, fmt.Errorf("orbit %s: %w", moonID(id), err)
	}
	return s.moons()
}

func (s *service) deorbit(text string) (any, error) {
	id, err := parseMoonID(text)
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
		return nil, usagef("moon %s is not orbited: see ztgate moons", moonID(id))
	}
	return s.moons()
}
