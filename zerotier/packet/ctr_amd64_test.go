//go:build !purego

package packet

// ctrVariants returns every implementation this processor can run.
func ctrVariants() []ctrVariant {
	best := newCTR(make([]byte, 32)).width
	names := map[ctrWidth]string{ctrNone: "generic", ctrAESNI: "aesni", ctrVAES: "vaes", ctrAVX512: "avx512"}
	var all []ctrVariant
	for w := ctrNone; w <= best; w++ {
		all = append(all, ctrVariant{names[w], func(key []byte) *ctr {
			c := newCTR(key)
			c.width = w
			return c
		}})
	}
	return all
}

// allocates reports whether xor needs heap memory.
func (c *ctr) allocates() bool { return c.width == ctrNone }

// gmacVariants returns every implementation this processor can run.
func gmacVariants() []gmacVariant {
	names := map[gmacWidth]string{gmacNone: "generic", gmacVEX: "vex", gmacAVX512: "avx512"}
	var all []gmacVariant
	for w := gmacNone; w <= widestGMAC(); w++ {
		all = append(all, gmacVariant{names[w], func(key []byte) *gmac {
			g := new(gmac)
			if err := g.initWidth(w, key); err != nil {
				panic(err)
			}
			return g
		}})
	}
	return all
}
