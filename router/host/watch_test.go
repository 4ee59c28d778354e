package host

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"ztgate/internal/nettest"
	"ztgate/zerotier/ztnode"
)

// changes reports whether a watch tells of a change soon, and takes all that it tells.
func changes(w *Watch) bool {
	select {
	case <-w.Changed():
	case <-time.After(5 * time.Second):
		return false
	}
	return true
}

// TestWatch: changes of all kinds are told, also after more of them than the kernel
// keeps.
func TestWatch(t *testing.T) {
	inNamespace(t)
	k := openLinks(t, "ztgt0")[0]
	w, err := OpenWatch()
	if err != nil {
		t.Fatal(err)
	}
	many := make([]ztnode.Route, 3000)
	for i := range many {
		many[i].Target = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)
	}
	if err := k.SetRoutes(many); err != nil { // nobody listens yet
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	if !changes(w) {
		t.Fatal("a flood of changes isn't told")
	}
	rule := netlink.NewRule()
	rule.Table, rule.Priority = 99, 1000
	for _, tt := range []struct {
		name   string
		change func() error
	}{
		{"address", func() error { return k.SetAddresses(nettest.Prefixes("100.127.255.1/32")) }},
		{"route", func() error { return k.SetRoutes(many[:1]) }},
		{"rule", func() error { return netlink.RuleAdd(rule) }},
		{"MTU", func() error { return k.SetMTU(1400) }},
		{"down", func() error { return netlink.LinkSetDown(k.l) }},
		{"up", func() error { return k.nl.LinkSetUp(k.l) }},
	} {
		for len(w.Changed()) > 0 { // of the one before
			<-w.Changed()
		}
		if err := tt.change(); err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if !changes(w) {
			t.Errorf("%s isn't told", tt.name)
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Errorf("run: %v", err)
	}
	w.Close()
}

// TestSetAddressesIsQuiet: what is there already isn't set again, which would be told
// as a change.
func TestSetAddressesIsQuiet(t *testing.T) {
	inNamespace(t)
	k := openLinks(t, "ztgt0")[0]
	list := nettest.Prefixes("100.127.255.1/32", "100.127.255.2/32") // those of IPv6 are told again when they are usable
	if err := k.SetAddresses(list); err != nil {
		t.Fatal(err)
	}
	updates := make(chan netlink.AddrUpdate, 10)
	done := make(chan struct{})
	if err := netlink.AddrSubscribe(updates, done); err != nil {
		t.Fatal(err)
	}
	if err := k.SetAddresses(list); err != nil {
		t.Fatal(err)
	}
	if err := k.SetAddresses(list[:1]); err != nil {
		t.Fatal(err)
	}
	if u := <-updates; u.NewAddr {
		t.Errorf("%v is set again", u.LinkAddress)
	}
	close(done)
	for range updates { // until the subscription ends
	}
}
