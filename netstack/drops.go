package netstack

import "ztgate/netstack/internal/ipkt"

// drop is why a packet went no further.
type drop uint8

// Reasons of the ingress check come first.
const (
	dropMalformed     drop = iota + 16
	dropSource             // not one that may send
	dropSpoofed            // claims an address of the other side
	dropMember             // not from the member whose address or flow it is
	dropConflict           // ARP or neighbour discovery for an address that is another's
	dropNeighbour          // ARP or neighbour discovery that contradicts itself
	dropForbidden          // to an address that is never forwarded
	dropNoRoute            //
	dropPolicy             //
	dropNoFlow             // unsolicited
	dropTTL                //
	dropTooBig             //
	dropFragment           // the rest of the packet didn't come in time, or there was no room
	dropDuplicate          // a fragment that was there already
	dropOverlap            // fragments that overlap, and all others of their packet
	dropTableFull          //
	dropClientLimit        // the client has all the flows or ports it may have
	dropNoPort             //
	dropNotFirst           // can't begin a flow
	dropChecksum           // of the transport header, in a packet that would open a flow
	dropFlags              // TCP flags that never occur
	dropWindow             // TCP segment outside the window
	dropICMPType           // an ICMP message that isn't forwarded
	dropErrorMember        // an ICMP error about a flow from a member that isn't on its way
	dropErrorUnlikely      // an ICMP error about what wasn't sent, or with an impossible MTU
	dropSCTP               // protocols that can't be translated
	dropGRE                //
	dropESP                //
	dropAH                 //
	dropIPIP               //
	dropProtocol           // others
	dropUnresolved         // next hop doesn't answer
	dropOverlay            // the overlay refused the frame
	dropDevice             // the device refused the packet
	dropBacklog            // the device lost it before it could be read
	dropNotForUs           // frame for another MAC
	dropEtherType          //
	dropNetwork            // network not joined
	dropNoAddress          // the gateway has no address of the family
	dropLocal              // the gateway's own stack can't take it
	dropProxySource        // a connection of somebody else than the load balancers that a forward is for
	dropProxyHeader        // one that doesn't begin with a PROXY header
	numDrops               //
)

