package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"ztgate/router/admin"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/zerotier/ztnode"
)

// Mesh is a set of members and gateways around one root and one controller, each
// of them ours or a zerotier-one of some version, on one underlay network and a
// spare one.
type Mesh struct {
	*Topology
	Inet       *Namespace // holds the two underlay networks, a bridge each
	Root       *Node
	Controller *Node   // the root, unless it is separate
	Nodes      []*Node // without these

	opts   MeshOptions
	planet string
}

// MeshOptions say what a mesh is made of.
type MeshOptions struct {
	Binary   string // our own program
	Prefix   string // of names
	Libzt    string // a build of it with libzt, for members that want that
	LogLevel string // of our processes, default info
	Root     string // path of the zerotier-one to be root and controller, "" = ours
	Members  []MeshMember

	// A separate controller is a node of its own: the zerotier-one at a path, "" =
	// ours.
	Separate   bool
	Controller string

	Seal ztnode.SealedHello // of root and controller
}

// MeshMember is a node to be started.
type MeshMember struct {
	Name        string
	ZeroTierOne string // path of the zerotier-one it is, "" = ours
	Libzt       bool   // ours on libzt
	Spare       bool   // it is on the spare underlay network too
	Seal        ztnode.SealedHello

	// Gateway says that it has a VPC of its own with one host. Forwarded are the
	// TCP ports that are forwarded from its overlay address to the same ports of that host.
	Gateway   bool
	Forwarded []uint16

	controller bool // root or controller or both
}

// Interfaces of a node in the underlay.
const (
	MeshLink  = "eth-inet"
	MeshSpare = "eth-spare"

	sparePort = "-s" // after the name of the node
)

// MeshAddress returns the underlay address of a node: number 0 is the root, the
// members follow. Numbers up to 200 are free for roaming. Each is in a /24 of its
// own: a zerotier-one checks one new identity in 4 s for each of these, so that it
// would learn of a dozen neighbours within a minute only.
func MeshAddress(number int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(number + 1), 1}), 16)
}

func spareAddress(number int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(number + 1)}), 24)
}

// Node is a node of a mesh.
type Node struct {
	Name    string
	NS      *Namespace
	Address string // of the node, 10 hex digits
	Process *Process
	Home    string
	VPC     *Namespace // the host behind a gateway, else nil

	mesh   *Mesh
	spec   MeshMember
	number int    // of its underlay address
	real   string // path of the zerotier-one
	ours   *control.Client
	ref    *referenceAPI
}

// NetworkState is how a node sees a network it has joined.
type NetworkState struct {
	Status    string
	Device    string
	Addresses []netip.Prefix
}

// StartMesh starts root and members. Unless the first result is nil it must be
// closed, even with an error.
func StartMesh(ctx context.Context, o MeshOptions) (*Mesh, error) {
	if o.LogLevel == "" {
		o.LogLevel = "info"
	}
	t, err := New(ctx, o.Prefix)
	if err != nil {
		return nil, err
	}
	m := &Mesh{Topology: t, opts: o}
	if m.Inet, err = m.Namespace("inet"); err != nil {
		return m, err
	}
	if err := errors.Join(m.Inet.Bridge("br0"), m.Inet.Bridge("br1")); err != nil {
		return m, err
	}
	if m.Root, err = m.node(0, MeshMember{Name: "root", ZeroTierOne: o.Root, Seal: o.Seal, controller: true}); err != nil {
		return m, err
	}
	m.planet = filepath.Join(m.Dir, "planet")
	if _, err := admin.WritePlanet(admin.PlanetSpec{
		Roots: []string{fmt.Sprintf("%s=%s/%d", filepath.Join(m.Root.Home, "identity.public"), MeshAddress(0).Addr(), rootPort)},
		Now:   time.Now(),
	}, m.planet, filepath.Join(m.Dir, "planet.key"), false); err != nil {
		return m, err
	}
	if err := m.Root.Start(ctx); err != nil {
		return m, err
	}
	if m.Controller = m.Root; o.Separate {
		if m.Controller, err = m.node(1, MeshMember{Name: "controller", ZeroTierOne: o.Controller, Seal: o.Seal, controller: true}); err != nil {
			return m, err
		}
		if err := m.Controller.Start(ctx); err != nil {
			return m, err
		}
	}
	for _, spec := range o.Members {
		if _, err := m.Add(ctx, spec); err != nil {
			return m, err
		}
	}
	return m, nil
}

// Add starts one more member.
func (m *Mesh) Add(ctx context.Context, spec MeshMember) (*Node, error) {
	n, err := m.node(10+len(m.Nodes), spec)
	if err != nil {
		return nil, err
	}
	m.Nodes = append(m.Nodes, n)
	return n, n.Start(ctx)
}

// Host makes a host in the underlay with a home that holds an identity, but starts
// nothing on it and doesn't count it as a member. Its number is that of
// [MeshAddress].
func (m *Mesh) Host(name string, number int) (*Node, error) {
	return m.node(number, MeshMember{Name: name})
}

