//go:build libzt

package bindings

import (
	"context"
	"log/slog"
	"net/netip"

	"ztgate/zerotier/ztnode"
)

// Headroom is the room, in bytes, that [Node.WriteFrames] needs before each
// frame: none, since frames are copied into C memory.
const Headroom = 0

// UDP is the service of UDP sockets that a node uses and closes.
type UDP interface {
	// Run reads datagrams until ctx ends, which is not an error. handle gets each
	// one and flush ends a batch; a worker's calls never overlap. Sockets have
	// numbers above 0 that are not used again.
	Run(ctx context.Context, handle func(worker int, socket uint32, from netip.AddrPort, datagram []byte), flush func(worker int)) error
	NewSender() Sender
	LocalEndpoints() []netip.AddrPort
	Ports() []int           // primary, secondary
	RebindSecondary() error // for a node that has been offline for long
	Close() error
}

// Sender sends datagrams of one goroutine. It copies them.
type Sender interface {
	// Send sends head followed by data; socket 0 = by all of the address family.
	Send(socket uint32, to netip.AddrPort, head, data []byte)
	SendTTL(socket uint32, to netip.AddrPort, data []byte, ttl int)
	Flush()
}

// Config says how a node runs.
type Config struct {
	Home   string // in the format of a ZeroTier home; created if missing
	Planet []byte // replaces an older or another one in Home; nil = that one, else the built-in one
	// Networks are joined before those that Home remembers, where there are more than
	// [ztnode.MaxNetworks].
	Networks []ztnode.NetworkID
	// OpenUDP opens the sockets. Addresses that exclude refuses lie inside joined
	// networks and must not be used.
	OpenUDP func(exclude func(netip.Addr) bool) (UDP, error)
	Logger  *slog.Logger // nil = no log
	// OnFrames receives Ethernet frames of a joined network, in batches. Frames are
	// valid until it returns and may be changed in place. Several goroutines call
	// it at the same time. Nil drops them.
	OnFrames func(nwid uint64, frames [][]byte)
}

// Stats are counters since [New]. Cipher suites are those of the datagrams'
// headers: the core does not tell which it accepted.
type Stats struct {
	TxBytes, RxBytes         [4]uint64 // of unfragmented datagrams, by cipher suite
	TxFragments, RxFragments uint64
	Full                     uint64 // datagrams and frames that found no room in a batch
	Refused                  uint64 // frames the core did not take
	Oversize, OwnMAC         uint64 // frames longer than the MTU allows, or to ourselves
	NoNetwork                uint64 // frames for networks that are not joined
}