var dropNames = [numDrops]string{
	dropMalformed: "malformed", dropSource: "source_not_allowed", dropSpoofed: "spoofed_source", dropMember: "wrong_member",
	dropConflict: "address_conflict", dropNeighbour: "neighbour_malformed", dropErrorMember: "icmp_error_member", dropErrorUnlikely: "icmp_error_unlikely", dropForbidden: "forbidden_address",
	dropNoRoute: "no_route", dropPolicy: "policy", dropNoFlow: "no_flow", dropTTL: "ttl_exceeded", dropTooBig: "too_big",
	dropFragment: "fragment", dropDuplicate: "fragment_duplicate", dropOverlap: "fragment_overlap", dropTableFull: "table_full",
	dropClientLimit: "client_limit", dropNoPort: "no_port", dropNotFirst: "not_first", dropChecksum: "checksum", dropFlags: "tcp_flags",
	dropWindow: "out_of_window", dropICMPType: "icmp_type", dropSCTP: "protocol_sctp", dropGRE: "protocol_gre", dropESP: "protocol_esp",
	dropAH: "protocol_ah", dropIPIP: "protocol_ipip", dropProtocol: "protocol",
	dropUnresolved: "unresolved", dropOverlay: "overlay", dropDevice: "device", dropBacklog: "backlog", dropNotForUs: "not_for_us",
	dropEtherType: "ethertype", dropNetwork: "network", dropNoAddress: "no_address", dropLocal: "local",
	dropProxySource: "proxy_source", dropProxyHeader: "proxy_header",
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

// Reason explains why packets are dropped.
type Reason struct {
	Name    string // as in the metrics
	Meaning string // one sentence
	Remedy  string // "" where nothing is wrong
}

// Reasons explains all reasons of drops.
func Reasons() []Reason {
	out := make([]Reason, 0, len(meanings))
	for _, d := range drops() {
		m := meanings[d.String()]
		out = append(out, Reason{d.String(), m[0], m[1]})
	}
	return out
}

// meanings are what reasons mean and the remedies, by name.
var meanings = map[string][2]string{
	"short":           {"The packet is shorter than an IP header.", "Look for a broken sender."},
	"version":         {"The packet is neither IPv4 nor IPv6.", "Look for a broken sender."},
	"length":          {"The packet's length contradicts its header.", "Look for a broken sender."},
	"header_length":   {"The IPv4 header is shorter than it may be.", "Look for a broken sender."},
	"transport_short": {"The TCP, UDP or ICMP header is cut or contradicts itself.", "Look for a broken sender."},
	"ipv6_extension":  {"IPv6 extension headers are too long, cut, or of a kind that is refused, as routing headers are.", "Let the sender leave them out."},
	"ip_options":      {"IPv4 options are malformed, or ask for a source route.", "Let the sender leave them out."},
	"header_checksum": {"The checksum of the IPv4 header is wrong.", "Look for a broken sender or device."},
	"martian":         {"An address can't be on a wire: loopback, multicast as a source, both the same.", "Look for a misconfigured sender."},
	"bad_fragment":    {"A fragment is impossible, or hides the transport header.", "Look for an attack; scanners send such packets."},
	"malformed":       {"The frame is too short.", "Look for a broken sender."},

	"source_not_allowed": {"The source is not one that may send.", "Add it to vpc.sources if it belongs to the VPC."},
	"spoofed_source":     {"The packet claims an address of the other side, of another network, or of the gateway itself; or it is the same, in all addresses and ports, as those of a flow of another network with the same ranges.", "Check routes and address maps; an overlap of VPC and network needs aliases (maps)."},
	"wrong_member":       {"The packet comes from a member that neither has its source address nor is the router that leads there.", "Ask the owner of that member; if the route's router was replaced, correct the managed route."},
	"address_conflict":   {"A member claims an address that another member has, or the gateway.", "Give one of them another address; if the other is gone, this one gets it in some seconds."},
	"neighbour_malformed": {"ARP or neighbour discovery that contradicts its frame or itself.",
		"Ask the owner of that member: it speaks in others' names."},
	"icmp_error_member":   {"An ICMP error about a flow comes from a member that the flow's packets don't go to.", "Ask the owner of that member."},
	"icmp_error_unlikely": {"An ICMP error is about a segment that isn't under way, or asks for packets smaller than any link's.", "Harmless in small numbers; else look for forged errors."},
	"forbidden_address":   {"The destination is never forwarded to: link-local, metadata, broadcast, multicast, or the gateway's own elsewhere.", "Correct the destination, or the forward that leads there."},
	"no_route":            {"No network has a route to the destination, or there is nothing at this port.", "Add a managed route at the controller, or a forward; ztgate explain says more."},
	"policy":              {"A rule of the policy refuses it.", "ztgate explain names the rule; change policy if it should pass."},
	"no_flow":             {"It answers nothing, and nothing invites it: scans, and late packets of flows that have ended.", "If it should get in, add a forward, a map, or a rule with direction in."},
	"ttl_exceeded":        {"The hop limit is used up here.", "Normal for traceroute; else look for a routing loop."},
	"too_big":             {"The packet doesn't fit where it goes and mustn't be cut; its sender was told the size.", "Normal; if connections hang, somebody drops ICMP on the way."},
	"fragment":            {"The rest of a fragmented packet didn't come in time, or there was no room for it.", "Look for loss, or for senders of many fragments."},
	"fragment_duplicate":  {"A fragment came twice.", ""},
	"fragment_overlap":    {"Fragments overlap, which only attacks do; the whole packet is lost.", "Look for the sender."},
	"table_full":          {"The flow table is full of flows that may not go.", "Raise nat.max_flows; ztgate flows shows who has them."},
	"client_limit":        {"The client has all the flows or ports that one may have, or opens them too fast.", "Look at it with ztgate flows; raise the limits in nat if it may."},
	"no_port":             {"The gateway's address on the network has no port left.", "Give the gateway more addresses (nat.addresses), or set nat.port_sharing: by_destination."},
	"not_first":           {"The packet can't begin a flow, and there is none.", "Late segments of connections that are over; harmless in small numbers."},
	"checksum":            {"The checksum of the transport header is wrong.", "Look for a broken sender, or for offloading that isn't finished."},
	"tcp_flags":           {"TCP flags that never occur.", "Look for the sender; scanners send such packets."},
	"out_of_window":       {"A TCP segment lies outside of its connection's window.", "Late segments; harmless in small numbers. nat.window_check turns the check off."},
	"icmp_type":           {"An ICMP message of a type that isn't forwarded.", ""},
	"protocol_sctp":       {"SCTP can't be masqueraded.", "Set masquerade: false for the network, or nat.exempt for the host."},
	"protocol_gre":        {"GRE can't be masqueraded.", "Set masquerade: false for the network, or nat.exempt for the host."},
	"protocol_esp":        {"ESP can't be masqueraded.", "Let IPsec use UDP (NAT traversal), or set nat.exempt for the host."},
	"protocol_ah":         {"AH can't be translated at all.", "Use ESP over UDP, or set nat.exempt for the host."},
	"protocol_ipip":       {"IP in IP can't be masqueraded.", "Set masquerade: false for the network, or nat.exempt for the host."},
	"protocol":            {"A protocol that can't be masqueraded.", "Set masquerade: false for the network, or nat.exempt for the host."},
	"unresolved":          {"The next hop doesn't answer ARP or neighbour discovery.", "Switch the host on, or its ZeroTier; ztgate peers shows whether it is reached."},
	"overlay":             {"The node didn't take the frame: the network isn't OK, or its rules refuse it.", "A reason network_… in the metrics says more."},
	"device":              {"The interface didn't take the packet, or gave one that can't be read: it is down, gone, or its queue is full.", "Look at the interface with ip -s link."},
	"backlog":             {"With vpc.ingress packet: it came faster than it could be taken.", "Give the gateway more CPU, or its socket more room: net.core.rmem_max."},
	"not_for_us":          {"A frame for another MAC.", ""},
	"ethertype":           {"A frame that is neither IP nor ARP.", ""},
	"network":             {"The network isn't joined, or not yet ready.", "ztgate networks shows its status."},
	"no_address":          {"The gateway has no address of the family on the network.", "Let the controller assign one."},
	"local":               {"The gateway's own stack can't take the packet.", "If it grows, report it with ztgate_local_stack_panics_total."},
	"proxy_source":        {"The connection to a forward with accept_proxy isn't from a load balancer that it names.", "Add the load balancer to accept_proxy, or give other clients a forward of their own."},
	"proxy_header":        {"The connection of a load balancer doesn't begin with a PROXY header, or none came within 5 seconds.", "Let the load balancer send it (send-proxy-v2, proxy_protocol on), or remove accept_proxy."},
}
