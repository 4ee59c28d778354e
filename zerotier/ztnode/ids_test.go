package ztnode

import (
	"encoding/json"
	"testing"
)

func TestAddressOf(t *testing.T) {
	// chapter 04 §15.6: the example of a network and a member.
	const network, member = 0x9778dd29dd246907, 0xfcd8055969
	mac := MAC{0x06, 0x95, 0xfc, 0xd8, 0x70, 0xb4}
	if got := AddressOf(network, mac); got != member {
		t.Errorf("got %s, want fcd8055969", got)
	}
	if got := MACOf(network, member); got != mac {
		t.Errorf("got %s, want %s", got, mac)
	}
}

func TestText(t *testing.T) {
	type words struct {
		Network NetworkID
		MAC     MAC
	}
	for _, tt := range []struct {
		text string
		want words
		ok   bool
	}{
		{`{"Network":"8056c2e21c000001","MAC":"02:00:00:00:00:0a"}`, words{0x8056c2e21c000001, MAC{2, 5: 10}}, true},
		{`{"Network":"0000000000000000","MAC":"00:00:00:00:00:00"}`, words{}, true}, // none
		{`{"Network":"8056c2e21c","MAC":"02:00:00:00:00:0a"}`, words{}, false},
		{`{"Network":"8056c2e21c00000g","MAC":"02:00:00:00:00:0a"}`, words{}, false},
		{`{"Network":"8056c2e21c000001","MAC":"02:00:00:00:00:0a:00:01"}`, words{}, false},
	} {
		var got words
		err := json.Unmarshal([]byte(tt.text), &got)
		if (err == nil) != tt.ok || tt.ok && got != tt.want {
			t.Errorf("%s: %+v, %v", tt.text, got, err)
		}
		if b, err := json.Marshal(got); tt.ok && (err != nil || string(b) != tt.text) {
			t.Errorf("%s comes back as %s, %v", tt.text, b, err)
		}
	}
	for text, want := range map[string]NetworkID{"8056C2E21C000001": 0x8056c2e21c000001, "0000000000000000": 0, "0x8056c2e21c0000": 0, "": 0} {
		if got, err := ParseNetworkID(text); got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %s, %v", text, got, err)
		}
	}
}
