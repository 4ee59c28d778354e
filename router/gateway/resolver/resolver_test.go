package resolver

import (
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"ztgate/internal/testwait"
)

const patience = 10 * time.Second

// nameServer is one that others run. What it is asked by UDP goes to answer, which
// returns the datagrams that are sent back; over TCP it is asked for one.
type nameServer struct {
	at     netip.AddrPort
	answer func(m *dns.Msg, tcp bool) []*dns.Msg

	mu    sync.Mutex
	asked []*dns.Msg
	ports map[uint16]bool
}

func newNameServer(t testing.TB, answer func(m *dns.Msg, tcp bool) []*dns.Msg) *nameServer {
	t.Helper()
	s := &nameServer{answer: answer, ports: map[uint16]bool{}}
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	s.at = l.Addr().(*net.TCPAddr).AddrPort()
	u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(s.at))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = u.Close(), l.Close() })
	go func() {
		b := make([]byte, 4096)
		for {
			n, from, err := u.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			for _, m := range s.take(b[:n], from.Port(), false) {
				out, _ := m.Pack()
				_, _ = u.WriteToUDPAddrPort(out, from)
			}
		}
	}()
	go func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, err := readStream(c, make([]byte, 4096))
				if err != nil {
					return
				}
				for _, m := range s.take(b, 0, true) {
					out, _ := m.Pack()
					_ = writeStream(c, out)
				}
			}()
		}
	}()
	return s
}

func (s *nameServer) take(b []byte, port uint16, tcp bool) []*dns.Msg {
	m := new(dns.Msg)
	if m.Unpack(b) != nil {
		return nil
	}
	s.mu.Lock()
	s.asked = append(s.asked, m)
	if port != 0 {
		s.ports[port] = true
	}
	s.mu.Unlock()
	return s.answer(m, tcp)
}

func (s *nameServer) questions() []*dns.Msg {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*dns.Msg(nil), s.asked...)
}

// known answers with an address for A, and with what a name says of itself.
func known(m *dns.Msg, tcp bool) []*dns.Msg {
	r := new(dns.Msg).SetReply(m)
	r.AuthenticatedData, r.Authoritative = true, true
	q := m.Question[0]
	name := dns.CanonicalName(q.Name)
	add := func(text string) {
		rr, err := dns.NewRR(text)
		if err != nil {
			panic(err)
		}
		rr.Header().Name = q.Name
		r.Answer = append(r.Answer, rr)
	}
	switch {
	case strings.HasPrefix(name, "none."):
		r.Rcode = dns.RcodeNameError
	case strings.HasPrefix(name, "silent."):
		return nil
	case strings.HasPrefix(name, "failing."):
		r.Rcode = dns.RcodeServerFailure
	case strings.HasPrefix(name, "metadata."):
		add("x. 60 IN A 169.254.169.254")
	case strings.HasPrefix(name, "hint."):
		add("x. 60 IN HTTPS 1 . ipv4hint=10.1.0.1,169.254.169.254")
	case strings.HasPrefix(name, "alias."): // and about others
		for _, text := range []string{name + " 60 IN CNAME www.elsewhere.example.", "www.elsewhere.example. 60 IN A 10.1.0.9", "bank.example. 60 IN A 10.1.0.8"} {
			rr, _ := dns.NewRR(text)
			r.Answer = append(r.Answer, rr)
		}
		for _, text := range []string{"bank.example. 60 IN NS ns.bank.example.", "ns.bank.example. 60 IN A 10.1.0.7"} {
			rr, _ := dns.NewRR(text)
			r.Ns, r.Extra = append(r.Ns, rr), append(r.Extra, rr)
		}
	case strings.HasPrefix(name, "large."):
		for i := range 150 {
			add(fmt.Sprintf("x. 60 IN A 10.1.0.%d", i))
		}
		if !tcp {
			size := 512
			if opt := m.IsEdns0(); opt != nil {
				size = int(opt.UDPSize())
			}
			r.Truncate(size)
		}
	case strings.HasPrefix(name, "middle."): // fits, but not everywhere
		for i := range 50 {
			add(fmt.Sprintf("x. 60 IN A 10.1.0.%d", i))
		}
	case q.Qtype == dns.TypeA:
		add("x. 60 IN A 10.1.0.1")
	}
	return []*dns.Msg{r}
}

