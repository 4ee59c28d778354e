package gateway

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/dns/dnsmessage"

	"ztgate/router/control"
	"ztgate/zerotier/ztnode"
)

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// nameRig runs names in a bubble.
type nameRig struct {
	*names

	lock  sync.Mutex
	known map[string][]netip.Addr // no entry = the lookup fails
	seen  []map[string][]netip.Addr
	asked int           // lookups of the first name
	ttl   time.Duration // of answers
}

// answer sets what lookups of a name find from now on, nothing = they fail.
func (r *nameRig) answer(name string, list ...string) {
	r.lock.Lock()
	defer r.lock.Unlock()
	delete(r.known, name)
	if len(list) > 0 {
		r.known[name] = addrs(list...)
	}
}

// changes returns what was reported until now.
func (r *nameRig) changes() []map[string][]netip.Addr {
	r.lock.Lock()
	defer r.lock.Unlock()
	return slices.Clone(r.seen)
}

func (r *nameRig) lookups() int {
	r.lock.Lock()
	defer r.lock.Unlock()
	return r.asked
}

func runNames(t *testing.T, list []string, answers map[string][]netip.Addr) *nameRig {
	t.Helper()
	r := &nameRig{known: answers}
	lookup := func(_ context.Context, name string) ([]netip.Addr, time.Duration, error) {
		r.lock.Lock()
		defer r.lock.Unlock()
		if name == list[0] {
			r.asked++
		}
		if a, ok := r.known[name]; ok {
			return a, r.ttl, nil
		}
		return nil, 0, errors.New("no answer")
	}
	r.names = newNames(list, lookup, func(a map[string][]netip.Addr) error {
		r.lock.Lock()
		defer r.lock.Unlock()
		r.seen = append(r.seen, a)
		return nil
	}, slog.New(slog.DiscardHandler))
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	synctest.Wait()
	return r
}

func (r *nameRig) state(name string) control.NameState {
	list := r.list()
	return list[slices.IndexFunc(list, func(s control.NameState) bool { return s.Name == name })]
}

func (r *nameRig) pass(d time.Duration) {
	time.Sleep(d) // of the bubble's clock
	synctest.Wait()
}

var byAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func TestNamesFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runNames(t, []string{"a", "b"}, map[string][]netip.Addr{"a": addrs("10.0.0.2", "10.0.0.1", "10.0.0.2"), "b": addrs("fd00::1")})
		want := map[string][]netip.Addr{"a": addrs("10.0.0.1", "10.0.0.2"), "b": addrs("fd00::1")}
		if len(r.changes()) != 1 || !cmp.Equal(want, r.changes()[0], byAddr) {
			t.Fatalf("first answers %v, want %v once", r.changes(), want)
		}
		r.answer("a", "10.0.0.1", "10.0.0.2")
		r.pass(namesEvery)
		if len(r.changes()) != 1 {
			t.Errorf("another order is no change, but there were %d", len(r.changes()))
		}
		r.answer("a", "10.0.0.3")
		r.pass(namesEvery - time.Second)
		if len(r.changes()) != 1 {
			t.Error("looked up too early")
		}
		r.pass(time.Second)
		if len(r.changes()) != 2 || !slices.Equal(r.changes()[1]["a"], addrs("10.0.0.3")) || len(r.changes()[1]["b"]) != 1 {
			t.Errorf("after a change: %v", r.changes())
		}
	})
}

func TestNamesKeepAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runNames(t, []string{"a"}, map[string][]netip.Addr{"a": addrs("10.0.0.1")})
		answered := time.Now()
		r.answer("a")
		r.pass(10 * namesEvery)
		s := r.state("a")
		if !slices.Equal(s.Addresses, addrs("10.0.0.1")) || s.Error != "no answer" || !s.LastAnswer.Equal(answered) || len(r.changes()) != 1 {
			t.Errorf("after failed lookups: %+v, %d changes", s, len(r.changes()))
		}
		r.answer("a", "10.0.0.1")
		r.pass(namesEvery)
		if s := r.state("a"); s.Error != "" || s.LastAnswer.Equal(answered) || len(r.changes()) != 1 {
			t.Errorf("after an answer: %+v, %d changes", s, len(r.changes()))
		}
	})
}

