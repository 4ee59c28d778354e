package gateway

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/netstack"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/host"
	"ztgate/router/plan"
)

const (
	// passageTries are made before a packet counts as lost, each of which may take
	// passagePatience.
	passageTries    = 3
	passagePatience = 200 * time.Millisecond
	// passageLost measurements in a row mean that clients are cut off, after one that
	// passed.
	passageLost = 2
	// maxPassages bounds what is measured in one look, and evidenceEvery says how often
	// the flows are searched for clients that pass where the measurement doesn't.
	maxPassages   = 16
	evidenceEvery = 5 * time.Second
)

// passage measures whether this host's firewall lets packets of clients through to the
// forwarding plane. A packet is written to the TUN as a client would send it to a target;
// the kernel takes it for one that came in by the VPC's interface (see [host.Redirect]).
// So it meets all that a client's meets: filters of that interface, those before routing,
// and those of forwarding, whoever made them. The plane recognises it and takes it out.
type passage struct {
	mark  host.Mark
	port  uint16                                   // that it comes from
	lay   func(m host.Mark, device string) error   // redirects to an interface
	write func(packet []byte) error                // to the TUN
	from  func(client netip.Addr) (string, error)  // the interface that a client's packets come in by
	flows func(to netip.Addr) []netstack.FlowInfo  // to an address, all if it is invalid
	read  func(tun string) (*host.Firewall, error) // the rules
	log   func(msg string, args ...any)            // says that nothing can be measured
	came  [maxPassages * maxKinds]atomic.Bool      // packets that have arrived
	wake  chan struct{}                            // gets a value when one has
	laid  string                                   // interface that is redirected to
	known map[string]*passing                      // by what is measured; only of the last look
	cant  error                                    // why nothing can be measured
	told  bool

	last     *host.Firewall // nil = not read since clients last passed
	lastRead time.Time
}

// maxKinds is how many kinds of packets are tried for one target: any may pass.
const maxKinds = 3

// passing is what is known of the way to one target.
type passing struct {
	ok     time.Time    // when it was last seen to be open
	ever   bool         // it was
	misses int          // measurements since
	seen   clientPacket // a client's that passed where ours didn't; invalid = none
	sought time.Time    // when flows were last searched for one
}

// clientPacket is a packet of a client.
type clientPacket struct {
	proto  string // tcp or icmp
	client netip.Addr
	dst    netip.AddrPort
}

// crossing is what is measured: whether one of several packets passes.
type crossing struct {
	name    string // of the target, or of where packets go
	to      netip.Addr
	packets []clientPacket
}

// key names it while its target has this address.
func (q *crossing) key() string { return q.name + " " + q.to.String() }

func newPassage() *passage {
	return &passage{mark: host.Mark{ID: uint16(rand.Uint32()), Word: rand.Uint32()}, port: uint16(probePort + rand.IntN(1<<16-probePort)),
		wake: make(chan struct{}, 1), known: map[string]*passing{}}
}

// take reports packets of ours that the plane has read. It is called by the plane.
func (p *passage) take(packet []byte) bool {
	n, ok := p.mark.Of(packet)
	if !ok || int(n) >= len(p.came) {
		return false
	}
	p.came[n].Store(true)
	select {
	case p.wake <- struct{}{}:
	default:
	}
	return true
}

// check measures and tells of the targets that clients are cut off from.
func (p *passage) check(now time.Time, vpc config.VPCConfig, list []crossing) control.Check {
	const name = "firewall"
	p.forget(list)
	p.cant = nil
	passed := p.measure(list)
	if p.cant != nil {
		return p.unmeasured(name, now, vpc)
	}
	var lost []crossing
	for i, q := range list {
		k := p.known[q.key()]
		if passed[i] {
			k.ok, k.ever, k.misses = now, true, 0
			continue
		}
		if k.misses++; now.Sub(k.sought) >= evidenceEvery {
			k.sought = now
			if w, found := p.evidence(q, k.ok); found {
				k.seen, k.ok, k.ever, k.misses = w, now, true, 0
			}
		}
		if k.misses == 0 || k.ever && k.misses < passageLost {
			continue
		}
		lost = append(lost, q)
	}
	if len(lost) == 0 {
		p.last = nil
		return control.Passed(name)
	}
	return p.lost(name, now, vpc.TUN, lost)
}