// rig is a resolver that listens on this machine.
type rig struct {
	*Resolver
	at     netip.AddrPort
	office *nameServer // of office.example
	world  *nameServer // of all else
	reg    *prometheus.Registry
	clock  atomic.Int64 // added to the time
}

func unusable(a netip.Addr) bool { return !a.IsLinkLocalUnicast() && !a.IsLoopback() }

func newRig(t testing.TB, s Settings) *rig {
	t.Helper()
	g := &rig{office: newNameServer(t, known), world: newNameServer(t, known), reg: prometheus.NewRegistry()}
	var d net.Dialer
	dial := func(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error) {
		return d.DialContext(ctx, network, server.String())
	}
	now := func() time.Time { return time.Now().Add(time.Duration(g.clock.Load())) }
	g.Resolver = New(Dialers{Overlay: dial, Host: dial}, LimitsFor(1<<20), unusable, g.reg, slog.New(slog.DiscardHandler), now)
	t.Cleanup(g.Close)
	g.SetNames(Names{Zone: labZone(t), Domains: []Domain{
		{Name: "office.example", Network: "8056c2e21c000001", Servers: []netip.AddrPort{g.office.at}},
		{Servers: []netip.AddrPort{g.world.at}},
	}})
	if s.Sources == nil {
		s.Sources = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	}
	g.at = freePort(t)
	s.Listen = []netip.AddrPort{g.at}
	g.Set(s)
	if st := g.State(); st.Listen[0].Error != "" {
		t.Fatal(st)
	}
	return g
}