// TestNamesHurry looks up a name without an answer more often, but not for ever.
func TestNamesHurry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runNames(t, []string{"a"}, map[string][]netip.Addr{})
		if s := r.state("a"); s.Error != "no answer" || len(r.changes()) != 0 {
			t.Errorf("%+v", s)
		}
		before := r.lookups()
		r.pass(3*time.Second + time.Millisecond) // after 1 s and 2 s more
		if got := r.lookups() - before; got != 2 {
			t.Errorf("%d lookups in the first 3 s, want 2", got)
		}
		r.pass(10 * time.Minute)
		before = r.lookups()
		r.pass(10 * namesEvery)
		if got := r.lookups() - before; got != 10 {
			t.Errorf("%d lookups in %v, want 10", got, 10*namesEvery)
		}
		r.answer("a", "10.0.0.1")
		r.retry()
		synctest.Wait()
		if len(r.changes()) != 1 {
			t.Error("retry didn't look at once")
		}
	})
}

// TestNamesHold looks a name up when its answer holds no longer, neither all the time nor
// never.
func TestNamesHold(t *testing.T) {
	for ttl, every := range map[time.Duration]time.Duration{
		1: namesLeast, time.Second: namesLeast, time.Minute: time.Minute, 24 * time.Hour: namesMost, 0: namesEvery,
	} {
		synctest.Test(t, func(t *testing.T) {
			r := runNames(t, []string{"b", "a"}, map[string][]netip.Addr{"a": addrs("10.0.0.1"), "b": addrs("10.0.0.2")})
			r.lock.Lock()
			r.ttl = ttl
			r.lock.Unlock()
			r.retry()
			synctest.Wait()
			before := r.lookups()
			r.pass(10*every - time.Nanosecond)
			if got := r.lookups() - before; got != 9 {
				t.Errorf("an answer for %v: %d lookups in %v, want 9", ttl, got, 10*every)
			}
		})
	}
}

// TestNamesSilent: health says that last addresses are in use, not at the first failure,
// and always in the same words.
func TestNamesSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runNames(t, []string{"a", "b"}, map[string][]netip.Addr{"a": addrs("10.0.0.1"), "b": addrs("10.0.0.2")})
		if (*names)(nil).checks() != nil || !r.checks()[0].OK {
			t.Errorf("%+v", r.checks())
		}
		since := clockTime(time.Now())
		r.answer("a")
		r.pass((namesFailed - 1) * namesEvery)
		if !r.checks()[0].OK {
			t.Errorf("after %d failures: %+v", namesFailed-1, r.checks())
		}
		want := "the name a hasn't been answered since " + since + ": its last addresses stay in use"
		for range 2 {
			r.pass(namesEvery)
			if c := r.checks()[0]; c.OK || c.Severity != control.Degraded || c.Reason != want {
				t.Errorf("%+v, want %q", c, want)
			}
		}
		r.answer("a", "10.0.0.1")
		r.pass(namesEvery)
		if !r.checks()[0].OK {
			t.Errorf("after an answer: %+v", r.checks())
		}
	})
}

// TestNamesGone: a member that its controller, which is this gateway, doesn't let in any more
// takes its addresses with it.
func TestNamesGone(t *testing.T) {
	n := newNames([]string{"a"}, nil, nil, slog.New(slog.DiscardHandler))
	now := time.Now()
	if !n.record("a", addrs("10.0.0.1"), time.Minute, nil, now) || n.record("a", nil, 0, errors.New("silence"), now) || len(n.answers()["a"]) != 1 {
		t.Errorf("%+v", n.list())
	}
	if !n.record("a", nil, 0, errGone, now) || len(n.answers()) != 0 || n.list()[0].Error != errGone.Error() {
		t.Errorf("%+v", n.list())
	}
	if n.record("a", nil, 0, errGone, now) {
		t.Error("gone twice")
	}
}

func TestNamesSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runNames(t, []string{"a", "b"}, map[string][]netip.Addr{"a": addrs("10.0.0.1"), "b": addrs("10.0.0.2"), "c": addrs("10.0.0.3")})
		r.set([]string{"b", "c"})
		if s := r.state("b"); len(s.Addresses) != 1 {
			t.Errorf("a name that stays lost its answer: %+v", s)
		}
		synctest.Wait()
		want := map[string][]netip.Addr{"b": addrs("10.0.0.2"), "c": addrs("10.0.0.3")}
		if got := r.changes(); len(got) != 2 || !cmp.Equal(want, got[1], byAddr) {
			t.Errorf("answers %v, want %v", got, want)
		}
	})
}

