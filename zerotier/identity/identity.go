// Package identity holds ZeroTier identities: key pairs whose public part hashes
// to the node's 40-bit address, key agreement and signatures (chapter 01 §2, §3).
// It does no I/O.
package identity

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"
)

// Sizes of the binary form and of signatures.
const (
	BinaryLen    = 71 // public form, the only one on the wire
	SignatureLen = 96
	SessionLen   = 48 // session key of a pair of nodes

	publicLen, secretLen = 64, 64
	powLimit             = 17 // first digest byte of a valid identity is below
	maxTextLen           = 384
)

// Errors of parsing and validation.
var (
	ErrSyntax  = errors.New("not an identity")
	ErrInvalid = errors.New("address does not belong to the key")
	ErrKeyPair = errors.New("secret key does not belong to the public key")
	ErrNoKey   = errors.New("identity has no secret key")
	ErrBadPeer = errors.New("peer's public key is of low order")
)

// Identity is a public key with the address that follows from it, and, for our
// own node, the secret key. It is immutable.
type Identity struct {
	address Address
	public  [publicLen]byte // X25519, Ed25519
	secret  *secret         // nil in a public identity
}

// secret is a secret key. What keys are agreed on with, and what signatures are made with,
// is derived from its halves once: that takes as long as an agreement or a signature.
type secret struct {
	bytes   [secretLen]byte // X25519 scalar, Ed25519 seed
	dh      *ecdh.PrivateKey
	signing ed25519.PrivateKey
}

func newSecret(b []byte) *secret {
	s := &secret{signing: ed25519.NewKeyFromSeed(b[32:secretLen])}
	copy(s.bytes[:], b)
	var err error
	if s.dh, err = ecdh.X25519().NewPrivateKey(s.bytes[:32]); err != nil {
		panic(err) // the length is a constant
	}
	return s
}

// Generate searches an identity on all cores; it takes about 15 address hashes.
// A nil random reads crypto/rand.
func Generate(random io.Reader) (*Identity, error) {
	if random == nil {
		random = rand.Reader
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	found := make(chan *Identity, 1)
	var failure error
	var mu sync.Mutex // guards random and failure
	draw := func(b []byte) bool {
		mu.Lock()
		defer mu.Unlock()
		if failure == nil {
			_, failure = io.ReadFull(random, b)
		}
		return failure == nil
	}
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for ctx.Err() == nil {
				var b [secretLen]byte
				if !draw(b[:]) {
					return
				}
				if id := candidate(newSecret(b[:])); id != nil {
					select {
					case found <- id:
						stop()
					default:
					}
					return
				}
			}
		})
	}
	wg.Wait()
	select {
	case id := <-found:
		return id, nil
	default:
		return nil, fmt.Errorf("generate identity: %w", failure)
	}
}

// candidate returns the identity of secret if it satisfies the proof of work.
func candidate(s *secret) *Identity {
	id := &Identity{secret: s, public: s.public()}
	d := addressHash(&id.public)
	id.address = AddressFromBytes(d[59:])
	if d[0] >= powLimit || id.address.Reserved() {
		return nil
	}
	return id
}

func (s *secret) public() (public [publicLen]byte) {
	copy(public[:32], s.dh.PublicKey().Bytes())
	copy(public[32:], s.signing.Public().(ed25519.PublicKey))
	return public
}

// Parse reads the text form, with or without the secret key; white space around
// it is ignored. It does not check that the address belongs to the key: see
// [Identity.Validate].
func Parse(text string) (*Identity, error) {
	if len(text) >= maxTextLen {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrSyntax, maxTextLen-1)
	}
	f := strings.Split(strings.TrimSpace(text), ":")
	if len(f) != 3 && len(f) != 4 {
		return nil, fmt.Errorf("%w: want address:0:public[:secret]", ErrSyntax)
	}
	addr, err := ParseAddress(f[0])
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSyntax, err)
	}
	if addr.Reserved() {
		return nil, fmt.Errorf("%w: address %s is reserved", ErrSyntax, addr)
	}
	if f[1] != "0" {
		return nil, fmt.Errorf("%w: type %q, want 0", ErrSyntax, f[1])
	}
	id := &Identity{address: addr}
	if err := parseKey(id.public[:], f[2]); err != nil {
		return nil, fmt.Errorf("%w: public key: %w", ErrSyntax, err)
	}
	if len(f) == 4 {
		var b [secretLen]byte
		if err := parseKey(b[:], f[3]); err != nil {
			return nil, fmt.Errorf("%w: secret key is not 128 hexadecimal digits", ErrSyntax)
		}
		id.secret = newSecret(b[:])
	}
	return id, nil
}

func parseKey(dst []byte, s string) error {
	b, err := hex.DecodeString(s)
	if err != nil {
		return err
	}
	if len(b) != len(dst) {
		return fmt.Errorf("%d bytes, want %d", len(b), len(dst))
	}
	copy(dst, b)
	return nil
}

