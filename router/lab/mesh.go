package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"ztgate/router"
)

// Mesh is a set of plain members around one root with a controller, each of them
// ours or a zerotier-one of some version, on one underlay network and a spare one.
type Mesh struct {
	*Topology
	Inet  *Namespace // holds the two underlay networks, a bridge each
	Root  *Node
	Nodes []*Node // without the root

	opts   MeshOptions
	planet string
}

// MeshOptions say what a mesh is made of.
type MeshOptions struct {
	Binary   string // our own program
	Prefix   string // of names
	LogLevel string // of our processes, default info
	Root     string // path of the zerotier-one to be root and controller, "" = ours
	Members  []MeshMember
}

// MeshMember is a node to be started.
type MeshMember struct {
	Name        string
	ZeroTierOne string // path of the zerotier-one it is, "" = ours
	Spare       bool   // it is on the spare underlay network too
}

// Interfaces of a node in the underlay.
const (
	MeshLink  = "eth-inet"
	MeshSpare = "eth-spare"

	sparePort = "-s" // after the name of the node
)

// MeshAddress returns the underlay address of a node: number 0 is the root, the
// members follow. Numbers up to 200 are free for roaming.
func MeshAddress(number int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(number + 1)}), 24)
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

	mesh *Mesh
	real string // path of the zerotier-one
	ours *router.Client
	ref  *referenceAPI
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
	if m.Root, err = m.node(0, MeshMember{Name: "root", ZeroTierOne: o.Root}); err != nil {
		return m, err
	}
	m.planet = filepath.Join(m.Dir, "planet")
	if _, err := router.WritePlanet(router.PlanetSpec{
		Roots: []string{fmt.Sprintf("%s=%s/%d", filepath.Join(m.Root.Home, "identity.public"), MeshAddress(0).Addr(), rootPort)},
		Now:   time.Now(),
	}, m.planet, filepath.Join(m.Dir, "planet.key"), false); err != nil {
		return m, err
	}
	if err := m.Root.Start(ctx); err != nil {
		return m, err
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
	n := &Node{Name: spec.Name, mesh: m, real: spec.ZeroTierOne}
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
	id, err := router.NewIdentity(filepath.Join(n.Home, "identity.secret"), filepath.Join(n.Home, "identity.public"), false)
	n.Address = id.Address
	return n, err
}

// Real reports whether the node is a zerotier-one.
func (n *Node) Real() bool { return n.real != "" }

// Start starts the node, the first time or after it was stopped, and waits until
// it answers.
func (n *Node) Start(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if n.Real() {
		n.Process, n.ref, err = n.mesh.startReference(n.NS, n.Name, n.real, n.mesh.planet, nil)
	} else {
		args := []string{"member", "--node", "go", "--listen", "", "--planet", n.mesh.planet, "--log-level", n.mesh.opts.LogLevel}
		if n == n.mesh.Root {
			args = append(args, "--controller", "--port", fmt.Sprint(rootPort))
		} else {
			args = append(args, "--tun", officeTUN)
		}
		socket := filepath.Join(n.Home, "ztgate.sock")
		n.Process, err = n.mesh.Topology.Start(n.NS, n.Name, n.mesh.opts.Binary, append(args, "--socket", socket)...)
		n.ours = router.NewClient(socket)
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

// Become makes the node, which must be stopped, the other program at its next
// start, with the same home. An empty path means ours.
func (n *Node) Become(zerotierOne string) {
	n.real, n.ours, n.ref = zerotierOne, nil, nil
}

// Join joins a network.
func (n *Node) Join(ctx context.Context, id router.NetworkID) error {
	if n.ref != nil {
		return n.ref.join(ctx, id)
	}
	_, err := n.ours.Join(ctx, id.String())
	return err
}

// Leave leaves a network.
func (n *Node) Leave(ctx context.Context, id router.NetworkID) error {
	if n.ref != nil {
		return n.ref.leave(ctx, id)
	}
	_, err := n.ours.Leave(ctx, id.String())
	return err
}

// Network returns how the node sees a network.
func (n *Node) Network(ctx context.Context, id router.NetworkID) (NetworkState, error) {
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

// CreateNetwork makes a network at the root's controller. The patch has the keys
// of chapter 04 §7.
func (m *Mesh) CreateNetwork(ctx context.Context, patch map[string]any) (router.NetworkID, error) {
	if m.Root.ref != nil {
		rec, err := m.Root.ref.createNetwork(ctx, patch)
		if err != nil {
			return 0, err
		}
		return networkOf(rec)
	}
	rec, err := m.Root.ours.CreateNetwork(ctx, patch)
	if err != nil {
		return 0, err
	}
	return networkOf(rec.Record)
}

// SetNetwork changes a network at the controller.
func (m *Mesh) SetNetwork(ctx context.Context, id router.NetworkID, patch map[string]any) error {
	if m.Root.ref != nil {
		return m.Root.ref.setNetwork(ctx, id, patch)
	}
	_, err := m.Root.ours.SetNetwork(ctx, id.String(), patch)
	return err
}

// SetMember changes a member at the controller, with the keys of chapter 04 §8.
func (m *Mesh) SetMember(ctx context.Context, id router.NetworkID, n *Node, patch map[string]any) error {
	if m.Root.ref != nil {
		return m.Root.ref.setMember(ctx, id, n.Address, patch)
	}
	_, err := m.Root.ours.SetMember(ctx, id.String(), n.Address, patch)
	return err
}
