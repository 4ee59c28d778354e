package resolver

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func dialReal(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, network, server.String())
}

// answerWith answers questions with an address.
func answerWith(m *dns.Msg, a string) *dns.Msg {
	r := new(dns.Msg).SetReply(m)
	r.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.ParseIP(a)}}
	return r
}

func (q Query) at(t *testing.T, s *nameServer) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	m, err := Ask(ctx, dialReal, "udp", s.at, q)
	if err != nil {
		return "", err
	}
	if m.Question[0].Name != q.Name || len(m.Answer) > 0 && m.Answer[0].Header().Name != q.Name {
		t.Errorf("the answer is about %v", m)
	}
	return m.Answer[0].(*dns.A).A.String(), nil
}

// TestForged: what doesn't fit the question in all that is random is no answer.
func TestForged(t *testing.T) {
	const forged, right = "6.6.6.6", "10.1.0.1"
	q := Query{Name: "wWw.office-1.example.", Type: dns.TypeA, EDNS: true}
	for name, spoil := range map[string]func(*dns.Msg){
		"another ID":       func(m *dns.Msg) { m.Id++ },
		"another name":     func(m *dns.Msg) { m.Question[0].Name = "wWw.office-2.example." },
		"another type":     func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA },
		"no question":      func(m *dns.Msg) { m.Question = nil },
		"two questions":    func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) },
		"no answer at all": func(m *dns.Msg) { m.Response = false },
	} {
		t.Run(name, func(t *testing.T) {
			s := newNameServer(t, func(m *dns.Msg, tcp bool) []*dns.Msg {
				bad := answerWith(m, forged)
				spoil(bad)
				return []*dns.Msg{bad, answerWith(m, right)}
			})
			if got, err := q.at(t, s); got != right || err != nil {
				t.Errorf("%s, %v", got, err)
			}
		})
	}
	t.Run("the case of letters", func(t *testing.T) { // asked again where nobody else can answer
		s := newNameServer(t, func(m *dns.Msg, tcp bool) []*dns.Msg {
			if tcp {
				return []*dns.Msg{answerWith(m, right)}
			}
			bad := answerWith(m, forged)
			bad.Question[0].Name = swapCase(bad.Question[0].Name)
			return []*dns.Msg{bad}
		})
		if got, err := q.at(t, s); got != right || err != nil {
			t.Errorf("%s, %v", got, err)
		}
	})
	t.Run("a server that writes small letters", func(t *testing.T) {
		s := newNameServer(t, func(m *dns.Msg, tcp bool) []*dns.Msg {
			m.Question[0].Name = strings.ToLower(m.Question[0].Name)
			return []*dns.Msg{answerWith(m, right)}
		})
		if got, err := q.at(t, s); got != right || err != nil {
			t.Errorf("%s, %v", got, err)
		}
	})
	t.Run("a flood", func(t *testing.T) {
		s := newNameServer(t, func(m *dns.Msg, tcp bool) []*dns.Msg {
			if tcp {
				return []*dns.Msg{answerWith(m, right)}
			}
			var out []*dns.Msg
			for i := range maxForged {
				bad := answerWith(m, forged)
				bad.Id = m.Id + uint16(i) + 1
				out = append(out, bad)
			}
			return append(out, answerWith(m, forged)) // it has guessed right, too late
		})
		if got, err := q.at(t, s); got != right || err != nil {
			t.Errorf("%s, %v", got, err)
		}
	})
	t.Run("nobody by TCP", func(t *testing.T) {
		s := newNameServer(t, func(m *dns.Msg, tcp bool) []*dns.Msg {
			bad := answerWith(m, forged)
			if bad.Question[0].Name = swapCase(bad.Question[0].Name); tcp {
				bad.Id++
			}
			return []*dns.Msg{bad}
		})
		if got, err := q.at(t, s); !errors.Is(err, errForged) {
			t.Errorf("%s, %v", got, err)
		}
	})
}

func swapCase(s string) string {
	return strings.Map(func(r rune) rune {
		if r|0x20 >= 'a' && r|0x20 <= 'z' {
			return r ^ 0x20
		}
		return r
	}, s)
}

