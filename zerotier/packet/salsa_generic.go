//go:build !amd64 || purego

package packet

type salsaScratch struct{}

// xorWide is for processors with vector code.
func (s *salsa12) xorWide([]byte) int { return 0 }
