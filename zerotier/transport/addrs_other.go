//go:build !linux || portableudp

package transport

import (
	"context"
	"net/netip"
	"time"
)

func unstableAddresses() map[netip.Addr]bool { return nil }

// addrWatch has no announcements here: changes are found by polling.
type addrWatch struct{}

func newAddrWatch() *addrWatch { return &addrWatch{} }

func (*addrWatch) changes(context.Context, func(func())) (<-chan struct{}, time.Duration) {
	return nil, rescanPoll
}

func (*addrWatch) close() error { return nil }
