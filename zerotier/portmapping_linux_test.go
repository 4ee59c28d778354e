package zerotier

import (
	"context"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"ztgate/internal/ownnet"
	"ztgate/zerotier/controller"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/portmap"
	"ztgate/zerotier/vl1"
)

// A member hears of a mapped port and tries it. The test runs itself in a network
// namespace of its own, where the external address is on another interface.
func TestMappingIsAnnounced(t *testing.T) { ownnet.Run(t, mappingIsAnnounced) }

// fakeMapper has the mappings that it is given.
type fakeMapper struct {
	list []portmap.Mapping
	runs chan bool
}

func (f *fakeMapper) Run(ctx context.Context) {
	f.runs <- true
	<-ctx.Done()
	f.runs <- false
}

func (*fakeMapper) NetworkChanged()               {}
func (f *fakeMapper) Mappings() []portmap.Mapping { return f.list }
func (*fakeMapper) Stats() (s portmap.Stats)      { return s }

func mappingIsAnnounced(t *testing.T) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	addresses := map[string][]string{"lo": {"127.0.0.1/8"}, "eth0": {"10.9.0.1/24", "10.9.0.2/24"}, "wan0": {"44.7.7.7/24"}}
	for name, list := range addresses {
		if name != "lo" {
			must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "-peer"}))
		}
		l, err := netlink.LinkByName(name)
		must(err)
		must(netlink.LinkSetUp(l))
		for _, s := range list {
			a, err := netlink.ParseAddr(s)
			must(err)
			if name != "lo" {
				must(netlink.AddrAdd(l, a))
			}
		}
	}
	router, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(44, 7, 7, 7)})
	must(err)
	defer router.Close()
	external := router.LocalAddr().(*net.UDPAddr).AddrPort()
	must(router.SetReadDeadline(time.Now().Add(30 * time.Second)))

	// One node is root and controller, the other is behind the router: what a root says
	// of itself doesn't count.
	root, err := identity.Parse(secrets(t)[0])
	must(err)
	const rootPort = 9993
	planet := vl1.NewPlanet(1, 1, []vl1.Root{{Identity: root.Public(), Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.9.0.1:9993")}}}, vl1.Key{}).Append(nil)
	var nodes []*Node
	ctx, cancel := context.WithCancel(t.Context())
	mapper := &fakeMapper{[]portmap.Mapping{{External: external, Port: 40000}}, make(chan bool, 2)}
	done := make(chan error, 2)
	for i, secret := range secrets(t)[:2] {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "identity.secret"), secret, 0o600)
		cfg := Config{Home: dir, Port: rootPort, Planet: planet, Controller: i == 0, Bind: []netip.Addr{netip.AddrFrom4([4]byte{10, 9, 0, byte(1 + i)})}}
		n, err := New(cfg)
		must(err)
		if i == 1 {
			n.mapper = mapper
		}
		nodes = append(nodes, n)
		go func() { done <- n.Run(ctx) }()
		<-n.Ready()
	}
	if !<-mapper.runs {
		t.Error("the mapper doesn't run")
	}
	if i := nodes[1].Info(); len(i.PortMappings) != 1 || !i.PortMapping || slices.Contains(i.Listening, external) {
		t.Errorf("shown: %+v", i)
	}
	rec := controller.DefaultNetwork()
	rec.Private = false
	net, err := nodes[0].Controller().CreateNetwork(rec)
	must(err)
	for _, n := range nodes {
		must(n.Join(net.ID))
	}
	// Frames make them trust each other; the first ones may come before the
	// configuration.
	go func() {
		for ctx.Err() == nil {
			to, _ := nodes[1].Network(net.ID)
			self, _ := nodes[0].Network(net.ID)
			frame := append(append(make([]byte, Headroom), to.MAC[:]...), self.MAC[:]...)
			frame = append(frame, 0x08, 0x00, 0x45)
			_, _ = nodes[0].WriteFrames(uint64(net.ID), [][]byte{frame}, []int{len(frame) - Headroom}, Headroom)
			time.Sleep(20 * time.Millisecond)
		}
	}()
	_, from, err := router.ReadFromUDPAddrPort(make([]byte, 2000))
	if err != nil {
		t.Fatalf("nobody tries the mapped port: %v", err)
	}
	if from.Addr().String() != "10.9.0.1" {
		t.Errorf("tried by %v", from)
	}
	cancel()
	for range nodes {
		must(<-done)
	}
	if <-mapper.runs {
		t.Error("the mapper runs on")
	}
}
