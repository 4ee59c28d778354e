package packet

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/internal/ownnet"
	"ztgate/internal/testwait"
)

const (
	proxied4, proxied6 = "172.31.0.250", "fd31::250"
	patience           = 10 * time.Second
)

// TestProxy: a real host finds addresses by ARP and neighbour discovery that our kernel
// doesn't have, and no others.
func TestProxy(t *testing.T) {
	ownnet.Run(t, func(t *testing.T) {
		client := newPlace(t)
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vpc0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(client.ns)}
		if err := netlink.LinkAdd(v); err != nil {
			t.Fatal(err)
		}
		if err := address("vpc0", "172.31.0.1/24", "fd31::1/64"); err != nil {
			t.Fatal(err)
		}
		client.address("eth0", clientAddr+"/24", clientAddr6+"/64")
		p, err := OpenProxy("vpc0")
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- p.Run(ctx) }()
		defer func() {
			stop()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}()
		ours, err := net.InterfaceByName("vpc0")
		if err != nil {
			t.Fatal(err)
		}
		// known returns the MAC that the client's kernel has for an address, asking for it.
		known := func(a string) (mac string) {
			_, _ = client.command("ping", "-c", "1", "-W", "1", a)
			client.do(func() error {
				l, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				list, err := netlink.NeighList(l.Attrs().Index, netlink.FAMILY_ALL)
				for _, n := range list {
					if n.IP.String() == a && n.State&(unix.NUD_FAILED|unix.NUD_INCOMPLETE) == 0 {
						mac = n.HardwareAddr.String()
					}
				}
				return err
			})
			return mac
		}
		for _, a := range []string{proxied4, proxied6} {
			if mac := known(a); mac != "" {
				t.Errorf("%s is at %s before anybody has it", a, mac)
			}
		}
		addrs := []netip.Addr{netip.MustParseAddr(proxied4), netip.MustParseAddr(proxied6)}
		if err := p.Set(addrs); err != nil {
			t.Fatal(err)
		}
		for _, a := range []string{proxied4, proxied6} {
			testwait.For(t, patience, a, func() bool { return known(a) == ours.HardwareAddr.String() })
		}
		if mac := known("172.31.0.251"); mac != "" {
			t.Errorf("somebody else's address is at %s", mac)
		}
		if r := p.Rival(); r != nil {
			t.Errorf("%s claims %s", r.MAC, r.Addr)
		}
		// Another host takes the address: that is noticed.
		client.address("eth0", proxied4+"/24")
		testwait.For(t, patience, "the other host to be noticed", func() bool {
			_, _ = client.command("ping", "-c", "1", "-W", "1", "-I", proxied4, "172.31.0.1")
			return p.Rival() != nil && p.Rival().Addr.String() == proxied4
		})
		if err := p.Set(nil); err != nil {
			t.Error(err)
		}
	})
}

// TestProxyMessages: what is malformed, or about others, isn't answered, and neither are
// claims but at a bounded rate.
func TestProxyMessages(t *testing.T) {
	ours, other := net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2}
	a4, a6 := netip.MustParseAddr(proxied4), netip.MustParseAddr(proxied6)
	p := &Proxy{start: time.Now()}
	set := &proxied{[]netip.Addr{a4, a6}, ours}
	p.set.Store(set)
	asker := &proxied{mac: other}
	ask4 := asker.arpFrame(1, netip.MustParseAddr(clientAddr), broadcastMAC, a4)
	answer := p.handle(ask4)
	if want := set.arpFrame(2, a4, [6]byte(other), netip.MustParseAddr(clientAddr)); !slices.Equal(answer, want) {
		t.Fatalf("got %x, want %x", answer, want)
	}
	solicit := func(src netip.Addr) []byte {
		f := asker.advertisement(a6, groupMAC(a6), netip.MustParseAddr("ff02::1:ff00:250"), false)
		s := src.As16()
		copy(f[14+8:], s[:])
		msg := f[14+40:]
		msg[0], msg[4], msg[2], msg[3] = solicitation, 0, 0, 0
		sum := sum6(src, netip.MustParseAddr("ff02::1:ff00:250"), msg)
		msg[2], msg[3] = byte(sum>>8), byte(sum)
		return f
	}
	ask6 := solicit(netip.MustParseAddr(clientAddr6))
	if answer := p.handle(ask6); len(answer) == 0 || answer[14+40] != advertising || answer[14+44]&0x40 == 0 {
		t.Errorf("got %x", answer)
	}
	if answer := p.handle(solicit(netip.IPv6Unspecified())); len(answer) == 0 || !strings.HasPrefix(net.HardwareAddr(answer[:6]).String(), "33:33:00") {
		t.Errorf("who wants the address for itself gets %x", answer)
	}
	for n := range ask4 {
		if a := p.handle(ask4[:n]); a != nil {
			t.Errorf("%d bytes of ARP: %x", n, a)
		}
	}
	for n := range ask6 {
		if a := p.handle(ask6[:n]); a != nil {
			t.Errorf("%d bytes of neighbour discovery: %x", n, a)
		}
	}
	for i := range ask6 {
		f := slices.Clone(ask6)
		f[i] ^= 0xff
		if a := p.handle(f); a != nil && i > 12 && i != 14+1 && i != 14+2 && i != 14+3 { // MACs, and the flow label
			t.Errorf("byte %d changed: %x", i, a)
		}
	}
	if a := p.handle(asker.arpFrame(1, netip.MustParseAddr(clientAddr), broadcastMAC, netip.MustParseAddr("172.31.0.251"))); a != nil {
		t.Errorf("about another address: %x", a)
	}
	claims := 0
	for range 100 {
		if p.handle(asker.arpFrame(1, a4, broadcastMAC, a4)) != nil {
			claims++
		}
	}
	if r := p.Rival(); claims != 1 || r == nil || r.Addr != a4 || !slices.Equal(r.MAC, other) {
		t.Errorf("%d claims are answered, %+v", claims, r)
	}
}
