package config

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Allow is an entry of policy.allow: what the VPC may open.
type Allow struct {
	Proto string       // tcp | udp | icmp
	To    netip.Prefix // invalid = Host
	Host  string       // a name
	Ports []PortRange  // none = all
}

func (a Allow) String() string {
	host := a.Host
	if host == "" {
		host = a.To.String()
		if a.To.IsSingleIP() {
			host = a.To.Addr().String()
		}
		if a.To.Addr().Is6() {
			host = "[" + host + "]"
		}
	}
	s := a.Proto + ":" + host
	for _, p := range a.Ports {
		s += ":" + p.String()
	}
	return s
}

func (a Allow) rule() PolicyRule {
	r := PolicyRule{Action: "accept", Proto: a.Proto, Ports: a.Ports, Direction: "out"}
	if a.Host != "" {
		r.ToNames = []Named{{Name: a.Host}}
	} else {
		r.To = []netip.Prefix{a.To}
	}
	return r
}

var errBadAllow = errors.New("give PROTO:HOST:PORT, as in tcp:10.0.0.10:443, udp:db.office.example:53, tcp:[fd00::10]:8000-8099 or icmp:10.0.0.0/24")

// ParseAllow reads PROTO:HOST[:PORTS].
func ParseAllow(s string) (Allow, error) {
	proto, rest, _ := strings.Cut(s, ":")
	a := Allow{Proto: proto}
	if !slices.Contains([]string{"tcp", "udp", "icmp"}, proto) {
		return a, errBadAllow
	}
	host, ports, given := strings.Cut(rest, ":")
	inside, after, bracketed := strings.Cut(strings.TrimPrefix(rest, "["), "]")
	switch bracketed = bracketed && rest[0] == '['; {
	case bracketed:
		host = inside
		if ports, given = strings.CutPrefix(after, ":"); !given && after != "" {
			return a, errBadAllow
		}
	case strings.Contains(ports, ":"):
		return a, errors.New("write an IPv6 address in brackets, as in tcp:[fd00::10]:443")
	}
	p, err := parsePlace(host)
	switch {
	case err != nil:
		return a, fmt.Errorf("host %q: %w", host, err)
	case bracketed && !p.prefix.Addr().Is6():
		return a, errors.New("brackets are for IPv6 addresses only")
	case given && proto == "icmp":
		return a, errors.New("ICMP has no ports: give icmp:HOST")
	}
	a.To, a.Host = p.prefix, p.name
	if given {
		r, err := parsePorts(ports)
		if err != nil {
			return a, err
		}
		a.Ports = []PortRange{r}
	}
	return a, nil
}
