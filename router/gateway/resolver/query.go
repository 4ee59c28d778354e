package resolver

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/miekg/dns"
)

const (
	// unprovenSize is what a client gets at most that hasn't proven its address, by a
	// cookie or a connection; whoever fakes one makes no more of it.
	unprovenSize = dns.MinMsgSize
	// maxRequest is more than any question takes.
	maxRequest = 1232
	// idleStream is how long a client may take for its next question, all of it.
	idleStream  = 10 * time.Second
	writeStall  = 5 * time.Second
	acceptPause = 100 * time.Millisecond
	// provenShare of the questions that may be with other servers are for clients that have
	// proven their address: whoever fakes many addresses gets the rest at most.
	provenShare = 4
	// slipEvery of the questions beyond a client's limit is told to come by TCP.
	slipEvery = 2
)

// query is a question that may be answered.
type query struct {
	*dns.Msg
	from    netip.Addr
	tcp     bool
	network string // as in counters
	opt     *dns.OPT
	cookie  *dns.EDNS0_COOKIE // to answer with
	proven  bool
}

func (q *query) question() dns.Question { return q.Msg.Question[0] }

// allowed reports whether a client may ask.
func (r *Resolver) allowed(a netip.Addr) bool {
	return slices.ContainsFunc(r.settings.Load().Sources, func(p netip.Prefix) bool { return p.Contains(a) })
}

// serveUDP answers datagrams until the socket is closed. What the zone answers takes
// microseconds, and is answered here.
func (r *Resolver) serveUDP(c *net.UDPConn) {
	b := make([]byte, maxRequest+1)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error about an earlier answer
		}
		client := from.Addr().Unmap()
		send := func(b []byte) {
			if b != nil {
				_, _ = c.WriteToUDPAddrPort(b, from) // lost as on any link if it fails
			}
		}
		q, answer := r.admit(b[:n], client, false)
		if q == nil {
			send(answer)
			continue
		}
		answer, p := r.local(q)
		if p == nil {
			send(answer)
			continue
		}
		ctx, cancel := context.WithCancel(r.ctx)
		first := r.flights.max
		if !q.proven {
			first -= first / provenShare
		}
		x := r.flights.take(clientOf(client), first, cancel)
		if x == nil {
			cancel()
			r.count.query(q.network, resultShare)
			send(comeByTCP(b[:n]))
			continue
		}
		r.wg.Go(func() {
			defer cancel()
			answer := r.forward(ctx, q, p)
			if r.flights.give(x) {
				send(answer)
			}
		})
	}
}

// serveTCP takes connections until the listener is closed.
func (r *Resolver) serveTCP(l *net.TCPListener) {
	for {
		c, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(acceptPause) // as for want of descriptors
			continue
		}
		client := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		x := (*place)(nil)
		if !r.allowed(client) {
			r.count.query("tcp", resultSource)
		} else if x = r.streams.take(clientOf(client), r.streams.max, func() { _ = c.Close() }); x == nil {
			r.count.query("tcp", resultShare)
		}
		if x == nil {
			_ = c.SetLinger(0)
			_ = c.Close()
			continue
		}
		if r.ctx.Err() != nil {
			_ = c.Close()
		}
		r.wg.Go(func() {
			r.serveStream(c, client)
			r.streams.give(x)
			_ = c.Close()
		})
	}
}

// serveStream answers one question after the other of a connection.
func (r *Resolver) serveStream(c net.Conn, client netip.Addr) {
	buffer := make([]byte, maxRequest)
	for {
		_ = c.SetReadDeadline(time.Now().Add(idleStream))
		b, err := readStream(c, buffer)
		if err != nil {
			return
		}
		q, answer := r.admit(b, client, true)
		if q != nil {
			var p *pool
			if answer, p = r.local(q); p != nil {
				answer = r.forwardStream(q, p)
			}
		}
		if answer == nil {
			return
		}
		_ = c.SetWriteDeadline(time.Now().Add(writeStall))
		if writeStream(c, answer) != nil {
			return
		}
	}
}

func (r *Resolver) forwardStream(q *query, p *pool) []byte {
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	x := r.flights.take(clientOf(q.from), r.flights.max, cancel)
	if x == nil {
		r.count.query(q.network, resultShare)
		return q.fail(dns.RcodeServerFailure, dns.ExtendedErrorCodeOther)
	}
	defer r.flights.give(x)
	return r.forward(ctx, q, p)
}

