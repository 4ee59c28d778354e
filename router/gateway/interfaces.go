package gateway

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/netip"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/router/config"
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
	RootEndpoints() []netip.AddrPort // where its worlds say that roots are
	Join(id ztnode.NetworkID) error
	Leave(id ztnode.NetworkID) error
	// Watch returns a channel that gets a value after changes, and its end.
	Watch() (<-chan struct{}, func())
	WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error)
	SetMulticastGroups(id ztnode.NetworkID, groups []ztnode.Group)
	// SetOverlayPrefixes says which addresses lie in overlay networks, so that the
	// overlay isn't carried by itself.
	SetOverlayPrefixes(list []netip.Prefix)
	Controller() Controller // nil if the node is none
}

// NodeConfig is what the gateway tells a node.
type NodeConfig struct {
	Implementation string // go or libzt, "" = [config.DefaultNode]
	Home           string
	Port           int
	Planet         []byte // nil = the one in Home, else the built-in one
	Controller     bool
	// Networks are joined first, where there are more than a node can be in.
	Networks   []ztnode.NetworkID
	Underlay   config.Underlay
	Mark       int // of the overlay's own packets, 0 = none
	Logger     *slog.Logger
	OnFrames   func(nwid uint64, frames [][]byte)
	Registerer prometheus.Registerer
	OnMember   func(ztnode.MemberEvent) bool // of our controller's networks; must not block
}

// sealer is a node that can seal its HELLOs.
type sealer interface {
	SetSealedHello(s ztnode.SealedHello)
}

// certifier is a node that sees the network controllers' certificates.
type certifier interface {
	// Owns reports whether an address of a network is proven to be that of the member
	// with a MAC.
	Owns(nwid uint64, mac [6]byte, a netip.Addr) bool
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
