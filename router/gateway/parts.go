package gateway

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/ztnode"
)

// Node is what the gateway needs of an overlay node.
type Node interface {
	// Run works until ctx ends, which is not an error, and then frees all.
	Run(ctx context.Context) error
	// Close frees the node if Run is never called.
	Close() error
	Ready() <-chan struct{}
	Info() ztnode.Info
	Peers() []ztnode.Peer
	Networks() []ztnode.Network
	Join(id ztnode.NetworkID) error
	Leave(id ztnode.NetworkID) error
	// Watch returns a channel that gets a value after changes, and its end.
	Watch() (<-chan struct{}, func())
	WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error)
	SetMulticastGroups(id ztnode.NetworkID, groups []ztnode.Group)
	Controller() Controller // nil if the node is none
}

// NodeConfig is what the gateway tells a node.
type NodeConfig struct {
	Make       string // go or libzt, "" = [DefaultNode]
	Home       string
	Port       int
	Planet     []byte // nil = the one in Home, else the built-in one
	Controller bool
	Underlay   config.Underlay
	Logger     *slog.Logger
	OnFrames   func(nwid uint64, frames [][]byte)
	Registerer prometheus.Registerer
}

// orbiter is a node that can use moons.
type orbiter interface {
	// Orbit begins to use a moon; seed is one of its roots.
	Orbit(id uint64, seed identity.Address) error
	Deorbit(id uint64) (bool, error)
	Moons() []ztnode.Moon
}

// Controller is a network controller. Records are the JSON objects of chapter
// 04 §7 and §8; a patch is an object of the same shape with the keys to change.
type Controller interface {
	Networks() ([]ztnode.NetworkID, error)
	Network(id ztnode.NetworkID) (json.RawMessage, error)
	// SetNetwork changes a network; ID 0 creates one with a free ID.
	SetNetwork(id ztnode.NetworkID, patch json.RawMessage) (json.RawMessage, error)
	DeleteNetwork(id ztnode.NetworkID) error
	Members(id ztnode.NetworkID) ([]json.RawMessage, error)
	Member(id ztnode.NetworkID, address string) (json.RawMessage, error)
	SetMember(id ztnode.NetworkID, address string, patch json.RawMessage) (json.RawMessage, error)
	DeleteMember(id ztnode.NetworkID, address string) error
}

// Device is the VPC side: IP packets in batches.
type Device interface {
	Read(bufs [][]byte, sizes []int, offset int) (int, error)
	Write(bufs [][]byte, offset int) (int, error)
	BatchSize() int
	MTU() (int, error)
	Close() error
}

// Plane is what the gateway needs of the forwarding plane.
type Plane interface {
	// Run moves packets until ctx ends, which is not an error. It closes the device.
	Run(ctx context.Context) error
	SetNetworks(nets []PlaneNetwork) error
	SetPolicy(p config.PolicyConfig)
	// SetTranslation replaces forwards and maps; with an error nothing changes.
	SetTranslation(forwards []config.Forward, maps []config.AddressMap) error
	Explain(q control.Question) control.Explanation
	Deliver(nwid uint64, frames [][]byte)
	MulticastGroups(id ztnode.NetworkID) []ztnode.Group
	Flows(control.FlowFilter) []control.Flow
	Mappings() []Mapping
	Ping(ctx context.Context, dst netip.Addr) (time.Duration, error)
	DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error)
	// DialUDP returns a socket for one peer; it sends nothing yet.
	DialUDP(ctx context.Context, dst netip.AddrPort) (net.Conn, error)
}

// PlaneConfig is what the gateway tells the forwarding plane.
type PlaneConfig struct {
	Device  Device
	Overlay interface {
		WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error)
	}
	VPC        config.VPCConfig
	NAT        config.NATConfig
	Forwards   []config.Forward
	Maps       []config.AddressMap
	Policy     config.PolicyConfig
	Seed       [32]byte  // for the choice of external ports; zero = random
	Mappings   []Mapping // of the last run, kept for their owners
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// PlaneNetwork is a network that carries traffic.
type PlaneNetwork struct {
	ID          ztnode.NetworkID
	MAC         ztnode.MAC
	MTU         int
	Addresses   []netip.Prefix
	Routes      []ztnode.Route
	Masquerade  bool
	Masquerade6 bool
	Exempt      []netip.Prefix
	Direct      int // largest IP packet that fits one datagram on the wire
	Conflicts   int // routes that are left out because they cover the VPC or a kernel route
}

// Parts makes the two halves that the gateway joins.
type Parts struct {
	NewNode  func(NodeConfig) (Node, error)
	NewPlane func(PlaneConfig) (Plane, error)
}
