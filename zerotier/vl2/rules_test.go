package vl2

import (
	"bytes"
	"fmt"
	"testing"

	"ztgate/zerotier/identity"
)

func match(typ uint8, field ...byte) Rule { return Rule{Type: typ, Field: field} }

func not(r Rule) Rule {
	r.Not = true
	return r
}

// defaultRules is what a new network gets: drop what is neither IP nor ARP.
func defaultRules() []Rule {
	return []Rule{
		not(match(MatchEtherType, 0x08, 0x00)),
		not(match(MatchEtherType, 0x08, 0x06)),
		not(match(MatchEtherType, 0x86, 0xdd)),
		{Type: ActionDrop},
		{Type: ActionAccept},
	}
}

func TestAcceptsEtherType(t *testing.T) {
	accept, drop := Rule{Type: ActionAccept}, Rule{Type: ActionDrop}
	ip4, ports := match(MatchEtherType, 8, 0), match(MatchSourcePort, 0, 1, 0, 2)
	or := func(r Rule) Rule {
		r.Or = true
		return r
	}
	tests := []struct {
		name         string
		rules        []Rule
		all, v4, odd bool
	}{
		{"none", nil, false, false, false},
		{"accept", []Rule{accept}, true, true, true},
		{"drop", []Rule{drop, accept}, false, false, false},
		{"default", defaultRules(), false, true, false},
		{"drop some ports", []Rule{ports, drop, accept}, false, false, false},
		{"accept some ports first", []Rule{ports, accept, accept}, true, true, true},
		{"accept some ports only", []Rule{ports, accept}, false, false, false},
		{"always true by OR", []Rule{or(ip4), accept}, true, true, true},
		{"never true", []Rule{ip4, not(ip4), drop, accept}, false, true, true},
		{"either", []Rule{ip4, or(not(ip4)), accept}, false, true, true},
		{"break", []Rule{ports, {Type: ActionBreak}, accept}, false, false, false},
		{"priority", []Rule{{Type: ActionPriority}}, true, true, true},
		{"tee", []Rule{{Type: ActionTee, Field: make([]byte, 14)}, accept}, false, false, false},
		{"trailing matches", []Rule{ip4}, false, false, false},
		{"reserved action", []Rule{ports, {Type: 9}, accept}, true, true, true},
	}
	for _, tt := range tests {
		c := &NetworkConfig{Rules: tt.rules}
		if got := [3]bool{c.AcceptsAll(), c.AcceptsEtherType(EtherTypeIPv4), c.AcceptsEtherType(0x88b5)}; got != [3]bool{tt.all, tt.v4, tt.odd} {
			t.Errorf("%s: %v, want %v", tt.name, got, [3]bool{tt.all, tt.v4, tt.odd})
		}
	}
}

// FuzzAccepts compares the shortcut with the evaluation it stands for.
func FuzzAccepts(f *testing.F) {
	f.Add(AppendRules(nil, defaultRules()), make([]byte, 60), uint16(EtherTypeIPv4), true)
	f.Add([]byte{0x65, 2, 8, 0, 1, 0}, make([]byte, 60), uint16(EtherTypeIPv6), false)
	f.Fuzz(func(t *testing.T, table, frame []byte, etherType uint16, inbound bool) {
		rules, err := ParseRules(table, MaxRules)
		if err != nil {
			return
		}
		again, err := ParseRules(AppendRules(nil, rules), MaxRules)
		if err != nil || !bytes.Equal(AppendRules(nil, again), AppendRules(nil, rules)) {
			t.Errorf("rules do not survive a round trip: %v", err)
		}
		own := &NetworkConfig{Member: 1, Rules: rules, Tags: []*Tag{{ID: 1, Value: 1}}}
		other := &Membership{tags: []*Tag{{ID: 1, Value: 2}}}
		info := &FrameInfo{Inbound: inbound, EtherType: etherType, Data: frame, Source: 2, Destination: 1}
		if !inbound {
			info.Source, info.Destination = 1, 2
		}
		if !own.AcceptsEtherType(etherType) {
			if own.AcceptsAll() {
				t.Error("accepts all, but not this")
			}
			return
		}
		if ev := Evaluate(rules, info, own, other); ev.Verdict != VerdictAccept || ev.Copy.To != 0 || ev.Destination != info.Destination {
			t.Errorf("%+v from a table said to accept", ev)
		}
	})
}

// bigTable has n entries of which none decides before the last.
func bigTable(n int) []Rule {
	var out []Rule
	for i := 0; len(out) < n-1; i++ {
		switch i % 4 {
		case 0:
			out = append(out, match(MatchIPv4Source, 10, byte(i), 0, 0, 24))
		case 1:
			out = append(out, match(MatchSourcePort, 0, 1, 0, 2))
		case 2:
			out = append(out, match(MatchCharacteristics, 0, 0, 0, 0, 0, 0, 0, 2))
		case 3:
			out = append(out, Rule{Type: ActionDrop})
		}
	}
	return append(out[:n-2], Rule{Type: lastAction}, Rule{Type: ActionAccept})
}

