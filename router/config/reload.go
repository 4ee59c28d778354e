package config

import (
	"maps"
	"slices"
)

// Reload reads the configuration again from where it came from. It returns what a
// running gateway may put into force, the keys and sections that differ from c in
// it, and those that wait for a restart: there next has c's values. Names keep the
// addresses that they have in c. Without the file that c came from there is no next.
func (c *Config) Reload() (next *Config, changed, restart []string, err error) {
	if next, err = load(c.sources, c.file); err != nil {
		return nil, nil, nil, err
	}
	if c.fitted {
		next = next.FitFlows(c.NAT.MaxFlows, c.Origin(keyMaxFlows))
	}
	if c.picked && next.VPC.Ingress == IngressAuto {
		next = next.PickIngress(c.VPC.Ingress, c.Origin(keyIngress))
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
			next.origin[s.key] = c.origin[s.key]
			if err := s.set(next, was); err != nil {
				return nil, nil, nil, err
			}
		}
	}
	for _, part := range sections {
		switch {
		case part.same(c, next):
		case !part.isLive():
			restart = append(restart, part.name())
		case !slices.Contains(changed, part.name()): // the IDs of networks are a setting too
			changed = append(changed, part.name())
		}
	}
	next.Underlay.Physical, next.Underlay.Virtual = c.Underlay.Physical, c.Underlay.Virtual
	return next.Resolve(c.answers), changed, restart, nil
}

// keyMaxFlows is the bound of the flow table.
const keyMaxFlows = "nat.max_flows"

// FitFlows returns c with a smaller bound of the flow table, and says where that came
// from. A bound that the operator gave stays.
func (c *Config) FitFlows(n int, origin string) *Config {
	if c.Origin(keyMaxFlows) != "default" || n >= c.NAT.MaxFlows {
		return c
	}
	next := c.from(keyMaxFlows, origin)
	next.NAT.MaxFlows, next.fitted = n, true
	return next
}

// keyIngress is the way in for packets of the VPC.
const keyIngress = "vpc.ingress"

// PickIngress returns c with a way in where it has auto, and says why that one.
func (c *Config) PickIngress(ingress, origin string) *Config {
	next := c.from(keyIngress, origin)
	next.VPC.Ingress, next.picked = ingress, true
	return next
}

// from returns a copy of c in which a key comes from elsewhere.
func (c *Config) from(key, origin string) *Config {
	next := *c
	next.origin = maps.Clone(c.origin)
	if next.origin == nil {
		next.origin = map[string]string{}
	}
	next.origin[key] = origin
	return &next
}
