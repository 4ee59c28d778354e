package identity

import (
	"crypto/ecdh"
	"crypto/rand"
	"crypto/sha512"
)

// EnvelopeKeyLen is the length of the key of an envelope, and of the public value in it.
const EnvelopeKeyLen = 32

// Encapsulate makes a key that only the owner of id finds out again, from the public value
// that goes with what the key protects (chapter 06 §3.3).
func (id *Identity) Encapsulate() (key, public [EnvelopeKeyLen]byte, err error) {
	var scalar [32]byte
	if _, err := rand.Read(scalar[:]); err != nil {
		return key, public, err
	}
	return id.encapsulate(&scalar)
}

func (id *Identity) encapsulate(scalar *[32]byte) (key, public [EnvelopeKeyLen]byte, err error) {
	once, err := ecdh.X25519().NewPrivateKey(scalar[:])
	if err != nil {
		return key, public, err
	}
	raw, err := agree(once, id.public[:32])
	if err != nil {
		return key, public, err
	}
	copy(public[:], once.PublicKey().Bytes())
	return envelopeKey(raw), public, nil
}

// Decapsulate returns the key that belongs to a public value. It takes one key agreement,
// and says nothing about who made the key.
func (id *Identity) Decapsulate(public *[EnvelopeKeyLen]byte) (key [EnvelopeKeyLen]byte, err error) {
	if id.secret == nil {
		return key, ErrNoKey
	}
	raw, err := agree(id.secret.dh, public[:])
	if err != nil {
		return key, err
	}
	return envelopeKey(raw), nil
}

func envelopeKey(raw []byte) [EnvelopeKeyLen]byte {
	sum := sha512.Sum512(raw)
	return [EnvelopeKeyLen]byte(sum[:EnvelopeKeyLen])
}
