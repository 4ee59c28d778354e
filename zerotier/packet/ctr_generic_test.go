//go:build !amd64 || purego

package packet

// ctrVariants returns the only implementation.
func ctrVariants() []ctrVariant { return []ctrVariant{{"generic", newCTR}} }

// allocates reports whether xor needs heap memory.
func (c *ctr) allocates() bool { return true }
