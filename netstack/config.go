// Package netstack is the forwarding plane: it takes IP packets from the VPC
// side, translates them and hands them as Ethernet frames to overlay networks,
// and back. Established flows are handled in batches without allocation; what
// needs a real stack (packets to the gateway itself, its own pings and
// connections) goes to gVisor.
package netstack

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/netstack/internal/nat"
	"ztgate/netstack/policy"
)

// Device is the VPC side: IP packets in batches, with the conventions of
// golang.zx2c4.com/wireguard/tun.Device.
type Device interface {
	Read(bufs [][]byte, sizes []int, offset int) (int, error)
	Write(bufs [][]byte, offset int) (int, error)
	BatchSize() int
	MTU() (int, error)
	Close() error
}

// Overlay takes Ethernet frames into overlay networks. Frame i is
// bufs[i][offset:offset+sizes[i]]; at least 64 bytes before it may be
// overwritten, and the frame itself.
type Overlay interface {
	WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error)
}

// VPC describes the VPC side.
type VPC struct {
	Addresses []netip.Prefix // of the gateway on the VPC side
	Sources   []netip.Prefix // who may send; none = everybody but the overlay
	MTU       int            // of the device; 0 = ask it
}

// Timeouts of idle flows; zero values become the defaults of RFC 4787, 5382 and
// 5508.
type Timeouts = nat.Timeouts

// Config says how an engine works.
type Config struct {
	Device     Device
	Overlay    Overlay
	VPC        VPC
	MaxFlows   int // 0 = 262144
	Timeouts   Timeouts
	Policy     *policy.Policy // nil = accept what the VPC side opens
	Logger     *slog.Logger
	Registerer prometheus.Registerer // nil = no metrics
	Now        func() time.Time      // nil = time.Now
}

// Route is a managed route of a network.
type Route struct {
	Target netip.Prefix
	Via    netip.Addr // invalid = directly on the network
}

// Network is an overlay network that carries traffic.
type Network struct {
	ID         uint64
	MAC        [6]byte
	MTU        int
	Addresses  []netip.Prefix // ours
	Routes     []Route
	Masquerade bool
	Direct     int // largest IP packet that fits one datagram on the wire, 0 = unknown
}

// Group is a multicast group a network's port wants.
type Group struct {
	MAC [6]byte
	ADI uint32
}

// FlowFilter selects flows.
type FlowFilter struct {
	To netip.Prefix // destination; invalid = all
}

// FlowInfo describes a flow.
type FlowInfo struct {
	Protocol             string
	State                string
	Network              uint64
	FromVPC              bool
	Client, Server       netip.AddrPort
	External             netip.AddrPort // source as the server sees it
	Created, LastSeen    time.Time
	PacketsOut, BytesOut uint64 // from the client
	PacketsIn, BytesIn   uint64
}

func (c *Config) check() error {
	if c.Device == nil || c.Overlay == nil {
		return errors.New("netstack: a device and an overlay are needed")
	}
	if c.MaxFlows < 0 {
		return fmt.Errorf("netstack: %d flows: want a positive limit", c.MaxFlows)
	}
	return nil
}