func udpFrame() *FrameInfo {
	d := make([]byte, 1400)
	d[0], d[9] = 0x45, 17
	copy(d[12:], []byte{10, 147, 17, 5, 10, 147, 17, 6})
	return &FrameInfo{Source: 2, Destination: 1, SourceMAC: MAC{2}, DestinationMAC: MAC{4}, EtherType: EtherTypeIPv4, Data: d}
}

func TestFilterDoesNotAllocate(t *testing.T) {
	own := &NetworkConfig{
		ID: 1, Member: 1, Timestamp: 1e12, TimeDelta: 1000, Flags: FlagNDPEmulation,
		Tags: []*Tag{{ID: 1, Value: 1}}, COOs: []*COO{{Things: make([]Thing, 3)}},
	}
	own.Addresses = append(own.Addresses, SixPlane(1, 1), RFC4193(1, 1))
	for _, typ := range []uint8{
		MatchSourceAddress, MatchIPv4Source, MatchIPv6Source, MatchIPTOS, MatchIPProtocol, MatchICMP, MatchSourcePort,
		MatchCharacteristics, MatchFrameSize, MatchRandom, MatchTagsEqual, MatchTagSender, MatchIntegerRange,
	} {
		field := bytes.Repeat([]byte{0xff}, fieldLen(typ))
		own.Rules = append(own.Rules, Rule{Type: typ, Field: field}, Rule{Type: lastAction})
	}
	own.Rules = append(own.Rules, Rule{Type: ActionTee, Field: make([]byte, 14)})
	capability := &Capability{ID: 1, Timestamp: 1e12, Rules: []Rule{{Type: ActionAccept}}}
	own.Capabilities = []*Capability{capability}
	other := &Membership{tags: []*Tag{{ID: 1, Value: 2, Timestamp: 1e12}}, caps: []*Capability{capability}, void: map[voidKey]int64{{TypeTag, 9}: 1}}
	for _, etherType := range []uint16{EtherTypeIPv4, EtherTypeIPv6, EtherTypeARP} {
		f := udpFrame()
		f.EtherType = etherType
		accepted := 0
		n := testing.AllocsPerRun(100, func() {
			in := *f
			in.Inbound = true
			if d := Inbound(&in, own, other); d.Result == FilterAccept {
				accepted++
			}
			if d := Outbound(f, own, other, false); d.Result == FilterAccept {
				accepted++
			}
		})
		if n != 0 || accepted == 0 {
			t.Errorf("ethertype %04x: %v allocations, %d accepted", etherType, n, accepted)
		}
	}
}

func BenchmarkInbound(b *testing.B) {
	tables := []struct {
		name  string
		rules []Rule
	}{
		{"1", []Rule{{Type: ActionAccept}}},
		{"default", defaultRules()},
		{"64", bigTable(64)},
		{"1024", bigTable(1024)},
	}
	for _, tt := range tables {
		own := &NetworkConfig{ID: 1, Member: 1, Rules: tt.rules}
		f := udpFrame()
		f.Inbound = true
		var m Membership
		b.Run(tt.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if d := Inbound(f, own, &m); d.Result != FilterAccept {
					b.Fatal("dropped")
				}
			}
		})
	}
}

// TestHeaderChain bounds the work that a long chain of IPv6 headers causes: it is
// walked once, not by every rule.
func TestHeaderChain(t *testing.T) {
	d := make([]byte, 40+8*1200) // destination options all the way
	d[6] = 60
	for i := 40; i < len(d); i += 8 {
		d[i] = 60
	}
	e := evaluator{f: &FrameInfo{EtherType: EtherTypeIPv6, Data: d}}
	if _, _, ok := e.payload6(); ok {
		t.Error("endless chain accepted")
	}
	d[6] = 17
	if _, _, ok := e.payload6(); ok {
		t.Error("walked twice")
	}
}

func ExampleDecision() {
	own := &NetworkConfig{Member: 1, Rules: []Rule{
		{Type: ActionTee, Field: []byte{0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 4}},
		{Type: ActionAccept},
	}}
	f := &FrameInfo{Source: 1, Destination: 2, EtherType: EtherTypeIPv4, Data: make([]byte, 20)}
	d := Outbound(f, own, nil, false)
	for _, x := range d.Diversions() {
		fmt.Println(d.Result == FilterAccept, x.To == identity.Address(9), x.Length)
	}
	// Output: true true 4
}
