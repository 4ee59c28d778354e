package config

import (
	"slices"
)

// Reload reads the configuration again from where it came from. It returns what a
// running gateway may put into force, the keys and sections that differ from c in
// it, and those that wait for a restart: there next has c's values.
func (c *Config) Reload() (next *Config, changed, restart []string, err error) {
	if next, err = Load(c.sources); err != nil {
		return nil, nil, nil, err
	}
	changed, restart = []string{}, []string{}
	for _, s := range settings {
		was := s.get(c)
		switch {
		case slices.Equal(was, s.get(next)):
		case s.live:
			changed = append(changed, s.key)
		default:
			restart = append(restart, s.key)
			if err := s.set(next, was); err != nil {
				return nil, nil, nil, err
			}
		}
	}
	next.Underlay = c.Underlay
	for _, part := range []struct {
		key  string
		same bool
	}{
		{"policy.rules", slices.EqualFunc(c.Policy.Rules, next.Policy.Rules, func(a, b PolicyRule) bool { return a.String() == b.String() })},
		{"forwards", slices.Equal(c.Forwards, next.Forwards)},
		{"maps", slices.Equal(c.Maps, next.Maps)},
	} {
		if !part.same {
			changed = append(changed, part.key)
		}
	}
	return next, changed, restart, nil
}
