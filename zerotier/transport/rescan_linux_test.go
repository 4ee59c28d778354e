//go:build linux && !portableudp

package transport

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"ztgate/internal/ownnet"
	"ztgate/internal/testwait"
)

// Addresses come and go at run time. The test runs itself in a network namespace
// of its own.
func TestFollowAddresses(t *testing.T) { ownnet.Run(t, followAddresses) }

func followAddresses(t *testing.T) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer0"}))
	var links []netlink.Link
	for _, name := range []string{"eth0", "peer0"} {
		l, err := netlink.LinkByName(name)
		must(err)
		must(netlink.LinkSetUp(l))
		links = append(links, l)
	}
	addr := func(s string) *netlink.Addr {
		a, err := netlink.ParseAddr(s)
		must(err)
		return a
	}
	must(netlink.AddrAdd(links[0], addr("10.9.0.1/24")))

	told := make(chan struct{}, 100)
	u, err := Open(Config{OnRescan: func() { told <- struct{}{} }})
	must(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- u.Run(ctx, func(int, SocketID, netip.AddrPort, []byte) {}, func(int) {}) }()

	expect := func(want ...string) {
		t.Helper()
		testwait.NoError(t, 3*time.Second, func() error {
			var got []string
			for _, ep := range u.LocalEndpoints() {
				if a := ep.Addr().String(); !slices.Contains(got, a) {
					got = append(got, a)
				}
			}
			slices.Sort(got)
			if !slices.Equal(got, want) || len(u.LocalEndpoints()) != 2*len(want) {
				return fmt.Errorf("sockets on %v, want %v", got, want)
			}
			return nil
		})
	}
	expect("10.9.0.1")
	must(netlink.AddrAdd(links[0], addr("10.9.1.2/24")))
	expect("10.9.0.1", "10.9.1.2")
	<-told
	must(netlink.AddrDel(links[0], addr("10.9.0.1/24")))
	expect("10.9.1.2")
	must(netlink.LinkSetDown(links[0]))
	expect()
	must(netlink.LinkSetUp(links[0]))
	expect("10.9.1.2")
	cancel()
	must(<-done)
}