// lost tells of what clients are cut off from, and by what.
func (p *passage) lost(name string, now time.Time, tun string, list []crossing) control.Check {
	names := make([]string, len(list))
	for i, q := range list {
		names[i] = q.name
	}
	if more := len(names) - maxReasons; more > 0 {
		names = append(names[:maxReasons], fmt.Sprintf("and %d more", more))
	}
	device := p.device(list)
	reasons, remedies := []string{fmt.Sprintf("this host's firewall drops packets of clients on the way from %s to %s: %s", device, tun, strings.Join(names, ", "))}, []string(nil)
	f, err := p.rules(now, tun)
	if err != nil {
		reasons = append(reasons, fmt.Sprintf("by which rule can't be told: %v", err))
		return control.Failed(name, control.Down, strings.Join(reasons, "; "), "see nft list ruleset and iptables -S")
	}
	for _, v6 := range []bool{false, true} {
		if !slices.ContainsFunc(list, func(q crossing) bool { return q.to.Is6() == v6 }) {
			continue
		}
		why, remedy := blame(f, device, tun, v6)
		if !slices.Contains(reasons, why) { // one of both families
			reasons, remedies = append(reasons, why), append(remedies, remedy)
		}
	}
	return control.Failed(name, control.Down, strings.Join(reasons, "; "), strings.Join(remedies, "; "))
}

// forget drops what is known of what isn't asked for any more.
func (p *passage) forget(list []crossing) {
	next := make(map[string]*passing, len(list))
	for _, q := range list {
		next[q.key()] = cmp.Or(p.known[q.key()], &passing{})
	}
	p.known = next
}

// device is the interface that the first crossing's packets come in by.
func (p *passage) device(list []crossing) string {
	for _, q := range list {
		for _, w := range q.packets {
			if d, err := p.from(w.client); err == nil && d != "" {
				return d
			}
		}
	}
	return ""
}

// sent is a packet under way.
type sent struct {
	device   string
	crossing int
	packet   []byte
	number   int
}

// measure reports for each crossing whether a packet of it came through.
func (p *passage) measure(list []crossing) []bool {
	passed := make([]bool, len(list))
	var out []sent
	for i, q := range list {
		packets := q.packets
		if k := p.known[q.key()]; k.seen.client.IsValid() {
			packets = append([]clientPacket{k.seen}, packets[:min(len(packets), maxKinds-1)]...)
		}
		for _, w := range packets {
			device, err := p.from(w.client)
			if err != nil || device == "" || device == local {
				continue
			}
			n := len(out)
			out = append(out, sent{device, i, p.packet(w, uint8(n)), n})
		}
	}
	asked := make([]bool, len(list))
	for _, s := range out {
		asked[s.crossing] = true
	}
	for i := range list {
		passed[i] = !asked[i] // nobody is known who could be cut off
	}
	slices.SortStableFunc(out, func(a, b sent) int { return cmp.Compare(a.device, b.device) })
	for len(out) > 0 && p.cant == nil {
		n := 1
		for n < len(out) && out[n].device == out[0].device {
			n++
		}
		p.through(out[:n], list, passed)
		out = out[n:]
	}
	return passed
}

// through sends packets that come in by one interface.
func (p *passage) through(out []sent, list []crossing, passed []bool) {
	tries := passageTries
	open := func() bool {
		return slices.ContainsFunc(out, func(s sent) bool { return !passed[s.crossing] })
	}
	if !slices.ContainsFunc(out, func(s sent) bool {
		k := p.known[list[s.crossing].key()]
		return k.misses == 0 || k.ever && k.misses < passageLost
	}) {
		tries = 1 // it is known already
	}
	for try := range tries {
		// Somebody may have taken it away, or the interface may be another of the name.
		if try > 0 || p.laid != out[0].device {
			if p.cant = p.lay(p.mark, out[0].device); p.cant != nil {
				p.laid = ""
				return
			}
			p.laid = out[0].device
		}
		for _, s := range out {
			p.came[s.number].Store(false)
		}
		for _, s := range out {
			if passed[s.crossing] {
				continue
			}
			if p.cant = p.write(s.packet); p.cant != nil {
				return
			}
		}
		for end := time.After(passagePatience); open(); {
			for _, s := range out {
				passed[s.crossing] = passed[s.crossing] || p.came[s.number].Load()
			}
			if !open() {
				return
			}
			select {
			case <-p.wake:
				continue
			case <-end:
			}
			break
		}
	}
	p.laid = "" // the next look lays it anew
}

