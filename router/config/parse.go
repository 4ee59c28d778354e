package config

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"ztgate/router/fault"
	"ztgate/zerotier/identity"
)

func MemberAddress(s string) (identity.Address, error) {
	a, err := identity.ParseAddress(s)
	if err != nil {
		return 0, fault.Usagef("member %q: want the node's address, 10 hex digits, as ztgate info prints it", s)
	}
	return a, nil
}

func ParseEndpoint(s string) (netip.AddrPort, error) {
	if host, port, ok := strings.Cut(s, "/"); ok {
		a, err1 := netip.ParseAddr(host)
		n, err2 := strconv.ParseUint(port, 10, 16)
		if err1 == nil && err2 == nil && n != 0 {
			return netip.AddrPortFrom(a, uint16(n)), nil
		}
	} else if ap, err := netip.ParseAddrPort(s); err == nil && ap.Port() != 0 {
		return ap, nil
	}
	return netip.AddrPort{}, fault.Usagef("endpoint %q: give ADDRESS/PORT, as in 198.51.100.1/9993", s)
}

// ParsePrefix reads ADDRESS/BITS, or an address alone.
func ParsePrefix(s string) (netip.Prefix, error) {
	p, err := ParseAddress(s)
	if err != nil {
		return p, err
	}
	if p != p.Masked() {
		return p, fmt.Errorf("host bits are set: write %s", p.Masked())
	}
	return p, nil
}

func ParseAddress(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		return netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return p, errors.New("give ADDRESS/BITS, as in 172.31.0.0/16")
	}
	return p, nil
}

// ParseTarget reads tcp://ADDRESS:PORT or icmp://ADDRESS.
func ParseTarget(s string) (Target, error) {
	u, err := url.Parse(s)
	if err != nil || u.Path != "" || u.RawQuery != "" || u.User != nil {
		return Target{}, errBadTarget
	}
	switch u.Scheme {
	case "tcp":
		ap, err := netip.ParseAddrPort(u.Host)
		if err != nil || ap.Port() == 0 {
			return Target{}, errBadTarget
		}
		return Target{"tcp", ap}, nil
	case "icmp":
		a, err := netip.ParseAddr(strings.Trim(u.Host, "[]"))
		if err != nil {
			return Target{}, errBadTarget
		}
		return Target{"icmp", netip.AddrPortFrom(a, 0)}, nil
	}
	return Target{}, errBadTarget
}

var errBadTarget = errors.New("give tcp://ADDRESS:PORT or icmp://ADDRESS, with an IP address")

func parseBool(s string) (bool, error) {
	switch strings.ToLower(s) {
	case "true", "yes", "on", "1":
		return true, nil
	case "false", "no", "off", "0":
		return false, nil
	}
	return false, errors.New("use true or false")
}

func parsePorts(s string) (PortRange, error) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	lo, err1 := strconv.ParseUint(first, 10, 16)
	hi, err2 := strconv.ParseUint(last, 10, 16)
	if err1 != nil || err2 != nil || lo > hi {
		return PortRange{}, errors.New("give a port or a range, as in 443 or 8000-8099")
	}
	return PortRange{uint16(lo), uint16(hi)}, nil
}
