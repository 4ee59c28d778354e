package zerotier_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"log"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"ztgate/zerotier"
	"ztgate/zerotier/controller"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/ztnode"
)

// Identities of the example; [identity.Generate] makes new ones, and so does
// [zerotier.New] in a home without.
const (
	officeSecret = "2d50cb849f:0:a7a865b2571b281f67236f787c0607a873bfd79a04b1a780c86a35d8d1d4053166e44ce51d51b978de22c6c4745b14fd432ebbf1abefb6ca0a38242615b2abd0" +
		":6f6898f2e39debb424f2bf2eee8ee55b4730c3b47c55bd8ffc9a7cc0ddb305a61d9e76d1959a07625f69807dde3d439eddb6180da96675e706dd0ba9a370c488"
	gatewaySecret = "a3de8493ea:0:a3fc807a5c8f837bd7984593cc03c71f6230e33a4194579a4bbfe1411dca027834426e3fce183ceba73b31c97ed601bc019dde3145a080de3ca2b3e831a75958" +
		":06d3c61b13a1e8031fd4533534980575b90e3a5ecc3b374fda2e6520d3e91a7143c72b9c522352c11d4deb9b837f96e6ac4caef55d4b63aa23466b288c7ed85e"
)

// Two nodes meet in a network and one sends the other a frame. The first one is
// the root of a planet of their own and the network's controller, so that nobody
// else is asked anything: all of it stays on this host.
func Example() {
	dir, err := os.MkdirTemp("", "zerotier")
	check(err)
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithCancel(context.Background())

	id, err := identity.Parse(officeSecret)
	check(err)
	at := freePort()
	planet := vl1.NewPlanet(1, 1, []vl1.Root{{Identity: id.Public(), Endpoints: []netip.AddrPort{at}}}, vl1.Key{}).Append(nil)
	ended, received := make(chan error, 2), make(chan string, 100)
	office := start(ctx, ended, zerotier.Config{
		Home: home(dir, "office", officeSecret), Port: int(at.Port()), Planet: planet, Controller: true,
		OnFrames: func(_ uint64, frames [][]byte) {
			for _, f := range frames {
				received <- string(f[14:])
			}
		},
	})
	gateway := start(ctx, ended, zerotier.Config{Home: home(dir, "gateway", gatewaySecret), Planet: planet})

	record := controller.DefaultNetwork()
	record.Private = false
	network, err := office.Controller().CreateNetwork(record)
	check(err)
	nwid := ztnode.NetworkID(network.ID)
	from, to := join(gateway, nwid), join(office, nwid)
	fmt.Println("joined:", from.Status, to.Status)

	// The frame is lost while the nodes don't have each other's credentials.
	frame := make([]byte, zerotier.Headroom, 128)
	frame = append(append(frame, to.MAC[:]...), from.MAC[:]...)
	frame = binary.BigEndian.AppendUint16(frame, 0x88b5)
	frame = append(frame, "hello"...)
	for again := time.NewTicker(50 * time.Millisecond); ; <-again.C {
		b := append([]byte(nil), frame...) // WriteFrames may change it
		_, err := gateway.WriteFrames(uint64(nwid), [][]byte{b}, []int{len(b) - zerotier.Headroom}, zerotier.Headroom)
		check(err)
		if len(received) > 0 {
			fmt.Println("received:", <-received)
			break
		}
	}

	cancel()
	check(<-ended)
	check(<-ended)
	// Output:
	// joined: OK OK
	// received: hello
}

// start runs a node on a loopback address until ctx ends, and says so then.
func start(ctx context.Context, ended chan<- error, cfg zerotier.Config) *zerotier.Node {
	cfg.Bind = []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	n, err := zerotier.New(cfg)
	check(err)
	go func() { ended <- n.Run(ctx) }()
	<-n.Ready()
	return n
}

// join joins a network and waits for its configuration.
func join(n *zerotier.Node, id ztnode.NetworkID) ztnode.Network {
	changes, stop := n.Watch()
	defer stop()
	check(n.Join(id))
	for {
		if network, _ := n.Network(id); network.Status == ztnode.StatusOK {
			return network
		}
		<-changes
	}
}

// home makes the directory of a node.
func home(dir, name, secret string) string {
	dir = filepath.Join(dir, name)
	check(os.Mkdir(dir, 0o700))
	check(os.WriteFile(filepath.Join(dir, "identity.secret"), []byte(secret), 0o600))
	return dir
}

// freePort is where the root will be: a planet says that before the root runs.
func freePort() netip.AddrPort {
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	check(err)
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
