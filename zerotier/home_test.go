package zerotier

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/ztnode/home"
)

// The peer cache lists the newest records, and a peer that has no path any more keeps the
// endpoints of its last ones.
func TestPeerCache(t *testing.T) {
	dir, err := home.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	h := &store{dir, time.Now}
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
