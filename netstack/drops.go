package netstack

import "ztgate/netstack/internal/ipkt"

// drop is why a packet went no further.
type drop uint8

// Reasons. Those of the ingress check come first.
const (
	dropMalformed  drop = iota + 16
	dropSource          // not one that may send
	dropSpoofed         // claims an address of the other side
	dropForbidden       // to an address that is never forwarded
	dropNoRoute         //
	dropPolicy          //
	dropNoFlow          // unsolicited from the overlay
	dropTTL             //
	dropTooBig          //
	dropFragment        // a later fragment whose first one isn't known
	dropTableFull       //
	dropNoPort          //
	dropProtocol        // can't be translated
	dropNotFirst        // can't begin a flow
	dropUnresolved      // next hop doesn't answer
	dropOverlay         // the overlay refused the frame
	dropDevice          // the device refused the packet
	dropNotForUs        // frame for another MAC
	dropEtherType       //
	dropNetwork         // network not joined
	dropNoAddress       // the gateway has no address of the family
	numDrops            //
)

var dropNames = [numDrops]string{
	dropMalformed: "malformed", dropSource: "source_not_allowed", dropSpoofed: "spoofed_source", dropForbidden: "forbidden_address",
	dropNoRoute: "no_route", dropPolicy: "policy", dropNoFlow: "no_flow", dropTTL: "ttl_exceeded", dropTooBig: "too_big",
	dropFragment: "fragment", dropTableFull: "table_full", dropNoPort: "no_port", dropProtocol: "protocol", dropNotFirst: "not_first",
	dropUnresolved: "unresolved", dropOverlay: "overlay", dropDevice: "device", dropNotForUs: "not_for_us",
	dropEtherType: "ethertype", dropNetwork: "network", dropNoAddress: "no_address",
}

// String returns the label used in metrics.
func (d drop) String() string {
	if d < 8 {
		return ipkt.Reason(d).String()
	}
	return dropNames[d]
}

// drops lists all reasons.
func drops() (out []drop) {
	for d := drop(ipkt.Short); d < 8; d++ {
		out = append(out, d)
	}
	for d := dropMalformed; d < numDrops; d++ {
		out = append(out, d)
	}
	return out
}
