// Package packet is the ZeroTier packet envelope: header, cipher suites,
// fragments, compression and endpoint encoding (chapter 01 §4 to §6). It does no
// I/O, reads no clock, and nothing on its data path allocates.
package packet

import (
	"encoding/binary"
	"errors"
	"fmt"

	"ztgate/zerotier/identity"
)

// Sizes in bytes (chapter 01 §4.2).
const (
	HeaderLen         = 28 // with the verb byte
	FragmentHeaderLen = 16
	MaxPacket         = 10024
	MaxPayload        = MaxPacket - HeaderLen
	MaxFragments      = 7    // datagrams per packet
	DefaultMTU        = 1432 // UDP payload
)

// Protocol versions (chapter 02 §11).
const (
	ProtocolVersion       = 13 // announced
	MinProtocolVersion    = 4  // accepted
	AESProtocolVersion    = 12 // from here on a peer gets suite 3
	SealedProtocolVersion = 13 // from here on a peer opens sealed HELLOs
)

// ErrShort says that a datagram is too short for what it claims to be.
var ErrShort = errors.New("packet too short")

// ID is a packet ID; on the wire it is also the initialisation vector.
type ID uint64

// Verb is the kind of a packet.
type Verb uint8

// Verbs (chapter 01 §4.1).
const (
	VerbNOP                    Verb = 0x00
	VerbHello                  Verb = 0x01
	VerbError                  Verb = 0x02
	VerbOK                     Verb = 0x03
	VerbWhois                  Verb = 0x04
	VerbRendezvous             Verb = 0x05
	VerbFrame                  Verb = 0x06
	VerbExtFrame               Verb = 0x07
	VerbEcho                   Verb = 0x08
	VerbMulticastLike          Verb = 0x09
	VerbNetworkCredentials     Verb = 0x0a
	VerbNetworkConfigRequest   Verb = 0x0b
	VerbNetworkConfig          Verb = 0x0c
	VerbMulticastGather        Verb = 0x0d
	VerbMulticastFrame         Verb = 0x0e
	VerbPushDirectPaths        Verb = 0x10
	VerbAck                    Verb = 0x12
	VerbQoSMeasurement         Verb = 0x13
	VerbUserMessage            Verb = 0x14
	VerbRemoteTrace            Verb = 0x15
	VerbPathNegotiationRequest Verb = 0x16
)

var verbNames = [...]string{
	VerbNOP: "NOP", VerbHello: "HELLO", VerbError: "ERROR", VerbOK: "OK", VerbWhois: "WHOIS",
	VerbRendezvous: "RENDEZVOUS", VerbFrame: "FRAME", VerbExtFrame: "EXT_FRAME", VerbEcho: "ECHO",
	VerbMulticastLike: "MULTICAST_LIKE", VerbNetworkCredentials: "NETWORK_CREDENTIALS",
	VerbNetworkConfigRequest: "NETWORK_CONFIG_REQUEST", VerbNetworkConfig: "NETWORK_CONFIG",
	VerbMulticastGather: "MULTICAST_GATHER", VerbMulticastFrame: "MULTICAST_FRAME",
	VerbPushDirectPaths: "PUSH_DIRECT_PATHS", VerbAck: "ACK", VerbQoSMeasurement: "QOS_MEASUREMENT",
	VerbUserMessage: "USER_MESSAGE", VerbRemoteTrace: "REMOTE_TRACE",
	VerbPathNegotiationRequest: "PATH_NEGOTIATION_REQUEST",
}

// String returns the name used in docs/protocol.
func (v Verb) String() string {
	if int(v) < len(verbNames) && verbNames[v] != "" {
		return verbNames[v]
	}
	return fmt.Sprintf("verb 0x%02x", uint8(v))
}

// ErrorCode is the reason carried by an ERROR packet (chapter 02 §2.3).
type ErrorCode uint8

// Error codes.
const (
	ErrorInvalidRequest            ErrorCode = 0x01
	ErrorBadProtocolVersion        ErrorCode = 0x02
	ErrorObjectNotFound            ErrorCode = 0x03
	ErrorIdentityCollision         ErrorCode = 0x04
	ErrorUnsupportedOperation      ErrorCode = 0x05
	ErrorNeedMembershipCertificate ErrorCode = 0x06
	ErrorNetworkAccessDenied       ErrorCode = 0x07
	ErrorUnwantedMulticast         ErrorCode = 0x08
	ErrorAuthenticationRequired    ErrorCode = 0x09
)

// Suite is a cipher suite (chapter 01 §5).
type Suite uint8

