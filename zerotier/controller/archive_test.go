package controller

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"ztgate/internal/disk"
	"ztgate/zerotier/vl2"
)

// TestFit: the reference may have stored more than it uses; what goes is said.
func TestFit(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	var n Network
	if err := n.UnmarshalJSON([]byte(`{"id":"0123456789000001","vendor":1,"clientId":""}`)); err != nil {
		t.Fatal(err)
	}
	n = Network{ID: n.ID, extra: n.extra, Name: strings.Repeat("x", 200), MulticastLimit: 1 << 20, SSOEnabled: true, RemoteTraceLevel: 3,
		IPAssignmentPools: []Pool{{addr("10.0.0.9"), addr("10.0.0.1")}, {addr("10.0.0.1"), addr("fd00::1")}, {addr("10.0.0.1"), addr("10.0.0.9")}}}
	for i := range vl2.MaxRoutes + 2 {
		n.Routes = append(n.Routes, Route{Target: prefix(fmt.Sprintf("10.%d.0.0/16", i))})
	}
	a := Archive{Networks: []Network{n}, Members: []Member{
		{Address: 1, Network: n.ID, IPAssignments: []netip.Addr{addr("10.0.0.5"), addr("192.0.2.1")}},
		{Address: 2, Network: n.ID, IPAssignments: []netip.Addr{addr("10.0.0.5")}, Identity: "nonsense"},
	}}
	notes, err := a.Fit()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"pool 10.0.0.9 to 10.0.0.1 is left out", "pool 10.0.0.1 to fd00::1 is left out", "2 of its routes are left out",
		"its name is cut", "multicastLimit 1048576 becomes 65535", "single sign-on", "remote trace", "the key vendor is kept",
		"10.0.0.5 is also the address of 0000000001", "192.0.2.1 is in no route", "its identity can't be used"} {
		found := 0
		for _, n := range notes {
			if strings.Contains(n, want) {
				found++
			}
		}
		if found != 1 {
			t.Errorf("%d notes %q in %q", found, want, notes)
		}
	}
	if len(notes) != 11 {
		t.Errorf("%d notes: %q", len(notes), notes)
	}
	got := a.Networks[0]
	if len(got.IPAssignmentPools) != 1 || len(got.Routes) != vl2.MaxRoutes || len(got.Name) != maxName || got.MTU != vl2.DefaultMTU {
		t.Errorf("%+v", got)
	}
}

// TestArchive: what a controller stored is read as it is, also while it runs.
func TestArchive(t *testing.T) {
	r := newRig(t)
	n := r.create(nil)
	r.authorize(n.ID, "alice", "bob")
	r.join("alice", n.ID)
	a, err := ReadArchive(nil, r.dir)
	if err != nil || len(a.Networks) != 1 || len(a.Members) != 2 {
		t.Fatalf("%+v, %v", a, err)
	}
	if now := r.now.UnixMilli(); a.LastTimestamp(nil, r.dir) < now {
		t.Errorf("last time stamp %d, want at least %d", a.LastTimestamp(nil, r.dir), now)
	}
	if notes, err := a.Fit(); err != nil || len(notes) != 0 {
		t.Errorf("%q, %v", notes, err)
	}
	r.dir = t.TempDir()
	if err := a.Write(disk.OS{}, r.dir); err != nil {
		t.Fatal(err)
	}
	want := r.c.Members(n.ID)
	r.restart()
	for i, m := range r.c.Members(n.ID) {
		if same, err := equal(m, want[i]); err != nil || !same {
			t.Errorf("%+v, want %+v", m, want[i])
		}
	}
	r.config(r.join("alice", n.ID), "alice", false)
	if a, err := ReadArchive(nil, t.TempDir()); err != nil || len(a.Networks) != 0 {
		t.Errorf("an empty directory: %+v, %v", a, err)
	}
}
