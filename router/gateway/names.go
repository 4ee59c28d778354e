package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"ztgate/router/control"
	"ztgate/router/gateway/resolver"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

const (
	namesEvery   = 30 * time.Second // where an answer doesn't say how long it holds
	namesHurry   = time.Second      // while a name has no answer, then twice as long each time
	namesLeast   = 5 * time.Second  // however shortly an answer holds
	namesMost    = 5 * time.Minute
	nameTimeout  = 5 * time.Second
	nameLookups  = 4  // at a time
	maxAddresses = 64 // of a name
	dnsPort      = 53
	namesFailed  = 3 // lookups in a row when health says so
	notLookedUp  = "not looked up yet"
)

// names finds the addresses of the names in the configuration and follows their
// changes. An address stays until an answer without it comes: a name server that is
// down takes nothing away.
type names struct {
	lookup  lookupFunc
	changed func(answers map[string][]netip.Addr) error // called by run; again in the next round after an error
	failed  bool                                        // it returned one last time; only run uses it
	log     *slog.Logger
	again   chan struct{} // a value makes run look at once

	mu     sync.Mutex
	states map[string]nameState
}

// lookupFunc finds the addresses of a name, and how long they hold; 0 = that isn't said.
type lookupFunc func(ctx context.Context, name string) (found []netip.Addr, ttl time.Duration, err error)

// nameState is what is known of a name.
type nameState struct {
	control.NameState
	due   time.Time     // of the next lookup
	hurry time.Duration // of the lookups while there is no answer
}

// newNames returns names that looks nothing up until it runs.
func newNames(list []string, lookup lookupFunc, changed func(map[string][]netip.Addr) error, log *slog.Logger) *names {
	n := &names{lookup: lookup, changed: changed, log: log, again: make(chan struct{}, 1), states: map[string]nameState{}}
	n.set(list)
	return n
}

// set replaces the names. Those that stay keep their answers.
func (n *names) set(list []string) {
	n.mu.Lock()
	old := n.states
	n.states = make(map[string]nameState, len(list))
	for _, name := range list {
		s, ok := old[name]
		if !ok {
			s = nameState{NameState: control.NameState{Name: name, Error: notLookedUp}}
		}
		n.states[name] = s
	}
	n.mu.Unlock()
	n.retry()
}

// retry makes run look all names up soon, as after a network has brought its name
// servers.
func (n *names) retry() {
	if n == nil {
		return
	}
	n.mu.Lock()
	for name, s := range n.states {
		s.due, s.hurry = time.Time{}, 0
		n.states[name] = s
	}
	n.mu.Unlock()
	select {
	case n.again <- struct{}{}:
	default:
	}
}

// run keeps the answers up to date until ctx ends.
func (n *names) run(ctx context.Context) error {
	for {
		t := time.NewTimer(n.round(ctx))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-n.again:
		case <-t.C:
		}
		t.Stop()
	}
}

// round looks up the names whose time has come, and returns how long nothing is to be
// done.
func (n *names) round(ctx context.Context) (wait time.Duration) {
	var g errgroup.Group
	g.SetLimit(nameLookups)
	var mu sync.Mutex
	changed := false
	for _, name := range n.dueAt(time.Now()) {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, nameTimeout)
			defer cancel()
			found, ttl, err := n.lookup(ctx, name)
			if errors.Is(ctx.Err(), context.Canceled) {
				return nil // we are stopping: says nothing about the name
			}
			if err == nil {
				found, err = usableAnswer(found)
			}
			if n.record(name, found, ttl, err, time.Now()) {
				mu.Lock()
				changed = true
				mu.Unlock()
			}
			return nil
		})
	}
	_ = g.Wait() // no function of it fails
	if changed || n.failed {
		err := n.changed(n.answers())
		if n.failed = err != nil; n.failed {
			n.log.Error("use the addresses of names: the last ones stay", "error", err)
		}
	}
	wait = namesEvery
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range n.states {
		wait = min(wait, time.Until(s.due))
	}
	return max(wait, 0)
}