// Cipher suites.
const (
	SuitePoly1305 Suite = 0 // authenticated, not encrypted
	SuiteSalsa    Suite = 1 // Salsa20/12 and Poly1305
	SuiteTrusted  Suite = 2 // neither: refused but on trusted paths
	SuiteAES      Suite = 3 // AES-GMAC-SIV
)

// Packet is a view of one packet. It aliases the buffer it was made from.
//
//	0    8      13    18    19    27     28
//	| id | dest | src | fch | mac | verb | payload...
type Packet []byte

const (
	offID, offDst, offSrc = 0, 8, 13
	offFCH                = 18
	offMAC, offVerb       = 19, 27

	fragmentIndicator = 0xff // at offSrc: no address begins with it

	flagEncrypted  = 0x80 // suite 1: set by older releases; suite 0: a sealed HELLO
	flagFragmented = 0x40
	suiteMask      = 0x38
	hopsMask       = 0x07 // rewritten by relays, never authenticated

	verbMask       = 0x1f
	flagCompressed = 0x80 // in the verb byte
)

// Parse checks the length, once. Every accessor relies on that check.
func Parse(b []byte) (Packet, error) {
	if len(b) < HeaderLen {
		return nil, ErrShort
	}
	return Packet(b), nil
}

// PutHeader fills b[:HeaderLen]; flags, suite, hops and MAC are zero.
func PutHeader(b []byte, id ID, dst, src identity.Address, v Verb) {
	_ = b[HeaderLen-1]
	binary.BigEndian.PutUint64(b[offID:], uint64(id))
	dst.Put(b[offDst:])
	src.Put(b[offSrc:])
	b[offFCH] = 0
	clear(b[offMAC:offVerb])
	b[offVerb] = byte(v)
}

// ID returns the wire packet ID.
func (p Packet) ID() ID { return ID(binary.BigEndian.Uint64(p[offID:])) }

// Destination returns the address the packet is for.
func (p Packet) Destination() identity.Address { return identity.AddressFromBytes(p[offDst:]) }

// Source returns the address the packet claims to come from.
func (p Packet) Source() identity.Address { return identity.AddressFromBytes(p[offSrc:]) }

// Suite returns the cipher suite.
func (p Packet) Suite() Suite { return Suite(p[offFCH] & suiteMask >> 3) }

// Hops returns the number of relays passed.
func (p Packet) Hops() uint8 { return p[offFCH] & hopsMask }

// SetHops sets the number of relays passed, modulo 8.
func (p Packet) SetHops(n uint8) { p[offFCH] = p[offFCH]&^hopsMask | n&hopsMask }

// Fragmented reports whether the datagram is the head of a fragmented packet.
func (p Packet) Fragmented() bool { return p[offFCH]&flagFragmented != 0 }

// SetFragmented marks the packet as one that will be cut; to be called before
// [Keys.Seal], which covers the mark.
func (p Packet) SetFragmented(on bool) {
	p[offFCH] &^= flagFragmented
	if on {
		p[offFCH] |= flagFragmented
	}
}

// SetTrusted gives the packet suite 2, which protects nothing, with a trusted path
// ID (chapter 01 §5.7). The fragmented mark must be final.
func (p Packet) SetTrusted(id uint64) {
	p[offFCH] = p[offFCH]&flagFragmented | byte(SuiteTrusted)<<3
	binary.BigEndian.PutUint64(p[offMAC:], id)
}

// TrustedPath returns the trusted path ID of a packet of suite 2.
func (p Packet) TrustedPath() uint64 { return binary.BigEndian.Uint64(p[offMAC:]) }

// Verb returns the verb; valid after [Keys.Open].
func (p Packet) Verb() Verb { return Verb(p[offVerb] & verbMask) }

// SetVerb sets the verb and clears the compression flag.
func (p Packet) SetVerb(v Verb) { p[offVerb] = byte(v) }

// Compressed reports whether the payload is an LZ4 block.
func (p Packet) Compressed() bool { return p[offVerb]&flagCompressed != 0 }

// Payload returns what follows the verb byte.
func (p Packet) Payload() []byte { return p[HeaderLen:] }

// Kind is what a datagram looks like from outside.
type Kind uint8

// Kinds of datagrams (chapter 01 §4.3).
const (
	KindJunk     Kind = iota // too short: NAT opening junk, beacons of old releases
	KindFragment             // not the first part of a fragmented packet
	KindPacket               // a packet or the head of one
)

// Classify tells datagrams apart.
func Classify(b []byte) Kind {
	switch {
	case len(b) <= FragmentHeaderLen:
		return KindJunk
	case b[offSrc] == fragmentIndicator:
		return KindFragment
	case len(b) < HeaderLen:
		return KindJunk
	}
	return KindPacket
}
