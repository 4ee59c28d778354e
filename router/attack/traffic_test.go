//go:build e2e

package attack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"

	"ztgate/internal/testwait"
	"ztgate/router/lab"
)

// How often the legitimate clients speak.
const (
	pingEvery    = 50 * time.Millisecond
	connectEvery = 200 * time.Millisecond // new connections, each kind
	bulkEvery    = 5 * time.Millisecond   // datagrams of a session, 1,000 bytes each way
	streamEvery  = 20 * time.Millisecond  // messages of a connection, 4,000 bytes each way

	late = time.Second // an answer that took longer is none
)

// tally counts what was asked, and what was answered in time.
type tally struct {
	mu    sync.Mutex
	asked map[int]time.Time // not yet answered
	of    int
	bad   int
	why   map[string]int
}

func newTally() *tally { return &tally{asked: map[int]time.Time{}, why: map[string]int{}} }

func (t *tally) ask(i int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.of++
	t.asked[i] = time.Now()
}

func (t *tally) answer(i int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	at, ok := t.asked[i]
	if !ok {
		return
	}
	delete(t.asked, i)
	if time.Since(at) > late {
		t.bad++
		t.why["late"]++
	}
}

func (t *tally) fail(i int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.asked[i]; ok {
		delete(t.asked, i)
		t.bad++
		t.why[reason(err)]++
	}
}

// reason is the last part of an error, which names no endpoint.
func reason(err error) string {
	s := err.Error()
	return s[strings.LastIndex(s, ": ")+1:]
}

// settle waits for the answers that may still come.
func (t *tally) settle() {
	testwait.Poll(late, func() bool {
		t.mu.Lock()
		defer t.mu.Unlock()
		return len(t.asked) == 0
	})
}

// end counts what is unanswered.
func (t *tally) end() (bad, of int, why map[string]int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := len(t.asked); n > 0 {
		t.bad += n
		t.why["no answer"] += n
		clear(t.asked)
	}
	return t.bad, t.of, t.why
}

// traffic is what legitimate hosts send while an attack runs.
type traffic struct {
	w      *world
	ctx    context.Context
	cancel context.CancelFunc
	group  sync.WaitGroup

	ping, bulk, stream *tally
	kinds              map[string]*tally // of new connections
}

// startTraffic starts all clients. It ends with stop.
func (w *world) startTraffic() *traffic {
	tr := &traffic{w: w, ping: newTally(), bulk: newTally(), stream: newTally(), kinds: map[string]*tally{}}
	tr.ctx, tr.cancel = context.WithCancel(context.Background())
	bulk := tr.dial(w.VPC, "udp4", client, office+":"+strconv.Itoa(echoPort))
	stream := tr.dial(w.VPC, "tcp4", client, office+":"+strconv.Itoa(echoPort))
	var pings *icmp.PacketConn
	w.must(w.VPC.Do(func() (err error) {
		pings, err = icmp.ListenPacket("ip4:icmp", client)
		return err
	}))
	tr.group.Go(func() { tr.runPings(pings) })
	tr.group.Go(func() { tr.runBulk(bulk) })
	tr.group.Go(func() { tr.runStream(stream) })
	name := w.GatewayMember + "." + w.Network.String() + ".zt.internal."
	for kind, f := range map[string]func() error{
		"TCP to the office":   func() error { return connect(w.VPC, client, office+":80") },
		"UDP to the office":   func() error { return askUDP(w.VPC, client, office+":"+strconv.Itoa(echoPort)) },
		"TCP by the host":     func() error { return connect(w.VPC, client, gwVPC+":"+strconv.Itoa(hostPort)) },
		"a member's name":     func() error { return askName(w.VPC, client, gwVPC+":53", name) },
		"TCP from the office": func() error { return connect(w.Office, office, gwOverlay+":"+strconv.Itoa(entryPort)) },
	} {
		t := newTally()
		tr.kinds[kind] = t
		tr.group.Go(func() { tr.every(connectEvery, func(i int) { tr.one(t, i, f) }) })
	}
	return tr
}

// stop ends the clients, late after the last question that counts.
func (tr *traffic) stop() {
	tr.cancel()
	tr.group.Wait()
}

// every calls f until the end, then waits for late answers.
func (tr *traffic) every(d time.Duration, f func(i int)) {
	t := time.NewTicker(d)
	defer t.Stop()
	for i := 0; ; i++ {
		f(i)
		select {
		case <-tr.ctx.Done():
			return
		case <-t.C:
		}
	}
}

func (tr *traffic) one(t *tally, i int, f func() error) {
	t.ask(i)
	tr.group.Go(func() {
		if err := f(); err != nil {
			t.fail(i, err)
		} else {
			t.answer(i)
		}
	})
}

// dial connects from an address of a namespace.
func (tr *traffic) dial(n *lab.Namespace, network, from, to string) net.Conn {
	tr.w.t.Helper()
	c, err := dialFrom(n, network, from, to)
	tr.w.must(err)
	return c
}

