package vl2

import (
	"fmt"
	"net/netip"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/wire"
)

// ExtFrame is the payload of EXT_FRAME (chapter 03 §4.2). Data aliases the packet.
type ExtFrame struct {
	Network             NetworkID
	Acknowledge         bool
	COM                 *COM
	Destination, Source MAC
	EtherType           uint16
	Data                []byte
}

const (
	frameHasCOM      = 0x01
	extAcknowledge   = 0x10
	multicastGather  = 0x02
	multicastSource  = 0x04
	multicastSpread  = 0x08
	okHasCOM         = 0x01
	okHasGather      = 0x02
	maxGatherResults = 4096
)

// com reads an attached certificate.
func (r *reader) com() *COM {
	if r.Failed {
		return nil
	}
	c, n, err := ParseCOM(r.Rest())
	if err != nil {
		r.Failed = true
		return nil
	}
	r.Off += n
	return c
}

// ParseExtFrame reads EXT_FRAME.
func ParseExtFrame(b []byte) (f ExtFrame, err error) {
	r := reader{Reader: wire.Reader{Buf: b}}
	f.Network = r.networkID()
	flags := r.U8()
	f.Acknowledge = flags&extAcknowledge != 0
	if flags&frameHasCOM != 0 {
		f.COM = r.com()
	}
	f.Destination, f.Source, f.EtherType = r.mac(), r.mac(), r.U16()
	if r.Failed {
		return ExtFrame{}, fmt.Errorf("EXT_FRAME: %w", ErrMalformed)
	}
	f.Data = r.Rest()
	return f, nil
}

// AppendExtFrame appends EXT_FRAME.
func AppendExtFrame(b []byte, n NetworkID, flags byte, dst, src MAC, etherType uint16, data []byte) []byte {
	b = append(n.Append(b), flags)
	b = append(append(b, dst[:]...), src[:]...)
	return append(be.AppendUint16(b, etherType), data...)
}

// MulticastFrame is the payload of MULTICAST_FRAME (chapter 03 §4.3).
type MulticastFrame struct {
	Network     NetworkID
	COM         *COM
	GatherLimit uint32
	HasSource   bool
	Source      MAC
	Replicate   bool // the receiver shall send it to the others
	Group       MulticastGroup
	EtherType   uint16
	Data        []byte
}

// ParseMulticastFrame reads MULTICAST_FRAME.
func ParseMulticastFrame(b []byte) (f MulticastFrame, err error) {
	r := reader{Reader: wire.Reader{Buf: b}}
	f.Network = r.networkID()
	flags := r.U8()
	if flags&frameHasCOM != 0 {
		f.COM = r.com()
	}
	if flags&multicastGather != 0 {
		f.GatherLimit = r.U32()
	}
	if flags&multicastSource != 0 {
		f.HasSource, f.Source = true, r.mac()
	}
	f.Replicate = flags&multicastSpread != 0
	f.Group = MulticastGroup{MAC: r.mac(), ADI: r.U32()}
	f.EtherType = r.U16()
	if r.Failed {
		return MulticastFrame{}, fmt.Errorf("MULTICAST_FRAME: %w", ErrMalformed)
	}
	f.Data = r.Rest()
	return f, nil
}

// AppendMulticastFrame appends MULTICAST_FRAME; source is nil for our own MAC.
func AppendMulticastFrame(b []byte, n NetworkID, gather uint32, source *MAC, g MulticastGroup, etherType uint16, data []byte) []byte {
	flags := byte(multicastGather)
	if source != nil {
		flags |= multicastSource
	}
	b = be.AppendUint32(append(n.Append(b), flags), gather)
	if source != nil {
		b = append(b, source[:]...)
	}
	return append(be.AppendUint16(g.Append(b), etherType), data...)
}

// AppendReplicate appends MULTICAST_FRAME for a replicator (chapter 03 §5.5).
func AppendReplicate(b []byte, n NetworkID, source MAC, g MulticastGroup, etherType uint16, data []byte) []byte {
	b = append(n.Append(b), multicastSource|multicastSpread)
	b = g.Append(append(b, source[:]...))
	return append(be.AppendUint16(b, etherType), data...)
}