// TestRandom: each question has another port, ID and case of letters.
func TestRandom(t *testing.T) {
	const n = 64
	s := newNameServer(t, known)
	q := Query{Name: "a-rather-long-name.office.example.", Type: dns.TypeA}
	ids, names := map[uint16]bool{}, map[string]bool{}
	for range n {
		if _, err := q.at(t, s); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range s.questions() {
		ids[m.Id], names[m.Question[0].Name] = true, true
		if !strings.EqualFold(m.Question[0].Name, q.Name) || !m.RecursionDesired || m.IsEdns0() != nil {
			t.Errorf("asked %v", m)
		}
	}
	if len(ids) < n-2 || len(names) < n-2 || len(s.ports) < n/2 {
		t.Errorf("of %d questions: %d IDs, %d ways to write the name, %d ports", n, len(ids), len(names), len(s.ports))
	}
}

// TestServersTakeTurns: one that is silent or fails is asked, but not first again.
func TestServersTakeTurns(t *testing.T) {
	good := newNameServer(t, known)
	silent := newNameServer(t, func(*dns.Msg, bool) []*dns.Msg { return nil })
	failing := newNameServer(t, func(m *dns.Msg, _ bool) []*dns.Msg {
		r := new(dns.Msg).SetReply(m)
		r.Rcode = dns.RcodeServerFailure
		return []*dns.Msg{r}
	})
	now := time.Now()
	for name, bad := range map[string]*nameServer{"silent": silent, "failing": failing} {
		p := &pool{Domain: Domain{Servers: []netip.AddrPort{bad.at, good.at}}, dial: dialReal, now: func() time.Time { return now }}
		before := len(bad.questions())
		for range 3 {
			m, err := p.ask(t.Context(), Query{Name: "a.example.", Type: dns.TypeA}, false)
			if err != nil || len(m.Answer) != 1 {
				t.Errorf("%s: %v, %v", name, m, err)
			}
		}
		if n := len(bad.questions()) - before; n != 1 {
			t.Errorf("%s: asked %d times", name, n)
		}
		if st := p.state(); st.Unanswered != 0 || !st.LastAnswer.Equal(now) {
			t.Errorf("%+v", st)
		}
	}
	p := &pool{Domain: Domain{Servers: []netip.AddrPort{failing.at}}, dial: dialReal, now: time.Now}
	if m, err := p.ask(t.Context(), Query{Name: "a.example.", Type: dns.TypeA}, false); err != nil || m.Rcode != dns.RcodeServerFailure {
		t.Errorf("a server's own word: %v, %v", m, err)
	}
	nobody := func(context.Context, string, netip.AddrPort) (net.Conn, error) { return nil, errors.New("no route") }
	p = &pool{Domain: Domain{Servers: []netip.AddrPort{failing.at}}, dial: nobody, now: time.Now}
	for range 3 {
		if _, err := p.ask(t.Context(), Query{Name: "a.example.", Type: dns.TypeA}, false); err == nil {
			t.Error("an answer by no route")
		}
	}
	if st := p.state(); st.Unanswered != 3 || st.Error != "no route" {
		t.Errorf("%+v", st)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.ask(ctx, Query{Name: "a.example.", Type: dns.TypeA}, false); err == nil || p.state().Unanswered != 3 {
		t.Error("nobody waited, and the servers are blamed")
	}
}

func TestAddresses(t *testing.T) {
	rr := func(list ...string) (out []dns.RR) {
		for _, s := range list {
			x, err := dns.NewRR(s)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, x)
		}
		return out
	}
	zone := map[string]map[uint16][]dns.RR{
		"both.example.":    {dns.TypeA: rr("both.example. 60 A 10.0.0.1"), dns.TypeAAAA: rr("both.example. 30 AAAA fd00::1")},
		"alias.example.":   {dns.TypeA: rr("alias.example. 5 CNAME web.example.", "web.example. 60 A 10.0.0.2", "other.example. 1 A 6.6.6.6")},
		"loop.example.":    {dns.TypeA: rr("loop.example. 5 CNAME pool.example.", "pool.example. 5 CNAME loop.example.")},
		"nothing.example.": {},
		"broken.example.":  {dns.TypeA: rr("broken.example. 60 A 10.0.0.3")},
		"deaf.example.":    {dns.TypeA: rr("deaf.example. 60 A 10.0.0.4")},
	}
	s := newNameServer(t, func(m *dns.Msg, _ bool) []*dns.Msg {
		r, q := new(dns.Msg).SetReply(m), m.Question[0]
		name := dns.CanonicalName(q.Name)
		list, ok := zone[name]
		switch {
		case name == "deaf.example." && q.Qtype == dns.TypeAAAA:
			return nil
		case name == "broken.example." && q.Qtype == dns.TypeAAAA:
			r.Rcode = dns.RcodeNotImplemented
		case !ok:
			r.Rcode = dns.RcodeNameError
		}
		r.Answer = list[q.Qtype]
		return []*dns.Msg{r}
	})
	for name, want := range map[string]string{
		"both.example": "10.0.0.1 fd00::1 30s", "alias.example": "10.0.0.2 5s", "broken.example": "10.0.0.3 1m0s",
		"loop.example": "!", "nothing.example": "!", "nobody.example": "!no such host", "deaf.example": "!no answer in time",
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		list, ttl, err := Addresses(ctx, dialReal, s.at, name)
		cancel()
		text := ""
		for _, a := range list {
			text += a.String() + " "
		}
		if wrong, ok := strings.CutPrefix(want, "!"); ok {
			if len(list) != 0 || err == nil != (wrong == "") || err != nil && err.Error() != wrong {
				t.Errorf("%s: %v, %v", name, list, err)
			}
		} else if text += ttl.String(); err != nil || text != want {
			t.Errorf("%s: %s, %v, want %s", name, text, err, want)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	q := Query{Name: "wWw.office-1.example.", Type: dns.TypeA, EDNS: true}
	request, question, err := q.pack()
	if err != nil {
		f.Fatal(err)
	}
	m := new(dns.Msg)
	if err := m.Unpack(request); err != nil {
		f.Fatal(err)
	}
	b, _ := answerWith(m, "10.0.0.1").Pack()
	f.Add(b[headerSize:], uint16(1))
	f.Add(request[headerSize:], uint16(1))
	f.Add([]byte{0xc0, 12, 0, 1, 0, 1}, uint16(1))
	f.Add([]byte{63}, uint16(1))
	f.Fuzz(func(t *testing.T, body []byte, questions uint16) {
		b := append([]byte{request[0], request[1], 0x81, 0x80, byte(questions >> 8), byte(questions), 0, 1, 0, 0, 0, 0}, body...)
		end := questionEnd(b)
		if end > len(b) || end != 0 && end < headerSize+5 {
			t.Fatalf("%x: the question ends at %d", b, end)
		}
		if compare(b, request) == foreign {
			return
		}
		copy(b[headerSize:], question)
		m := new(dns.Msg)
		if m.Unpack(b) == nil && (len(m.Question) != 1 || m.Question[0].Name != q.Name || m.Question[0].Qtype != q.Type) {
			t.Errorf("%x is taken for an answer: %v", b, m)
		}
	})
}
