package gateway

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/host"
	"ztgate/zerotier/ztnode"
)

// hostWays says what this host does with packets.
type hostWays interface {
	// throughHost follows a packet of a VPC host to the forwarding plane; done says
	// that it doesn't come so far.
	throughHost(q control.Question) (x control.Explanation, done bool, err error)
	// intoVPC goes on where the plane has sent a packet to the VPC.
	intoVPC(x control.Explanation) (control.Explanation, error)
}

// Reasons of verdicts that the forwarding plane never sees.
const (
	reasonForwarding  = "host_forwarding_off"
	reasonInterface   = "host_interface_down"
	reasonKernelRoute = "host_route"
	reasonNetworkDown = "network_down"
	reasonUnreachable = "member_unreachable"
	reasonUnresolved  = "unresolved"
	reasonProxySource = "proxy_source"
)

// explain follows a packet through the host's kernel, the forwarding plane and the
// overlay, as far as each would let it come.
func (s *service) explain(q control.Question) (any, error) {
	if s.plane == nil {
		return nil, fault.Usagef("this process is a %s and forwards nothing: ask a gateway", s.mode)
	}
	if r, ok := s.planned().Route(q.Source.Addr()); ok && r.Network != 0 && !q.FromOverlay {
		q.FromOverlay, q.Network = true, r.Network
	}
	if err := q.Check(); err != nil {
		return nil, fault.Usage(err)
	}
	if q.FromOverlay && len(s.only(q.Network)) == 0 {
		return nil, s.notJoined(q.Network)
	}
	x, err := s.follows(q)
	if err != nil {
		return nil, err
	}
	x.Schema, x.Question = control.Schema, q
	policy := s.config().Policy
	switch {
	case x.Rule >= 0 && x.Rule < len(policy.Rules):
		x.RuleText = policy.Rules[x.Rule].String()
	case x.Rule == -1:
		x.RuleText = "default " + policy.Default
	}
	return x, nil
}

// unasked is an explanation in which the policy had no part.
func unasked(q control.Question, verdict, reason, detail string) control.Explanation {
	return control.Explanation{Verdict: verdict, Reason: reason, Detail: detail, Rule: -2,
		Source: q.Source, Destination: q.Destination, Translation: "keep"}
}

func (s *service) follows(q control.Question) (control.Explanation, error) {
	if q.FromOverlay {
		return s.followsIn(q)
	}
	if s.ways != nil {
		x, done, err := s.ways.throughHost(q)
		if done || err != nil {
			return x, err
		}
	}
	x := s.plane.Explain(q)
	if f := listens(s.planned().Relayed(), q); f != nil && x.Verdict == "local" {
		return s.relayed(*f, q, "the connection ends in the gateway, and a new one is made into the overlay"), nil
	}
	s.throughMember(&x)
	return x, nil
}

func where(w host.Way) string {
	if w.Via.IsValid() {
		return w.Via.String() + " on " + w.Device
	}
	return w.Device
}

// throughProxy follows a packet that ends in this host: a forward on its own
// addresses takes it up, or one of its programs does.
func (s *service) throughProxy(q control.Question) control.Explanation {
	if f := listens(s.planned().HostForwards, q); f != nil {
		return s.relayed(*f, q, "the connection ends at this host's own address, and a new one is made into the overlay")
	}
	return unasked(q, "local", "", "it ends in this host, whose own programs answer: no forward listens there")
}

// listens returns the forward that listens where a packet goes: one at just that address
// before one at all, nil if there is none.
func listens(forwards []config.Forward, q control.Question) (found *config.Forward) {
	for i := range forwards {
		f := &forwards[i]
		switch l := f.Listen; {
		case f.Proto != q.Protocol || l.Port() != q.Destination.Port():
		case l.Addr() == q.Destination.Addr():
			return f
		case l.Addr().IsUnspecified() && l.Addr().Is4() == q.Destination.Addr().Is4():
			found = f
		}
	}
	return found
}

// relayed follows a packet that opens a connection which ends here.
func (s *service) relayed(f config.Forward, q control.Question, detail string) control.Explanation {
	if len(f.AcceptProxy) > 0 && !slices.ContainsFunc(f.AcceptProxy, func(p netip.Prefix) bool { return p.Contains(q.Source.Addr()) }) {
		x := unasked(q, "reject", reasonProxySource, "the forward is for load balancers that are named in accept_proxy")
		x.Redirected, x.By = true, []string{"forward " + f.String()}
		return x
	}
	inner := q
	inner.Destination = f.To
	x := s.plane.Explain(inner)
	x.Redirected, x.By = true, append([]string{"forward " + f.String()}, x.By...)
	x.Detail = note(x.Detail, detail)
	if f.ProxyProtocol != "" {
		x.Detail = note(x.Detail, "its first bytes name the client (PROXY "+f.ProxyProtocol+")")
	}
	if x.Verdict == "forward" {
		x.Destination, x.Translation = f.To, "masquerade"
	}
	s.throughMember(&x)
	return x
}