// admit judges a message of a client. Without a query there is an answer at once, or
// none at all: whoever may not ask, and whatever is no question, gets nothing.
func (r *Resolver) admit(b []byte, from netip.Addr, tcp bool) (q *query, answer []byte) {
	network := "udp"
	if tcp {
		network = "tcp"
	}
	refuse := func(why result, answer []byte) (*query, []byte) {
		r.count.query(network, why)
		return nil, answer
	}
	if !r.allowed(from) {
		return refuse(resultSource, nil)
	}
	if len(b) < headerSize || b[2]&0x80 != 0 { // two servers must never answer each other's answers
		return refuse(resultMalformed, nil)
	}
	limits := r.limits.Load()
	if tcp && !limits.tcp.Take(clientOf(from), r.now()) {
		return refuse(resultRate, nil)
	}
	if !tcp && !limits.udp.Take(clientOf(from), r.now()) {
		if r.slip.Add(1)%slipEvery != 0 {
			return refuse(resultRate, nil)
		}
		return refuse(resultRate, comeByTCP(b))
	}
	m := new(dns.Msg)
	if len(b) > maxRequest || binary.BigEndian.Uint16(b[4:]) != 1 || m.Unpack(b) != nil || len(m.Question) != 1 {
		return refuse(resultMalformed, header12(b, dns.RcodeFormatError))
	}
	q = &query{Msg: m, from: from, tcp: tcp, network: network, proven: tcp}
	if m.Opcode != dns.OpcodeQuery {
		return refuse(resultKind, header12(b, dns.RcodeNotImplemented))
	}
	if rcode := r.readOPT(q); rcode != dns.RcodeSuccess {
		return refuse(resultMalformed, q.fail(rcode, 0))
	}
	// Types from 128 on ask for no records of a name (RFC 6895 §3.1): transfers, and
	// ANY, which makes large answers of small questions (RFC 8482).
	if x := q.question(); x.Qclass != dns.ClassINET || x.Qtype >= 128 && x.Qtype < 256 || x.Qtype == dns.TypeOPT || x.Qtype == dns.TypeNone {
		return refuse(resultKind, q.fail(dns.RcodeRefused, dns.ExtendedErrorCodeNotSupported))
	}
	return q, nil
}

// readOPT reads what the client says of itself (RFC 6891 §6.1).
func (r *Resolver) readOPT(q *query) (rcode int) {
	for _, rr := range q.Extra {
		opt, ok := rr.(*dns.OPT)
		switch {
		case !ok:
		case q.opt != nil || opt.Hdr.Name != ".":
			return dns.RcodeFormatError
		default:
			q.opt = opt
		}
	}
	if q.opt == nil {
		return dns.RcodeSuccess
	}
	if q.opt.Version() != 0 {
		return dns.RcodeBadVers
	}
	cookie, proven, ok := r.cookies.look(q.opt, q.from, r.now())
	if !ok {
		return dns.RcodeFormatError
	}
	q.cookie, q.proven = cookie, q.proven || proven
	return dns.RcodeSuccess
}

// local answers what the zone covers, or refuses what nobody is asked for. Otherwise it
// returns who is asked.
func (r *Resolver) local(q *query) (answer []byte, p *pool) {
	n, x := r.names.Load(), q.question()
	if n.zone != nil && n.zone.Covers(x.Name) {
		m := q.reply()
		n.zone.answer(x, m)
		r.count.query(q.network, resultZone)
		return q.pack(m), nil
	}
	if p = n.of(dns.CanonicalName(x.Name)); p == nil || !q.RecursionDesired {
		r.count.query(q.network, resultNobody)
		return q.fail(dns.RcodeRefused, dns.ExtendedErrorCodeNotAuthoritative), nil
	}
	return nil, p
}

// forward asks other servers.
func (r *Resolver) forward(ctx context.Context, q *query, p *pool) []byte {
	x := q.question()
	ask := Query{Name: x.Name, Type: x.Qtype, CD: q.CheckingDisabled}
	if q.opt != nil {
		ask.EDNS, ask.DNSSEC = true, q.opt.Do()
	}
	got, err := p.ask(ctx, ask, q.tcp)
	switch {
	case ctx.Err() != nil:
		r.count.query(q.network, resultEvicted)
		return q.fail(dns.RcodeServerFailure, dns.ExtendedErrorCodeOther)
	case err != nil:
		r.count.query(q.network, resultUnanswered)
		return q.fail(dns.RcodeServerFailure, dns.ExtendedErrorCodeNoReachableAuthority)
	case p.Network != "" && !r.allUsable(got):
		r.count.query(q.network, resultUnusable)
		return q.fail(dns.RcodeServerFailure, dns.ExtendedErrorCodeFiltered)
	}
	if p.Network != "" {
		p.own(got, x.Name)
	}
	r.count.query(q.network, resultForwarded)
	m := q.reply()
	m.Rcode, m.Truncated, m.Answer, m.Ns = got.Rcode, got.Truncated, got.Answer, got.Ns
	m.Extra = slices.DeleteFunc(got.Extra, func(rr dns.RR) bool {
		t := rr.Header().Rrtype
		return t == dns.TypeOPT || t == dns.TypeTSIG || t == dns.TypeSIG
	})
	if m.Rcode > 15 {
		m.Rcode = dns.RcodeServerFailure
	}
	return q.pack(m)
}

