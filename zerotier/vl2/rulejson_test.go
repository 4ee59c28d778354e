package vl2

import (
	"bytes"
	"encoding/json"
	"testing"

	"ztgate/zerotier/internal/testvec"
)

// TestRuleJSONRecords compares the rules of controller records with the tables the
// reference made of them.
func TestRuleJSONRecords(t *testing.T) {
	var v struct {
		Configs []struct {
			Name       string      `json:"name"`
			Dictionary testvec.Hex `json:"dictionary_hex"`
			Record     struct {
				Rules []json.RawMessage `json:"rules"`
			} `json:"controller_record_network"`
		} `json:"configs"`
	}
	testvec.Load(t, "netconf.json", &v)
	seen := 0
	for _, c := range v.Configs {
		var rules []Rule
		for _, raw := range c.Record.Rules {
			var r Rule
			if err := json.Unmarshal(raw, &r); err != nil {
				t.Errorf("%s: %s: %v", c.Name, raw, err)
				continue
			}
			rules = append(rules, r)
			seen++
		}
		if got := AppendRules(nil, rules); !bytes.Equal(got, ParseDictionary(c.Dictionary)["R"]) {
			t.Errorf("%s:\ngot  %x\nwant %x", c.Name, got, ParseDictionary(c.Dictionary)["R"])
		}
	}
	if seen < 40 {
		t.Errorf("only %d rules in the records", seen)
	}
}

// TestRuleJSONTables takes every rule of the vectors through JSON and back.
func TestRuleJSONTables(t *testing.T) {
	var v struct {
		Tables []struct {
			Rules testvec.Hex `json:"rules_hex"`
		} `json:"table_cases"`
	}
	testvec.Load(t, "rules.json", &v)
	seen := make(map[uint8]bool)
	for _, c := range v.Tables {
		rules, err := ParseRules(c.Rules, MaxRules)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rules {
			b, err := json.Marshal(r)
			if err != nil {
				continue // reserved and unknown types have no JSON form
			}
			seen[r.Type] = true
			var again Rule
			if err := json.Unmarshal(b, &again); err != nil {
				if r.Type != MatchIntegerRange {
					t.Errorf("%s: %v", b, err)
				}
				continue
			}
			r.Field = r.Field[:fieldLen(r.Type)]
			if r.Type <= lastAction {
				r.Not, r.Or = false, false
			}
			if again.Type == MatchIPv4Source || again.Type == MatchIPv4Destination {
				r.Field = append(bytes.Clone(r.Field[:4]), min(r.Field[4], 32))
			}
			switch again.Type {
			case ActionTee, ActionWatch, ActionRedirect, MatchIPv6Source, MatchIPv6Destination, MatchIntegerRange, MatchICMP:
				continue // upper bits, lengths and unused bits aren't written
			}
			if !bytes.Equal(AppendRules(nil, []Rule{again}), AppendRules(nil, []Rule{r})) {
				t.Errorf("%s became %x, was %x", b, AppendRules(nil, []Rule{again}), AppendRules(nil, []Rule{r}))
			}
		}
	}
	if len(seen) < 33 {
		t.Errorf("only %d types", len(seen))
	}
}

