package control

import (
	"cmp"
	"errors"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"

	"ztgate/router/config"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

// Question is a packet that would open a flow.
type Question struct {
	Protocol    string           `json:"protocol"` // tcp, udp, icmp or a number; "" = tcp with a port, else icmp
	Source      netip.AddrPort   `json:"source"`
	Destination netip.AddrPort   `json:"destination"`
	FromOverlay bool             `json:"fromOverlay"`
	Network     ztnode.NetworkID `json:"network"` // where it comes from, from the overlay
}

// Proto returns the number of the protocol.
func (q Question) Proto() uint8 {
	switch q.Protocol {
	case "tcp":
		return unix.IPPROTO_TCP
	case "udp":
		return unix.IPPROTO_UDP
	case "icmp":
		if q.Destination.Addr().Is6() {
			return unix.IPPROTO_ICMPV6
		}
		return unix.IPPROTO_ICMP
	}
	n, _ := strconv.ParseUint(q.Protocol, 10, 8) // checked
	return uint8(n)
}

// Check completes a question and says what is wrong with it.
func (q *Question) Check() error {
	if q.Protocol == "" {
		q.Protocol = "icmp"
		if q.Destination.Port() != 0 {
			q.Protocol = "tcp"
		}
	}
	switch {
	case !q.Source.Addr().IsValid() || !q.Destination.Addr().IsValid():
		return errors.New("give a source and a destination address")
	case q.Source.Addr().Is4() != q.Destination.Addr().Is4():
		return errors.New("source and destination are of different families")
	case q.FromOverlay && q.Network == 0:
		return errors.New("a packet from the overlay needs a network: give --network")
	}
	p, err := parseProtocol(q.Protocol)
	if err != nil {
		return err
	}
	q.Protocol = p
	return nil
}

var protocols = map[string]string{"1": "icmp", "58": "icmp", "6": "tcp", "17": "udp"}

// parseProtocol returns the protocol that a question is about, "" for none, by the
// name that flows have it under.
func parseProtocol(s string) (string, error) {
	switch s {
	case "", "tcp", "udp", "icmp":
		return s, nil
	}
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil || n == 0 {
		if near := config.Nearest(s, []string{"tcp", "udp", "icmp"}); near != "" {
			return "", fault.Usagef("protocol %q: did you mean %s?", s, near)
		}
		return "", fault.Usagef("protocol %q: give tcp, udp, icmp or a number from 1 to 255", s)
	}
	return cmp.Or(protocols[strconv.FormatUint(n, 10)], strconv.FormatUint(n, 10)), nil
}

// Explanation says what would happen to a packet, and why.
type Explanation struct {
	Schema      int              `json:"schema"`
	Question    Question         `json:"question"`
	Verdict     string           `json:"verdict"`          // forward | local | drop | reject | elsewhere
	Reason      string           `json:"reason,omitempty"` // of drop, reject and elsewhere; see the manual
	Established bool             `json:"established"`      // it belongs to a flow
	Rule        int              `json:"rule"`             // of the policy; -1 = default, -2 = not asked
	RuleText    string           `json:"ruleText,omitempty"`
	Network     ztnode.NetworkID `json:"network"` // 0 = none
	Route       netip.Prefix     `json:"route,omitzero"`
	NextHop     netip.Addr       `json:"nextHop,omitzero"`
	Member      string           `json:"member,omitempty"`  // node behind the next hop; "" = not resolved yet
	Path        string           `json:"path,omitempty"`    // DIRECT or RELAY
	PathMTU     int              `json:"pathMTU,omitempty"` // largest UDP payload that is known to reach the member; 0 = unknown
	Source      netip.AddrPort   `json:"translatedSource"`
	Destination netip.AddrPort   `json:"translatedDestination"`
	Translation string           `json:"translation"`  // keep | masquerade | map
	Redirected  bool             `json:"redirected"`   // by a forward or a map
	By          []string         `json:"by,omitempty"` // the forward and the maps that change it
	MTU         int              `json:"mtu,omitempty"`
	Detail      string           `json:"detail,omitempty"` // what this host or a member does with it, and the remedy
}
