package config

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"ztgate/zerotier/ztnode"
)

// Underlay is what the operator knows about the networks that carry the overlay
// (chapter 02 §8.6).
type Underlay struct {
	LowBandwidth bool // fewer probes and announcements
	SealedHello  ztnode.SealedHello
	TCPRelay     string // auto | off | ADDRESS:PORT
	PortMapping  bool   // routers in front of this host are asked to map a port
	Physical     []PhysicalNetwork
	Virtual      []VirtualPeer
}

// PhysicalNetwork describes a part of the underlay; of several that contain an
// address the first counts.
type PhysicalNetwork struct {
	Network     netip.Prefix
	MTU         int  // of datagrams without IP and UDP headers, 0 = default
	Blacklist   bool // no paths through it
	TrustedPath uint64
}

// VirtualPeer describes where a peer is.
type VirtualPeer struct {
	Address   string // of the node, 10 hex digits
	Try       []netip.AddrPort
	Blacklist []netip.Prefix // no paths through them
}

const (
	minPhysicalMTU = 510

	usualPhysicalMTU = 576 // smaller ones are seldom meant

	maxPhysicalMTU = 10324
	maxPhysical    = 32
)

func parsePhysicalMTU(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < minPhysicalMTU || n > maxPhysicalMTU {
		return 0, fmt.Errorf("want a number from %d to %d", minPhysicalMTU, maxPhysicalMTU)
	}
	return n, nil
}

func parseTrustedPath(s string) (uint64, error) {
	n, err := strconv.ParseUint(s, 0, 64)
	if err != nil || n == 0 {
		return 0, errors.New("want a number above 0, the same on all hosts of this network")
	}
	return n, nil
}

// parseMember reads the address of a node into the form that nodes print.
func parseMember(s string) (string, error) {
	s = strings.ToLower(s)
	_, err := MemberAddress(s)
	return s, err
}

func (p PhysicalNetwork) String() string {
	s := p.Network.String()
	if p.MTU != 0 {
		s += fmt.Sprintf(" mtu %d", p.MTU)
	}
	if p.Blacklist {
		s += " blacklist"
	}
	if p.TrustedPath != 0 {
		s += fmt.Sprintf(" trusted_path %d", p.TrustedPath)
	}
	return s
}

func (p VirtualPeer) String() string {
	s := p.Address
	if len(p.Try) > 0 {
		s += " try " + strings.Join(texts(p.Try), ",")
	}
	if len(p.Blacklist) > 0 {
		s += " blacklist " + strings.Join(texts(p.Blacklist), ",")
	}
	return s
}
