package host

import (
	"net/netip"
)

// KernelRoute is a route that somebody else put into the kernel.
type KernelRoute struct {
	Target netip.Prefix
	Device string
}