func dialFrom(n *lab.Namespace, network, from, to string) (c net.Conn, err error) {
	err = n.Do(func() (err error) {
		d := net.Dialer{Timeout: 2 * late}
		ip := net.ParseIP(from)
		if d.LocalAddr = (&net.TCPAddr{IP: ip}); network == "udp4" {
			d.LocalAddr = &net.UDPAddr{IP: ip}
		}
		c, err = d.Dial(network, to)
		return err
	})
	return c, err
}

// connect opens a connection, gets something through it, and closes it.
func connect(n *lab.Namespace, from, to string) error {
	c, err := dialFrom(n, "tcp4", from, to)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * late))
	if _, err := io.WriteString(c, "GET /client HTTP/1.0\r\n\r\n"); err != nil {
		return err
	}
	_, err = io.ReadFull(c, make([]byte, 4))
	return err
}

// askName asks a name server for the address of a member.
func askName(n *lab.Namespace, from, server, name string) error {
	c, err := dialFrom(n, "udp4", from, server)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * late))
	m := new(dns.Msg).SetQuestion(name, dns.TypeA)
	conn := &dns.Conn{Conn: c}
	if err := conn.WriteMsg(m); err != nil {
		return err
	}
	r, err := conn.ReadMsg()
	if err == nil && (r.Id != m.Id || len(r.Answer) != 1) {
		err = fmt.Errorf("answer %v", r)
	}
	return err
}

// askUDP sends a datagram from a new port and waits for the answer.
func askUDP(n *lab.Namespace, from, to string) error {
	c, err := dialFrom(n, "udp4", from, to)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(late))
	if _, err := c.Write([]byte("name")); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 100))
	return err
}

// runPings sends echo requests, with a new identifier each second.
func (tr *traffic) runPings(c *icmp.PacketConn) {
	to := &net.IPAddr{IP: netip.MustParseAddr(office).AsSlice()}
	const perID = int(time.Second / pingEvery)
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 1500)
		for {
			k, from, err := c.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil || from.String() != office {
				continue
			}
			if m, err := icmp.ParseMessage(1, b[:k]); err == nil && m.Type == ipv4.ICMPTypeEchoReply {
				if e, ok := m.Body.(*icmp.Echo); ok {
					tr.ping.answer(e.Seq)
				}
			}
		}
	}()
	tr.every(pingEvery, func(i int) {
		m := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: 4000 + i/perID, Seq: i & 0xffff, Data: make([]byte, 56)}}
		b, _ := m.Marshal(nil)
		tr.ping.ask(i)
		if _, err := c.WriteTo(b, to); err != nil {
			tr.ping.fail(i, err)
		}
	})
	tr.ping.settle()
	_ = c.Close()
	<-done
}

// runBulk sends numbered datagrams to an echo server.
func (tr *traffic) runBulk(c net.Conn) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 2000)
		for {
			k, err := c.Read(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil && k >= 4 {
				tr.bulk.answer(int(binary.BigEndian.Uint32(b)))
			}
		}
	}()
	b := make([]byte, 1000)
	tr.every(bulkEvery, func(i int) {
		binary.BigEndian.PutUint32(b, uint32(i))
		tr.bulk.ask(i)
		if _, err := c.Write(b); err != nil {
			tr.bulk.fail(i, err)
		}
	})
	tr.bulk.settle()
	_ = c.Close()
	<-done
}

// runStream sends messages over one connection to an echo server.
func (tr *traffic) runStream(c net.Conn) {
	const size = 4000
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, size)
		for i := 0; ; i++ {
			if _, err := io.ReadFull(c, b); err != nil {
				return
			}
			tr.stream.answer(i)
		}
	}()
	b := make([]byte, size)
	tr.every(streamEvery, func(i int) {
		_ = c.SetWriteDeadline(time.Now().Add(late))
		tr.stream.ask(i)
		if _, err := c.Write(b); err != nil {
			tr.stream.fail(i, err)
		}
	})
	tr.stream.settle()
	_ = c.Close()
	<-done
}

// losses are what the legitimate clients lost.
type losses struct {
	ping, bulk, stream float64 // percent
	failed, of         int     // new connections
	why                []string
}

// worst is the greatest loss of what has been open, in percent.
func (l losses) worst() float64 { return max(l.ping, l.bulk, l.stream) }

func (tr *traffic) losses() (l losses) {
	percent := func(name string, t *tally) float64 {
		bad, of, why := t.end()
		l.explain(name, bad, of, why)
		return 100 * float64(bad) / float64(max(of, 1))
	}
	l.ping, l.bulk, l.stream = percent("ping", tr.ping), percent("bulk", tr.bulk), percent("stream", tr.stream)
	for name, t := range tr.kinds {
		bad, of, why := t.end()
		l.failed, l.of = l.failed+bad, l.of+of
		l.explain(name, bad, of, why)
	}
	return l
}

func (l *losses) explain(name string, bad, of int, why map[string]int) {
	if bad > 0 {
		l.why = append(l.why, fmt.Sprintf("%s: %d of %d %v", name, bad, of, why))
	}
}
