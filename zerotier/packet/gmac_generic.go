//go:build !amd64 || purego

package packet

import (
	"crypto/aes"
	"crypto/cipher"
)

// gmac is GMAC with 96-bit nonces.
type gmac struct{ aead cipher.AEAD }

// gmacScratch is the work space of gmac.
type gmacScratch struct{}

func (g *gmac) init(key []byte) error {
	b, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	g.aead, err = cipher.NewGCM(b)
	return err
}

// sum leaves the tag of data in s.tag. The nonce is s.nonce.
func (g *gmac) sum(data []byte, s *Scratch) { g.aead.Seal(s.tag[:0], s.nonce[:], nil, data) }
