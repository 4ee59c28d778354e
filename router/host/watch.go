package host

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Watch tells that something of the host may have changed: interfaces, addresses,
// routes, rules, and the settings that the kernel announces (forwarding, rp_filter).
// Whoever hears that looks for himself, so that nothing is lost when the kernel drops
// announcements.
type Watch struct {
	s       *nl.NetlinkSocket
	changed chan struct{}
}

// Groups of announcements that netlink doesn't name (linux/rtnetlink.h).
const (
	groupNetconf4 = 24
	groupNetconf6 = 25
)

// OpenWatch opens a watch on the network namespace of the calling thread. Close frees
// it.
func OpenWatch() (*Watch, error) {
	// One socket for all: with announcements lost it goes on, and needs no namespace to
	// be opened in again.
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE, groupNetconf4, groupNetconf6)
	if err != nil {
		return nil, fmt.Errorf("watch the host's links and routes: %w", err)
	}
	return &Watch{s: s, changed: make(chan struct{}, 1)}, nil
}

// Changed gets a value after changes; several may be one.
func (w *Watch) Changed() <-chan struct{} { return w.changed }

// Run listens until ctx ends, which is not an error.
func (w *Watch) Run(ctx context.Context) error {
	defer context.AfterFunc(ctx, w.Close)()
	for {
		_, _, err := w.s.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil, errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			// Also too many at once: some are lost, and something has changed.
		default:
			return fmt.Errorf("watch the host's links and routes: %w", err)
		}
		select {
		case w.changed <- struct{}{}:
		default: // it is known already
		}
	}
}

// Close frees the watch; closing twice is harmless.
func (w *Watch) Close() { w.s.Close() }