// throughMember follows a packet that leaves into the overlay.
func (s *service) throughMember(x *control.Explanation) {
	unresolved := x.Reason == reasonUnresolved
	if x.Verdict != "forward" && !unresolved || x.Network == 0 || !x.NextHop.IsValid() {
		return
	}
	switch {
	case x.Member == "" && unresolved:
		x.Detail = note(x.Detail, fmt.Sprintf("nobody answers for %s: is it on, and the right address?", x.NextHop))
		return
	case x.Member == "":
		x.Detail = note(x.Detail, fmt.Sprintf("nobody has answered for %s yet: the first packet asks; ztgate ping %s does so now", x.NextHop, x.NextHop))
		return
	case unresolved:
		x.Detail = note(x.Detail, fmt.Sprintf("member %s, which had %s, no longer answers for it", x.Member, x.NextHop))
	}
	for _, p := range s.peers() {
		if p.Address != x.Member {
			continue
		}
		x.Path = p.Link
		if path, ok := bestPath(p); ok {
			x.PathMTU = path.MTU
		}
		switch now := s.now(); {
		case unresolved:
			x.Detail = note(x.Detail, lastHeard(p, now))
		case dead(p, now):
			x.Verdict, x.Reason, x.Detail = "drop", reasonUnreachable, note(x.Detail, lastHeard(p, now))
		}
		return
	}
	x.Detail = note(x.Detail, fmt.Sprintf("node %s isn't among our peers now: the first packet looks for it", x.Member))
}

func note(have, more string) string {
	if have == "" {
		return more
	}
	return have + "; " + more
}

// memberPatience is how long a member may be silent before it counts as dead. Peers
// say something at least once a minute.
const memberPatience = 2 * time.Minute

// dead reports that nothing comes from a peer any more, as far as its node knows.
func dead(p ztnode.Peer, now time.Time) bool {
	if p.LastReceive.IsZero() {
		_, direct := bestPath(p) // then its node doesn't know
		return !direct
	}
	return now.Sub(p.LastReceive) >= memberPatience
}

// lastHeard says when a peer that is silent was not.
func lastHeard(p ztnode.Peer, now time.Time) string {
	if p.LastReceive.IsZero() {
		return fmt.Sprintf("member %s has never been heard: is it on?", p.Address)
	}
	return fmt.Sprintf("member %s was last heard %s ago %s: is it on?", p.Address, now.Sub(p.LastReceive).Round(time.Second), over(p))
}

// over says by which way a peer was last heard.
func over(p ztnode.Peer) string {
	way, latest := "through a root", time.Time{}
	for _, path := range p.Paths {
		// What comes through a root leaves the paths as they are.
		if path.LastReceive.After(latest) && p.LastReceive.Sub(path.LastReceive) < time.Second {
			latest, way = path.LastReceive, "over "+path.Endpoint.String()
		}
	}
	return way
}

// followsIn follows a packet from the overlay into the VPC.
func (s *service) followsIn(q control.Question) (control.Explanation, error) {
	for _, n := range s.networks() {
		if n.ID == q.Network && n.Status != ztnode.StatusOK {
			x := unasked(q, "drop", reasonNetworkDown, fmt.Sprintf("network %s is %s: see ztgate status", n.ID, n.Status))
			x.Network = n.ID
			return x, nil
		}
	}
	x := s.plane.Explain(q)
	if s.ways == nil || x.Verdict != "forward" || x.NextHop.IsValid() {
		return x, nil
	}
	if x.Translation == "host" {
		x.Detail = "it ends here, and goes on by a socket of this host, as from one of its addresses"
		return x, nil
	}
	return s.ways.intoVPC(x)
}

// heldBy returns the network that keeps an address while it doesn't work, 0 = none.
func (s *service) heldBy(a netip.Addr) ztnode.NetworkID {
	for id, list := range s.planned().Held {
		for _, p := range list {
			if p.Contains(a) && !s.works(id) {
				return id
			}
		}
	}
	return 0
}

func (s *service) works(id ztnode.NetworkID) bool {
	for _, n := range s.networks() {
		if n.ID == id {
			return n.Status == ztnode.StatusOK
		}
	}
	return false
}

// withNetworkDown says that an address is that of a network which doesn't work, and what
// happens to the network's addresses meanwhile.
func withNetworkDown(q control.Question, id ztnode.NetworkID, meanwhile string) control.Explanation {
	x := unasked(q, "drop", reasonNetworkDown, fmt.Sprintf("network %s doesn't work now, and its addresses %s meanwhile: see ztgate status", id, meanwhile))
	x.Network = id
	return x
}

// whyNotRouted lists problems of prefixes that an address lies in.
func (s *service) whyNotRouted(a netip.Addr) string {
	var out []string
	for _, p := range s.planned().Problems {
		if p.Refused && p.Prefix.Contains(a) {
			out = append(out, p.String())
		}
	}
	return cmp.Or(strings.Join(out, "; "), "no network has a route to it")
}
