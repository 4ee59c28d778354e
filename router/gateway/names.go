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
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

const (
	namesEvery   = 30 * time.Second
	namesHurry   = time.Second // while a name has no answer, then twice as long each time
	nameTimeout  = 5 * time.Second
	nameLookups  = 4  // at a time
	maxAddresses = 64 // of a name
	dnsPort      = 53
	notLookedUp  = "not looked up yet"
)

// names finds the addresses of the names in the configuration and follows their
// changes. An address stays until an answer without it comes: a name server that is
// down takes nothing away.
type names struct {
	lookup  func(ctx context.Context, name string) ([]netip.Addr, error)
	changed func(answers map[string][]netip.Addr) error // called by run; again in the next round after an error
	failed  bool                                        // it returned one last time; only run uses it
	log     *slog.Logger
	again   chan struct{} // a value makes run look at once

	mu     sync.Mutex
	states map[string]control.NameState
}

// newNames returns names that looks nothing up until it runs.
func newNames(list []string, lookup func(context.Context, string) ([]netip.Addr, error), changed func(map[string][]netip.Addr) error, log *slog.Logger) *names {
	n := &names{lookup: lookup, changed: changed, log: log, again: make(chan struct{}, 1), states: map[string]control.NameState{}}
	n.set(list)
	return n
}

// set replaces the names. Those that stay keep their answers.
func (n *names) set(list []string) {
	n.mu.Lock()
	old := n.states
	n.states = make(map[string]control.NameState, len(list))
	for _, name := range list {
		s, ok := old[name]
		if !ok {
			s = control.NameState{Name: name, Error: notLookedUp}
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
	select {
	case n.again <- struct{}{}:
	default:
	}
}

// run keeps the answers up to date until ctx ends.
func (n *names) run(ctx context.Context) error {
	hurry := namesHurry
	for {
		wait := namesEvery
		if !n.round(ctx) {
			wait, hurry = hurry, min(2*hurry, namesEvery)
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-n.again:
			hurry = namesHurry
		case <-t.C:
		}
		t.Stop()
	}
}

// round looks all names up once. It reports whether all have an address.
func (n *names) round(ctx context.Context) (complete bool) {
	var g errgroup.Group
	g.SetLimit(nameLookups)
	var mu sync.Mutex
	changed := false
	for _, s := range n.list() {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, nameTimeout)
			defer cancel()
			found, err := n.lookup(ctx, s.Name)
			if errors.Is(ctx.Err(), context.Canceled) {
				return nil // we are stopping: says nothing about the name
			}
			if err == nil {
				found, err = usableAnswer(found)
			}
			if n.record(s.Name, found, err, time.Now()) {
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
	return !slices.ContainsFunc(n.list(), func(s control.NameState) bool { return len(s.Addresses) == 0 })
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
func (n *names) record(name string, found []netip.Addr, err error, now time.Time) (changed bool) {
	n.mu.Lock()
	old, wanted := n.states[name]
	s := old
	if err == nil {
		changed = !slices.Equal(old.Addresses, found)
		s.Addresses, s.LastAnswer, s.Error = found, now, ""
	} else {
		s.Error = err.Error()
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
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b control.NameState) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// nameServers asks those who know a name: the name servers of the network whose
// domain it lies in, else this host's resolver. There is no second choice: what a
// network says of its own domain must not depend on whether its servers answer.
type nameServers struct {
	networks func() []ztnode.Network
	dial     func(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error) // udp or tcp, through the overlay
	host     func(ctx context.Context, name string) ([]netip.Addr, error)                       // nil = this host's resolver
}

func (s nameServers) lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	servers := s.of(name)
	switch {
	case len(servers) > 0:
	case s.host != nil:
		return s.host(ctx, name)
	default:
		return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
	}
	var errs []error
	for i, server := range servers {
		found, err := s.ask(ctx, netip.AddrPortFrom(server, dnsPort), name, len(servers)-i)
		if err == nil {
			return found, nil
		}
		errs = append(errs, fmt.Errorf("name server %s: %w", server, err))
		if no, ok := errors.AsType[*net.DNSError](err); ok && no.IsNotFound || ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

// of returns the name servers of the joined network with the longest domain that a
// name lies in.
func (s nameServers) of(name string) []netip.Addr {
	var servers []netip.Addr
	longest := 0
	for _, n := range s.networks() {
		domain := strings.ToLower(strings.Trim(n.DNSDomain, "."))
		inside := name == domain || strings.HasSuffix(name, "."+domain)
		if n.Status == ztnode.StatusOK && domain != "" && len(n.DNSServers) > 0 && inside && len(domain) > longest {
			servers, longest = n.DNSServers, len(domain)
		}
	}
	return servers
}

// ask asks one server, for its share of the time that is left.
func (s nameServers) ask(ctx context.Context, server netip.AddrPort, name string, left int) ([]netip.Addr, error) {
	if end, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(end)/time.Duration(left))
		defer cancel()
	}
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return s.dial(ctx, strings.TrimRight(network, "46"), server)
	}}
	return r.LookupNetIP(ctx, "ip", name+".") // the dot keeps this host's search domains out
}
