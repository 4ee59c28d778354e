// Package netstack is the forwarding plane: it takes IP packets from the VPC
// side, translates them and hands them as Ethernet frames to overlay networks,
// and back.
//
// The engine forwards by itself. gVisor's stack is used only as the gateway's own
// host: for packets to its addresses, its pings and connections. Forwarded
// packets don't pass through it, neither through its iptables nor through its
// nftables hooks: there a packet costs about 10 µs and 13 to 15 allocations, a
// second core brings nothing, and some short malformed packets panic it. Here
// every packet of a known flow takes the same path, which is a lookup without
// locks and a rewrite in place; the first one is judged by routes, policy and
// translation in one place, which [Engine.Explain] asks too. What is handed to
// gVisor has passed the same check as everything else, and a panic there is
// caught and counted.
//
// What happens to a packet:
//
//	parse and check -> fragments: wait for the rest -> look up the flow
//	  known: track its state -> size, TTL, MSS -> translate -> next hop -> batch out
//	  unknown: decide -> refuse, hand to the gateway itself, or open a flow
//
// Every packet that enters is forwarded, for the gateway itself, or dropped with a
// reason that is counted; sums by side agree.
package netstack

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
	"ztgate/netstack/policy"
)

// Device is the VPC side: IP packets in batches, with the conventions of
// golang.zx2c4.com/wireguard/tun.Device. Several goroutines may write at the same
// time. What is written lies behind an offset of 14 bytes that the device may use,
// and isn't kept. An error of Read with a method Temporary that returns true is
// about one packet.
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

// Timeouts of idle flows; the zero value means the defaults of RFC 4787, 5382
// and 5508.
type Timeouts = nat.Timeouts

// NAT are the settings of the flow table; the zero value means the defaults.
type NAT = nat.Settings

// Mapping is the external endpoint of a client's endpoint.
type Mapping = nat.Mapping

const (
	NoSharing               = nat.NoSharing
	ByDestination           = nat.ByDestination
	AddressAndPortDependent = nat.AddressAndPortDependent
	EndpointIndependent     = nat.EndpointIndependent
)

// PortForward forwards what comes to an address and port to a host of either side.
// The address is one of the gateway's, or one that is routed to it: the gateway's own
// for the side of the forward's clients.
type PortForward struct {
	From       Side           // where its clients are; nobody else reaches it
	Proto      uint8          // 6 = TCP, 17 = UDP
	Listen     netip.AddrPort // an unspecified address stands for all of ours of its family
	To         netip.AddrPort // as the VPC knows the host: an overlay host's alias, where the VPC has its address
	Masquerade bool           // the host sees our address instead of the client's, or never does
	// Relayed connections end here, at a listener of [Engine.ListenTCP], which the policy
	// lets them come to as if they went on.
	Relayed bool
}

// Side is a side of the gateway.
type Side = nat.Side

const (
	VPCSide     = nat.VPC
	OverlaySide = nat.Overlay
)

// AddressMap gives hosts of one side other addresses on the other side, one for
// one in both directions, so that networks with the same addresses can be
// connected. In IPv6 the host part is changed too, so that checksums stay right
// (RFC 6296). Both prefixes have the same length. Where the VPC has addresses that a
// network has too, aliases of the overlay's hosts are the only way to reach these.
type AddressMap struct {
	Network uint64 // 0 = all
	Hosts   Side   // where the hosts are
	Real    netip.Prefix
	Alias   netip.Prefix // as the other side knows them
}

// Config says how an engine works.
type Config struct {
	Device   Device
	Overlay  Overlay
	VPC      VPC
	NAT      NAT
	MaxFlows int      // NAT.MaxFlows unless that is set
	Timeouts Timeouts // NAT.Timeouts unless that is set
	Forwards []PortForward
	Maps     []AddressMap
	// Masquerade is as [Engine.SetMasquerade] has it.
	Masquerade []Masquerade
	// PathMTU returns the largest IP packet that reaches a member of a network in one
	// datagram, 0 if that isn't known. Nil = never known.
	PathMTU  func(nwid uint64, member [6]byte) int
	Mappings []Mapping      // of an earlier engine: endpoints are quarantined for their owners, flows go on
	Policy   *policy.Policy // nil = accept what the VPC side opens
	// Owns reports whether the network's controller certifies that an address is that of
	// the member with a MAC; nil = nothing is certified.
	Owns func(network uint64, mac [6]byte, a netip.Addr) bool
	// Host carries on what a masquerade hands over to it; nil = nobody does.
	Host Host
	// Ours takes packets from the VPC side that the caller itself sent, to see whether they
	// get here. They are neither counted nor forwarded. It isn't asked for packets of
	// established flows; nil = there are none.
	Ours       func(packet []byte) bool
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
	Masquerade bool // IPv4
	// Masquerade6 hides IPv6 clients too (NAT66); without, they are routed.
	Masquerade6 bool
	// NAT are those of Addresses that clients are masqueraded behind, each client behind one;
	// of a family without any it is the first of Addresses.
	NAT       []netip.Addr
	Exempt    []netip.Prefix // destinations that see clients' own addresses
	Direct    int            // largest IP packet that fits one datagram on the wire, 0 = unknown
	Conflicts int            // routes left out already because they overlap the VPC, for the metric
}

