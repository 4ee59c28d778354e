package packet

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"errors"

	"golang.org/x/crypto/poly1305" //lint:ignore SA1019 the protocol is built on the bare authenticator

	"ztgate/zerotier/identity"
)

// Errors of [Keys.Open].
var (
	ErrMAC   = errors.New("packet authentication failed")
	ErrSuite = errors.New("cipher suite not accepted")
)

// Keys are the keys shared with one peer. They are immutable and safe for
// concurrent use.
type Keys struct {
	gmac    gmac         // K0
	ctr     ctr          // K1
	block   cipher.Block // K1
	session [32]byte     // suites 0 and 1, HELLO mask
}

// Scratch is the work space of one goroutine that seals and opens packets. It
// must be on the heap and not be copied; the zero value is ready.
type Scratch struct {
	mac    gmacScratch // the widest first, so that no vector lies in two cache lines
	stream ctrScratch
	salsa  salsa12
	ks     [64]byte
	key    [32]byte
	tag    [16]byte
	siv    [16]byte
	saved  [16]byte
	ctr    [16]byte
	nonce  [12]byte
}

// NewKeys derives all keys from the session key of a pair of nodes (chapter 01
// §3.1, §3.3).
func NewKeys(session [identity.SessionLen]byte) *Keys {
	k := &Keys{session: [32]byte(session[:32])}
	k0 := identity.KDF(session, '0', 0, 0)
	k1 := identity.KDF(session, '1', 0, 0)
	err := k.gmac.init(k0[:32])
	if err != nil {
		panic(err) // the key length is a constant
	}
	if k.block, err = aes.NewCipher(k1[:32]); err != nil {
		panic(err)
	}
	k.ctr.init(k.block, k1[:32])
	return k
}

// Seal protects p in place with a suite: it sets the suite bits, hops to 0, MAC,
// and encrypts. Suite 3 replaces the packet ID. The fragmented mark must be
// final. For suite 2 see [Packet.SetTrusted].
func (k *Keys) Seal(p Packet, suite Suite, s *Scratch) {
	p[offFCH] = p[offFCH]&flagFragmented | byte(suite)<<3
	switch suite {
	case SuiteAES:
		k.seal3(p, s)
	case SuiteSalsa:
		p[offFCH] |= flagEncrypted
		k.startSalsa(p, s)
		s.salsa.xor(p[offVerb:], &s.ks)
		k.poly(p, s)
		copy(p[offMAC:offVerb], s.tag[:8])
	default:
		k.startSalsa(p, s)
		k.poly(p, s)
		copy(p[offMAC:offVerb], s.tag[:8])
	}
}

// Open verifies p and decrypts it in place. After an error the content of p is
// undefined and must not be used.
func (k *Keys) Open(p Packet, s *Scratch) error {
	switch p.Suite() {
	case SuiteAES:
		return k.open3(p, s)
	case SuitePoly1305, SuiteSalsa:
		k.startSalsa(p, s)
		k.poly(p, s)
		if subtle.ConstantTimeCompare(s.tag[:8], p[offMAC:offVerb]) != 1 {
			return ErrMAC
		}
		if p.Suite() == SuiteSalsa {
			s.salsa.xor(p[offVerb:], &s.ks)
		}
		return nil
	}
	return ErrSuite
}

// startSalsa makes the per-packet key, leaves the Poly1305 key in s.key and the
// stream at block 1 (chapter 01 §5.3, §5.4).
func (k *Keys) startSalsa(p Packet, s *Scratch) {
	s.key = k.session
	for i := range offFCH {
		s.key[i] ^= p[i]
	}
	s.key[18] ^= p[offFCH] &^ hopsMask
	s.key[19] ^= byte(len(p))
	s.key[20] ^= byte(len(p) >> 8)
	s.salsa.init(&s.key, p[:8])
	s.salsa.block(&s.ks)
	copy(s.key[:], s.ks[:32])
}

func (k *Keys) poly(p Packet, s *Scratch) { poly1305.Sum(&s.tag, p[offVerb:], &s.key) }

// gmac3 leaves the folded GMAC of header and plaintext in s.tag[:8]. The
// associated data is put right before the plaintext for a moment, so that
// nothing is copied (chapter 01 §8.2). iv is the random packet ID.
func (k *Keys) gmac3(p Packet, iv []byte, s *Scratch) {
	copy(s.saved[:], p[11:offVerb])
	copy(s.nonce[:8], iv)
	aad := p[11:offVerb]
	copy(aad, p[offDst:offFCH])
	aad[10] = s.saved[offFCH-11] &^ hopsMask
	clear(aad[11:])
	k.gmac.sum(p[11:], s)
	copy(p[11:offVerb], s.saved[:])
	be := binary.BigEndian
	be.PutUint64(s.tag[:], be.Uint64(s.tag[:])^be.Uint64(s.tag[8:]))
}

func (k *Keys) seal3(p Packet, s *Scratch) {
	k.gmac3(p, p[:8], s)
	copy(s.siv[:8], p[:8])
	copy(s.siv[8:], s.tag[:8])
	k.ctr.encrypt(&s.siv)
	s.start()
	k.ctr.xor(p[offVerb:], s)
	copy(p[:8], s.siv[:8])
	copy(p[offMAC:offVerb], s.siv[8:])
}

func (k *Keys) open3(p Packet, s *Scratch) error {
	copy(s.siv[:8], p[:8])
	copy(s.siv[8:], p[offMAC:offVerb])
	s.start()
	k.block.Decrypt(s.siv[:], s.siv[:]) // needed last: the processor does it beside what follows
	k.ctr.xor(p[offVerb:], s)
	k.gmac3(p, s.siv[:8], s)
	if subtle.ConstantTimeCompare(s.tag[:8], s.siv[8:]) != 1 {
		return ErrMAC
	}
	return nil
}

// start makes the first counter block of s.siv.
func (s *Scratch) start() {
	le := binary.LittleEndian
	le.PutUint64(s.ctr[:8], le.Uint64(s.siv[:8]))
	le.PutUint64(s.ctr[8:], le.Uint64(s.siv[8:])&^(0x80<<32))
}

// MaskHello applies the HELLO field mask to p[from:], both ways (chapter 01
// §5.6). It must be done before sealing and after opening, once.
func (k *Keys) MaskHello(p Packet, from int, s *Scratch) {
	copy(s.nonce[:8], p[:8])
	s.nonce[7] &= 0xf8
	s.salsa.init(&k.session, s.nonce[:8])
	s.salsa.xor(p[from:], &s.ks)
	clear(s.nonce[8:])
}