func freePort(t testing.TB) netip.AddrPort {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// exchange sends a message from an address of this machine; nil = no answer in a while.
func (g *rig) exchange(t testing.TB, network, from string, b []byte) []byte {
	t.Helper()
	d := net.Dialer{Timeout: patience}
	if network == "tcp" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	} else {
		d.LocalAddr = &net.UDPAddr{IP: net.ParseIP(from)}
	}
	c, err := d.Dial(network, g.at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	if network == "tcp" {
		if err := writeStream(c, b); err != nil {
			t.Fatal(err)
		}
		out, err := readStream(c, make([]byte, dns.MaxMsgSize))
		if err != nil {
			return nil
		}
		return out
	}
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
	out := make([]byte, 65535)
	n, err := c.Read(out)
	if err != nil {
		return nil
	}
	return out[:n]
}

func (g *rig) ask(t testing.TB, network string, m *dns.Msg) *dns.Msg {
	t.Helper()
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	out := g.exchange(t, network, "127.0.0.1", b)
	r := new(dns.Msg)
	if err := r.Unpack(out); err != nil {
		t.Fatalf("answer to %v: %x, %v", m.Question, out, err)
	}
	if r.Id != m.Id || !r.Response || !r.RecursionAvailable || len(r.Question) == 1 && r.Question[0] != m.Question[0] {
		t.Errorf("answer %v to %v", r, m)
	}
	return r
}

func (g *rig) counted(network string, x result) float64 {
	var m dto.Metric
	_ = g.count.queries.WithLabelValues(network, string(x)).Write(&m) // doesn't fail
	return m.GetCounter().GetValue()
}

func question(name string, qtype uint16) *dns.Msg { return new(dns.Msg).SetQuestion(name, qtype) }

func TestAnswers(t *testing.T) {
	g := newRig(t, Settings{})
	for _, network := range []string{"udp", "tcp"} {
		for _, tt := range []struct {
			what    string
			m       *dns.Msg
			rcode   int
			answers int
			result  result
		}{
			{"zone", question("db.Office.zt.internal.", dns.TypeA), dns.RcodeSuccess, 2, resultZone},
			{"zone, without recursion", func() *dns.Msg {
				m := question("db.office.zt.internal.", dns.TypeA)
				m.RecursionDesired = false
				return m
			}(), dns.RcodeSuccess, 2, resultZone},
			{"no such name", question("x.office.zt.internal.", dns.TypeA), dns.RcodeNameError, 0, resultZone},
			{"network", question("Web.Office.Example.", dns.TypeA), dns.RcodeSuccess, 1, resultForwarded},
			{"network, no such name", question("none.office.example.", dns.TypeA), dns.RcodeNameError, 0, resultForwarded},
			{"network, no such record", question("web.office.example.", dns.TypeMX), dns.RcodeSuccess, 0, resultForwarded},
			{"network, a failing server", question("failing.office.example.", dns.TypeA), dns.RcodeServerFailure, 0, resultForwarded},
			{"network, an address of nobody", question("metadata.office.example.", dns.TypeA), dns.RcodeServerFailure, 0, resultUnusable},
			{"network, the same for browsers", question("hint.office.example.", dns.TypeHTTPS), dns.RcodeServerFailure, 0, resultUnusable},
			{"world", question("example.com.", dns.TypeA), dns.RcodeSuccess, 1, resultForwarded},
			{"world, its own affair", question("metadata.example.com.", dns.TypeA), dns.RcodeSuccess, 1, resultForwarded},
			{"world, without recursion", func() *dns.Msg { m := question("example.com.", dns.TypeA); m.RecursionDesired = false; return m }(), dns.RcodeRefused, 0, resultNobody},
			{"any", question("db.office.zt.internal.", dns.TypeANY), dns.RcodeRefused, 0, resultKind},
			{"any, forwarded", question("example.com.", dns.TypeANY), dns.RcodeRefused, 0, resultKind},
			{"transfer", question("zt.internal.", dns.TypeAXFR), dns.RcodeRefused, 0, resultKind},
			{"chaos", func() *dns.Msg {
				m := question("version.bind.", dns.TypeTXT)
				m.Question[0].Qclass = dns.ClassCHAOS
				return m
			}(), dns.RcodeRefused, 0, resultKind},
			{"update", new(dns.Msg).SetUpdate("zt.internal."), dns.RcodeNotImplemented, 0, resultKind},
			{"notify", new(dns.Msg).SetNotify("zt.internal."), dns.RcodeNotImplemented, 0, resultKind},
			{"two questions", func() *dns.Msg {
				m := question("a.example.", dns.TypeA)
				m.Question = append(m.Question, m.Question[0])
				return m
			}(), dns.RcodeFormatError, 0, resultMalformed},
			{"two OPTs", question("a.example.", dns.TypeA).SetEdns0(1232, false).SetEdns0(1232, false), dns.RcodeFormatError, 0, resultMalformed},
			{"EDNS of the future", func() *dns.Msg {
				m := question("a.example.", dns.TypeA).SetEdns0(1232, false)
				m.IsEdns0().SetVersion(1)
				return m
			}(), dns.RcodeBadVers, 0, resultMalformed},
			{"a cookie that is none", cookie(question("a.example.", dns.TypeA), "0102"), dns.RcodeFormatError, 0, resultMalformed},
		} {
			t.Run(network+"/"+tt.what, func(t *testing.T) {
				before := g.counted(network, tt.result)
				r := g.ask(t, network, tt.m)
				if r.Rcode != tt.rcode || len(r.Answer) != tt.answers || r.AuthenticatedData {
					t.Errorf("%v", r)
				}
				for _, rr := range r.Answer {
					if rr.Header().Name != tt.m.Question[0].Name {
						t.Errorf("the answer is about %s, want %s", rr.Header().Name, tt.m.Question[0].Name)
					}
				}
				if (r.IsEdns0() != nil) != (tt.m.IsEdns0() != nil && tt.rcode != dns.RcodeFormatError) && tt.what != "two OPTs" && tt.what != "a cookie that is none" {
					t.Errorf("EDNS in the answer: %v", r)
				}
				if got := g.counted(network, tt.result) - before; got != 1 {
					t.Errorf("counted %v times as %s", got, tt.result)
				}
			})
		}
	}
}

// Of names of others a network's servers say only where their own aliases lead, and that isn't
// kept.
func TestAnswersAboutOthers(t *testing.T) {
	g := newRig(t, Settings{})
	r := g.ask(t, "udp", question("alias.office.example.", dns.TypeA))
	if len(r.Answer) != 2 || len(r.Ns) > 0 || len(r.Extra) > 0 || r.Answer[0].Header().Ttl != 60 || r.Answer[1].Header().Name != "www.elsewhere.example." || r.Answer[1].Header().Ttl != 0 {
		t.Errorf("%v", r)
	}
	if r = g.ask(t, "udp", question("alias.example.com.", dns.TypeA)); len(r.Answer) != 3 || r.Answer[1].Header().Ttl != 60 {
		t.Errorf("of this host's servers: %v", r)
	}
}

// cookie adds one to a question.
func cookie(m *dns.Msg, text string) *dns.Msg {
	m.SetEdns0(4096, false)
	m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: text})
	return m
}

