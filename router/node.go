package router

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// NetworkID is the 64-bit ID of an overlay network, 16 hex digits in text.
type NetworkID uint64

// ParseNetworkID reads 16 hex digits.
func ParseNetworkID(s string) (NetworkID, error) {
	v, err := strconv.ParseUint(s, 16, 64)
	if err != nil || len(s) != 16 || v == 0 {
		return 0, fmt.Errorf("network ID %q: want 16 hex digits, as in 8056c2e21c000001", s)
	}
	return NetworkID(v), nil
}

func (id NetworkID) String() string { return fmt.Sprintf("%016x", uint64(id)) }

// MarshalText implements encoding.TextMarshaler.
func (id NetworkID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *NetworkID) UnmarshalText(b []byte) (err error) {
	if string(b) == NetworkID(0).String() {
		*id = 0 // none, as in a flow that ends here
		return nil
	}
	*id, err = ParseNetworkID(string(b))
	return err
}

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// MarshalText implements encoding.TextMarshaler.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *MAC) UnmarshalText(b []byte) error {
	hw, err := net.ParseMAC(string(b))
	if err != nil || len(hw) != len(m) {
		return fmt.Errorf("MAC address %q: want six bytes in hex", b)
	}
	copy(m[:], hw)
	return nil
}

// Status words of a network, as ZeroTier has them.
const (
	StatusRequesting = "REQUESTING_CONFIGURATION"
	StatusOK         = "OK"
	StatusDenied     = "ACCESS_DENIED"
	StatusNotFound   = "NOT_FOUND"
	StatusPortError  = "PORT_ERROR"
	StatusTooOld     = "CLIENT_TOO_OLD"
	StatusAuth       = "AUTHENTICATION_REQUIRED"
)

// Statuses lists all status words.
var statuses = [...]string{StatusRequesting, StatusOK, StatusDenied, StatusNotFound, StatusPortError, StatusTooOld, StatusAuth}

// Roles lists the roles of a peer.
var roles = [...]string{"LEAF", "MOON", "PLANET"}

// NodeInfo describes the node itself.
type NodeInfo struct {
	Address         string           `json:"address"`
	Identity        string           `json:"publicIdentity"`
	Online          bool             `json:"online"`
	Version         string           `json:"version"`
	PrimaryPort     int              `json:"primaryPort"`
	SecondaryPort   int              `json:"secondaryPort"`
	TertiaryPort    int              `json:"tertiaryPort"` // the one that routers map; 0 = not open, as the others
	PlanetID        uint64           `json:"planetWorldId"`
	PlanetTimestamp int64            `json:"planetWorldTimestamp"` // ms since the epoch
	Root            bool             `json:"root"`
	Controller      bool             `json:"controller"`
	Surface         []netip.AddrPort `json:"surfaceAddresses"`
	Listening       []netip.AddrPort `json:"listeningOn"`
	PortMapping     bool             `json:"portMappingEnabled"`
	PortMappings    []PortMapping    `json:"portMappings,omitempty"`
}

// PortMapping is a UDP port that a router in front of this host leads to it.
type PortMapping struct {
	External netip.AddrPort `json:"external"`
	Port     uint16         `json:"port"` // our own
	Gateway  netip.Addr     `json:"gateway"`
	Protocol string         `json:"protocol"` // pcp, natpmp or upnp
	Expires  time.Time      `json:"expires"`
}

// Network is a joined network.
type Network struct {
	ID          NetworkID      `json:"id"`
	Name        string         `json:"name"`
	Status      string         `json:"status"`
	Type        string         `json:"type"`
	MAC         MAC            `json:"mac"`
	MTU         int            `json:"mtu"`
	Addresses   []netip.Prefix `json:"assignedAddresses"`
	Routes      []Route        `json:"routes"`
	DNSDomain   string         `json:"dnsDomain,omitempty"`
	DNSServers  []netip.Addr   `json:"dnsServers,omitempty"`
	Bridge      bool           `json:"bridge"`
	Broadcast   bool           `json:"broadcastEnabled"`
	Revision    uint64         `json:"netconfRevision"`
	Certificate time.Time      `json:"certificateExpiry,omitzero"`
	AuthURL     string         `json:"authenticationURL,omitempty"`
	Device      string         `json:"portDeviceName,omitempty"`
	Problems    []string       `json:"problems,omitempty"` // routes not installed, and why
}

// Route is a managed route. Without Via the target is on the network itself.
type Route struct {
	Target netip.Prefix `json:"target"`
	Via    netip.Addr   `json:"via,omitzero"`
}

// Peer is a node that ours knows.
type Peer struct {
	Address     string    `json:"address"`
	Role        string    `json:"role"`
	Version     string    `json:"version"`
	Latency     float64   `json:"latency"` // ms, -1 unknown
	Relayed     bool      `json:"relayed"`
	Link        string    `json:"link"`   // DIRECT or RELAY
	Cipher      int       `json:"cipher"` // cipher suite of what we send
	LastReceive time.Time `json:"lastReceive,omitzero"`
	Paths       []Path    `json:"paths"`
}

// Path is a way to a peer.
type Path struct {
	Endpoint    netip.AddrPort `json:"address"`
	Preferred   bool           `json:"preferred"`
	Expired     bool           `json:"expired"`
	LastSend    time.Time      `json:"lastSend,omitzero"`
	LastReceive time.Time      `json:"lastReceive,omitzero"`
	Latency     float64        `json:"latency"` // ms, -1 unknown
}

// Group is a multicast group of a network.
type Group struct {
	MAC MAC
	ADI uint32
}

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

// Moon is a moon that is used or waited for.
type Moon struct {
	ID        string       `json:"id"`
	Waiting   bool         `json:"waiting"`
	Seed      string       `json:"seed,omitempty"` // who is asked while waiting
	Timestamp int64        `json:"timestamp,omitempty"`
	Roots     []PlanetRoot `json:"roots"`
}

// orbiter is a node that can use moons.
type orbiter interface {
	// Orbit begins to use a moon; seed is one of its roots.
	Orbit(id uint64, seed string) error
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
