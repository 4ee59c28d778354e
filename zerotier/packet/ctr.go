package packet

import "crypto/cipher"

// ctr is AES-256-CTR with a new start block for every packet.
type ctr struct {
	block cipher.Block
}

type ctrScratch struct{}

func (c *ctr) init(b cipher.Block, _ []byte) { c.block = b }

func (c *ctr) xor(b []byte, s *Scratch) {
	cipher.NewCTR(c.block, s.ctr[:]).XORKeyStream(b, b)
}
