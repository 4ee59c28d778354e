package plan_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"ztgate/internal/nettest"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

// TestNATAddresses: clients leave from addresses that are ours on a network, and from no
// others.
func TestNATAddresses(t *testing.T) {
	office := ztnode.Network{ID: first, Status: ztnode.StatusOK, MTU: 2800, Addresses: nettest.Prefixes("10.0.0.1/24", "10.0.0.2/24", "fd00:10::1/64"),
		Routes: []ztnode.Route{
			{Target: netip.MustParsePrefix("10.50.0.0/24"), Via: netip.MustParseAddr("10.0.0.1")},
			{Target: netip.MustParsePrefix("10.50.0.16/28"), Via: netip.MustParseAddr("10.0.0.9")}, // a part of it through another member
			{Target: netip.MustParsePrefix("10.0.0.64/28"), Via: netip.MustParseAddr("10.0.0.2")},
			{Target: netip.MustParsePrefix("10.0.0.0/16"), Via: netip.MustParseAddr("10.0.0.1")}, // the subnet is longer
			{Target: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.0.0.1")},
			{Target: netip.MustParsePrefix("fd00:50::/64"), Via: netip.MustParseAddr("fd00:10::1")},
			{Target: netip.MustParsePrefix("172.31.0.0/16"), Via: netip.MustParseAddr("10.0.0.1")}, // the VPC, for the others
		}}
	other := ztnode.Network{ID: second, Status: ztnode.StatusOK, MTU: 2800, Addresses: nettest.Prefixes("10.60.0.1/24"),
		Routes: []ztnode.Route{{Target: netip.MustParsePrefix("10.50.0.0/25"), Via: netip.MustParseAddr("10.60.0.1")}}}
	for _, tt := range []struct {
		addresses, first, second string
		why                      string // "" = nothing is refused
	}{
		{"10.0.0.1, 10.0.0.2", "[10.0.0.1 10.0.0.2]", "[]", ""},
		{"fd00:10::1", "[fd00:10::1]", "[]", ""},
		{"10.50.0.0/30, 10.50.0.2", "[10.50.0.0 10.50.0.1 10.50.0.2 10.50.0.3]", "[]", ""},
		{"fd00:50::5", "[fd00:50::5]", "[]", ""},
		{"10.0.0.70", "[10.0.0.70]", "[]", ""},
		{"10.60.0.1, 10.0.0.1", "[10.0.0.1]", "[10.60.0.1]", ""},
		{"10.0.0.3", "[]", "[]", "no network has given it to us"},
		{"10.50.0.17", "[]", "[]", "which was named first"}, // of a network that routes it to somebody else
		{"10.70.0.1", "[]", "[]", "no network has given it to us"},
		{"192.0.2.1", "[]", "[]", "no network has given it to us"}, // a default route through us says nothing
		{"172.31.0.20", "[]", "[]", "inside the VPC's own"},
		{"127.0.0.1", "[]", "[]", "loopback"},
		{"224.0.0.1", "[]", "[]", "multicast"},
	} {
		cfg := load(t, fmt.Sprintf("nat: {addresses: [%s]}\n", tt.addresses))
		p := plan.Make(plan.Input{Config: cfg, Networks: []ztnode.Network{office, other}, Host: host()})
		if got := fmt.Sprint(p.Networks[0].NAT); got != tt.first {
			t.Errorf("%s: %s, want %s", tt.addresses, got, tt.first)
		}
		if got := fmt.Sprint(p.Networks[1].NAT); got != tt.second {
			t.Errorf("%s on the other network: %s, want %s", tt.addresses, got, tt.second)
		}
		var got []string
		for _, x := range texts(p) {
			if strings.Contains(x, "nat.addresses") {
				got = append(got, x)
			}
		}
		if text := strings.Join(got, "\n"); len(got) > 1 || tt.why == "" != (text == "") || !strings.Contains(text, tt.why) {
			t.Errorf("%s: %q, want %q", tt.addresses, text, tt.why)
		}
		for _, n := range p.Networks {
			for _, a := range n.NAT {
				if r, ok := p.Route(a); !ok || r.Network != n.ID {
					t.Errorf("%s: %v has the route %v", tt.addresses, a, r)
				}
			}
		}
	}
	// While a network doesn't work, it may be the one.
	cfg := load(t, "nat: {addresses: [10.70.0.1]}\n")
	other.Status = ztnode.StatusRequesting
	if p := plan.Make(plan.Input{Config: cfg, Networks: []ztnode.Network{office, other}, Host: host()}); len(p.Problems) > 0 && strings.Contains(strings.Join(texts(p), "\n"), "nat.addresses") {
		t.Errorf("%q", texts(p))
	}
	// What is never forwarded is an error of the file.
	if err := plan.Check(load(t, "nat: {addresses: [127.0.0.1]}\n")); err == nil {
		t.Error("a loopback address is no error")
	}
}
