package zerotier

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
	"ztgate/zerotier/ztnode"
	"ztgate/zerotier/ztnode/home"
)

func testStore(t *testing.T) *store {
	dir, err := home.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dir.Close() })
	return newStore(dir, time.Now)
}

func record(t *testing.T, a identity.Address) vl1.PeerRecord {
	id, err := identity.Parse(fmt.Sprintf("%s:0:%0128x", a, uint64(a)))
	if err != nil {
		t.Fatal(err)
	}
	return vl1.PeerRecord{Identity: id, ProtocolVersion: 12, Endpoints: []netip.AddrPort{netip.MustParseAddrPort("5.0.0.1:9993")}}
}

func files(t *testing.T, s *store) (n int) {
	entries, err := os.ReadDir(s.Path("peers.d"))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// The peer cache lists the newest records, and a peer that has no path any more keeps the
// endpoints of its last ones.
func TestPeerCache(t *testing.T) {
	h, now := testStore(t), time.Now()
	var records []vl1.PeerRecord
	for i := range 5 {
		r := record(t, identity.Address(i+1))
		if err := h.storePeer(r, now); err != nil {
			t.Fatal(err)
		}
		at := now.Add(-time.Duration(i) * 9 * 24 * time.Hour) // the last one is too old
		if err := os.Chtimes(h.Path("peers.d", vl1.PeerFile(r.Identity.Address())), at, at); err != nil {
			t.Fatal(err)
		}
		records = append(records, r)
	}
	if err := os.WriteFile(h.Path("peers.d", "README"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.tidyPeers(now); err != nil {
		t.Fatal(err)
	}
	if got := h.peers(3); !slices.Equal(got, []identity.Address{1, 2, 3}) {
		t.Errorf("newest three: %v", got)
	}
	if got := h.peers(9); !slices.Equal(got, []identity.Address{1, 2, 3, 4}) {
		t.Errorf("all: %v", got)
	}
	if h.peer(5) != nil || files(t, h) != 5 {
		t.Error("what is too old is kept, or more than that was removed")
	}
	records[1].Endpoints = nil
	if err := h.storePeer(records[1], now); err != nil {
		t.Fatal(err)
	}
	if r := h.peer(2); r == nil || len(r.Endpoints) != 1 {
		t.Errorf("after the path was lost: %+v", r)
	}
}

// However many peers there are, so many have files; the oldest go, at a start and when
// another one comes. A record of a clock that was set back is not the newest for ever.
func TestPeerCacheIsBounded(t *testing.T) {
	h, now := testStore(t), time.Now().Add(-time.Hour)
	h.cached.most = 100
	for i := range 100 {
		if err := h.storePeer(record(t, identity.Address(i+1)), now.Add(time.Duration(i)*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 50 {
		if err := h.storePeer(record(t, identity.Address(1000+i)), now.Add(time.Hour+time.Duration(i)*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	if n := files(t, h); n != 100 || h.peer(50) != nil || h.peer(51) == nil || h.peer(1049) == nil {
		t.Errorf("%d files, or the wrong ones", n)
	}
	future := now.Add(365 * 24 * time.Hour)
	if err := os.Chtimes(h.Path("peers.d", vl1.PeerFile(60)), future, future); err != nil {
		t.Fatal(err)
	}
	again := newStore(h.Dir, time.Now)
	again.cached.most = 10
	start := time.Now().Add(time.Minute)
	if err := again.tidyPeers(start); err != nil {
		t.Fatal(err)
	}
	if n := files(t, h); n != 10 {
		t.Errorf("%d files after the start", n)
	}
	for i := range 10 {
		if err := again.storePeer(record(t, identity.Address(2000+i)), start.Add(time.Duration(i+1)*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	if h.peer(60) != nil {
		t.Error("a record from the future outlived all others")
	}
}

// A configuration that comes while a network is left does not make it joined again.
func TestLeftNetworkStaysLeft(t *testing.T) {
	h := testStore(t)
	cfg := &vl2.NetworkConfig{ID: 0x48ccec18eb000001, Member: 1}
	joined := func() bool {
		list, err := h.networks()
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(list, func(n storedNetwork) bool { return n.id == cfg.ID })
	}
	if err := h.rememberNetwork(cfg.ID); err != nil || !joined() {
		t.Fatal(err)
	}
	if err := h.storeNetwork(cfg.ID, cfg); err != nil || !joined() {
		t.Error(err)
	}
	if err := h.removeNetwork(cfg.ID); err != nil {
		t.Fatal(err)
	}
	if err := h.storeNetwork(cfg.ID, cfg); err != nil || joined() {
		t.Error("joined again", err)
	}
}

// TestTooManyNetworks: what is refused isn't remembered, and what a home remembers
// beyond the limit is left alone.
func TestTooManyNetworks(t *testing.T) {
	dir := t.TempDir()
	id := func(i int) ztnode.NetworkID { return 0x8056c2e21c000000 + ztnode.NetworkID(i) }
	open := func(configured ...ztnode.NetworkID) *Node {
		n, err := New(Config{Home: dir, Bind: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, NoSecondaryPort: true, Networks: configured})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	files := func() int {
		list, err := filepath.Glob(filepath.Join(dir, "networks.d", "*.conf"))
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	joined := func(n *Node) (out []ztnode.NetworkID) {
		for _, v := range n.Networks() {
			out = append(out, v.ID)
		}
		return out
	}
	n := open()
	for i := range 70 {
		err := n.Join(id(i + 1))
		if want := i >= ztnode.MaxNetworks; errors.Is(err, ztnode.ErrTooManyNetworks) != want || !want && err != nil {
			t.Fatalf("network %d: %v", i+1, err)
		}
	}
	if got := files(); got != ztnode.MaxNetworks {
		t.Errorf("%d files, want %d", got, ztnode.MaxNetworks)
	}
	if err := n.Join(id(1)); err != nil {
		t.Errorf("joined already: %v", err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	// More than that in home, as left by another program.
	now := time.Now()
	for i := range 70 {
		p := filepath.Join(dir, "networks.d", id(i+1).String()+".conf")
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(p, now, now.Add(-time.Duration(i)*time.Minute)); err != nil { // the last is the oldest
			t.Fatal(err)
		}
	}
	n = open(id(2), id(100))
	var left []ztnode.NetworkID
	for i := range 7 { // 63 fit beside the configured one that isn't stored
		if x := id(8 - i); x != id(2) {
			left = append(left, x)
		}
	}
	left = append(left, id(1))
	if got := n.LeftOut(); !slices.Equal(got, left) {
		t.Errorf("left out %v, want %v", got, left)
	}
	if got := joined(n); len(got) != ztnode.MaxNetworks-1 || !slices.Contains(got, id(2)) {
		t.Errorf("%d joined: %v", len(got), got)
	}
	if err := n.Join(id(100)); err != nil {
		t.Errorf("a configured network: %v", err)
	}
	if got := files(); got != 71 {
		t.Errorf("%d files, want all 71", got)
	}
	if err := n.Leave(id(1)); err != nil {
		t.Error(err)
	}
	if got := files(); got != 70 || slices.Contains(n.LeftOut(), id(1)) {
		t.Errorf("%d files, left out %v", got, n.LeftOut())
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
}
