package control

import (
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"ztgate/router/fault"
)

// MaxPingTimeout is how long a ping may wait, less than what the server gives a
// request.
const MaxPingTimeout = 25 * time.Second

// ParsePingTarget reads HOST, HOST:PORT, an IPv6 address or [IPv6]:PORT.
func ParsePingTarget(s string) (PingRequest, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return PingRequest{Host: a.String()}, nil
	}
	if !strings.Contains(s, ":") {
		if s == "" {
			return PingRequest{}, fault.Usagef("give HOST or HOST:PORT")
		}
		return PingRequest{Host: s}, nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return PingRequest{}, fault.Usagef("%q: give HOST or HOST:PORT, IPv6 as [ADDRESS]:PORT", s)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || host == "" {
		return PingRequest{}, fault.Usagef("%q: give a port from 1 to 65535", s)
	}
	return PingRequest{Host: host, Port: int(n)}, nil
}
