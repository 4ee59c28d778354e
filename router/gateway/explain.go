package gateway

import (
	"ztgate/router/control"
	"ztgate/router/fault"
)

func (s *service) explain(q control.Question) (any, error) {
	if s.plane == nil {
		return nil, fault.Usagef("this process is a %s and forwards nothing: ask a gateway", s.mode)
	}
	if err := q.Check(); err != nil {
		return nil, fault.Usage(err)
	}
	x := s.plane.Explain(q)
	x.Schema, x.Question = control.Schema, q
	policy := s.config().Policy
	switch {
	case x.Rule >= 0 && x.Rule < len(policy.Rules):
		x.RuleText = policy.Rules[x.Rule].String()
	case x.Rule == -1:
		x.RuleText = "default " + policy.Default
	}
	for _, p := range s.peers() {
		if p.Address == x.Member {
			x.Path = p.Link
		}
	}
	return x, nil
}
