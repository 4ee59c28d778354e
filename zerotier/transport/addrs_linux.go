//go:build linux && !portableudp

package transport

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Of linux/if_addr.h: temporary (0x01), failed (0x08), deprecated (0x20) and
// tentative (0x40) addresses make no lasting endpoints.
const unstableFlags = 0x01 | 0x08 | 0x20 | 0x40

// unstableAddresses returns the IPv6 addresses not to be used now.
func unstableAddresses() map[netip.Addr]bool {
	f, err := os.Open("/proc/thread-self/net/if_inet6")
	if err != nil {
		return nil // no IPv6
	}
	defer f.Close()
	out := make(map[netip.Addr]bool)
	for sc := bufio.NewScanner(f); sc.Scan(); {
		// address, interface index, prefix length, scope, flags, name
		fields := strings.Fields(sc.Text())
		if len(fields) < 6 {
			continue
		}
		raw, err := hex.DecodeString(fields[0])
		flags, err2 := strconv.ParseUint(fields[4], 16, 32)
		if err != nil || err2 != nil || flags&unstableFlags == 0 {
			continue
		}
		if a, ok := netip.AddrFromSlice(raw); ok {
			out[a] = true
		}
	}
	return out
}

// addrWatch tells when addresses or links change (rtnetlink groups).
type addrWatch struct{ f *os.File }

// newAddrWatch never fails: without it changes are found by polling.
func newAddrWatch() *addrWatch {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return &addrWatch{}
	}
	sa := &unix.SockaddrNetlink{
		Family: unix.AF_NETLINK,
		Groups: unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR,
	}
	if err := unix.Bind(fd, sa); err != nil {
		_ = unix.Close(fd)
		return &addrWatch{}
	}
	return &addrWatch{f: os.NewFile(uintptr(fd), "rtnetlink")}
}

// changes returns a channel that gets a value after a change, and how often to
// look anyway. Its goroutine, started with spawn, ends with close.
func (w *addrWatch) changes(ctx context.Context, spawn func(func())) (<-chan struct{}, time.Duration) {
	if w.f == nil {
		return nil, rescanPoll
	}
	ch := make(chan struct{}, 1)
	spawn(func() {
		var buf [8192]byte
		for {
			_, err := w.f.Read(buf[:]) // the content doesn't matter, nor that some was lost
			if err != nil && !errors.Is(err, unix.ENOBUFS) || ctx.Err() != nil {
				return
			}
			select {
			case ch <- struct{}{}:
			default:
			}
		}
	})
	return ch, rescanAfter
}

func (w *addrWatch) close() error {
	if w.f == nil {
		return nil
	}
	return w.f.Close()
}
