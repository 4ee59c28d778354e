//go:build !amd64 || purego

package packet

import "crypto/cipher"

// ctr is AES-256-CTR with a new start block for every packet.
type ctr struct {
	block cipher.Block
}

// ctrScratch is the work space of ctr.
type ctrScratch struct{}

func (c *ctr) init(b cipher.Block, _ []byte) { c.block = b }

// encrypt encrypts one block in place.
func (c *ctr) encrypt(b *[16]byte) { c.block.Encrypt(b[:], b[:]) }

// xor applies the key stream that starts at counter block s.ctr to b. It
// allocates one stream object; going block by block would avoid that but is much
// slower.
func (c *ctr) xor(b []byte, s *Scratch) {
	cipher.NewCTR(c.block, s.ctr[:]).XORKeyStream(b, b)
}
