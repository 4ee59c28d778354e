package router

import "ztgate/zerotier/ztnode"

// The words about a node, which [ztnode] has.
type (
	NetworkID   = ztnode.NetworkID
	MAC         = ztnode.MAC
	Group       = ztnode.Group
	NodeInfo    = ztnode.Info
	PortMapping = ztnode.PortMapping
	Network     = ztnode.Network
	Route       = ztnode.Route
	Peer        = ztnode.Peer
	Path        = ztnode.Path
	Moon        = ztnode.Moon
	PlanetRoot  = ztnode.PlanetRoot
)

// Status words of a network.
const (
	StatusRequesting = ztnode.StatusRequesting
	StatusOK         = ztnode.StatusOK
	StatusDenied     = ztnode.StatusDenied
	StatusNotFound   = ztnode.StatusNotFound
	StatusPortError  = ztnode.StatusPortError
	StatusTooOld     = ztnode.StatusTooOld
	StatusAuth       = ztnode.StatusAuth
)

// ParseNetworkID reads 16 hex digits.
func ParseNetworkID(s string) (NetworkID, error) { return ztnode.ParseNetworkID(s) }
