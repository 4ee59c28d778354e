package host

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/router/plan"
)

// Exits lead what has no other way through a member of a network. The main table is left
// as it is, with the host's own default routes: policy routing asks it first, and for all
// that keeps its own way asks nothing else. So the way of the underlay survives whatever
// becomes of addresses, routers and peers, and when the interface is gone, also with a
// process that was killed, packets go the host's own way again. Only IPv6 that had no exit
// goes nowhere until the next start then, since such a route belongs to no interface.
//
//	5400  what is sent by an exit's interface        our table
//	5401  what bears the mark of the overlay's own   main
//	5402  what comes from an address of the host     main, but not IPv6 that is blocked
//	5403  all                                        main, without its default routes
//	5404  all                                        our table
//
// Our table has a pair of half routes for each exit, and throws out what no exit forwards.
type Exits struct {
	nl  ruler
	log *slog.Logger
}

// ExitTable is the table with the routes to exits, and ExitMark marks packets of the
// overlay itself.
const (
	ExitTable = 0x7a74
	ExitMark  = 0x7a740000
)

// Priorities of our rules.
const (
	ruleDevice = 5400 + iota
	ruleMark
	ruleSource
	ruleMain
	ruleExit
)

// ruler is a kernel with rules of policy routing.
type ruler interface {
	Netlink
	RuleList(family int) ([]netlink.Rule, error)
	RuleAdd(r *netlink.Rule) error
	RuleDel(r *netlink.Rule) error
}

// ExitWay is the way to an exit, of one family.
type ExitWay struct {
	Link    *Link
	Via     netip.Addr
	InForce bool // else only what is sent by the interface takes it
}

// ExitState is what shall be.
type ExitState struct {
	Ways      []ExitWay
	BlockIPv6 bool // no exit carries it, and it mustn't leak
	Detour    plan.Detour
}

// TidyExits removes what an earlier process left, unless another one uses it.
func TidyExits(log *slog.Logger) error {
	x, err := OpenExits(log)
	switch {
	case errors.Is(err, ErrExitsInUse):
	case err != nil:
		return err
	default:
		x.nl.Close()
	}
	return nil
}

// OpenExits opens the host's policy routing and removes what an earlier process left.
func OpenExits(log *slog.Logger) (*Exits, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	x := &Exits{nl: h, log: log}
	left, err := x.routes()
	if err == nil && slices.ContainsFunc(left, func(r netlink.Route) bool { return r.Type == unix.RTN_UNICAST }) {
		err = ErrExitsInUse
	}
	if err == nil {
		err = x.Set(ExitState{})
	}
	if err != nil {
		h.Close()
		return nil, err
	}
	return x, nil
}

// ErrExitsInUse means that another process of this host leads it through an exit.
var ErrExitsInUse = fmt.Errorf("table %d leads to an exit already: another member on this host takes a default route: stop it, or allow one for one of the two", ExitTable)

// Close removes all.
func (x *Exits) Close() {
	if err := x.Set(ExitState{}); err != nil {
		x.log.Warn("clean up the ways to exits", "error", err)
	}
	x.nl.Close()
}

// Set makes rules and routes exactly these. What ends does so first, so that nothing
// is led astray in between.
func (x *Exits) Set(s ExitState) error {
	want := s.rules()
	have, err := x.rules()
	if err != nil {
		return err
	}
	var errs []error
	kept := have[:0]
	for _, r := range have {
		if slices.ContainsFunc(want, func(w netlink.Rule) bool { return sameRule(w, r) }) {
			kept = append(kept, r)
		} else if err := x.nl.RuleDel(&r); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove rule %s: %w", r, err))
		}
	}
	errs = append(errs, x.setRoutes(s))
	for _, w := range want { // the last of them leads to the exit
		if slices.ContainsFunc(kept, func(r netlink.Rule) bool { return sameRule(w, r) }) {
			continue
		}
		if err := x.nl.RuleAdd(&w); err != nil && !errors.Is(err, unix.EEXIST) && !x.withoutIPv6(w.Family, err) {
			errs = append(errs, fmt.Errorf("add rule %s: %w", w, err))
			break // the ones that follow could cut the underlay off
		}
	}
	return errors.Join(errs...)
}

// withoutIPv6 reports an error of a host that has no IPv6, where none can leak.
func (*Exits) withoutIPv6(family int, err error) bool {
	return family == unix.AF_INET6 && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP))
}

