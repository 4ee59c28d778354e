package transport

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"ztgate/zerotier/packet"
)

// DefaultTCPRelay is the public relay server (chapter 02 §8.5).
var DefaultTCPRelay = netip.MustParseAddrPort("204.80.128.1:443")

// Times and limits of the TCP relay (chapter 02 §8.5).
const (
	relayAfter     = 60 * time.Second // without UDP from a global address
	relayAsksApart = 2500 * time.Millisecond
	relayCloseUDP  = 30 * time.Second // UDP works again
	relayStep      = time.Second
	relayRedial    = 10 * time.Second
	relayDial      = 10 * time.Second
	relayWrite     = 10 * time.Second
	relayMinimum   = 16 // bytes of a datagram
	relayQueue     = 64 << 10
	relayMaximum   = 2047 // bytes of a datagram; more is refused by servers
)

// relay carries datagrams over a TCP connection in networks that block UDP. It is
// engaged when nothing came by UDP from the internet for a minute, or always when
// forced.
type relay struct {
	log    *slog.Logger
	server netip.AddrPort
	hello  [4]byte // software version
	force  bool
	mark   int

	wanted atomic.Bool // datagrams to the internet are offered
	heard  atomic.Bool // UDP from the internet arrived since the last step
	asked  atomic.Bool // a datagram was offered since the last step

	tunnel  atomic.Pointer[tunnel]
	rx, tx  atomic.Uint64
	dropped atomic.Uint64

	// Of the goroutine that runs step.
	start, lastHeard, lastAsk, lastDial time.Time
}

// tunnel is one connection to the server.
type tunnel struct {
	queue  chan []byte
	queued atomic.Int64 // bytes
}

// RelayStats counts datagrams by TCP relay.
type RelayStats struct {
	Connected       bool
	Rx, Tx, Dropped uint64
}

func newRelay(cfg *Config, log *slog.Logger) *relay {
	if !cfg.TCPRelay.IsValid() {
		return nil
	}
	r := &relay{log: log, server: cfg.TCPRelay, force: cfg.ForceTCPRelay, mark: cfg.Mark}
	r.hello = [4]byte{byte(cfg.Version[0]), byte(cfg.Version[1])}
	binary.BigEndian.PutUint16(r.hello[2:], uint16(cfg.Version[2]))
	r.wanted.Store(r.force)
	return r
}

func (r *relay) stats() RelayStats {
	if r == nil {
		return RelayStats{}
	}
	return RelayStats{Connected: r.tunnel.Load() != nil, Rx: r.rx.Load(), Tx: r.tx.Load(), Dropped: r.dropped.Load()}
}

// received notes that UDP arrived.
func (r *relay) received(from netip.Addr) {
	if !r.heard.Load() && packet.ScopeOf(from) == packet.ScopeGlobal {
		r.heard.Store(true)
	}
}

// offer takes a copy of a datagram if it can go by relay.
func (r *relay) offer(to netip.AddrPort, head, data []byte) {
	n := len(head) + len(data)
	a := to.Addr().Unmap()
	if n < relayMinimum || !a.Is4() || packet.ScopeOf(a) != packet.ScopeGlobal {
		return
	}
	if !r.asked.Load() {
		r.asked.Store(true)
	}
	t := r.tunnel.Load()
	if t == nil {
		return
	}
	if n > relayMaximum || t.queued.Load()+int64(n) > relayQueue {
		r.dropped.Add(1)
		return
	}
	frame := make([]byte, 0, 5+7+n)
	frame = append(frame, 0x17, 3, 3)
	frame = binary.BigEndian.AppendUint16(frame, uint16(7+n))
	a4 := a.As4()
	frame = append(append(frame, 4), a4[:]...)
	frame = binary.BigEndian.AppendUint16(frame, to.Port())
	frame = append(append(frame, head...), data...)
	select {
	case t.queue <- frame:
		t.queued.Add(int64(len(frame)))
	default:
		r.dropped.Add(1)
	}
}

// step decides, once a second, whether to offer datagrams to the relay, to connect
// and to disconnect.
func (r *relay) step(now time.Time) (connect, disconnect bool) {
	if r.start.IsZero() {
		r.start = now
	}
	if r.heard.Swap(false) {
		r.lastHeard = now
	}
	connected := r.tunnel.Load() != nil
	silent := now.Sub(r.start) > relayAfter && now.Sub(r.lastHeard) > relayAfter
	// A tunnel stays until UDP has worked; it doesn't end by itself.
	r.wanted.Store(r.force || silent || connected)
	if connected {
		return false, !r.force && !r.lastHeard.IsZero() && now.Sub(r.lastHeard) < relayCloseUDP
	}
	if !r.wanted.Load() || !r.asked.Swap(false) {
		return false, false
	}
	apart := now.Sub(r.lastAsk)
	if !r.force && (r.lastAsk.IsZero() || apart > relayAfter) {
		r.lastAsk = now // the first in a while may be the last
		return false, false
	}
	if !r.force && apart < relayAsksApart || !r.lastDial.IsZero() && now.Sub(r.lastDial) < relayRedial {
		return false, false
	}
	r.lastAsk, r.lastDial = now, now
	return true, false
}

