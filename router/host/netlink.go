package host

import (
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Netlink is what is asked of the kernel: a [netlink.Handle], or a simulated one.
type Netlink interface {
	LinkByName(name string) (netlink.Link, error)
	LinkByIndex(index int) (netlink.Link, error)
	LinkList() ([]netlink.Link, error)
	LinkSetUp(l netlink.Link) error
	LinkSetMTU(l netlink.Link, mtu int) error
	LinkSetHardwareAddr(l netlink.Link, mac net.HardwareAddr) error
	AddrList(l netlink.Link, family int) ([]netlink.Addr, error)
	AddrReplace(l netlink.Link, a *netlink.Addr) error
	AddrDel(l netlink.Link, a *netlink.Addr) error
	RouteList(l netlink.Link, family int) ([]netlink.Route, error)
	RouteListFiltered(family int, filter *netlink.Route, mask uint64) ([]netlink.Route, error)
	RouteGetWithOptions(dst net.IP, o *netlink.RouteGetOptions) ([]netlink.Route, error)
	RouteAdd(r *netlink.Route) error
	RouteDel(r *netlink.Route) error
	NeighList(index, family int) ([]netlink.Neigh, error)
	NeighProxyList(index, family int) ([]netlink.Neigh, error)
	NeighSet(n *netlink.Neigh) error
	NeighDel(n *netlink.Neigh) error
	Close()
}

// openNetlink opens the kernel of the calling thread's network namespace.
func openNetlink() (Netlink, error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return nl, nil
}
