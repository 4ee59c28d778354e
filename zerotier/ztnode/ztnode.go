// Package ztnode has the words about a ZeroTier node: its networks, peers, paths and
// moons, and the errors an operator can remedy. All implementations of a node speak
// them, and their JSON is what the control API answers with. The package does no I/O
// and knows no protocol.
package ztnode

import (
	"net/netip"
	"slices"
	"time"

	"ztgate/zerotier/identity"
)

// Status words of a network, as ZeroTier has them (chapter 04 §15.4).
const (
	StatusRequesting = "REQUESTING_CONFIGURATION"
	StatusOK         = "OK"
	StatusDenied     = "ACCESS_DENIED"
	StatusNotFound   = "NOT_FOUND"
	StatusPortError  = "PORT_ERROR"
	StatusTooOld     = "CLIENT_TOO_OLD"
	StatusAuth       = "AUTHENTICATION_REQUIRED"
)

// Statuses lists the status words in the order of their numbers in ZeroTier.
func Statuses() [7]string {
	return [...]string{StatusRequesting, StatusOK, StatusDenied, StatusNotFound, StatusPortError, StatusTooOld, StatusAuth}
}

// Types of a network.
const (
	TypePrivate = "PRIVATE"
	TypePublic  = "PUBLIC"
)

// Roles of a peer.
const (
	RoleLeaf   = "LEAF"
	RoleMoon   = "MOON"
	RolePlanet = "PLANET"
)

// Roles lists the roles in the order of their numbers in ZeroTier.
func Roles() [3]string { return [...]string{RoleLeaf, RoleMoon, RolePlanet} }

// Info describes the node itself.
type Info struct {
	Address         string           `json:"address"`
	Identity        string           `json:"publicIdentity"`
	Online          bool             `json:"online"`
	Version         string           `json:"version"`     // announced to peers
	PrimaryPort     int              `json:"primaryPort"` // UDP; this and the following: 0 = not open
	SecondaryPort   int              `json:"secondaryPort"`
	TertiaryPort    int              `json:"tertiaryPort"` // the one that routers map
	PlanetID        uint64           `json:"planetWorldId"`
	PlanetTimestamp int64            `json:"planetWorldTimestamp"` // ms since the epoch
	Root            bool             `json:"root"`                 // the planet lists us
	Controller      bool             `json:"controller"`
	Surface         []netip.AddrPort `json:"surfaceAddresses"` // own external addresses, as others see them
	Listening       []netip.AddrPort `json:"listeningOn"`
	PortMapping     bool             `json:"portMappingEnabled"` // routers are asked to map a port
	PortMappings    []PortMapping    `json:"portMappings,omitempty"`

	// When the wall clock was set last while the node ran, by the new time, and by how many
	// seconds, below zero for back. Zero if it never was.
	ClockSet   time.Time `json:"clockSet,omitzero"`
	ClockSetBy float64   `json:"clockSetBy,omitempty"`

	Collision time.Time `json:"collision,omitzero"` // when a root last knew our address by another identity; zero = never
}

// PortMapping is a UDP port that a router in front of this host maps to it.
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
	Status      string         `json:"status"` // see [Statuses]
	Type        string         `json:"type"`   // [TypePrivate] or [TypePublic]
	MAC         MAC            `json:"mac"`
	MTU         int            `json:"mtu"`
	Addresses   []netip.Prefix `json:"assignedAddresses"`
	Routes      []Route        `json:"routes"`
	DNSDomain   string         `json:"dnsDomain,omitempty"`
	DNSServers  []netip.Addr   `json:"dnsServers,omitempty"`
	Bridge      bool           `json:"bridge"`
	Broadcast   bool           `json:"broadcastEnabled"`
	Revision    uint64         `json:"netconfRevision"`
	Certificate time.Time      `json:"certificateExpiry,omitzero"` // zero without a certificate
	AuthURL     string         `json:"authenticationURL,omitempty"`

	// When the controller answered or sent something last; zero = not since the start.
	LastController time.Time `json:"lastController,omitzero"`
	Unanswered     int       `json:"unansweredRequests,omitempty"` // that it was sent since

	// When answers to requests of another node with our identity came last; zero = not lately.
	Duplicate time.Time `json:"duplicateIdentity,omitzero"`
}