// TestSizes: what an answer by UDP may have, and that it all comes by TCP.
func TestSizes(t *testing.T) {
	g := newRig(t, Settings{})
	const client = "0102030405060708"
	r := g.ask(t, "udp", cookie(question("web.office.example.", dns.TypeA), client))
	given := r.IsEdns0().Option[0].(*dns.EDNS0_COOKIE).Cookie
	if !strings.HasPrefix(given, client) || len(given) != 2*(clientCookie+serverCookie) {
		t.Fatalf("cookie %q", given)
	}
	sized := func(name string, size uint16) *dns.Msg { return question(name, dns.TypeA).SetEdns0(size, false) }
	forged := []byte(given)
	forged[len(forged)-1] = "10"[min(forged[len(forged)-1]-'0', 1)] // another digit
	proven := cookie(question("middle.office.example.", dns.TypeA), given)
	small := cookie(question("middle.office.example.", dns.TypeA), given)
	small.IsEdns0().SetUDPSize(600)
	for _, tt := range []struct {
		what string
		m    *dns.Msg
		most int
		cut  bool
	}{
		{"no EDNS", question("middle.office.example.", dns.TypeA), 512, true},
		{"EDNS alone proves nothing", sized("middle.office.example.", 4096), 512, true},
		{"a first cookie", cookie(question("middle.office.example.", dns.TypeA), client), 512, true},
		{"our cookie", proven, 1232, false},
		{"our cookie, small buffers", small, 600, true},
		{"another's cookie", cookie(question("middle.office.example.", dns.TypeA), string(forged)), 512, true},
		{"our cookie, too large", cookie(question("large.office.example.", dns.TypeA), given), 1232, true},
	} {
		t.Run(tt.what, func(t *testing.T) {
			b, _ := tt.m.Pack()
			out := g.exchange(t, "udp", "127.0.0.1", b)
			r := new(dns.Msg)
			if err := r.Unpack(out); err != nil || len(out) > tt.most || r.Truncated != tt.cut {
				t.Errorf("%d bytes, cut %v, %v", len(out), r.Truncated, err)
			}
			want := 50
			if strings.HasPrefix(tt.m.Question[0].Name, "large") {
				want = 150
			}
			if r := g.ask(t, "tcp", tt.m); len(r.Answer) != want || r.Truncated {
				t.Errorf("by TCP: %d answers, cut %v", len(r.Answer), r.Truncated)
			}
		})
	}
	t.Run("from elsewhere", func(t *testing.T) {
		b, _ := cookie(question("middle.office.example.", dns.TypeA), given).Pack()
		if out := g.exchange(t, "udp", "127.0.0.9", b); len(out) > 512 {
			t.Errorf("%d bytes for another's cookie", len(out))
		}
	})
	t.Run("later", func(t *testing.T) {
		g.clock.Add(int64(cookieLife + time.Second))
		b, _ := cookie(question("middle.office.example.", dns.TypeA), given).Pack()
		if out := g.exchange(t, "udp", "127.0.0.1", b); len(out) > 512 {
			t.Errorf("%d bytes for an old cookie", len(out))
		}
	})
}

// TestNobodyElse: who isn't in vpc.sources hears nothing.
func TestNobodyElse(t *testing.T) {
	g := newRig(t, Settings{Sources: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}})
	b, _ := question("db.office.zt.internal.", dns.TypeA).Pack()
	c, err := net.DialUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2)}, net.UDPAddrFromAddrPort(g.at))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = c.Write(b)
	testwait.For(t, patience, "the count", func() bool { return g.counted("udp", resultSource) == 1 })
	if g.ask(t, "udp", question("db.office.zt.internal.", dns.TypeA)).Rcode != dns.RcodeSuccess { // behind it in the same queue
		t.Error("a client isn't answered")
	}
	_ = c.SetReadDeadline(time.Now())
	if n, err := c.Read(make([]byte, 512)); err == nil {
		t.Errorf("a stranger got %d bytes", n)
	}
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	if s, err := d.Dial("tcp", g.at.String()); err == nil {
		defer s.Close()
		_ = s.SetDeadline(time.Now().Add(patience))
		_ = writeStream(s, b)
		if out, err := readStream(s, make([]byte, 512)); err == nil {
			t.Errorf("a stranger got %x", out)
		}
	}
	if n := g.counted("tcp", resultSource); n != 1 {
		t.Errorf("%v strangers counted", n)
	}
}