// evidence finds a flow that a client has begun since: then the firewall lets that one
// through, and the measurement goes on as him.
func (p *passage) evidence(q crossing, since time.Time) (clientPacket, bool) {
	to := q.to
	if len(q.packets) > 1 {
		to = netip.Addr{} // it stands for all of its family
	}
	own := map[netip.Addr]bool{}
	for _, f := range p.flows(to) {
		c := f.Client.Addr()
		if !f.FromVPC || !f.Created.After(since) || c.Is6() != q.to.Is6() || own[c] || f.Protocol != "tcp" && f.Protocol != "icmp" {
			continue
		}
		if device, err := p.from(c); err == nil && device != "" && device != local {
			return clientPacket{f.Protocol, c, f.Server}, true
		}
		if own[c] = true; len(own) >= maxReasons {
			break
		}
	}
	return clientPacket{}, false
}

// unmeasured says what is known where the kernel redirects nothing: whether something
// drops what it isn't told to accept, and no rule is about the TUN.
func (p *passage) unmeasured(name string, now time.Time, vpc config.VPCConfig) control.Check {
	if !p.told {
		p.told = true
		p.log("whether the host's firewall lets clients through can't be measured", "error", p.cant)
	}
	f, err := p.rules(now, vpc.TUN)
	if err != nil {
		return control.Passed(name)
	}
	return suspicion(name, f, vpc)
}

// rules are the firewall's, of not long ago: there may be very many.
func (p *passage) rules(now time.Time, tun string) (*host.Firewall, error) {
	if p.last != nil && now.Sub(p.lastRead) < evidenceEvery {
		return p.last, nil
	}
	f, err := p.read(tun)
	if err != nil {
		return nil, err
	}
	p.last, p.lastRead = f, now
	return f, nil
}

// suspicion fails if a firewall drops what it isn't told to accept, and no rule is about the
// TUN.
func suspicion(name string, f *host.Firewall, vpc config.VPCConfig) control.Check {
	v4, v6 := len(vpc.Sources) == 0 || sends(vpc, netip.Addr.Is4), sends(vpc, netip.Addr.Is6)
	for _, c := range f.Chains {
		if !c.Drops || c.Mention || !(v4 && c.Holds(false) || v6 && c.Holds(true)) {
			continue
		}
		from := firstInterface(vpc)
		if from == local {
			from = "INTERFACE" // nobody has named it
		}
		_, remedy := blame(f, from, vpc.TUN, !v4)
		return control.Failed(name, control.Degraded, fmt.Sprintf("chain %s drops by policy what comes by hook %s, no rule of its table names %s, and clients may be cut off",
			c, c.Hook, vpc.TUN), remedy)
	}
	return control.Passed(name)
}

// blame says what drops packets from one interface to another as far as the rules tell,
// and how they are let through.
func blame(f *host.Firewall, from, to string, v6 bool) (why, remedy string) {
	var policies, others []string
	var first *host.Chain
	chains := slices.Clone(f.Chains)
	// Where some rule is about the TUN it may be let through already.
	slices.SortStableFunc(chains, func(a, b host.Chain) int { return strings.Compare(fmt.Sprint(a.Mention), fmt.Sprint(b.Mention)) })
	for _, c := range chains {
		if !c.Holds(v6) {
			continue
		}
		text := fmt.Sprintf("%s (hook %s)", c, c.Hook)
		if c.Drops {
			policies = append(policies, text)
			if first == nil || !first.Drops {
				first = &c
			}
			continue
		}
		others = append(others, text)
		if first == nil {
			first = &c
		}
	}
	for _, l := range f.Legacy {
		if (l == "ip6tables-legacy") == v6 {
			others = append(others, "those of "+l)
			if first == nil {
				return "a rule of " + l + " drops them", forwardBoth(l, "FORWARD", from, to)
			}
		}
	}
	switch {
	case len(policies) > 0:
		why = "chain " + strings.Join(policies, ", or ") + " drops by policy what no rule accepts"
	case len(others) > 0:
		return "a rule drops them, in a chain that starts at " + strings.Join(others, ", "), remedyFor(f, *first, from, to)
	default:
		return "no chain of nftables or iptables does: look for BPF programs and traffic control on " + from, "see bpftool net and tc filter show dev " + from + " ingress"
	}
	return why, remedyFor(f, *first, from, to)
}

