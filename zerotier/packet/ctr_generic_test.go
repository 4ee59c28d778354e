//go:build !amd64 || purego

package packet

// ctrVariants returns the only implementation.
func ctrVariants() []ctrVariant { return []ctrVariant{{"generic", newCTR}} }

// allocates reports whether xor needs heap memory.
func (c *ctr) allocates() bool { return true }

// gmacVariants returns every implementation this processor can run.
func gmacVariants() []gmacVariant {
	return []gmacVariant{{"generic", func(key []byte) *gmac {
		g := new(gmac)
		if err := g.init(key); err != nil {
			panic(err)
		}
		return g
	}}}
}