// Unmarshal reads the binary form from the start of b and returns how many bytes
// it takes (chapter 01 §2.6).
func Unmarshal(b []byte) (id *Identity, n int, err error) {
	if len(b) < BinaryLen {
		return nil, 0, fmt.Errorf("%w: %d bytes, want %d", ErrSyntax, len(b), BinaryLen)
	}
	if b[5] != 0 {
		return nil, 0, fmt.Errorf("%w: type %d", ErrSyntax, b[5])
	}
	id = &Identity{address: AddressFromBytes(b)}
	copy(id.public[:], b[6:70])
	switch b[70] {
	case 0:
		return id, BinaryLen, nil
	case secretLen:
		if len(b) < BinaryLen+secretLen {
			return nil, 0, fmt.Errorf("%w: secret key cut short", ErrSyntax)
		}
		id.secret = newSecret(b[BinaryLen:])
		return id, BinaryLen + secretLen, nil
	default:
		return nil, 0, fmt.Errorf("%w: secret key of %d bytes", ErrSyntax, b[70])
	}
}

// AppendBinary appends the public binary form, [BinaryLen] bytes.
func (id *Identity) AppendBinary(b []byte) []byte {
	b = append(id.address.Append(b), 0)
	b = append(b, id.public[:]...)
	return append(b, 0)
}

// String returns the public text form.
func (id *Identity) String() string {
	return id.address.String() + ":0:" + hex.EncodeToString(id.public[:])
}

// SecretString returns the text form with the secret key, "" without one.
func (id *Identity) SecretString() string {
	if id.secret == nil {
		return ""
	}
	return id.String() + ":" + hex.EncodeToString(id.secret.bytes[:])
}

// Address returns the node address.
func (id *Identity) Address() Address { return id.address }

// PublicKey returns the X25519 and the Ed25519 public key.
func (id *Identity) PublicKey() [64]byte { return id.public }

// HasSecret reports whether the identity can agree on keys and sign.
func (id *Identity) HasSecret() bool { return id.secret != nil }

// Public returns the identity without its secret key.
func (id *Identity) Public() *Identity {
	return &Identity{address: id.address, public: id.public}
}

// Equal reports whether address and public key are the same.
func (id *Identity) Equal(o *Identity) bool {
	return o != nil && id.address == o.address && id.public == o.public
}

// Compare orders by address, then by public key.
func (id *Identity) Compare(o *Identity) int {
	switch {
	case id.address < o.address:
		return -1
	case id.address > o.address:
		return 1
	}
	return bytes.Compare(id.public[:], o.public[:])
}

// Fingerprint returns SHA-384 of address and public key (chapter 01 §2.7).
func (id *Identity) Fingerprint() [48]byte {
	return sha512.Sum384(append(id.address.Append(nil), id.public[:]...))
}

// Validate checks that the address belongs to the public key (chapter 01 §2.3),
// which takes 12 to 35 ms, and the public key to the secret one if there is one.
func (id *Identity) Validate() error {
	if id.address.Reserved() {
		return fmt.Errorf("%w: address %s is reserved", ErrInvalid, id.address)
	}
	if id.secret != nil && id.secret.public() != id.public {
		return ErrKeyPair
	}
	d := addressHash(&id.public)
	if d[0] >= powLimit || AddressFromBytes(d[59:]) != id.address {
		return ErrInvalid
	}
	return nil
}

// Agree returns the session key shared with peer (chapter 01 §3.1).
func (id *Identity) Agree(peer *Identity) (key [SessionLen]byte, err error) {
	if id.secret == nil {
		return key, ErrNoKey
	}
	raw, err := agree(id.secret.dh, peer.public[:32])
	if err != nil {
		return key, err
	}
	sum := sha512.Sum512(raw)
	copy(key[:], sum[:])
	return key, nil
}

// agree is X25519 without the result zero, which some public values yield for everybody.
func agree(mine *ecdh.PrivateKey, public []byte) ([]byte, error) {
	theirs, err := ecdh.X25519().NewPublicKey(public)
	if err != nil {
		return nil, err
	}
	raw, err := mine.ECDH(theirs)
	if err != nil {
		return nil, ErrBadPeer
	}
	return raw, nil
}

// Sign returns the signature of msg (chapter 01 §3.2).
func (id *Identity) Sign(msg []byte) (sig [SignatureLen]byte, err error) {
	if id.secret == nil {
		return sig, ErrNoKey
	}
	sum := sha512.Sum512(msg)
	copy(sig[:64], ed25519.Sign(id.secret.signing, sum[:32]))
	copy(sig[64:], sum[:32])
	return sig, nil
}

// Verify reports whether sig is the signature of msg by this identity.
func (id *Identity) Verify(msg, sig []byte) bool {
	return VerifyKey(id.public[32:], msg, sig)
}

// VerifyKey verifies with a bare Ed25519 public key, as worlds need it.
func VerifyKey(public ed25519.PublicKey, msg, sig []byte) bool {
	if len(sig) != SignatureLen || len(public) != ed25519.PublicKeySize {
		return false
	}
	sum := sha512.Sum512(msg)
	if subtle.ConstantTimeCompare(sum[:32], sig[64:]) != 1 {
		return false
	}
	return ed25519.Verify(public, sum[:32], sig[:64])
}

// KDF derives a key from a session key (chapter 01 §3.3).
func KDF(key [SessionLen]byte, label, context byte, iteration uint32) (out [48]byte) {
	var msg [13]byte
	binary.BigEndian.PutUint32(msg[:], iteration)
	msg[4], msg[5], msg[6], msg[8] = 'Z', 'T', label, context
	binary.BigEndian.PutUint32(msg[9:], 384)
	h := hmac.New(sha512.New384, key[:])
	h.Write(msg[:])
	h.Sum(out[:0])
	return out
}