// Group is a multicast group that the gateway wants to hear on a network.
type Group struct {
	MAC [6]byte
	ADI uint32
}

// FlowFilter selects flows.
type FlowFilter struct {
	To       netip.Prefix // destination; invalid = all
	From     netip.Prefix // who opened it
	Protocol string       // tcp, udp, icmp or a number; "" = all
	State    string       // "" = all
	Network  uint64       // 0 = all
}

// Greedy is what a client has of the flow table, or all clients of a network.
type Greedy struct {
	Prefix          netip.Prefix // one address, or a /24 or /64
	FromVPC         bool
	Network         uint64 // overlay network that it is in; 0 = the VPC
	Flows, HalfOpen int
	Ports           int    // external ones, of a client
	Clients         int    // of a network
	Evicted         uint64 // flows that made room for others, of a client
	Refused         uint64 // flows that were not opened, of a client as long as it has others
}

// FlowInfo describes a flow.
type FlowInfo struct {
	Protocol             string
	State                string
	Network              uint64
	FromVPC              bool
	Client, Server       netip.AddrPort
	External             netip.AddrPort // source as the server sees it
	Target               netip.AddrPort // destination as the client sees it
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
	for _, p := range []int{c.NAT.MaxFlows, c.NAT.MaxFlowsPerClient, c.NAT.MaxPortsPerClient, c.NAT.MaxHalfOpen, c.NAT.FlowRatePerClient} {
		if p < 0 {
			return fmt.Errorf("netstack: limit %d: want 0 or more", p)
		}
	}
	const most = 1 << 24
	if max(c.MaxFlows, c.NAT.MaxFlows) > most {
		return fmt.Errorf("netstack: %d flows: want at most %d", max(c.MaxFlows, c.NAT.MaxFlows), most)
	}
	if err := checkMasquerade(c.Masquerade); err != nil {
		return err
	}
	return checkTranslation(c.Forwards, c.Maps)
}

func checkTranslation(forwards []PortForward, maps []AddressMap) error {
	seen := map[forwardKey]bool{}
	for _, f := range forwards {
		k := f.listens()
		switch {
		case f.From >= numSides:
			return fmt.Errorf("netstack: forward %v: side %d: want that of the VPC or of the overlay", f.Listen, f.From)
		case f.Proto != ipkt.TCP && f.Proto != ipkt.UDP:
			return fmt.Errorf("netstack: forward %v: protocol %d: want TCP or UDP", f.Listen, f.Proto)
		case !f.Listen.IsValid() || f.Listen.Port() == 0 || !f.To.IsValid() || f.To.Port() == 0 || f.Listen.Addr().Is4() != f.To.Addr().Is4():
			return fmt.Errorf("netstack: forward %v to %v: want two addresses of one family, with ports", f.Listen, f.To)
		case f.Relayed && (f.Proto != ipkt.TCP || f.From != VPCSide):
			return fmt.Errorf("netstack: forward %v: only TCP from the VPC can be relayed", f.Listen)
		case seen[k]:
			return fmt.Errorf("netstack: forward %v: there are two", f.Listen)
		}
		seen[k] = true
	}
	for _, m := range maps {
		if !m.Real.IsValid() || !m.Alias.IsValid() || m.Real.Bits() != m.Alias.Bits() || m.Real.Addr().Is4() != m.Alias.Addr().Is4() {
			return fmt.Errorf("netstack: address map %v to %v: want two prefixes of the same length", m.Real, m.Alias)
		}
	}
	return nil
}
