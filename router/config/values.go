package config

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"ztgate/router/fault"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/ztnode"
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

// parseOwnAddress reads an address that this host can have, with its prefix.
func parseOwnAddress(s string) (netip.Prefix, error) {
	p, err := ParseAddress(s)
	if err != nil {
		return p, errors.New("give an address, as in 100.127.255.1, or with its subnet, as in 10.0.0.1/24")
	}
	a := p.Addr()
	switch {
	case a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast():
		return p, fmt.Errorf("%s can't be an address of an interface of ours: give a private one, as in 100.127.255.1", a)
	case p.Bits() < 8:
		return p, fmt.Errorf("a subnet of /%d is more than anybody has: give the address with its own subnet, as in %s/24", p.Bits(), a)
	case p.Bits() < a.BitLen()-1 && a == p.Masked().Addr():
		return p, fmt.Errorf("%s is the subnet itself: give an address in it, as in %s/%d", p, a.Next(), p.Bits())
	case !strings.Contains(s, "/") && a.Is4() && a.As4()[3] == 0:
		return p, fmt.Errorf("%s looks like a subnet: give an address in it, as in %s/24, or write %s/32", a, a.Next(), a)
	case a.Is4() && p.Bits() < 31 && broadcast(p) == a:
		return p, fmt.Errorf("%s is the broadcast address of %s: give another, as in %s/%d", a, p.Masked(), a.Prev(), p.Bits())
	}
	return p, nil
}

// broadcast returns the last address of an IPv4 prefix.
func broadcast(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])|^uint32(0)>>p.Bits())
	return netip.AddrFrom4(b)
}

// ParseTarget reads tcp://HOST:PORT or icmp://HOST.
func ParseTarget(s string) (Target, error) {
	u, err := url.Parse(s)
	if err != nil || u.Path != "" || u.RawQuery != "" || u.User != nil {
		return Target{}, errBadTarget
	}
	switch u.Scheme {
	case "tcp":
		to, err := parseHostPort(u.Host)
		if errors.Is(err, errBadTo) {
			err = errBadTarget
		}
		return Target{"tcp", to.at, to.name}, err
	case "icmp":
		if a, err := netip.ParseAddr(strings.Trim(u.Host, "[]")); err == nil {
			return Target{Scheme: "icmp", Addr: netip.AddrPortFrom(a, 0)}, nil
		}
		name, err := parseName(u.Host)
		if err != nil {
			err = fmt.Errorf("host %q: %w", u.Host, err)
		}
		return Target{Scheme: "icmp", Host: name}, err
	}
	return Target{}, errBadTarget
}

var errBadTarget = errors.New("give tcp://HOST:PORT or icmp://HOST, where HOST is an address or a name")

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
	if err1 != nil || err2 != nil || lo > hi || lo == 0 {
		return PortRange{}, errors.New("give a port or a range, as in 443 or 8000-8099")
	}
	return PortRange{uint16(lo), uint16(hi)}, nil
}

func parseNetwork(s string) (ztnode.NetworkID, error) {
	id, err := ztnode.ParseNetworkID(s)
	if err != nil {
		return 0, errors.New("want 16 hex digits, as in 8056c2e21c000001")
	}
	return id, nil
}

// oneOf reads one of some words.
func oneOf[S ~string](words ...S) func(string) (S, error) {
	known := make([]string, len(words))
	for i, w := range words {
		known[i] = string(w)
	}
	return func(s string) (S, error) {
		if !slices.Contains(known, s) {
			return "", fmt.Errorf("use one of %s", strings.Join(known, ", "))
		}
		return S(s), nil
	}
}

// listenAt is where a forward listens. Without an address it means all of the
// gateway's.
type listenAt struct {
	proto string
	at    netip.AddrPort
}

var errBadListen = errors.New("give tcp/PORT, udp/PORT or PROTO/ADDRESS:PORT")

// parseListen reads PROTO/PORT or PROTO/ADDRESS:PORT.
func parseListen(s string) (listenAt, error) {
	proto, where, ok := strings.Cut(s, "/")
	if !ok || proto != "tcp" && proto != "udp" {
		return listenAt{}, errBadListen
	}
	l := listenAt{proto: proto}
	if port, err := strconv.ParseUint(where, 10, 16); err == nil {
		l.at = netip.AddrPortFrom(netip.Addr{}, uint16(port))
	} else if l.at, err = netip.ParseAddrPort(where); err != nil {
		return listenAt{}, errBadListen
	}
	if l.at.Port() == 0 {
		return listenAt{}, errBadListen
	}
	return l, nil
}

var errBadTo = errors.New("give HOST:PORT, as in 10.0.0.10:443 or db.office.example:443")

// unspecified returns the unspecified address of the family of a.
func unspecified(a netip.Addr) netip.Addr {
	if a.Is6() {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}
