package netstack

import "ztgate/netstack/internal/ipkt"

// drop is why a packet went no further.
type drop uint8

// Reasons of the ingress check come first.
const (
	dropMalformed   drop = iota + 16
	dropSource           // not one that may send
	dropSpoofed          // claims an address of the other side
	dropForbidden        // to an address that is never forwarded
	dropNoRoute          //
	dropPolicy           //
	dropNoFlow           // unsolicited
	dropTTL              //
	dropTooBig           //
	dropFragment         // the rest of the packet didn't come in time, or there was no room
	dropDuplicate        // a fragment that was there already
	dropOverlap          // fragments that overlap, and all others of their packet
	dropTableFull        //
	dropClientLimit      // the client has all the flows or ports it may have
	dropNoPort           //
	dropNotFirst         // can't begin a flow
	dropChecksum         // of the transport header, in a packet that would open a flow
	dropFlags            // TCP flags that never occur
	dropWindow           // TCP segment outside the window
	dropICMPType         // an ICMP message that isn't forwarded
	dropSCTP             // protocols that can't be translated
	dropGRE              //
	dropESP              //
	dropAH               //
	dropIPIP             //
	dropProtocol         // others
	dropUnresolved       // next hop doesn't answer
	dropOverlay          // the overlay refused the frame
	dropDevice           // the device refused the packet
	dropNotForUs         // frame for another MAC
	dropEtherType        //
	dropNetwork          // network not joined
	dropNoAddress        // the gateway has no address of the family
	dropLocal            // the gateway's own stack can't take it
	numDrops             //
)

var dropNames = [numDrops]string{
	dropMalformed: "malformed", dropSource: "source_not_allowed", dropSpoofed: "spoofed_source", dropForbidden: "forbidden_address",
	dropNoRoute: "no_route", dropPolicy: "policy", dropNoFlow: "no_flow", dropTTL: "ttl_exceeded", dropTooBig: "too_big",
	dropFragment: "fragment", dropDuplicate: "fragment_duplicate", dropOverlap: "fragment_overlap", dropTableFull: "table_full",
	dropClientLimit: "client_limit", dropNoPort: "no_port", dropNotFirst: "not_first", dropChecksum: "checksum", dropFlags: "tcp_flags",
	dropWindow: "out_of_window", dropICMPType: "icmp_type", dropSCTP: "protocol_sctp", dropGRE: "protocol_gre", dropESP: "protocol_esp",
	dropAH: "protocol_ah", dropIPIP: "protocol_ipip", dropProtocol: "protocol",
	dropUnresolved: "unresolved", dropOverlay: "overlay", dropDevice: "device", dropNotForUs: "not_for_us",
	dropEtherType: "ethertype", dropNetwork: "network", dropNoAddress: "no_address", dropLocal: "local",
}

// dropOfProtocol counts the protocols that can't be translated one by one
// (decision D5).
func dropOfProtocol(proto uint8) drop {
	switch proto {
	case 132:
		return dropSCTP
	case 47:
		return dropGRE
	case 50:
		return dropESP
	case 51:
		return dropAH
	case 4, 41:
		return dropIPIP
	}
	return dropProtocol
}

// String returns the label used in metrics.
func (d drop) String() string {
	if d < dropMalformed {
		return ipkt.Reason(d).String()
	}
	return dropNames[d]
}

// drops lists all reasons.
func drops() (out []drop) {
	for d := drop(ipkt.Short); int(d) < ipkt.NumReasons; d++ {
		out = append(out, d)
	}
	for d := dropMalformed; d < numDrops; d++ {
		out = append(out, d)
	}
	return out
}