// TestNoAnswerToAnswers: two servers never talk for ever.
func TestNoAnswerToAnswers(t *testing.T) {
	g := newRig(t, Settings{})
	m := question("db.office.zt.internal.", dns.TypeA)
	m.Response = true
	b, _ := m.Pack()
	from := netip.MustParseAddr("127.0.0.1")
	for _, b := range [][]byte{b, nil, b[:11], {0, 1, 0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0}} {
		if q, answer := g.admit(b, from, false); q != nil || answer != nil {
			t.Errorf("%x is answered with %x", b, answer)
		}
	}
}

// TestRate: beyond its rate a client gets nothing, or no more than it sent; whoever
// fakes its address takes nothing from its connections.
func TestRate(t *testing.T) {
	g := newRig(t, Settings{Rate: 10})
	from, other := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2")
	stopped := time.Now()
	g.now = func() time.Time { return stopped }
	b, _ := question("db.office.zt.internal.", dns.TypeA).SetEdns0(4096, false).Pack()
	answered, told := 0, 0
	for range 1000 {
		q, answer := g.admit(b, from, false)
		switch {
		case q != nil:
			answered++
		case answer != nil:
			told++
			r := new(dns.Msg)
			if err := r.Unpack(answer); err != nil || !r.Truncated || len(r.Answer) != 0 || len(answer) > len(b) {
				t.Fatalf("%v, %d bytes for %d, %v", r, len(answer), len(b), err)
			}
		}
	}
	if answered != 20 || told != 490 {
		t.Errorf("%d answered, %d told to come by TCP", answered, told)
	}
	if q, _ := g.admit(b, from, true); q == nil {
		t.Error("its connections have no share of their own")
	}
	if q, _ := g.admit(b, other, false); q == nil {
		t.Error("another client is refused")
	}
	stopped = stopped.Add(time.Second)
	if q, _ := g.admit(b, from, false); q == nil {
		t.Error("a second later it is still refused")
	}
}

// TestShares: a client whose questions nobody answers can't keep others from asking.
func TestShares(t *testing.T) {
	g := newRig(t, Settings{Rate: 1000000})
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(g.at))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b, _ := question("silent.example.com.", dns.TypeA).Pack()
	for range eachForwarded + 10 {
		_, _ = c.Write(b)
	}
	testwait.For(t, patience, "the count", func() bool { return g.counted("udp", resultShare) == 10 })
	if n := g.State().Forwarded; n != eachForwarded {
		t.Errorf("%d are forwarded", n)
	}
	b, _ = question("example.com.", dns.TypeA).Pack()
	if out := g.exchange(t, "udp", "127.0.0.9", b); out == nil {
		t.Error("another client isn't answered")
	}
}

// TestProvenPlaces: whoever fakes all addresses of the VPC leaves places for those that
// connect, and tells nobody more than he said.
func TestProvenPlaces(t *testing.T) {
	g := newRig(t, Settings{Rate: 1000000})
	for i := range MaxForwarded - MaxForwarded/provenShare {
		g.flights.take(clientOf(netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)})), MaxForwarded, func() { t.Error("somebody's only one gave way") })
	}
	b, _ := question("example.com.", dns.TypeA).SetEdns0(4096, true).Pack()
	out := g.exchange(t, "udp", "127.0.0.9", b)
	r := new(dns.Msg)
	if err := r.Unpack(out); err != nil || !r.Truncated || len(r.Answer) != 0 || len(out) > len(b) {
		t.Errorf("%v, %d bytes for %d, %v", r, len(out), len(b), err)
	}
	if r := g.ask(t, "tcp", question("example.com.", dns.TypeA)); len(r.Answer) != 1 {
		t.Errorf("by TCP: %v", r)
	}
}