// TestNamesUnusable takes no answer that stands for this host or a metadata service.
func TestNamesUnusable(t *testing.T) {
	for _, tt := range []struct {
		found []netip.Addr
		want  []netip.Addr
		err   string
	}{
		{addrs("127.0.0.1"), nil, "loopback addresses, which are never forwarded"},
		{addrs("0.0.0.0", "::"), nil, "is not used"},
		{addrs("::ffff:169.254.169.254"), nil, "the answer 169.254.169.254 is not used"},
		{addrs("fd00:ec2::254"), nil, "metadata service"},
		{addrs("64:ff9b::a9fe:a9fe"), nil, "metadata service"},
		{addrs("64:ff9b::7f00:1"), nil, "loopback addresses, which are never forwarded"},
		{nil, nil, "has no address"},
		{addrs("224.0.0.1", "::ffff:10.0.0.1"), addrs("10.0.0.1"), ""},
	} {
		got, err := usableAnswer(tt.found)
		if !slices.Equal(got, tt.want) || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%v: %v, %v, want %v, %q", tt.found, got, err, tt.want, tt.err)
		}
	}
	var many []netip.Addr
	for a := netip.MustParseAddr("10.0.0.1"); len(many) < 1000; a = a.Next() {
		many = append(many, a)
	}
	if got, err := usableAnswer(many); len(got) != maxAddresses || err != nil {
		t.Errorf("%d addresses of a huge answer, %v", len(got), err)
	}
}

// TestNamesLimits proves that a few slow lookups run at a time, and that each ends.
func TestNamesLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		now, most := 0, 0
		lookup := func(ctx context.Context, _ string) ([]netip.Addr, time.Duration, error) {
			mu.Lock()
			now++
			most = max(most, now)
			mu.Unlock()
			<-ctx.Done()
			mu.Lock()
			now--
			mu.Unlock()
			return nil, 0, ctx.Err()
		}
		n := newNames([]string{"a", "b", "c", "d", "e", "f"}, lookup, nil, slog.New(slog.DiscardHandler))
		began := time.Now()
		if wait := n.round(t.Context()); wait != 0 { // the first ones are due again
			t.Errorf("waits %v", wait)
		}
		if took := time.Since(began); took != 2*nameTimeout || most != nameLookups {
			t.Errorf("took %v with %d at a time, want %v and %d", took, most, 2*nameTimeout, nameLookups)
		}
		for _, s := range n.list() {
			if s.Error != context.DeadlineExceeded.Error() {
				t.Errorf("%+v", s)
			}
		}
		if len(n.answers()) != 0 {
			t.Errorf("answers %v", n.answers())
		}
	})
}

// TestNamesStop doesn't blame a name for the end of the process.
func TestNamesStop(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	n := newNames([]string{"a"}, func(ctx context.Context, _ string) ([]netip.Addr, time.Duration, error) {
		stop()
		return nil, 0, ctx.Err()
	}, nil, slog.New(slog.DiscardHandler))
	if err := n.run(ctx); err != nil {
		t.Fatal(err)
	}
	if s := n.list()[0]; s.Error != notLookedUp {
		t.Errorf("%+v", s)
	}
	if (*names)(nil).list() != nil {
		t.Error("no names have states")
	}
}

func TestNamesShown(t *testing.T) {
	var b strings.Builder
	st := control.Status{Names: []control.NameState{{Name: "db<office", Addresses: addrs("10.0.0.1", "fd00::1"), LastAnswer: time.Unix(0, 0), Error: "no answer"}}}
	if err := statusPage.Execute(&b, st); err != nil {
		t.Fatal(err)
	}
	if want := "<td>db&lt;office<td>10.0.0.1, fd00::1<td>1970-01-01 00:00:00 UTC<td>no answer"; !strings.Contains(b.String(), want) {
		t.Errorf("the page lacks %q:\n%s", want, b.String())
	}
}

// answerDNS answers questions, as a name server does that knows the given addresses.
func answerDNS(t *testing.T, network string, c net.Conn, known map[string][]netip.Addr) {
	defer c.Close()
	for {
		b := make([]byte, 1500)
		n, err := c.Read(b)
		if err != nil {
			return
		}
		if b = b[:n]; network == "tcp" {
			b = b[2:]
		}
		var m dnsmessage.Message
		if err := m.Unpack(b); err != nil {
			t.Error(err)
			return
		}
		q := m.Questions[0]
		list, ok := known[strings.ToLower(q.Name.String())]
		m.Header = dnsmessage.Header{ID: m.ID, Response: true, Authoritative: true, RecursionAvailable: true}
		m.Additionals = nil
		if !ok {
			m.RCode = dnsmessage.RCodeNameError
		}
		for _, a := range list {
			h := dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 60}
			switch {
			case a.Is4() && q.Type == dnsmessage.TypeA:
				m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: a.As4()}})
			case a.Is6() && q.Type == dnsmessage.TypeAAAA:
				m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
			}
		}
		out, err := m.AppendPack(make([]byte, 2))
		if err != nil {
			t.Error(err)
			return
		}
		if binary.BigEndian.PutUint16(out, uint16(len(out)-2)); network == "udp" {
			out = out[2:]
		}
		if _, err := c.Write(out); err != nil {
			return
		}
	}
}

