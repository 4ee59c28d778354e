package vl1

import (
	"crypto/ed25519"
	"crypto/sha512"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/wire"
	"ztgate/zerotier/packet"
)

// World types on the wire (chapter 02 §3.1).
const (
	worldPlanet = 1
	worldMoon   = 127
)

// Limits of a world (chapter 02 §3.1).
const (
	MaxRoots     = 4
	MaxEndpoints = 32 // per root
)

// Key is an update key of a world: X25519 part (unused) and Ed25519 part. The
// secret form has the Ed25519 seed in the second half.
type Key [64]byte

// Public returns the public form of a secret key. The X25519 part, which nothing
// uses, is zero.
func (k Key) Public() (public Key) {
	copy(public[32:], ed25519.NewKeyFromSeed(k[32:]).Public().(ed25519.PublicKey))
	return public
}

// ErrMalformed is wrapped by the parse errors of worlds.
var ErrMalformed = errors.New("malformed world")

// World is a signed list of roots: the planet or a moon (chapter 02 §3). It is
// not changed after it was handed to a Core.
type World struct {
	Moon      bool // a moon, otherwise a planet
	ID        uint64
	Timestamp int64 // ms since the Unix epoch; also the revision number
	UpdateKey Key   // signs the next revision
	Signature [identity.SignatureLen]byte
	Roots     []Root
}

// Root is one root of a world with the endpoints it always has.
type Root struct {
	Identity  *identity.Identity
	Endpoints []netip.AddrPort
}

//go:embed default.planet
var defaultPlanet []byte

// DefaultPlanet returns the planet of the public ZeroTier network (chapter 02
// §3.3).
func DefaultPlanet() *World {
	w, _, err := ParseWorld(defaultPlanet)
	if err != nil {
		panic("vl1: embedded planet: " + err.Error())
	}
	return w
}

// NewPlanet returns an unsigned planet; see [World.Sign]. A first revision needs
// no signature.
func NewPlanet(id uint64, timestamp int64, roots []Root, updateKey Key) *World {
	return &World{ID: id, Timestamp: timestamp, Roots: roots, UpdateKey: updateKey}
}

// IsPlanet reports whether the world is a planet.
func (w *World) IsPlanet() bool { return !w.Moon }

// ParseWorld reads one world from the start of b and returns the number of bytes
// it takes (chapter 02 §3.1).
func ParseWorld(b []byte) (w *World, n int, err error) {
	r := reader{Reader: wire.Reader{Buf: b}}
	typ := r.U8()
	w = &World{Moon: typ == worldMoon, ID: r.U64(), Timestamp: int64(r.U64())}
	copy(w.UpdateKey[:], r.Bytes(len(w.UpdateKey)))
	copy(w.Signature[:], r.Bytes(len(w.Signature)))
	roots := int(r.U8())
	switch {
	case r.Failed:
		return nil, 0, fmt.Errorf("parse world: %w: too short", ErrMalformed)
	case typ != worldPlanet && typ != worldMoon:
		return nil, 0, fmt.Errorf("parse world: %w: type %d", ErrMalformed, typ)
	case roots > MaxRoots:
		return nil, 0, fmt.Errorf("parse world: %w: %d roots", ErrMalformed, roots)
	}
	for range roots {
		root := Root{Identity: r.identity()}
		count := int(r.U8())
		if count > MaxEndpoints {
			return nil, 0, fmt.Errorf("parse world: %w: %d endpoints", ErrMalformed, count)
		}
		for range count {
			root.Endpoints = append(root.Endpoints, r.endpoint())
		}
		if r.Failed {
			return nil, 0, fmt.Errorf("parse world: %w: bad root", ErrMalformed)
		}
		w.Roots = append(w.Roots, root)
	}
	if w.Moon {
		r.Bytes(int(r.U16()))
	}
	if r.Failed {
		return nil, 0, fmt.Errorf("parse world: %w: too short", ErrMalformed)
	}
	return w, r.Off, nil
}

// Append appends the binary form, as on disk and in OK(HELLO).
func (w *World) Append(b []byte) []byte {
	b = w.appendHead(b)
	b = append(b, w.Signature[:]...)
	return w.appendRoots(b)
}

func (w *World) appendHead(b []byte) []byte {
	typ := byte(worldPlanet)
	if w.Moon {
		typ = worldMoon
	}
	b = append(b, typ)
	b = binary.BigEndian.AppendUint64(b, w.ID)
	b = binary.BigEndian.AppendUint64(b, uint64(w.Timestamp))
	return append(b, w.UpdateKey[:]...)
}

func (w *World) appendRoots(b []byte) []byte {
	b = append(b, byte(len(w.Roots)))
	for _, root := range w.Roots {
		b = root.Identity.AppendBinary(b)
		b = append(b, byte(len(root.Endpoints)))
		for _, ep := range root.Endpoints {
			b = packet.AppendEndpoint(b, ep)
		}
	}
	if w.Moon {
		b = append(b, 0, 0)
	}
	return b
}

// signedMessage is what the signature covers (chapter 02 §3.2).
func (w *World) signedMessage() []byte {
	b := binary.BigEndian.AppendUint64(nil, 0x7f7f7f7f7f7f7f7f)
	b = w.appendRoots(w.appendHead(b))
	return binary.BigEndian.AppendUint64(b, 0xf7f7f7f7f7f7f7f7)
}

// Sign signs the world with the secret form of the update key of the revision it
// replaces.
func (w *World) Sign(secret Key) {
	sum := sha512.Sum512(w.signedMessage())
	copy(w.Signature[:64], ed25519.Sign(ed25519.NewKeyFromSeed(secret[32:]), sum[:32]))
	copy(w.Signature[64:], sum[:32])
}

// Verify checks the signature with the update key of the revision that w is to
// replace.
func (w *World) Verify(key Key) bool {
	return identity.VerifyKey(key[32:], w.signedMessage(), w.Signature[:])
}

// Replaces reports whether w is an acceptable update of current, which may be nil
// (chapter 02 §3.4).
func (w *World) Replaces(current *World) bool {
	if current == nil || current.ID == 0 {
		return true
	}
	return w.Moon == current.Moon && w.ID == current.ID && w.Timestamp > current.Timestamp &&
		w.Verify(current.UpdateKey)
}
