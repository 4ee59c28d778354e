package host

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Way is where the kernel sends a packet.
type Way struct {
	Device string
	Via    netip.Addr // invalid = the destination is attached to the device
	Local  bool       // it ends in this host
	// Refused says why it goes nowhere, as an error of the kernel; nil = it goes on.
	Refused error
}

// Way asks the kernel where a packet goes. in is the interface that it comes in by,
// "" if this host sends it; src may be invalid then.
func (t *Table) Way(src, dst netip.Addr, in string) (Way, error) {
	o := &netlink.RouteGetOptions{Iif: in}
	if src.IsValid() {
		o.SrcAddr = src.AsSlice()
	}
	list, err := t.nl.RouteGetWithOptions(dst.AsSlice(), o)
	for _, refusal := range []error{unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EINVAL, unix.EACCES, unix.EXDEV} {
		if errors.Is(err, refusal) {
			return Way{Refused: refusal}, nil
		}
	}
	switch {
	case err != nil:
		return Way{}, fmt.Errorf("ask the kernel for the way to %s: %w", dst, err)
	case len(list) == 0:
		return Way{Refused: unix.ENETUNREACH}, nil
	}
	r := list[0]
	hop := nextHops(&r)[0]
	w := Way{Via: hop.via, Local: r.Type == unix.RTN_LOCAL}
	l, err := t.nl.LinkByIndex(hop.index)
	if err != nil {
		return Way{}, fmt.Errorf("find interface %d: %w", hop.index, err)
	}
	w.Device = l.Attrs().Name
	return w, nil
}

// IsUp reports whether the interface is up.
func (k *Link) IsUp() bool {
	l, err := k.nl.LinkByIndex(k.l.Attrs().Index)
	return err == nil && l.Attrs().Flags&net.FlagUp != 0
}