// rules are the rules that a state needs, in their order.
func (s ExitState) rules() (out []netlink.Rule) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		v6 := family == unix.AF_INET6
		add := func(priority, table int, more func(*netlink.Rule)) {
			r := netlink.NewRule()
			r.Family, r.Priority, r.Table, r.Protocol = family, priority, table, uint8(routeProtocol)
			if more != nil {
				more(r)
			}
			out = append(out, *r)
		}
		inForce := v6 && s.BlockIPv6
		for _, w := range s.Ways {
			if w.Via.Is6() == v6 {
				add(ruleDevice, ExitTable, func(r *netlink.Rule) { r.OifName = w.Link.name })
				inForce = inForce || w.InForce
			}
		}
		if !inForce {
			continue
		}
		mask := uint32(0xffff0000)
		add(ruleMark, unix.RT_TABLE_MAIN, func(r *netlink.Rule) { r.Mark, r.Mask = ExitMark, &mask })
		for _, a := range s.Detour.From {
			// Where a lookup without a source fails, IPv6 tries again with the one that it
			// would use, so that what is blocked would come from there too.
			if a.Is6() == v6 && !(v6 && s.BlockIPv6) {
				add(ruleSource, unix.RT_TABLE_MAIN, func(r *netlink.Rule) { r.Src = ipNet(netip.PrefixFrom(a, a.BitLen())) })
			}
		}
		add(ruleMain, unix.RT_TABLE_MAIN, func(r *netlink.Rule) { r.SuppressPrefixlen = 0 })
		add(ruleExit, ExitTable, nil)
	}
	return out
}

// rules are ours that the kernel has.
func (x *Exits) rules() ([]netlink.Rule, error) {
	list, err := x.nl.RuleList(netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}
	return slices.DeleteFunc(list, func(r netlink.Rule) bool {
		return r.Protocol != uint8(routeProtocol) || r.Priority < ruleDevice || r.Priority > ruleExit
	}), nil
}

func sameRule(a, b netlink.Rule) bool {
	return a.Family == b.Family && a.Priority == b.Priority && a.Table == b.Table && a.Mark == b.Mark &&
		a.OifName == b.OifName && prefixOf(a.Src) == prefixOf(b.Src) && a.SuppressPrefixlen == b.SuppressPrefixlen
}

// halves of all addresses of a family: a pair that no program takes for a default
// route to be replaced.
func halves(v6 bool) []netip.Prefix {
	if v6 {
		return []netip.Prefix{netip.MustParsePrefix("::/1"), netip.MustParsePrefix("8000::/1")}
	}
	return []netip.Prefix{netip.MustParsePrefix("0.0.0.0/1"), netip.MustParsePrefix("128.0.0.0/1")}
}

// routes are those of our table.
func (x *Exits) routes() ([]netlink.Route, error) {
	list, err := x.nl.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: ExitTable}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list routes of table %d: %w", ExitTable, err)
	}
	return list, nil
}

func (x *Exits) setRoutes(s ExitState) error {
	var want []netlink.Route
	families := map[bool]bool{true: s.BlockIPv6}
	for _, w := range s.Ways {
		families[w.Via.Is6()] = true
		for _, p := range halves(w.Via.Is6()) {
			want = append(want, netlink.Route{LinkIndex: w.Link.l.Attrs().Index, Dst: ipNet(p), Gw: w.Via.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
				Table: ExitTable, Protocol: routeProtocol, Type: unix.RTN_UNICAST})
		}
	}
	if s.BlockIPv6 {
		for _, p := range halves(true) {
			want = append(want, netlink.Route{Dst: ipNet(p), Table: ExitTable, Protocol: routeProtocol, Type: unix.RTN_UNREACHABLE})
		}
	}
	for _, p := range s.Detour.To {
		if families[p.Addr().Is6()] {
			want = append(want, netlink.Route{Dst: ipNet(p), Table: ExitTable, Protocol: routeProtocol, Type: unix.RTN_THROW})
		}
	}
	have, err := x.routes()
	if err != nil {
		return err
	}
	same := func(a, b netlink.Route) bool {
		return a.Type == b.Type && prefixOf(a.Dst) == prefixOf(b.Dst) && (a.Type != unix.RTN_UNICAST || a.LinkIndex == b.LinkIndex && a.Gw.Equal(b.Gw))
	}
	var errs []error
	for _, r := range have {
		if slices.ContainsFunc(want, func(w netlink.Route) bool { return same(w, r) }) {
			continue
		}
		if err := x.nl.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove route %s of table %d: %w", prefixOf(r.Dst), ExitTable, err))
		}
	}
	for _, w := range want {
		if slices.ContainsFunc(have, func(r netlink.Route) bool { return same(w, r) }) {
			continue
		}
		family := unix.AF_INET
		if prefixOf(w.Dst).Addr().Is6() {
			family = unix.AF_INET6
		}
		if err := x.nl.RouteAdd(&w); err != nil && !errors.Is(err, unix.EEXIST) && !x.withoutIPv6(family, err) {
			errs = append(errs, fmt.Errorf("add route %s to table %d: %w", prefixOf(w.Dst), ExitTable, err))
		}
	}
	return errors.Join(errs...)
}
