package packet

import (
	"crypto/aes"
	"crypto/cipher"

	"ztgate/zerotier/identity"
)

// Sizes of a sealed HELLO (chapter 06 §3.2).
const (
	EnvelopeLen  = identity.EnvelopeKeyLen // at its end
	minEnveloped = HeaderLen + EnvelopeLen
)

// Enveloped reports whether a packet is a sealed HELLO: one in an envelope, of which only
// the header up to the MAC can be read. The mark stays when it was opened.
func (p Packet) Enveloped() bool { return p[offFCH]&(suiteMask|flagEncrypted) == flagEncrypted }

// Envelope hides HELLOs from all but one receiver. One may serve for many: the key stream
// of each depends on the packet ID. It is immutable.
type Envelope struct {
	block  cipher.Block
	public [EnvelopeLen]byte
}

// NewEnvelope makes an envelope that only the owner of an identity can open. It takes two
// key agreements.
func NewEnvelope(to *identity.Identity) (*Envelope, error) {
	key, public, err := to.Encapsulate()
	if err != nil {
		return nil, err
	}
	return newEnvelope(&key, &public), nil
}

func newEnvelope(key, public *[EnvelopeLen]byte) *Envelope {
	block, err := aes.NewCipher(key[:])
	if err != nil {
		panic(err) // the key length is a constant
	}
	return &Envelope{block, *public}
}

// xor encrypts and decrypts what is hidden.
func (e *Envelope) xor(p Packet) {
	var counter [aes.BlockSize]byte
	copy(counter[:12], p)
	cipher.NewCTR(e.block, counter[:]).XORKeyStream(p[offMAC:], p[offMAC:])
}

// Suits reports whether receivers of release 1.16.0 can read a HELLO with this ID: they
// take what is encrypted for a plain HELLO, and drop it, if the byte in the place of
// the verb happens to look so.
func (e *Envelope) Suits(id ID, to identity.Address) bool {
	var p [HeaderLen]byte
	PutHeader(p[:], id, to, 0, VerbHello)
	e.xor(p[:])
	return Packet(p[:]).Verb() != VerbHello
}

// SealHello protects a HELLO in place in suite 0, as [Keys.Seal] does, and puts it into an
// envelope: what it returns is longer by [EnvelopeLen].
func (k *Keys) SealHello(p Packet, e *Envelope, s *Scratch) Packet {
	p[offFCH] = p[offFCH]&flagFragmented | flagEncrypted
	k.startSalsa(p, s)
	k.poly(p, s)
	copy(p[offMAC:offVerb], s.tag[:8])
	e.xor(p)
	return append(p, e.public[:]...)
}

// OpenEnvelope takes a sealed HELLO out of its envelope, in place. Anybody can make an
// envelope: what is in it is still to be opened by [Keys.Open]. After an error the
// content of p is undefined.
func (p Packet) OpenEnvelope(own *identity.Identity) (Packet, error) {
	if len(p) < minEnveloped {
		return nil, ErrShort
	}
	inner := p[:len(p)-EnvelopeLen]
	public := [EnvelopeLen]byte(p[len(inner):])
	key, err := own.Decapsulate(&public)
	if err != nil {
		return nil, err
	}
	newEnvelope(&key, &public).xor(inner)
	return inner, nil
}