// Planet returns the path of the planet file.
func (m *Mesh) Planet() string { return m.planet }

func (m *Mesh) node(number int, spec MeshMember) (*Node, error) {
	n := &Node{Name: spec.Name, mesh: m, spec: spec, number: number, real: spec.ZeroTierOne}
	var err error
	if n.NS, err = m.Namespace(n.Name); err != nil {
		return nil, err
	}
	if err := errors.Join(Plug(n.NS, MeshLink, m.Inet, "br0", n.Name), n.NS.AddAddress(MeshLink, MeshAddress(number))); err != nil {
		return nil, err
	}
	if spec.Spare {
		if err := errors.Join(Plug(n.NS, MeshSpare, m.Inet, "br1", n.Name+sparePort), n.NS.AddAddress(MeshSpare, spareAddress(number))); err != nil {
			return nil, err
		}
	}
	if n.Home, err = m.Home(n.Name); err != nil {
		return nil, err
	}
	id, err := admin.NewIdentity(filepath.Join(n.Home, "identity.secret"), filepath.Join(n.Home, "identity.public"), false)
	if err != nil {
		return n, err
	}
	n.Address = id.Address
	if spec.Gateway {
		err = n.makeVPC()
	}
	return n, err
}

// makeVPC puts a host behind a gateway, with a default route through it.
func (n *Node) makeVPC() (err error) {
	if n.VPC, err = n.mesh.Namespace(n.Name + "vpc"); err != nil {
		return err
	}
	if err := Connect(n.NS, "eth-vpc", n.VPC, "eth0"); err != nil {
		return err
	}
	return errors.Join(
		n.NS.AddAddress("eth-vpc", gwVPC),
		n.VPC.AddAddress("eth0", clientVPC),
		n.VPC.AddRoute(netip.PrefixFrom(netip.IPv4Unspecified(), 0), gwVPC.Addr()),
		n.NS.Sysctl("net/ipv4/ip_forward", "1"),
	)
}

// VPCHost is the address of the host behind every gateway of a mesh.
var VPCHost = clientVPC.Addr()

// Real reports whether the node is a zerotier-one.
func (n *Node) Real() bool { return n.real != "" }

// Start starts the node, the first time or after it was stopped, and waits until
// it answers.
func (n *Node) Start(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if n.Real() {
		n.Process, n.ref, err = n.mesh.startReference(n.NS, n.Name, n.real, n.mesh.planet, n.spec.Seal == ztnode.SealedHelloAlways, nil)
		if err == nil && n.VPC != nil {
			err = handMade(ctx, n.NS, n.spec.Forwarded)
		}
	} else {
		err = n.startOurs()
	}
	if err != nil {
		return err
	}
	return until(ctx, func() error {
		if n.ref != nil {
			_, err = n.ref.address(ctx)
		} else {
			_, err = n.ours.Info(ctx)
		}
		return err
	})
}

func (n *Node) startOurs() error {
	socket := filepath.Join(n.Home, "ztgate.sock")
	command, more := "member", []string{"--tun", officeTUN}
	text := ""
	if n.spec.Seal != ztnode.SealedHelloOff {
		text = fmt.Sprintf("sealed_hello: %s\n", n.spec.Seal)
	}
	switch {
	case n.spec.controller:
		more = []string{"--controller", "--port", fmt.Sprint(rootPort)}
	case n.VPC != nil:
		text += forwardsText(n.spec.Forwarded)
		command, more = "run", []string{"--tun", gatewayTUN, "--source", vpcSources.String(), "--interface", "eth-vpc"}
	}
	if text != "" {
		config := filepath.Join(n.Home, "ztgate.yaml")
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			return err
		}
		more = append(more, "--config", config)
	}
	binary, node := n.mesh.opts.Binary, config.NodeGo
	if n.spec.Libzt {
		binary, node = n.mesh.opts.Libzt, config.NodeLibzt
	}
	args := append([]string{command, "--node", node, "--listen", "", "--planet", n.mesh.planet, "--log-level", n.mesh.opts.LogLevel, "--socket", socket}, more...)
	var err error
	n.Process, err = n.mesh.Topology.Start(n.NS, n.Name, binary, args...)
	n.ours = control.NewClient(socket)
	return err
}

// forwardsText is the configuration of a gateway of ours.
func forwardsText(ports []uint16) string {
	if len(ports) == 0 {
		return "forwards: []\n"
	}
	text := "forwards:\n"
	for _, p := range ports {
		text += fmt.Sprintf("  - {listen: \"tcp/%d\", to: \"%s:%d\", from: overlay, masquerade: false}\n", p, VPCHost, p)
	}
	return text
}