func remedyFor(f *host.Firewall, c host.Chain, from, to string) string {
	command := map[string]string{"ip": "iptables", "ip6": "ip6tables"}[c.Family]
	switch {
	case c.Hook != "forward":
		return fmt.Sprintf("see nft list chain %s, and accept there what comes by %s from vpc.sources", c, from)
	case c.Table == "firewalld":
		return fmt.Sprintf("make a policy of firewalld that accepts from %s to %s and back (firewall-cmd --permanent --new-policy)", from, to)
	case f.Has(c.Family+" filter ufw-user-forward") || f.Has(c.Family+" filter ufw6-user-forward"):
		return fmt.Sprintf("run ufw route allow in on %s out on %s && ufw route allow in on %s out on %s", from, to, to, from)
	case command != "" && c.Table == "filter" && c.Name == "FORWARD":
		chain := "FORWARD"
		if f.Has(c.Family + " filter DOCKER-USER") {
			chain = "DOCKER-USER" // Docker keeps its hands off it
		}
		return forwardBoth(command, chain, from, to)
	}
	return fmt.Sprintf("run nft 'insert rule %s iifname %q oifname %q accept; insert rule %s iifname %q oifname %q accept'", c, from, to, c, to, from)
}

func forwardBoth(command, chain, from, to string) string {
	return fmt.Sprintf("run %s -I %s -i %s -o %s -j ACCEPT && %s -I %s -i %s -o %s -j ACCEPT", command, chain, from, to, command, chain, to, from)
}

// packet is a client's, with a number: a SYN or an echo request.
func (p *passage) packet(w clientPacket, number uint8) []byte {
	const ttl, window = 64, 64240
	src, dst := w.client.AsSlice(), w.dst.Addr().AsSlice()
	proto, l4 := byte(unix.IPPROTO_TCP), make([]byte, 20)
	word := p.mark.Word&^0xff | uint32(number)
	binary.BigEndian.PutUint32(l4[4:], word)
	if w.proto == "icmp" {
		proto, l4 = unix.IPPROTO_ICMP, l4[:8]
		l4[0] = 8 // echo request
		if w.client.Is6() {
			proto, l4[0] = unix.IPPROTO_ICMPV6, 128
		}
	} else {
		binary.BigEndian.PutUint16(l4, p.port)
		binary.BigEndian.PutUint16(l4[2:], w.dst.Port())
		l4[12], l4[13] = 5<<4, 2 // SYN
		binary.BigEndian.PutUint16(l4[14:], window)
	}
	at := map[byte]int{unix.IPPROTO_TCP: 16}[proto]
	if at == 0 {
		at = 2
	}
	var pseudo []byte
	if proto != unix.IPPROTO_ICMP {
		pseudo = slices.Concat(src, dst, []byte{0, proto, 0, byte(len(l4))})
	}
	binary.BigEndian.PutUint16(l4[at:], checksum(pseudo, l4))
	if w.client.Is6() {
		h := make([]byte, 8, 40+len(l4))
		binary.BigEndian.PutUint32(h, 6<<28|uint32(p.mark.ID))
		h[5], h[6], h[7] = byte(len(l4)), proto, ttl
		return slices.Concat(h, src, dst, l4)
	}
	h := make([]byte, 12, 20+len(l4))
	h[0], h[3], h[8], h[9] = 4<<4|5, byte(20+len(l4)), ttl, proto
	binary.BigEndian.PutUint16(h[4:], p.mark.ID)
	h = slices.Concat(h, src, dst)
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, l4...)
}

// checksum is that of the internet, over parts of even length.
func checksum(parts ...[]byte) uint16 {
	sum := uint32(0)
	for _, b := range parts {
		for i := 0; i < len(b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// passages are what is measured: the targets, and where a family has none, whether
// anything gets to its first route.
func (g *gateway) passages(p *plan.Plan) (out []crossing) {
	var has [2]bool
	for _, t := range g.config().Targets {
		dst := t.Addr.Addr()
		client := g.clientAddress(dst.Is6())
		if _, ours := p.Route(dst); !ours || !client.IsValid() || len(out) >= maxPassages-len(has) {
			continue
		}
		has[family(dst.Is6())] = true
		out = append(out, crossing{t.String(), dst, []clientPacket{{t.Scheme, client, t.Addr}}})
	}
	for _, a := range g.destinations(p) {
		client := g.clientAddress(a.Is6())
		if f := family(a.Is6()); !has[f] && client.IsValid() {
			has[f] = true
			out = append(out, crossing{a.String(), a, []clientPacket{{"tcp", client, netip.AddrPortFrom(a, 443)}, {"icmp", client, netip.AddrPortFrom(a, 0)}}})
		}
	}
	return out
}
