package host

import (
	"encoding/hex"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"

	"ztgate/zerotier/ztnode"
)

// Neighbour returns the MAC of a neighbour that the kernel knows.
func (k *Link) Neighbour(a netip.Addr) (mac ztnode.MAC, ok bool) {
	list, err := k.nl.NeighList(k.l.Attrs().Index, netlink.FAMILY_ALL)
	if err != nil {
		return mac, false
	}
	for _, n := range list {
		if ip, isIP := netip.AddrFromSlice(n.IP); isIP && ip.Unmap() == a && len(n.HardwareAddr) == len(mac) {
			return ztnode.MAC(n.HardwareAddr), true
		}
	}
	return mac, false
}

// Groups lists the multicast groups that the kernel has joined on the interface.
func (k *Link) Groups() []ztnode.Group {
	b, err := os.ReadFile("/proc/thread-self/net/dev_mcast")
	if err != nil {
		return nil
	}
	return ParseGroups(string(b), k.name)
}

// ParseGroups reads /proc/net/dev_mcast: index, name, users, global use, address.
func ParseGroups(text, device string) []ztnode.Group {
	var out []ztnode.Group
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) != 5 || f[1] != device || len(f[4]) != 12 || len(out) >= maxGroups {
			continue
		}
		var mac ztnode.MAC
		if _, err := hex.Decode(mac[:], []byte(f[4])); err == nil {
			out = append(out, ztnode.Group{MAC: mac})
		}
	}
	return out
}

// maxGroups bounds the subscriptions of an interface.
const maxGroups = 1024