// Ping sends an echo request from the node's own address in the overlay and
// returns an error unless it is answered within a second or so.
func (n *Node) Ping(ctx context.Context, to netip.Addr) error {
	if n.VPC != nil && !n.Real() { // its addresses in the overlay are not the kernel's
		_, err := n.ours.Ping(ctx, control.PingRequest{Host: to.String(), TimeoutMS: 1000})
		return err
	}
	out, err := n.NS.Run(ctx, "ping", "-n", "-c", "1", "-W", "1", to.String())
	if err != nil {
		lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
		return fmt.Errorf("%s: no answer from %s: %w: %s", n.Name, to, err, lines[len(lines)-1])
	}
	return nil
}

// Renumber gives the node another address in the underlay, that of a number, and
// takes the one it had.
func (n *Node) Renumber(number int) error {
	err := errors.Join(n.NS.RemoveAddress(MeshLink, MeshAddress(n.number)), n.NS.AddAddress(MeshLink, MeshAddress(number)))
	n.number = number
	return err
}

// Become makes the node, which must be stopped, the other program at its next
// start, with the same home. An empty path means ours.
func (n *Node) Become(zerotierOne string) {
	n.real, n.ours, n.ref = zerotierOne, nil, nil
}

// Join joins a network.
func (n *Node) Join(ctx context.Context, id ztnode.NetworkID) error {
	if n.ref != nil {
		return n.ref.join(ctx, id)
	}
	_, err := n.ours.Join(ctx, id.String())
	return err
}

// Leave leaves a network.
func (n *Node) Leave(ctx context.Context, id ztnode.NetworkID) error {
	if n.ref != nil {
		return n.ref.leave(ctx, id)
	}
	_, err := n.ours.Leave(ctx, id.String())
	return err
}

// Network returns how the node sees a network.
func (n *Node) Network(ctx context.Context, id ztnode.NetworkID) (NetworkState, error) {
	if n.ref != nil {
		return n.ref.network(ctx, id)
	}
	list, err := n.ours.Networks(ctx)
	if err != nil {
		return NetworkState{}, err
	}
	for _, v := range list.Networks {
		if v.ID == id {
			return NetworkState{v.Status, v.Device, v.Addresses}, nil
		}
	}
	return NetworkState{}, fmt.Errorf("%s has not joined network %s", n.Name, id)
}

// Endpoints returns where the node reaches another directly, the preferred
// endpoint first.
func (n *Node) Endpoints(ctx context.Context, to *Node) ([]netip.AddrPort, error) {
	if n.ref != nil {
		return n.ref.endpoints(ctx, to.Address)
	}
	peers, err := n.ours.Peers(ctx)
	if err != nil {
		return nil, err
	}
	var out []netip.AddrPort
	for _, p := range peers.Peers {
		if p.Address != to.Address || p.Link != "DIRECT" {
			continue
		}
		for _, path := range p.Paths {
			switch {
			case path.Preferred:
				out = slices.Insert(out, 0, path.Endpoint)
			case !path.Expired:
				out = append(out, path.Endpoint)
			}
		}
	}
	return out, nil
}

// Unplug takes the node off an underlay network at the switch, where the node
// can't see it.
func (n *Node) Unplug(ctx context.Context, link string) error {
	return n.setPort(ctx, link, "nomaster")
}

// Replug undoes [Node.Unplug].
func (n *Node) Replug(ctx context.Context, link string) error {
	if link == MeshSpare {
		return n.setPort(ctx, link, "master", "br1")
	}
	return n.setPort(ctx, link, "master", "br0")
}

func (n *Node) setPort(ctx context.Context, link string, to ...string) error {
	port := n.Name
	if link == MeshSpare {
		port += sparePort
	}
	out, err := n.mesh.Inet.Run(ctx, "ip", append([]string{"link", "set", port}, to...)...)
	if err != nil {
		return fmt.Errorf("set port of %s of %s: %w: %s", link, n.Name, err, out)
	}
	return nil
}

// CreateNetwork makes a network at the controller. The patch has the keys
// of chapter 04 §7.
func (m *Mesh) CreateNetwork(ctx context.Context, patch any) (ztnode.NetworkID, error) {
	if m.Controller.ref != nil {
		rec, err := m.Controller.ref.createNetwork(ctx, patch)
		if err != nil {
			return 0, err
		}
		return networkOf(rec)
	}
	rec, err := m.Controller.ours.CreateNetwork(ctx, patch)
	if err != nil {
		return 0, err
	}
	return networkOf(rec.Record)
}

// SetNetwork changes a network at the controller.
func (m *Mesh) SetNetwork(ctx context.Context, id ztnode.NetworkID, patch any) error {
	if m.Controller.ref != nil {
		return m.Controller.ref.setNetwork(ctx, id, patch)
	}
	_, err := m.Controller.ours.SetNetwork(ctx, id.String(), patch)
	return err
}

// SetMember changes a member at the controller, with the keys of chapter 04 §8.
func (m *Mesh) SetMember(ctx context.Context, id ztnode.NetworkID, n *Node, patch any) error {
	if m.Controller.ref != nil {
		return m.Controller.ref.setMember(ctx, id, n.Address, patch)
	}
	_, err := m.Controller.ours.SetMember(ctx, id.String(), n.Address, patch)
	return err
}