// allUsable reports whether all addresses in an answer can be hosts'. A network's name
// server must not lead clients to their own metadata service or to themselves.
func (r *Resolver) allUsable(m *dns.Msg) bool {
	for _, rr := range slices.Concat(m.Answer, m.Ns, m.Extra) {
		for _, ip := range addressesOf(rr) {
			a, _ := netip.AddrFromSlice(ip)
			if !r.usable(a.Unmap()) {
				return false
			}
		}
	}
	return true
}

// addressesOf returns the addresses in a record, those that browsers are given beforehand
// (RFC 9460) among them.
func addressesOf(rr dns.RR) (out []net.IP) {
	var parameters []dns.SVCBKeyValue
	switch rr := rr.(type) {
	case *dns.A:
		return []net.IP{rr.A}
	case *dns.AAAA:
		return []net.IP{rr.AAAA}
	case *dns.SVCB:
		parameters = rr.Value
	case *dns.HTTPS:
		parameters = rr.Value
	}
	for _, p := range parameters {
		switch p := p.(type) {
		case *dns.SVCBIPv4Hint:
			out = append(out, p.Hint...)
		case *dns.SVCBIPv6Hint:
			out = append(out, p.Hint...)
		}
	}
	return out
}

// reply begins an answer.
func (q *query) reply() *dns.Msg {
	m := new(dns.Msg).SetReply(q.Msg)
	m.RecursionAvailable = true
	return m
}

// fail is an answer without any record; why is a reason of RFC 8914.
func (q *query) fail(rcode int, why uint16) []byte {
	m := q.reply()
	m.Rcode = rcode
	if why != 0 && q.opt != nil {
		m.Extra = append(m.Extra, q.answerOPT(&dns.EDNS0_EDE{InfoCode: why}))
	}
	return q.pack(m)
}

// answerOPT tells the client of us.
func (q *query) answerOPT(more ...dns.EDNS0) *dns.OPT {
	opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}, Option: more}
	opt.SetUDPSize(udpSize)
	opt.SetDo(q.opt.Do())
	if q.cookie != nil {
		opt.Option = append(opt.Option, q.cookie)
	}
	return opt
}

// pack returns an answer that is as large as the client may get it.
func (q *query) pack(m *dns.Msg) []byte {
	if q.opt != nil && m.IsEdns0() == nil {
		m.Extra = append(m.Extra, q.answerOPT())
	}
	m.Compress = true
	if !q.tcp {
		m.Truncate(q.size())
	}
	b, err := m.Pack()
	if err != nil || len(b) > dns.MaxMsgSize || !q.tcp && len(b) > q.size() {
		b, _ = (&dns.Msg{MsgHdr: dns.MsgHdr{Id: m.Id, Response: true, RecursionDesired: m.RecursionDesired, RecursionAvailable: true, Rcode: dns.RcodeServerFailure}, Question: m.Question}).Pack()
	}
	return b
}

// size is how large an answer by UDP may be.
func (q *query) size() int {
	if q.opt == nil || !q.proven {
		return unprovenSize
	}
	return min(max(int(q.opt.UDPSize()), dns.MinMsgSize), udpSize)
}

// header12 is an answer that is nothing but a header.
func header12(b []byte, rcode int) []byte {
	out := make([]byte, headerSize)
	copy(out, b[:3])
	out[2] = out[2]&0x79 | 0x80 // with its opcode and RD
	out[3] = 0x80 | byte(rcode)
	return out
}

// comeByTCP is an answer that was cut to nothing, not larger than the question.
func comeByTCP(b []byte) []byte {
	out := header12(b, dns.RcodeSuccess)
	out[2] |= 2 // TC
	if end := questionEnd(b); end > 0 {
		out[5] = 1
		out = append(out, b[headerSize:end]...)
	}
	return out
}