// dueAt lists the names that are to be looked up.
func (n *names) dueAt(now time.Time) (out []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for name, s := range n.states {
		if !s.due.After(now) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// usableAnswer sorts an answer and leaves out what can be nobody's address, so that
// a name never stands for this host or for a cloud's metadata service.
func usableAnswer(found []netip.Addr) ([]netip.Addr, error) {
	var out []netip.Addr
	err := errors.New("the answer has no address")
	for _, a := range found {
		a = a.Unmap()
		if why := plan.Unusable(a); why != "" {
			err = fmt.Errorf("the answer %s is not used: %s", a, why)
			continue
		}
		out = append(out, a)
	}
	if len(out) == 0 {
		return nil, err
	}
	slices.SortFunc(out, netip.Addr.Compare)
	out = slices.Compact(out)
	return out[:min(len(out), maxAddresses)], nil
}

// record takes an answer and reports whether it changes anything.
func (n *names) record(name string, found []netip.Addr, ttl time.Duration, err error, now time.Time) (changed bool) {
	n.mu.Lock()
	old, wanted := n.states[name]
	s := old
	switch {
	case err == nil:
		changed = !slices.Equal(old.Addresses, found)
		s.Addresses, s.LastAnswer, s.Error, s.Failures, s.hurry = found, now, "", 0, 0
		s.due = now.Add(namesEvery)
		if ttl > 0 {
			s.due = now.Add(min(max(ttl, namesLeast), namesMost))
		}
	case errors.Is(err, errGone) && len(old.Addresses) > 0: // nobody's rules are to hold for whoever gets the address
		changed, found = true, nil
		s.Addresses, s.Error, s.Failures, s.hurry, s.due = nil, err.Error(), 1, namesHurry, now.Add(namesHurry)
	case len(old.Addresses) == 0:
		s.Error, s.Failures = err.Error(), s.Failures+1
		s.hurry = min(max(2*s.hurry, namesHurry), namesEvery)
		s.due = now.Add(s.hurry)
	default:
		s.Error, s.Failures = err.Error(), s.Failures+1
		s.due = now.Add(namesEvery)
	}
	if wanted { // else a reload took it away meanwhile
		n.states[name] = s
	}
	n.mu.Unlock()
	switch {
	case !wanted:
		return false
	case changed:
		n.log.Info("name resolved", "name", name, "addresses", found, "before", old.Addresses)
	case err != nil && (old.Error == "" || old.Error == notLookedUp):
		n.log.Warn("look up name", "name", name, "error", err, "addresses", old.Addresses)
	}
	return changed
}

// answers returns the addresses that are known, for [config.Config.Resolve].
func (n *names) answers() map[string][]netip.Addr {
	out := map[string][]netip.Addr{}
	for _, s := range n.list() {
		if len(s.Addresses) > 0 {
			out[s.Name] = s.Addresses
		}
	}
	return out
}

// list returns the state of all names, sorted by name. A nil n has none.
func (n *names) list() []control.NameState {
	if n == nil {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []control.NameState
	for _, s := range n.states {
		out = append(out, s.NameState)
	}
	slices.SortFunc(out, func(a, b control.NameState) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// checks tell of names whose last addresses are in use because nobody says others. What
// has none is a problem of the configuration. Without names there are none.
func (n *names) checks() []control.Check {
	const name = "names"
	var reasons []string
	list := n.list()
	if len(list) == 0 {
		return nil
	}
	for _, s := range list {
		if len(s.Addresses) > 0 && s.Failures >= namesFailed {
			reasons = append(reasons, fmt.Sprintf("the name %s hasn't been answered since %s: its last addresses stay in use", s.Name, clockTime(s.LastAnswer)))
		}
	}
	if len(reasons) == 0 {
		return []control.Check{control.Passed(name)}
	}
	return []control.Check{control.Failed(name, control.Degraded, strings.Join(reasons, "; "), "see ztgate status for why, and ztgate resolve NAME")}
}

// nameServers asks those who know a name: the zone of the networks' hosts, the name servers
// of the network whose domain it lies in, else this host's resolver. There is no second
// choice: what a network says of its own domain must not depend on whether its servers
// answer. A controller can call any domain its own, so only networks with allow_dns count.
type nameServers struct {
	hosts    func(name string) (list []netip.Addr, inside bool, err error) // nil = there is no zone
	networks func() []ztnode.Network
	allowed  func(ztnode.NetworkID) bool
	dial     resolver.Dial // udp or tcp, through the overlay
	// seen returns the address by which a network's host is dialled; nil = its own.
	seen func(nwid uint64, a netip.Addr) (netip.Addr, bool)
	host func(ctx context.Context, name string) ([]netip.Addr, error) // nil = this host's resolver
}

func (s nameServers) lookup(ctx context.Context, name string) (found []netip.Addr, ttl time.Duration, err error) {
	if s.hosts != nil {
		if list, inside, err := s.hosts(name); inside {
			return list, resolver.TTL * time.Second, err
		}
	}
	id, servers := s.of(name, s.allowed)
	if len(servers) == 0 {
		if s.host != nil {
			found, err = s.host(ctx, name)
		} else {
			found, err = net.DefaultResolver.LookupNetIP(ctx, "ip", name)
		}
		if other, unasked := s.of(name, nil); err != nil && len(unasked) > 0 {
			err = fmt.Errorf("%w (the name servers of network %s weren't asked: set allow_dns for it)", err, other)
		}
		return found, 0, err
	}
	var errs []error
	for i, server := range servers {
		at, ok := server, true
		if s.seen != nil {
			at, ok = s.seen(uint64(id), server)
		}
		if !ok {
			errs = append(errs, fmt.Errorf("name server %s: its network has no route to it", server))
			continue
		}
		found, ttl, err := s.ask(ctx, netip.AddrPortFrom(at, dnsPort), name, len(servers)-i)
		if err == nil {
			return found, ttl, nil
		}
		errs = append(errs, fmt.Errorf("name server %s: %w", server, err))
		if errors.Is(err, resolver.ErrNoHost) || ctx.Err() != nil {
			break
		}
	}
	return nil, 0, errors.Join(errs...)
}

// of returns the joined network with the longest domain that a name lies in, and its name
// servers.
func (s nameServers) of(name string, allowed func(ztnode.NetworkID) bool) (id ztnode.NetworkID, servers []netip.Addr) {
	longest := 0
	for _, n := range s.networks() {
		if allowed != nil && !allowed(n.ID) {
			continue
		}
		domain := domainOf(n)
		inside := name == domain || strings.HasSuffix(name, "."+domain)
		if n.Status == ztnode.StatusOK && domain != "" && len(n.DNSServers) > 0 && inside && len(domain) > longest {
			id, servers, longest = n.ID, n.DNSServers, len(domain)
		}
	}
	return id, servers
}

// ask asks one server, for its share of the time that is left.
func (s nameServers) ask(ctx context.Context, server netip.AddrPort, name string, left int) ([]netip.Addr, time.Duration, error) {
	if end, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(end)/time.Duration(left))
		defer cancel()
	}
	return resolver.Addresses(ctx, s.dial, server, name)
}