// run works until ctx ends. deliver gets what arrives.
func (r *relay) run(ctx context.Context, deliver func(from netip.AddrPort, datagram []byte)) {
	tick := time.NewTicker(relayStep)
	defer tick.Stop()
	var current *session
	defer func() {
		if current != nil {
			current.cancel()
			<-current.done
		}
	}()
	for {
		connect, disconnect := r.step(time.Now())
		var ended <-chan struct{}
		switch {
		case connect && current == nil:
			current = r.begin(ctx, deliver)
		case disconnect && current != nil:
			r.log.Info("UDP works again, leaving the TCP relay")
			current.cancel()
		}
		if current != nil {
			ended = current.done
		}
		select {
		case <-ctx.Done():
			return
		case <-ended:
			current.cancel()
			current = nil
		case <-tick.C:
		}
	}
}

// session is a connection under way.
type session struct {
	cancel context.CancelFunc
	done   chan struct{}
}

func (r *relay) begin(ctx context.Context, deliver func(netip.AddrPort, []byte)) *session {
	ctx, cancel := context.WithCancel(ctx)
	s := &session{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		if err := r.connect(ctx, deliver); err != nil && ctx.Err() == nil {
			r.log.Warn("TCP relay", "server", r.server, "error", err)
		}
	}()
	return s
}

// connect is one connection from beginning to end.
func (r *relay) connect(ctx context.Context, deliver func(netip.AddrPort, []byte)) error {
	d := net.Dialer{Timeout: relayDial, Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { setMark(int(fd), r.mark) })
	}}
	conn, err := d.DialContext(ctx, "tcp", r.server.String())
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	t := &tunnel{queue: make(chan []byte, relayQueue/512)}
	t.queue <- append([]byte{0x17, 3, 3, 0, 4}, r.hello[:]...)
	r.tunnel.Store(t)
	r.log.Info("using the TCP relay", "server", r.server)
	quit := make(chan struct{})
	wrote := make(chan error, 1)
	go func() {
		err := t.write(conn, quit, &r.tx)
		_ = conn.Close() // ends the reader
		wrote <- err
	}()
	err = r.read(conn, deliver)
	r.tunnel.Store(nil)
	_ = conn.Close()
	close(quit)
	return errors.Join(err, <-wrote)
}

func (t *tunnel) write(conn net.Conn, quit <-chan struct{}, sent *atomic.Uint64) error {
	for {
		select {
		case <-quit:
			return nil
		case frame := <-t.queue:
			t.queued.Add(-int64(len(frame)))
			_ = conn.SetWriteDeadline(time.Now().Add(relayWrite))
			if _, err := conn.Write(frame); err != nil {
				return err
			}
			sent.Add(1)
		}
	}
}

var errRelayFrame = errors.New("malformed message")

func (r *relay) read(conn net.Conn, deliver func(netip.AddrPort, []byte)) error {
	in := bufio.NewReaderSize(conn, 1<<16)
	var buf []byte
	for {
		var head [5]byte
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return err
		}
		n := int(binary.BigEndian.Uint16(head[3:]))
		if n > cap(buf) {
			buf = make([]byte, n)
		}
		buf = buf[:n]
		if _, err := io.ReadFull(in, buf); err != nil {
			return err
		}
		from, d, err := parseRelayed(buf)
		if err != nil {
			return err
		}
		if from.IsValid() {
			r.rx.Add(1)
			deliver(from, d)
		}
	}
}

// parseRelayed reads a message of the server; one without an address is to be
// ignored.
func parseRelayed(b []byte) (from netip.AddrPort, datagram []byte, err error) {
	if len(b) == 0 {
		return from, nil, errRelayFrame
	}
	size := map[byte]int{0: 0, 4: 4, 6: 16}
	n, ok := size[b[0]]
	switch {
	case !ok:
		return from, nil, errRelayFrame
	case n == 0:
		return from, nil, nil
	case len(b) < 1+n+2:
		return from, nil, errRelayFrame
	}
	a, _ := netip.AddrFromSlice(b[1 : 1+n])
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(b[1+n:])), b[1+n+2:], nil
}