// Route is a managed route. Without Via the target is on the network itself.
type Route struct {
	Target netip.Prefix `json:"target"`
	Via    netip.Addr   `json:"via,omitzero"`
}

// Peer is a node that ours knows.
type Peer struct {
	Address     string    `json:"address"`
	Role        string    `json:"role"`    // see [Roles]
	Version     string    `json:"version"` // "-" if unknown
	Latency     float64   `json:"latency"` // ms, of the preferred path; see [Milliseconds]
	Relayed     bool      `json:"relayed"`
	Link        string    `json:"link"`   // DIRECT or RELAY; nodes leave it empty
	Cipher      int       `json:"cipher"` // cipher suite of what we send
	LastReceive time.Time `json:"lastReceive,omitzero"`
	LastRelayed time.Time `json:"lastRelayed,omitzero"` // received through a root
	Paths       []Path    `json:"paths"`
}

// Path is a way to a peer.
type Path struct {
	Endpoint    netip.AddrPort `json:"address"`
	Preferred   bool           `json:"preferred"`
	Expired     bool           `json:"expired"`
	LastSend    time.Time      `json:"lastSend,omitzero"`
	LastReceive time.Time      `json:"lastReceive,omitzero"`
	Latency     float64        `json:"latency"`       // ms; see [Milliseconds]
	MTU         int            `json:"mtu,omitempty"` // largest UDP payload that is known to arrive; 0 = unknown
}

// Milliseconds returns a latency in milliseconds, -1 for an unknown one, which is below
// zero.
func Milliseconds(d time.Duration) float64 {
	if d < 0 {
		return -1
	}
	return float64(d.Microseconds()) / 1000
}

// What a member of a network of our own controller did.
const (
	MemberRequested = "member.requested" // it asked for the network and isn't authorised
	MemberJoined    = "member.joined"    // it came online as a member
)

// MemberEvent tells of a member of a network of our own controller.
type MemberEvent struct {
	Kind        string // [MemberRequested] or [MemberJoined]
	At          time.Time
	Network     NetworkID
	NetworkName string
	Address     identity.Address
	Identity    string // public
	Name        string
	Version     string // "-" if unknown
	Addresses   []netip.Addr
}

// Moon is a moon that is used or waited for.
type Moon struct {
	ID        string       `json:"id"` // see [MoonID]
	Waiting   bool         `json:"waiting"`
	Seed      string       `json:"seed,omitempty"` // who is asked while waiting
	Timestamp int64        `json:"timestamp,omitempty"`
	Roots     []PlanetRoot `json:"roots"`
}

// PlanetRoot is one root of a planet or a moon.
type PlanetRoot struct {
	Address   string           `json:"address"`
	Identity  string           `json:"identity"`
	Endpoints []netip.AddrPort `json:"stableEndpoints"`
}

// SealedHello says which HELLOs of ours are sealed, so that who sees them learns nothing of
// our identity and version.
type SealedHello uint8

// Which HELLOs are sealed. All nodes of protocol 13 open them.
const (
	SealedHelloOff    SealedHello = iota
	SealedHelloAuto               // those to peers that are known to open them
	SealedHelloAlways             // all, also in vain
)

var sealedHellos = [...]string{"off", "auto", "always"}

// String returns the word in configurations.
func (s SealedHello) String() string { return sealedHellos[s] }

// ParseSealedHello is the inverse of String.
func ParseSealedHello(word string) (SealedHello, bool) {
	i := slices.Index(sealedHellos[:], word)
	return SealedHello(max(i, 0)), i >= 0
}
