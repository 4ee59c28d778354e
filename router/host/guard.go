package host

import (
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/zerotier/ztnode"
)

// guardMetric makes guards the last resort among routes to the same target. The
// interface's name is in its lower bits, since guards belong to no interface.
const guardMetric = 0x7a000000

func metricOf(name string) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(name))
	return guardMetric | int(h.Sum32()&0xffffff)
}

// guardsOf lists the routes that guard set, also for an earlier process.
func guardsOf(nl Netlink, name string) ([]netlink.Route, error) {
	f := &netlink.Route{Protocol: routeProtocol, Type: unix.RTN_BLACKHOLE}
	list, err := nl.RouteListFiltered(netlink.FAMILY_ALL, f, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TYPE)
	if err != nil {
		return nil, fmt.Errorf("list guard routes: %w", err)
	}
	metric := metricOf(name)
	return slices.DeleteFunc(list, func(r netlink.Route) bool { return r.Priority != metric }), nil
}

// Guards lists the targets of the guards of an interface, which need not exist.
func (t *Table) Guards(name string) ([]netip.Prefix, error) {
	list, err := guardsOf(t.nl, name)
	out := make([]netip.Prefix, len(list))
	for i, r := range list {
		out[i] = prefixOf(r.Dst)
	}
	return out, err
}

// Guard makes the kernel discard packets to targets for as long as they have no
// other route: while the network is down, and after this process was killed or
// failed, they would follow the default route with the clients' own addresses, or be answered
// by this host as unreachable. With keep, targets from before stay too.
func (k *Link) Guard(targets []ztnode.Route, keep bool) error {
	return guard(k.nl, k.name, targets, keep)
}

// Guard is [Link.Guard] without an interface; the name tells guards of ours from those
// of other processes.
func (t *Table) Guard(name string, targets []ztnode.Route, keep bool) error {
	return guard(t.nl, name, targets, keep)
}

func guard(nl Netlink, name string, targets []ztnode.Route, keep bool) error {
	have, err := guardsOf(nl, name)
	if err != nil {
		return err
	}
	var errs []error
	present := map[netip.Prefix]bool{}
	for _, r := range have {
		target := prefixOf(r.Dst)
		if keep || slices.ContainsFunc(targets, func(t ztnode.Route) bool { return t.Target == target }) {
			present[target] = true
			continue
		}
		if err := nl.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove guard of %s: %w", target, err))
		}
	}
	for _, t := range targets {
		if present[t.Target] || t.Target.Bits() == 0 {
			continue
		}
		present[t.Target] = true
		r := &netlink.Route{Dst: ipNet(t.Target), Protocol: routeProtocol, Type: unix.RTN_BLACKHOLE, Priority: metricOf(name)}
		if err := nl.RouteAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			errs = append(errs, fmt.Errorf("add guard of %s: %w%s", t.Target, err, ipv6Hint(t.Target, err)))
		}
	}
	return errors.Join(errs...)
}
