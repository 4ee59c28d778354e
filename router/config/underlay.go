package config

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Underlay is what the operator knows about the networks that carry the overlay
// (chapter 02 §8.6).
type Underlay struct {
	LowBandwidth bool   // fewer probes and announcements
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
	minPhysicalMTU = 1400
	maxPhysicalMTU = 10324
	maxPhysical    = 32
)

var (
	physicalKeys = []string{"network", "mtu", "blacklist", "trusted_path"}
	virtualKeys  = []string{"id", "try", "blacklist"}
)

func (f *yamlFile) physical(n *yaml.Node) {
	f.entries("physical", `{network: 10.0.0.0/8, mtu: 1400}`, n, func(item *yaml.Node) {
		var p PhysicalNetwork
		f.mapping("physical.", item, func(key, full string, v *yaml.Node) {
			var err error
			switch key {
			case "network":
				p.Network, err = ParsePrefix(v.Value)
			case "mtu":
				if p.MTU, err = strconv.Atoi(v.Value); err != nil || p.MTU < minPhysicalMTU || p.MTU > maxPhysicalMTU {
					err = fmt.Errorf("want a number from %d to %d", minPhysicalMTU, maxPhysicalMTU)
				}
			case "blacklist":
				p.Blacklist = f.boolean(full, v)
			case "trusted_path":
				if p.TrustedPath, err = strconv.ParseUint(v.Value, 0, 64); err != nil || p.TrustedPath == 0 {
					err = fmt.Errorf("want a number above 0, the same on all hosts of this network")
				}
			default:
				f.unknown(v, full, prefixed("physical.", physicalKeys))
			}
			if err != nil {
				f.errorf("%s: %s: %q: %w", f.at(v), full, v.Value, err)
			}
		})
		if !p.Network.IsValid() {
			f.errorf("%s: physical: an entry has no network: give a prefix", f.at(item))
		}
		f.cfg.Underlay.Physical = append(f.cfg.Underlay.Physical, p)
	})
	if len(f.cfg.Underlay.Physical) > maxPhysical {
		f.errorf("%s: physical: more than %d entries: leave some out", f.at(n), maxPhysical)
	}
}

func (f *yamlFile) virtual(n *yaml.Node) {
	f.entries("virtual", `{id: "a1b2c3d4e5", try: ["198.51.100.7:9993"]}`, n, func(item *yaml.Node) {
		var p VirtualPeer
		f.mapping("virtual.", item, func(key, full string, v *yaml.Node) {
			switch key {
			case "id":
				p.Address = strings.ToLower(v.Value)
			case "try":
				p.Try = items(f, full, v, ParseEndpoint)
			case "blacklist":
				p.Blacklist = items(f, full, v, ParsePrefix)
			default:
				f.unknown(v, full, prefixed("virtual.", virtualKeys))
			}
		})
		if _, err := MemberAddress(p.Address); err != nil {
			f.errorf("%s: virtual.id: %w", f.at(item), err)
		}
		f.cfg.Underlay.Virtual = append(f.cfg.Underlay.Virtual, p)
	})
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
