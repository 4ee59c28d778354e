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
	s, err := k.State()
	return err == nil && s.Up
}

// LinkState is the state of an interface.
type LinkState struct {
	Up  bool
	MTU int // bytes
}

// State returns the state of the interface now.
func (k *Link) State() (LinkState, error) { return linkState(k.nl.LinkByIndex(k.l.Attrs().Index)) }

// Link returns the state of any interface, by its name.
func (t *Table) Link(name string) (LinkState, error) { return linkState(t.nl.LinkByName(name)) }

func linkState(l netlink.Link, err error) (LinkState, error) {
	if err != nil {
		return LinkState{}, err
	}
	return LinkState{Up: l.Attrs().Flags&net.FlagUp != 0, MTU: l.Attrs().MTU}, nil
}

// Gone reports that an interface doesn't exist.
func Gone(err error) bool {
	_, gone := errors.AsType[netlink.LinkNotFoundError](err)
	return gone || errors.Is(err, unix.ENODEV)
}
