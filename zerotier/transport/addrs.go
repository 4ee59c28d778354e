package transport

import (
	"net"
	"net/netip"
	"strings"
)

// localAddresses lists the addresses of all interfaces that are up, without
// loopback and temporary ones.
func localAddresses() ([]place, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	unstable := unstableAddresses()
	var out []place
	for _, i := range ifs {
		if i.Flags&net.FlagUp == 0 || i.Flags&net.FlagLoopback != 0 {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			continue // the interface went away meanwhile
		}
		for _, a := range addrs {
			n, ok := a.(*net.IPNet)
			if !ok {
				continue
			}
			if ip, ok := netip.AddrFromSlice(n.IP); ok && !unstable[ip.Unmap()] {
				out = append(out, place{ifname: i.Name, addr: ip.Unmap()})
			}
		}
	}
	return out, nil
}

// excludedInterface reports whether an interface is one of a virtual network
// (chapter 02 §8.1) or of ours.
func excludedInterface(name string) bool {
	for _, p := range []string{"lo", "zt", "tun", "tap", "utun", "feth"} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}
