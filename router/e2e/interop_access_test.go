//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/lab"
)

const (
	tagDepartment  = 1000
	portTagged     = 7000 // for members of the same department
	portInbound    = 7001 // refused by the receiver only
	portOutbound   = 7002 // refused by the sender only
	portCapability = 7003 // UDP, for holders of the capability
)

type rule = map[string]any

func tcpTo(port int) []rule {
	return []rule{{"type": "MATCH_IP_PROTOCOL", "ipProtocol": 6}, {"type": "MATCH_IP_DEST_PORT_RANGE", "start": port, "end": port}}
}

// accessRules accept ARP and ping; TCP to portTagged within a department; they
// refuse TCP to portInbound on receipt and TCP to portOutbound on sending; and
// accept the rest of TCP. UDP takes the capability.
func accessRules() []rule {
	const inbound = "8000000000000000"
	var out []rule
	add := func(r ...rule) { out = append(out, r...) }
	add(rule{"type": "MATCH_ETHERTYPE", "etherType": 0x806}, rule{"type": "ACTION_ACCEPT"})
	add(rule{"type": "MATCH_IP_PROTOCOL", "ipProtocol": 1}, rule{"type": "ACTION_ACCEPT"})
	add(tcpTo(portTagged)...)
	add(rule{"type": "MATCH_TAGS_DIFFERENCE", "not": true, "id": tagDepartment, "value": 0}, rule{"type": "ACTION_DROP"})
	add(tcpTo(portInbound)...)
	add(rule{"type": "MATCH_CHARACTERISTICS", "mask": inbound}, rule{"type": "ACTION_DROP"})
	add(tcpTo(portOutbound)...)
	add(rule{"type": "MATCH_CHARACTERISTICS", "not": true, "mask": inbound}, rule{"type": "ACTION_DROP"})
	add(rule{"type": "MATCH_IP_PROTOCOL", "ipProtocol": 6}, rule{"type": "ACTION_ACCEPT"})
	return out
}

// Rules, tags and capabilities are enforced alike by both kinds of nodes, on
// sending and on receipt, whoever the controller is.
func TestInteropRules(t *testing.T) {
	eachRoot(t, "rules on sending and on receipt, tags, capabilities of each", func(t *testing.T, m *lab.Mesh) {
		id := network(t, m, map[string]any{
			"rules": accessRules(),
			"tags":  []rule{{"id": tagDepartment, "default": 3}},
			"capabilities": []rule{{"id": 1, "default": false, "rules": []rule{
				{"type": "MATCH_IP_PROTOCOL", "ipProtocol": 17},
				{"type": "MATCH_IP_DEST_PORT_RANGE", "start": portCapability, "end": portCapability},
				{"type": "ACTION_ACCEPT"}}}},
		})
		department := []int{1, 1, 2}
		for i, n := range m.Nodes {
			setMember(t, m, id, n, map[string]any{"tags": [][]int{{tagDepartment, department[i]}}})
			for _, port := range []uint16{portTagged, portInbound, portOutbound, 7777} {
				accept(t, n, netip.AddrPortFrom(overlayOf(i), port))
			}
		}
		inboxes := make([]*inbox, len(m.Nodes))
		for i, n := range m.Nodes {
			inboxes[i] = openInbox(t, n, netip.AddrPortFrom(overlayOf(i), portCapability))
		}
		allReach(t, m)
		pairs(t, m, func(from, to *lab.Node, i, j int) error {
			var errs []error
			for _, c := range []struct {
				name string
				port uint16
				want bool
			}{
				{"accepted port", 7777, true},
				{"same department", portTagged, department[i] == department[j]}, // tags come with the next configuration
				{"refused on receipt", portInbound, false},
				{"refused on sending", portOutbound, false},
			} {
				at := netip.AddrPortFrom(overlayOf(j), c.port)
				if err := testwait.Try(patience, func() error {
					err := connect(from, at)
					if (err == nil) != c.want {
						return fmt.Errorf("%s: connection from %s to %s: %v, want success: %v", c.name, from.Name, to.Name, err, c.want)
					}
					return nil
				}); err != nil {
					errs = append(errs, err)
				}
			}
			return errors.Join(errs...)
		})
		// One holder at a time, so that it is seen who enforces what.
		for holder := range m.Nodes {
			for i, n := range m.Nodes {
				caps := []int{}
				if i == holder {
					caps = []int{1}
				}
				setMember(t, m, id, n, map[string]any{"capabilities": caps})
			}
			pairs(t, m, func(from, to *lab.Node, i, j int) error {
				return testwait.Try(patience, func() error {
					err := deliver(from, inboxes[j])
					if i != holder {
						err = not(err, "%s reaches %s without the capability", from.Name, to.Name)
					}
					return err
				})
			})
			t.Logf("capability of %s: its datagrams arrive at both others, nobody else's anywhere", m.Nodes[holder].Name)
		}
	})
}

// De-authorisation cuts traffic of any kind of member both ways, and another
// authorisation brings it back.
func TestInteropDeauthorise(t *testing.T) {
	eachRoot(t, "de-authorised member is cut off both ways, comes back", func(t *testing.T, m *lab.Mesh) {
		id := network(t, m, nil)
		inboxes := make([]*inbox, len(m.Nodes))
		for i, n := range m.Nodes {
			inboxes[i] = openInbox(t, n, netip.AddrPortFrom(overlayOf(i), portCapability))
		}
		allReach(t, m)
		for v, victim := range m.Nodes {
			setMember(t, m, id, victim, map[string]any{"authorized": false})
			start := time.Now()
			pairs(t, m, func(from, to *lab.Node, i, j int) error {
				if i != v && j != v { // the rest is not disturbed
					return testwait.Try(patience, func() error { return ping(from, overlayOf(j)) })
				}
				if err := testwait.Try(patience, func() error {
					return not(ping(from, overlayOf(j)), "%s still has answers from %s", from.Name, to.Name)
				}); err != nil {
					return err
				}
				cut := time.Since(start).Round(100 * time.Millisecond)
				err := deliver(from, inboxes[j])
				t.Logf("%s put out: %s to %s cut within %v; datagrams arrive: %v", victim.Name, from.Name, to.Name, cut, err == nil)
				if i != v && from.Real() {
					return nil // those don't ask for permission to send
				}
				return not(err, "datagrams from %s to %s arrive although %s was put out", from.Name, to.Name, victim.Name)
			})
			setMember(t, m, id, victim, map[string]any{"authorized": true})
			start = time.Now()
			allReach(t, m)
			t.Logf("%s authorised again: all reach each other within %v", victim.Name, time.Since(start).Round(100*time.Millisecond))
		}
	})
}
