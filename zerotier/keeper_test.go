package zerotier

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
)

// New peers are stored once each, a bounded number per round, and again when they
// have been away or have another endpoint, but not when they lost one.
func TestKeeper(t *testing.T) {
	const count = keepRound + 10
	list := make([]vl1.PeerRecord, count)
	for i := range list {
		id, err := identity.Parse(fmt.Sprintf("%010x:0:%0128x", i+1, i+1))
		if err != nil {
			t.Fatal(err)
		}
		list[i].Identity = id
	}
	stored := map[identity.Address]int{}
	total := 0
	k := &keeper{store: func(r vl1.PeerRecord) { stored[r.Identity.Address()]++; total++ }}
	at := func(eps ...string) []vl1.PeerRecord {
		out := slices.Clone(list)
		for _, ep := range eps {
			out[3].Endpoints = append(out[3].Endpoints, netip.MustParseAddrPort(ep))
		}
		return out
	}
	rounds := []struct {
		list []vl1.PeerRecord
		want int // in all, after the round
	}{{list, keepRound}, {list, count}, {list, count}, {list[1:], count}, {list, count + 1},
		{at("5.0.0.1:1"), count + 2}, {list, count + 2}, {at("5.0.0.1:1"), count + 2}, {at("5.0.0.2:1", "5.0.0.1:1"), count + 3}, {nil, count + 3}}
	var got []int // before the round
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(len(rounds))*keepEvery+time.Second)
		defer cancel()
		k.run(ctx, func() []vl1.PeerRecord {
			got = append(got, total)
			return rounds[len(got)-1].list
		})
	})
	if len(got) != len(rounds) || len(stored) != count {
		t.Fatalf("%d rounds, %d peers stored", len(got), len(stored))
	}
	for i, n := range append(got[1:], total) {
		if n != rounds[i].want {
			t.Errorf("%d records stored after round %d, want %d", n, i, rounds[i].want)
		}
	}
}
