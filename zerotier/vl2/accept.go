package vl2

// AcceptsAll reports whether the rules accept every frame, whatever it is, and do
// nothing else with it: the data path can then leave them out.
func (c *NetworkConfig) AcceptsAll() bool { return alwaysAccepts(c.Rules, nil) }

// AcceptsEtherType is AcceptsAll for the frames of one ethertype. It makes the
// usual tables, which only drop what is neither IP nor ARP, as cheap as none.
func (c *NetworkConfig) AcceptsEtherType(etherType uint16) bool {
	return alwaysAccepts(c.Rules, &etherType)
}

// alwaysAccepts evaluates a table of which only the ethertype is known, or not even
// that: matched and maybe are the match state of some possible frame.
func alwaysAccepts(rules []Rule, etherType *uint16) bool {
	canMatch, canFail := true, false
	for i := range rules {
		r := &rules[i]
		if r.Type > lastAction {
			if !canMatch && !r.Or {
				continue
			}
			yes, no := true, true // what the match may yield
			if r.Type == MatchEtherType && etherType != nil {
				yes = (be.Uint16(r.Field) == *etherType) != r.Not
				no = !yes
			}
			if r.Or {
				canMatch, canFail = canMatch || yes, canFail && no
			} else {
				canMatch, canFail = canMatch && yes, canFail || no
			}
			continue
		}
		switch {
		case r.Type == ActionAccept || r.Type == ActionPriority:
			if canMatch && !canFail {
				return true
			}
		case r.Type == ActionTee || r.Type == ActionWatch || r.Type == ActionRedirect:
			return false // even if it isn't taken it may decide (chapter 03 §6.4)
		case r.Type == ActionDrop || r.Type == ActionBreak:
			if canMatch {
				return false
			}
		}
		canMatch, canFail = true, false
	}
	return false
}
