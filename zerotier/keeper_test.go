package zerotier

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
)

// New peers are stored once each, a bounded number per round, and again when they
// have been away.
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
	rounds := []struct {
		list []vl1.PeerRecord
		want int // in all, after the round
	}{{list, keepRound}, {list, count}, {list, count}, {list[1:], count}, {list, count + 1}, {nil, count + 1}}
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

// The peers written last come first, whatever else lies in the directory.
func TestLatestPeers(t *testing.T) {
	h := &home{dir: t.TempDir()}
	if err := os.Mkdir(h.path("peers.d"), 0o700); err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"0000000003.peer", "0000000001.peer", "rubbish", "0000000002.peer", "1.peer"} {
		path := h.path("peers.d", name)
		at := time.Unix(int64(1000+i), 0)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	for limit, want := range map[int][]identity.Address{10: {2, 1, 3}, 2: {2, 1}} {
		if got := h.latestPeers(limit); !slices.Equal(got, want) {
			t.Errorf("latest %d: got %v, want %v", limit, got, want)
		}
	}
	if got := (&home{dir: t.TempDir()}).latestPeers(10); got != nil {
		t.Errorf("without a cache: got %v", got)
	}
}
