package gateway

import (
	"net"
	"net/netip"
	"slices"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/host"
)

// checkHost looks for host settings that keep a gateway from working.
func checkHost(vpc config.VPCConfig) []control.Check {
	tun := vpc.TUN
	var out []control.Check
	add := func(name string, ok bool, reason string) {
		out = append(out, control.Check{Name: name, OK: ok, Reason: reason})
	}
	add("ip_forward", host.Sysctl("ipv4/ip_forward") != "0",
		"net.ipv4.ip_forward is 0: the kernel won't pass VPC packets on to "+tun+"; run: sysctl -w net.ipv4.ip_forward=1")
	if slices.ContainsFunc(vpc.Sources, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		add("ipv6_forward", host.Sysctl("ipv6/conf/all/forwarding") != "0",
			"net.ipv6.conf.all.forwarding is 0: the kernel won't pass IPv6 packets of the VPC on to "+tun+"; run: sysctl -w net.ipv6.conf.all.forwarding=1")
	}
	strict := func(name string) bool {
		// The kernel uses the larger of the two; 1 is strict, 2 loose.
		return max(host.Sysctl("ipv4/conf/all/rp_filter"), host.Sysctl("ipv4/conf/"+name+"/rp_filter")) == "1"
	}
	add("rp_filter", !strict(tun),
		"net.ipv4.conf."+tun+".rp_filter is strict: errors from routers inside the office get lost; run: sysctl -w net.ipv4.conf."+tun+".rp_filter=2")
	for _, name := range vpc.Interfaces {
		_, err := net.InterfaceByName(name)
		add("interface_"+name, err == nil, "interface "+name+" of vpc.interfaces doesn't exist: correct the name")
	}
	return out
}
