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
	"ztgate/zerotier/ztnode"
	"ztgate/zerotier/ztnode/home"
)

// The peer cache lists the newest records, and a peer that has no path any more keeps the
// endpoints of its last ones.
func TestPeerCache(t *testing.T) {
	dir, err := home.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	h := &store{dir}
	defer h.Close()
	var records []vl1.PeerRecord
	for i := range 5 {
		id, err := identity.Parse(fmt.Sprintf("%010x:0:%0128x", i+1, i+1))
		if err != nil {
			t.Fatal(err)
		}
		r := vl1.PeerRecord{Identity: id, ProtocolVersion: 12, Endpoints: []netip.AddrPort{netip.MustParseAddrPort("5.0.0.1:9993")}}
		if err := h.storePeer(r); err != nil {
			t.Fatal(err)
		}
		at := time.Now().Add(-time.Duration(i) * 9 * 24 * time.Hour) // the last one is too old
		if err := os.Chtimes(h.Path("peers.d", vl1.PeerFile(id.Address())), at, at); err != nil {
			t.Fatal(err)
		}
		records = append(records, r)
	}
	if err := os.WriteFile(h.Path("peers.d", "README"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := h.peers(3); !slices.Equal(got, []identity.Address{1, 2, 3}) {
		t.Errorf("newest three: %v", got)
	}
	if got := h.peers(9); !slices.Equal(got, []identity.Address{1, 2, 3, 4}) {
		t.Errorf("all: %v", got)
	}
	records[1].Endpoints = nil
	if err := h.storePeer(records[1]); err != nil {
		t.Fatal(err)
	}
	if r := h.peer(2); r == nil || len(r.Endpoints) != 1 {
		t.Errorf("after the path was lost: %+v", r)
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
