package router

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/zerotier/identity"
)

// Node is what the gateway needs of an overlay node.
type Node interface {
	// Run works until ctx ends, which is not an error, and then frees all.
	Run(ctx context.Context) error
	// Close frees the node if Run is never called.
	Close() error
	Ready() <-chan struct{}
	Info() NodeInfo
	Peers() []Peer
	Networks() []Network
	Join(id NetworkID) error
	Leave(id NetworkID) error
	// Watch returns a channel that gets a value after changes, and its end.
	Watch() (<-chan struct{}, func())
	WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error)
	SetMulticastGroups(id NetworkID, groups []Group)
	Controller() Controller // nil if the node is none
}

// NodeConfig is what the gateway tells a node.
type NodeConfig struct {
	Make       string // go or libzt, "" = [DefaultNode]
	Home       string
	Port       int
	Planet     []byte // nil = the one in Home, else the built-in one
	Controller bool
	Underlay   Underlay
	Logger     *slog.Logger
	OnFrames   func(nwid uint64, frames [][]byte)
	Registerer prometheus.Registerer
}

// orbiter is a node that can use moons.
type orbiter interface {
	// Orbit begins to use a moon; seed is one of its roots.
	Orbit(id uint64, seed identity.Address) error
	Deorbit(id uint64) (bool, error)
	Moons() []Moon
}

// Controller is a network controller. Records are the JSON objects of chapter
// 04 §7 and §8; a patch is an object of the same shape with the keys to change.
type Controller interface {
	Networks() ([]NetworkID, error)
	Network(id NetworkID) (json.RawMessage, error)
	// SetNetwork changes a network; ID 0 creates one with a free ID.
	SetNetwork(id NetworkID, patch json.RawMessage) (json.RawMessage, error)
	DeleteNetwork(id NetworkID) error
	Members(id NetworkID) ([]json.RawMessage, error)
	Member(id NetworkID, address string) (json.RawMessage, error)
	SetMember(id NetworkID, address string, patch json.RawMessage) (json.RawMessage, error)
	DeleteMember(id NetworkID, address string) error
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
	SetPolicy(p PolicyConfig)
	// SetTranslation replaces forwards and maps; with an error nothing changes.
	SetTranslation(forwards []Forward, maps []AddressMap) error
	Explain(q Question) Explanation
	Deliver(nwid uint64, frames [][]byte)
	MulticastGroups(id NetworkID) []Group
	Flows(FlowFilter) []Flow
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
	VPC        VPCConfig
	NAT        NATConfig
	Forwards   []Forward
	Maps       []AddressMap
	Policy     PolicyConfig
	Seed       [32]byte  // for the choice of external ports; zero = random
	Mappings   []Mapping // of the last run, kept for their owners
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// PlaneNetwork is a network that carries traffic.
type PlaneNetwork struct {
	ID          NetworkID
	MAC         MAC
	MTU         int
	Addresses   []netip.Prefix
	Routes      []Route
	Masquerade  bool
	Masquerade6 bool
	Exempt      []netip.Prefix
	Direct      int // largest IP packet that fits one datagram on the wire
	Conflicts   int // routes that are left out because they cover the VPC or a kernel route
}

// FlowFilter selects flows.
type FlowFilter struct {
	To, From netip.Prefix // invalid = all
	Protocol string       // "" = all
	State    string       // "" = all
	Network  NetworkID    // 0 = all
	Top      int          // the busiest only; 0 = all
}

// Flow is a live entry of the flow table.
type Flow struct {
	Protocol      string         `json:"protocol"`
	State         string         `json:"state"`
	Network       NetworkID      `json:"network"`
	Direction     string         `json:"direction"`
	Source        netip.AddrPort `json:"source"`
	Destination   netip.AddrPort `json:"destination"`
	Translated    netip.AddrPort `json:"translatedSource"`
	TranslatedDst netip.AddrPort `json:"translatedDestination"`
	AgeSeconds    float64        `json:"ageSeconds"`
	IdleSeconds   float64        `json:"idleSeconds"`
	BytesOut      uint64         `json:"bytesOut"`
	BytesIn       uint64         `json:"bytesIn"`
	PacketsOut    uint64         `json:"packetsOut"`
	PacketsIn     uint64         `json:"packetsIn"`
}

// Parts makes the two halves that the gateway joins.
type Parts struct {
	NewNode  func(NodeConfig) (Node, error)
	NewPlane func(PlaneConfig) (Plane, error)
}