// Gather is the payload of MULTICAST_GATHER (chapter 03 §5.3).
type Gather struct {
	Network NetworkID
	Group   MulticastGroup
	Limit   uint32
	COM     *COM
}

// ParseGather reads MULTICAST_GATHER; a malformed certificate is ignored.
func ParseGather(b []byte) (g Gather, err error) {
	r := reader{Reader: wire.Reader{Buf: b}}
	g.Network = r.networkID()
	flags := r.U8()
	g.Group = MulticastGroup{MAC: r.mac(), ADI: r.U32()}
	g.Limit = r.U32()
	if r.Failed {
		return Gather{}, fmt.Errorf("MULTICAST_GATHER: %w", ErrMalformed)
	}
	if flags&frameHasCOM != 0 {
		g.COM = r.com()
	}
	return g, nil
}

// AppendGather appends MULTICAST_GATHER with our certificate if there is one.
func AppendGather(b []byte, n NetworkID, g MulticastGroup, limit uint32, com *COM) []byte {
	flags := byte(0)
	if com != nil {
		flags = frameHasCOM
	}
	b = be.AppendUint32(g.Append(append(n.Append(b), flags)), limit)
	if com != nil {
		b = com.Append(b)
	}
	return b
}

// ParseGatherResult reads the addresses of a gather result (chapter 03 §5.4).
func ParseGatherResult(b []byte) (out []identity.Address) {
	r := reader{Reader: wire.Reader{Buf: b}}
	r.U32()
	for range min(int(r.U16()), maxGatherResults) {
		a := r.Address()
		if r.Failed {
			break
		}
		out = append(out, a)
	}
	return out
}

// SplitFrameOK reads what follows the group in OK(MULTICAST_FRAME): perhaps a
// certificate, perhaps a gather result (has).
func SplitFrameOK(b []byte) (com *COM, gather []byte, has bool) {
	r := reader{Reader: wire.Reader{Buf: b}}
	flags := r.U8()
	if flags&okHasCOM != 0 {
		com = r.com()
	}
	if r.Failed || flags&okHasGather == 0 {
		return com, nil, false
	}
	return com, r.Rest(), true
}

// NDPReply is the answer to a neighbour solicitation that is made up instead of
// asking (chapter 03 §5.8).
type NDPReply struct {
	From MAC
	Data []byte // Ethernet payload, an IPv6 packet
}

// EmulateNDP answers a solicitation for an address that names its holder; nil if
// it must be asked for.
func EmulateNDP(c *NetworkConfig, etherType uint16, d []byte) *NDPReply {
	if c.Flags&FlagNDPEmulation == 0 || etherType != EtherTypeIPv6 || len(d) < 64 || d[6] != 58 || d[40] != 135 {
		return nil
	}
	target := [16]byte(d[48:64])
	for _, p := range c.Addresses {
		if !p.Addr().Is6() {
			continue
		}
		a := p.Addr().As16()
		var peer identity.Address
		switch {
		case p.Bits() == 88 && a[0] == 0xfd && a[9] == 0x99 && a[10] == 0x93 && [11]byte(target[:11]) == [11]byte(a[:11]):
			peer = identity.AddressFromBytes(target[11:])
		case p.Bits() == 40 && a[0] == 0xfc && [5]byte(a[:5]) == [5]byte(SixPlane(c.ID, 0).Addr().AsSlice()[:5]) && [5]byte(target[:5]) == [5]byte(a[:5]):
			peer = identity.AddressFromBytes(target[5:])
		default:
			continue
		}
		if peer == 0 || peer == c.Member {
			return nil
		}
		return &NDPReply{From: MACOf(c.ID, peer), Data: advertisement(target, p.Addr(), MACOf(c.ID, peer))}
	}
	return nil
}

func advertisement(target [16]byte, to netip.Addr, mac MAC) []byte {
	b := []byte{0x60, 0, 0, 0, 0, 0x20, 0x3a, 0xff}
	b = append(b, target[:]...)
	b = append(b, to.AsSlice()...)
	b = append(b, 0x88, 0, 0, 0, 0x60, 0, 0, 0)
	b = append(b, target[:]...)
	b = append(append(b, 2, 1), mac[:]...)
	sum := uint32(0x20 + 0x3a)
	for i := 8; i < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	be.PutUint16(b[42:], ^uint16(sum))
	return b
}
