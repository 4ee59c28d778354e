package gateway

import (
	"slices"
	"testing"

	"ztgate/zerotier/ztnode"
)

// TestJoinedOrder: home remembers who was joined first, also when one is joined again.
func TestJoinedOrder(t *testing.T) {
	home := t.TempDir()
	const a, b, c = ztnode.NetworkID(3), ztnode.NetworkID(1), ztnode.NetworkID(2)
	m, err := remember(home)
	if err != nil {
		t.Fatal(err)
	}
	for i, step := range []struct {
		id   ztnode.NetworkID
		join bool
		want []ztnode.NetworkID
	}{
		{a, true, []ztnode.NetworkID{a}},
		{b, true, []ztnode.NetworkID{a, b}},
		{a, true, []ztnode.NetworkID{a, b}},
		{c, false, []ztnode.NetworkID{a, b}},
		{c, true, []ztnode.NetworkID{a, b, c}},
		{a, false, []ztnode.NetworkID{b, c}},
		{a, true, []ztnode.NetworkID{b, c, a}},
	} {
		if err := m.join(step.id, step.join); err != nil {
			t.Fatal(err)
		}
		again, err := remember(home)
		if err != nil {
			t.Fatal(err)
		}
		for _, got := range [][]ztnode.NetworkID{m.joined(), again.joined()} {
			if !slices.Equal(got, step.want) {
				t.Errorf("step %d: joined %v, want %v", i+1, got, step.want)
			}
		}
	}
}