func TestPlaces(t *testing.T) {
	const all, each = 64, 16
	p := newPlaces(all, each)
	client := func(i int) netip.Prefix { return clientOf(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})) }
	var gone []int
	take := func(i, n int) (got int) {
		for range n {
			if p.take(client(i), all, func() { gone = append(gone, i) }) != nil {
				got++
			}
		}
		return got
	}
	for i := range all / each {
		if n := take(i, each+5); n != each || len(gone) != 0 {
			t.Fatalf("client %d got %d, %d are gone", i, n, len(gone))
		}
	}
	// All are taken: newcomers get as much as the others keep.
	if n := take(100, each); n < all/(all/each+1) || p.taken() != all {
		t.Errorf("a newcomer got %d, %d are taken", n, p.taken())
	}
	if len(gone) == 0 {
		t.Error("nobody gave way")
	}
	p = newPlaces(all, each)
	for i := range all {
		take(i, 1)
	}
	gone = nil
	if take(200, 1) != 0 || len(gone) != 0 {
		t.Error("somebody's only one gave way")
	}
	x := newPlaces(1, 1).take(client(1), 1, nil)
	if q := newPlaces(1, 1); q.give(x) {
		t.Error("a place was given back that wasn't there")
	}
	for a, want := range map[string]string{"::ffff:10.0.0.1": "10.0.0.1/32", "fd00::1:2:3:4": "fd00::/64"} {
		if got := clientOf(netip.MustParseAddr(a)); got.String() != want {
			t.Errorf("%s is client %s", a, got)
		}
	}
}

// TestConnections: connections are few, and a client can't have all.
func TestConnections(t *testing.T) {
	g := newRig(t, Settings{})
	b, _ := question("db.office.zt.internal.", dns.TypeA).Pack()
	dial := func(from string) net.Conn {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: patience}
		c, err := d.Dial("tcp", g.at.String())
		if err != nil {
			return nil
		}
		t.Cleanup(func() { _ = c.Close() })
		_ = c.SetDeadline(time.Now().Add(patience))
		return c
	}
	for range eachConnected + 5 {
		dial("127.0.0.1")
	}
	testwait.For(t, patience, "the count", func() bool { return g.counted("tcp", resultShare) == 5 })
	for i := range MaxConnections - eachConnected { // each of others has one
		dial(fmt.Sprintf("127.0.1.%d", i+1))
	}
	testwait.For(t, patience, "all places", func() bool { return g.streams.taken() == MaxConnections })
	if c := dial("127.0.2.1"); c == nil || writeStream(c, b) != nil {
		t.Error("another client can't connect")
	} else if _, err := readStream(c, make([]byte, 512)); err != nil {
		t.Error(err)
	}
	// One connection carries many questions, and a message that is too large ends it.
	g2 := newRig(t, Settings{})
	c, err := net.Dial("tcp", g2.at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	for range 5 {
		if err := writeStream(c, b); err != nil {
			t.Fatal(err)
		}
	}
	for range 5 {
		if _, err := readStream(c, make([]byte, 512)); err != nil {
			t.Fatal(err)
		}
	}
	_, _ = c.Write([]byte{0xff, 0xff})
	if _, err := readStream(c, make([]byte, 512)); err == nil {
		t.Error("a message of 65535 bytes is waited for")
	}
}

// TestListen: an address that can't be used is said, and used as soon as it can be.
func TestListen(t *testing.T) {
	g := newRig(t, Settings{})
	busy, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	at := busy.Addr().(*net.TCPAddr).AddrPort()
	elsewhere := netip.MustParseAddrPort("192.0.2.1:53")
	s := *g.settings.Load()
	s.Listen = []netip.AddrPort{at, elsewhere}
	g.Set(s)
	st := g.State()
	if len(st.Listen) != 2 || !strings.Contains(st.Listen[0].Error, "another program") || !strings.Contains(st.Listen[1].Error, "this host doesn't have the address") {
		t.Fatalf("%+v", st.Listen)
	}
	if c, err := net.DialTimeout("tcp", g.at.String(), patience); err == nil {
		_ = c.Close()
		t.Error("still listens at the address of before")
	}
	_ = busy.Close()
	g.Retry()
	if st := g.State(); st.Listen[0].Error != "" || st.Listen[1].Error == "" {
		t.Errorf("%+v", st.Listen)
	}
	g.at = at
	g.ask(t, "udp", question("db.office.zt.internal.", dns.TypeA))
}

