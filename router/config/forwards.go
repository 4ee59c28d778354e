package config

import (
	"errors"
	"net/netip"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

var (
	forwardKeys = []string{"listen", "to", "masquerade", "from"}
	mapKeysList = []string{"network", "hosts", "real", "alias"}
	sideWords   = []string{string(SideVPC), string(SideOverlay)}
)

// forwards reads - {listen: "tcp/8443", to: "10.0.0.10:443"}.
func (f *yamlFile) forwards(n *yaml.Node) {
	f.entries("forwards", `{listen: "tcp/8443", to: "10.0.0.10:443"}`, n, func(item *yaml.Node) {
		fw := Forward{Masquerade: true, Side: SideVPC}
		var listen string
		f.mapping("forwards.", item, func(key, full string, v *yaml.Node) {
			var err error
			switch key {
			case "listen":
				listen = v.Value
			case "to":
				if fw.To, err = netip.ParseAddrPort(v.Value); err != nil || fw.To.Port() == 0 {
					err = errors.New("give ADDRESS:PORT, as in 10.0.0.10:443")
				}
			case "masquerade":
				fw.Masquerade = f.boolean(full, v)
			case "from":
				fw.Side = Side(f.oneOf(full, v, sideWords))
			default:
				f.unknown(v, full, prefixed("forwards.", forwardKeys))
			}
			if err != nil {
				f.errorf("%s: %s: %q: %w", f.at(v), full, v.Value, err)
			}
		})
		var err error
		if fw.Proto, fw.Listen, err = parseListen(listen, fw.To.Addr()); err != nil {
			f.errorf("%s: forwards.listen: %q: %w", f.at(item), listen, err)
		}
		if !fw.To.IsValid() {
			f.errorf("%s: forwards: an entry has no to: give ADDRESS:PORT", f.at(item))
		}
		f.cfg.Forwards = append(f.cfg.Forwards, fw)
	})
}

// parseListen reads PROTO/PORT or PROTO/ADDRESS:PORT. Without an address the
// unspecified one of the family of to is meant.
func parseListen(s string, to netip.Addr) (proto string, ap netip.AddrPort, err error) {
	bad := errors.New("give tcp/PORT, udp/PORT or PROTO/ADDRESS:PORT")
	proto, where, ok := strings.Cut(s, "/")
	if !ok || proto != "tcp" && proto != "udp" {
		return proto, ap, bad
	}
	if port, err := strconv.ParseUint(where, 10, 16); err == nil {
		a := netip.IPv4Unspecified()
		if to.Is6() {
			a = netip.IPv6Unspecified()
		}
		ap = netip.AddrPortFrom(a, uint16(port))
	} else if ap, err = netip.ParseAddrPort(where); err != nil {
		return proto, ap, bad
	}
	if ap.Port() == 0 {
		return proto, ap, bad
	}
	if to.IsValid() && ap.Addr().Is4() != to.Is4() {
		return proto, ap, errors.New("it and to are of different families")
	}
	return proto, ap, nil
}

// maps reads - {hosts: vpc, real: 10.0.0.0/24, alias: 10.77.0.0/24}.
func (f *yamlFile) maps(n *yaml.Node) {
	f.entries("maps", `{hosts: vpc, real: 10.0.0.0/24, alias: 10.77.0.0/24}`, n, func(item *yaml.Node) {
		m := AddressMap{Hosts: SideVPC}
		f.mapping("maps.", item, func(key, full string, v *yaml.Node) {
			var err error
			switch key {
			case "network":
				m.Network = f.network(full, v)
			case "hosts":
				m.Hosts = Side(f.oneOf(full, v, sideWords))
			case "real":
				m.Real, err = ParsePrefix(v.Value)
			case "alias":
				m.Alias, err = ParsePrefix(v.Value)
			default:
				f.unknown(v, full, prefixed("maps.", mapKeysList))
			}
			if err != nil {
				f.errorf("%s: %s: %q: %w", f.at(v), full, v.Value, err)
			}
		})
		switch {
		case !m.Real.IsValid() || !m.Alias.IsValid():
			f.errorf("%s: maps: give real and alias, two prefixes", f.at(item))
		case m.Real.Bits() != m.Alias.Bits() || m.Real.Addr().Is4() != m.Alias.Addr().Is4():
			f.errorf("%s: maps: %s and %s: want two prefixes of the same length", f.at(item), m.Real, m.Alias)
		}
		f.cfg.Maps = append(f.cfg.Maps, m)
	})
}