func TestNameServers(t *testing.T) {
	office := ztnode.Network{ID: 1, Status: ztnode.StatusOK, DNSDomain: "office.example", DNSServers: addrs("10.1.0.53", "10.0.0.99", "10.0.0.53")}
	lab := ztnode.Network{ID: 2, Status: ztnode.StatusOK, DNSDomain: "Lab.Office.Example.", DNSServers: addrs("10.1.0.53")}
	down := ztnode.Network{ID: 3, Status: ztnode.StatusDenied, DNSDomain: "down.example", DNSServers: addrs("10.2.0.53")}
	greedy := ztnode.Network{ID: 4, Status: ztnode.StatusOK, DNSDomain: "db.office.example", DNSServers: addrs("10.0.0.66")}
	all := ztnode.Network{ID: 5, Status: ztnode.StatusOK, DNSDomain: "com", DNSServers: addrs("10.0.0.66")}
	zones := map[string]map[string][]netip.Addr{
		"10.0.0.66:53":  {"db.office.example.": addrs("10.0.0.66"), "shop.com.": addrs("10.0.0.66")},
		"10.0.0.53:53":  {"db.office.example.": addrs("10.0.0.10", "fd00::10"), "office.example.": addrs("10.0.0.1")},
		"10.77.0.53:53": {"db.lab.office.example.": addrs("10.1.0.10")},
	}
	s := nameServers{
		networks: func() []ztnode.Network { return []ztnode.Network{office, lab, down, greedy, all} },
		allowed:  func(id ztnode.NetworkID) bool { return id < 4 },
		dial: func(_ context.Context, network string, server netip.AddrPort) (net.Conn, error) {
			zone := zones[server.String()]
			if zone == nil || network != "udp" && network != "tcp" {
				return nil, errors.New("nobody there")
			}
			ours, theirs := net.Pipe()
			go answerDNS(t, network, theirs, zone)
			return ours, nil
		},
		host: func(_ context.Context, name string) ([]netip.Addr, error) {
			if name == "nobody.com" {
				return nil, errors.New("no such host")
			}
			return addrs("192.0.2.1"), nil
		},
		seen: func(nwid uint64, a netip.Addr) (netip.Addr, bool) { // the second one's is known by an alias
			if nwid == 2 {
				return netip.MustParseAddr("10.77.0.53"), a == lab.DNSServers[0]
			}
			return a, a != netip.MustParseAddr("10.1.0.53")
		},
	}
	for name, want := range map[string]string{
		"db.office.example":      "10.0.0.10 fd00::10", // the first server is down
		"office.example":         "10.0.0.1",
		"db.lab.office.example":  "10.1.0.10",
		"nobody.office.example":  "!no such host",
		"db2.lab.office.example": "!name server 10.1.0.53",
		"backoffice.example":     "192.0.2.1",
		"db.down.example":        "192.0.2.1",
		"db":                     "192.0.2.1",
		"shop.com":               "192.0.2.1", // whatever a network calls its own
		"nobody.com":             "!no such host (the name servers of network 0000000000000005 weren't asked: set allow_dns for it)",
	} {
		ctx, cancel := context.WithTimeout(t.Context(), nameTimeout)
		got, ttl, err := s.lookup(ctx, name)
		cancel()
		text := ""
		for _, a := range got {
			text += " " + a.String()
		}
		if wrong, ok := strings.CutPrefix(want, "!"); ok {
			if err == nil || !strings.Contains(err.Error(), wrong) {
				t.Errorf("%s: %v, %v, want an error that says %q", name, got, err, wrong)
			}
			continue
		}
		slices.SortFunc(got, netip.Addr.Compare)
		if err != nil || strings.TrimSpace(text) != want {
			t.Errorf("%s: %v, %v, want %s", name, got, err, want)
		}
		if fromNetwork := strings.HasPrefix(want, "10."); ttl != time.Minute && fromNetwork || ttl != 0 && !fromNetwork {
			t.Errorf("%s holds for %v", name, ttl)
		}
	}
}