// TestNobodyAsked: without name servers others' names are refused, and the zone isn't.
func TestNobodyAsked(t *testing.T) {
	g := newRig(t, Settings{})
	g.SetNames(Names{Zone: labZone(t), Domains: []Domain{{Name: "down.example", Network: "1"}}})
	for name, want := range map[string]int{"example.com.": dns.RcodeRefused, "a.down.example.": dns.RcodeServerFailure, "db.office.zt.internal.": dns.RcodeSuccess} {
		if r := g.ask(t, "udp", question(name, dns.TypeA)); r.Rcode != want {
			t.Errorf("%s: %v", name, r)
		}
	}
	if len(g.office.questions())+len(g.world.questions()) != 0 {
		t.Error("somebody was asked")
	}
	if _, err := g.Find(t.Context(), "example.com", dns.TypeA); err != ErrNobody {
		t.Error(err)
	}
}

func TestFind(t *testing.T) {
	g := newRig(t, Settings{})
	for name, want := range map[string]string{"db.office.zt.internal": "", "web.office.example": "8056c2e21c000001", "example.com": "-"} {
		f, err := g.Find(t.Context(), name, dns.TypeA)
		if err != nil || len(f.Message.Answer) == 0 || (f.From == nil) != (want == "") || f.From != nil && f.From.Network != strings.Trim(want, "-") {
			t.Errorf("%s: %+v, %v", name, f, err)
		}
	}
	if f, err := g.Find(t.Context(), "large.example.com", dns.TypeA); err != nil || len(f.Message.Answer) != 150 {
		t.Error(err)
	}
}

// TestLongestDomain: who knows more of a name is asked, and the zone before all.
func TestLongestDomain(t *testing.T) {
	n := names{}
	r := New(Dialers{}, LimitsFor(0), nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler), time.Now)
	server := []netip.AddrPort{netip.MustParseAddrPort("10.0.0.53:53")}
	r.SetNames(Names{Domains: []Domain{{Servers: server}, {Name: "example", Servers: server}, {Name: "office.example", Reverse: []string{"0.10.in-addr.arpa"}, Servers: server}}})
	n = *r.names.Load()
	for name, want := range map[string]string{"a.office.example.": "office.example", "office.example.": "office.example", "backoffice.example.": "example", "com.": "", "1.0.0.10.in-addr.arpa.": "office.example", "1.0.20.10.in-addr.arpa.": ""} {
		if p := n.of(name); p == nil || p.Name != want {
			t.Errorf("%s: %+v", name, p)
		}
	}
	n.of("office.example.").note(0, errNoAnswer)
	r.SetNames(Names{Domains: []Domain{{Name: "office.example", Reverse: []string{"0.10.in-addr.arpa"}, Servers: server}}})
	if st := r.State(); len(st.Domains) != 1 || st.Domains[0].Unanswered != 1 {
		t.Errorf("a domain that stays forgets: %+v", st)
	}
}

func FuzzQuery(f *testing.F) {
	g := newRig(f, Settings{Rate: 1000000})
	g.Close()
	from := netip.MustParseAddr("127.0.0.1")
	for _, m := range []*dns.Msg{question("db.office.zt.internal.", dns.TypeA), question("10.0.0.10.in-addr.arpa.", dns.TypePTR), question("x.example.", dns.TypeANY),
		cookie(question("zt.internal.", dns.TypeNS), "0102030405060708"), new(dns.Msg).SetUpdate("zt.internal.")} {
		b, _ := m.Pack()
		f.Add(b, true)
		f.Add(b, false)
	}
	raw, _ := hex.DecodeString("000001000001000000000000c00c00010001")
	f.Add(raw, false)
	f.Fuzz(func(t *testing.T, b []byte, tcp bool) {
		if len(b) > maxRequest+1 {
			return
		}
		q, answer := g.admit(b, from, tcp)
		if q != nil {
			answer, _ = g.local(q)
		}
		if answer == nil {
			return
		}
		if len(answer) < headerSize || !tcp && len(answer) > udpSize || answer[2]&0x80 == 0 || answer[0] != b[0] || answer[1] != b[1] {
			t.Errorf("%x is answered with %x", b, answer)
		}
		if q != nil && !q.proven && len(answer) > unprovenSize {
			t.Errorf("%d bytes for an address that isn't proven", len(answer))
		}
		m := new(dns.Msg)
		if err := m.Unpack(answer); err != nil {
			t.Errorf("%x is answered with %x: %v", b, answer, err)
		}
	})
}
