package nat

import (
	"time"

	"ztgate/netstack/internal/ipkt"
)

// Side is where a packet comes from or goes to.
type Side uint8

const (
	VPC Side = iota
	Overlay
	NumSides
)

// DefaultMaxFlows is the limit unless configured.
const DefaultMaxFlows = 262144

// Ports and echo identifiers of the gateway itself; the translator never uses
// them.
const (
	LocalPortFirst = 61000
	LocalPortLast  = 63999
)

// Protocol classes, for counters and limits.
const (
	ClassTCP = iota
	ClassUDP
	ClassICMP
	ClassOther
	NumClasses
)

// ClassNames are the label values.
var ClassNames = [NumClasses]string{"tcp", "udp", "icmp", "other"}

// ClassOf returns a protocol's class.
func ClassOf(proto uint8) int {
	switch proto {
	case ipkt.TCP:
		return ClassTCP
	case ipkt.UDP:
		return ClassUDP
	case ipkt.ICMP, ipkt.ICMPv6:
		return ClassICMP
	}
	return ClassOther
}

// Timeouts of idle flows by state; zero means the default.
type Timeouts struct {
	TCPEstablished time.Duration // 5 days, as users of Linux expect; at least 2 h 4 min in RFC 5382 REQ-5
	TCPHalfClosed  time.Duration // 2 h 4 min, at most TCPEstablished
	TCPTransitory  time.Duration // 4 min; what the three below are unless set
	TCPOpening     time.Duration // handshake not finished
	TCPClosing     time.Duration // after both FINs
	TCPReset       time.Duration // after a RST, which may be forged (RFC 7857 §2.2)
	UDP            time.Duration // 5 min, answered (RFC 4787 REQ-5)
	UDPUnanswered  time.Duration // 2 min
	ICMP           time.Duration // 60 s (RFC 5508 REQ-2)
	Other          time.Duration // 10 min
}

// Established returns for how long answered flows of TCP and of UDP may be idle.
func (t Timeouts) Established() (tcp, udp time.Duration) {
	t.defaults()
	return t.TCPEstablished, t.UDP
}

func (t *Timeouts) defaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&t.TCPEstablished, 5*24*time.Hour)
	def(&t.TCPHalfClosed, min(124*time.Minute, t.TCPEstablished))
	def(&t.TCPTransitory, 4*time.Minute)
	def(&t.TCPOpening, t.TCPTransitory)
	def(&t.TCPClosing, t.TCPTransitory)
	def(&t.TCPReset, t.TCPTransitory)
	def(&t.UDP, 5*time.Minute)
	def(&t.UDPUnanswered, min(2*time.Minute, t.UDP))
	def(&t.ICMP, time.Minute)
	def(&t.Other, 10*time.Minute)
}

// PortSharing says what happens when an external address has no port left
// (decision D1).
type PortSharing uint8

const (
	// NoSharing refuses the flow: every client endpoint keeps one external port
	// of its own (RFC 4787 REQ-1, REQ-3).
	NoSharing PortSharing = iota
	// ByDestination lets new flows use ports of others towards other servers.
	// Existing mappings never change.
	ByDestination
)

// Filtering says which packets from outside reach a client's mapping (decision
// D2).
type Filtering uint8

// Classes of RFC 4787 §5.
const (
	AddressAndPortDependent Filtering = iota // only answers
	EndpointIndependent                      // everything
)

// Settings say how a translator works. Zero limits mean none unless noted.
type Settings struct {
	MaxFlows          int // 0 = [DefaultMaxFlows]
	MaxFlowsPerClient int // 0 = half of MaxFlows, also for all addresses of an overlay member together
	MaxPortsPerClient int // external ports or identifiers, per protocol; 0 = three quarters of those of an address, as for flows
	MaxHalfOpen       int // never-answered flows per client; its own oldest one makes room
	FlowRatePerClient int // new flows a second; as many at once
	PortSharing       PortSharing
	PortQuarantine    time.Duration // how long a freed port waits for its owner (RFC 6888 REQ-8); 0 = 2 min, <0 = not at all
	Timeouts          Timeouts
	FilterUDP         Filtering
	FilterTCP         Filtering
	NoWindow          bool     // let TCP segments outside the window pass
	NoPickup          bool     // refuse TCP segments without SYN that belong to no flow
	Seed              [32]byte // keys the choice of replaced ports, which is the same after a restart with the same seed; zero = random
}
