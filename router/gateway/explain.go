package gateway

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/host"
	"ztgate/zerotier/ztnode"
)

// hostWays says where this host's kernel sends packets.
type hostWays interface {
	// fromClient is the way of a packet that a VPC host sends through this one.
	fromClient(src, dst netip.Addr) (host.Way, error)
	// toVPC is the way of a packet that the forwarding plane gives to the kernel.
	toVPC(src, dst netip.Addr) (host.Way, error)
	// forwards reports whether the kernel forwards packets of a family at all.
	forwards(v6 bool) bool
	isUp() bool // the interface to the forwarding plane
}

// Reasons of verdicts that the forwarding plane never sees.
const (
	reasonForwarding  = "host_forwarding_off"
	reasonInterface   = "host_interface_down"
	reasonKernelRoute = "host_route"
	reasonNetworkDown = "network_down"
	reasonUnreachable = "member_unreachable"
	reasonUnresolved  = "unresolved"
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
		x, done, err := s.throughHost(q)
		if done || err != nil {
			return x, err
		}
	}
	x := s.plane.Explain(q)
	s.throughMember(&x)
	return x, nil
}

// throughHost follows a packet of a VPC host to the forwarding plane; done says
// that it doesn't come so far.
func (s *service) throughHost(q control.Question) (x control.Explanation, done bool, err error) {
	src, dst := q.Source.Addr(), q.Destination.Addr()
	w, err := s.ways.fromClient(src, dst)
	if err != nil {
		return x, false, err
	}
	if w.Local {
		x := s.throughProxy(q)
		return x, true, nil
	}
	tun := s.config().VPC.TUN
	r, ours := s.planned().Route(dst)
	switch {
	case !s.ways.forwards(dst.Is6()):
		key := "net.ipv4.ip_forward"
		if dst.Is6() {
			key = "net.ipv6.conf.all.forwarding"
		}
		return unasked(q, "drop", reasonForwarding, fmt.Sprintf("%s is 0, so that the kernel doesn't pass packets on to %s: run sysctl -w %s=1", key, tun, key)), true, nil
	case (ours || s.heldBy(dst) != 0) && !s.ways.isUp():
		return unasked(q, "drop", reasonInterface, fmt.Sprintf("%s is down: run ip link set %s up", tun, tun)), true, nil
	case w.Refused == nil && w.Device == tun:
		return x, false, nil
	case s.heldBy(dst) != 0:
		id := s.heldBy(dst)
		x := unasked(q, "drop", reasonNetworkDown, fmt.Sprintf("network %s doesn't work now, and its addresses go nowhere else meanwhile: see ztgate status", id))
		x.Network = id
		return x, true, nil
	case w.Refused != nil && !ours:
		return unasked(q, "reject", reasonKernelRoute, fmt.Sprintf("the kernel has no way to %s (%v), and no network has a route to it: see ztgate networks", dst, w.Refused)), true, nil
	case w.Refused != nil:
		return unasked(q, "drop", reasonKernelRoute, fmt.Sprintf("the kernel refuses it (%v), although %s is routed to %s: see ip route get %s from %s", w.Refused, r.Target, tun, dst, src)), true, nil
	}
	detail := fmt.Sprintf("the kernel sends it to %s and not to %s", where(w), tun)
	if ours {
		detail += fmt.Sprintf(", although %s is ours: remove the more specific route", r.Target)
	} else if list := s.problemsAbout(dst); list != "" {
		detail += ": " + list
	} else {
		detail += ": no network has a route to it"
	}
	return unasked(q, "elsewhere", reasonKernelRoute, detail), true, nil
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
	for _, f := range s.planned().HostForwards {
		l := f.Listen
		if f.Proto != q.Protocol || l.Port() != q.Destination.Port() || l.Addr().Is4() != q.Destination.Addr().Is4() ||
			!l.Addr().IsUnspecified() && l.Addr() != q.Destination.Addr() {
			continue
		}
		inner := q
		inner.Destination = f.To
		x := s.plane.Explain(inner)
		x.Redirected, x.By = true, append([]string{"forward " + f.String()}, x.By...)
		x.Detail = note(x.Detail, "the connection ends at this host's own address, and a new one is made into the overlay")
		if x.Verdict == "forward" {
			x.Destination, x.Translation = f.To, "masquerade"
		}
		s.throughMember(&x)
		return x
	}
	return unasked(q, "local", "", "it ends in this host, whose own programs answer: no forward listens there")
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
	tun := s.config().VPC.TUN
	w, err := s.ways.toVPC(x.Source.Addr(), x.Destination.Addr())
	switch {
	case err != nil:
		return x, err
	case !w.Local && !s.ways.forwards(x.Destination.Addr().Is6()):
		x.Verdict, x.Reason, x.Detail = "drop", reasonForwarding, "the kernel forwards nothing from "+tun+": switch ip_forward on"
	case w.Refused != nil:
		x.Verdict, x.Reason = "drop", reasonKernelRoute
		x.Detail = fmt.Sprintf("the kernel has no way to %s from %s (%v)", x.Destination.Addr(), tun, w.Refused)
		if errors.Is(w.Refused, unix.EXDEV) {
			x.Detail += ": rp_filter refuses the source"
		}
	case w.Device == tun && !w.Local:
		x.Verdict, x.Reason, x.Detail = "drop", reasonKernelRoute, "the kernel sends it back to "+tun
	case w.Local:
		x.Detail = "it ends in this host"
	default:
		x.Detail = "the kernel sends it to " + where(w)
	}
	return x, nil
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

// problemsAbout lists problems of prefixes that an address lies in.
func (s *service) problemsAbout(a netip.Addr) string {
	var out []string
	for _, p := range s.planned().Problems {
		if p.Refused && p.Prefix.Contains(a) {
			out = append(out, p.String())
		}
	}
	return strings.Join(out, "; ")
}

// The ways of packets through the host of a gateway.

func (g *gateway) fromClient(src, dst netip.Addr) (host.Way, error) {
	if !src.IsValid() { // nobody in particular: as this host itself
		return g.table.Way(src, dst, "")
	}
	in, err := g.comesBy(src)
	if err != nil || in == "" {
		return host.Way{}, err
	}
	if in == local {
		return g.table.Way(netip.Addr{}, dst, "")
	}
	w, err := g.table.Way(src, dst, in)
	// With forwarding off the kernel says no more than that.
	if w.Refused != nil && !g.forwards(dst.Is6()) {
		return g.table.Way(netip.Addr{}, dst, "")
	}
	return w, err
}

// local stands for this host itself where an interface is named.
const local = "lo"

// comesBy returns the interface that packets of a source come in by.
func (g *gateway) comesBy(src netip.Addr) (string, error) {
	w, err := g.table.Way(netip.Addr{}, src, "")
	switch {
	case err != nil:
		return "", err
	case w.Local:
		return local, nil
	case w.Device == g.config().VPC.TUN || w.Refused != nil:
		return firstInterface(g.config().VPC), nil
	}
	return w.Device, nil
}

func firstInterface(vpc config.VPCConfig) string {
	if len(vpc.Interfaces) > 0 {
		return vpc.Interfaces[0]
	}
	return local
}

func (g *gateway) toVPC(src, dst netip.Addr) (host.Way, error) {
	return g.table.Way(src, dst, g.config().VPC.TUN)
}

func (g *gateway) forwards(v6 bool) bool { return host.Forwards(g.sysctl, v6) }

func (g *gateway) isUp() bool { return g.link.IsUp() }