func TestRuleJSON(t *testing.T) {
	good := []struct{ in, out string }{
		{`{"type":"ACTION_TEE","address":"4dd8dab0a9","length":64}`, `{"type":"ACTION_TEE","address":"4dd8dab0a9","flags":0,"length":64}`},
		{`{"type":"ACTION_REDIRECT","address":"4dd8dab0a9","flags":1}`, `{"type":"ACTION_REDIRECT","address":"4dd8dab0a9","flags":1}`},
		{`{"type":"ACTION_PRIORITY"}`, `{"type":"ACTION_PRIORITY"}`},
		{`{"type":"MATCH_ETHERTYPE","etherType":2048,"not":true}`, `{"type":"MATCH_ETHERTYPE","etherType":2048,"not":true,"or":false}`},
		{`{"type":"MATCH_MAC_SOURCE","mac":"02-00-00-1c-e2-c3","or":true}`, `{"type":"MATCH_MAC_SOURCE","mac":"02:00:00:1c:e2:c3","not":false,"or":true}`},
		{`{"type":"MATCH_IPV4_DEST","ip":"10.0.0.1/99"}`, `{"type":"MATCH_IPV4_DEST","ip":"10.0.0.1/32","not":false,"or":false}`},
		{`{"type":"MATCH_IPV6_SOURCE","ip":"fd00::/8"}`, `{"type":"MATCH_IPV6_SOURCE","ip":"fd00::/8","not":false,"or":false}`},
		{`{"type":"MATCH_ICMP","icmpType":8,"icmpCode":null}`, `{"type":"MATCH_ICMP","icmpType":8,"icmpCode":null,"not":false,"or":false}`},
		{`{"type":"MATCH_ICMP","icmpType":8,"icmpCode":3}`, `{"type":"MATCH_ICMP","icmpType":8,"icmpCode":3,"not":false,"or":false}`},
		{`{"type":"MATCH_IP_DEST_PORT_RANGE","start":22}`, `{"type":"MATCH_IP_DEST_PORT_RANGE","start":22,"end":22,"not":false,"or":false}`},
		{`{"type":"MATCH_CHARACTERISTICS","mask":2}`, `{"type":"MATCH_CHARACTERISTICS","mask":"0000000000000002","not":false,"or":false}`},
		{`{"type":"INTEGER_RANGE","start":"10","end":"1f","idx":4,"little":true,"bits":64}`, `{"type":"INTEGER_RANGE","start":"0000000000000010","end":"000000000000001f","idx":4,"little":true,"bits":64,"not":false,"or":false}`},
	}
	for _, tt := range good {
		var r Rule
		if err := json.Unmarshal([]byte(tt.in), &r); err != nil {
			t.Errorf("%s: %v", tt.in, err)
			continue
		}
		if len(r.Field) < fieldLen(r.Type) {
			t.Errorf("%s: field of %d bytes", tt.in, len(r.Field))
		}
		if b, err := json.Marshal(r); err != nil || string(b) != tt.out {
			t.Errorf("%s became %s, %v", tt.in, b, err)
		}
	}
	for _, in := range []string{
		`{}`, `{"type":"MATCH_NONSENSE"}`, `{"type":"ACTION_TEE"}`, `{"type":"MATCH_IPV4_SOURCE","ip":"fd00::1"}`, `{"type":"MATCH_IPV4_SOURCE"}`,
		`{"type":"MATCH_ETHERTYPE","etherType":65536}`, `{"type":"MATCH_ETHERTYPE","etherType":-1}`, `{"type":"MATCH_MAC_DEST","mac":"02"}`,
		`{"type":"INTEGER_RANGE","bits":0}`, `{"type":"INTEGER_RANGE","end":4294967296,"bits":8}`, `{"type":"MATCH_IPV6_DEST","ip":"fe80::1%eth0/64"}`,
	} {
		var r Rule
		if err := json.Unmarshal([]byte(in), &r); err == nil {
			t.Errorf("%s accepted", in)
		}
	}
}

func FuzzRuleJSON(f *testing.F) {
	f.Add([]byte(`{"type":"MATCH_IPV4_DEST","ip":"10.0.0.1/8","not":true}`))
	f.Add([]byte(`{"type":"INTEGER_RANGE","start":"10","end":"1f","idx":4,"little":true,"bits":64}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r, again Rule
		if json.Unmarshal(b, &r) != nil {
			return
		}
		text, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(text, &again); err != nil || !bytes.Equal(AppendRules(nil, []Rule{again}), AppendRules(nil, []Rule{r})) {
			t.Errorf("%s became %+v, %v", text, again, err)
		}
		own := &NetworkConfig{Rules: []Rule{r}}
		Outbound(udpFrame(), own, nil, false)
	})
}
