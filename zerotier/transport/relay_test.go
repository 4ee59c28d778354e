package transport

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"ztgate/internal/testwait"
)

var (
	globalEndpoint = netip.MustParseAddrPort("8.8.4.4:9993")
	localEndpoint  = netip.MustParseAddrPort("10.0.0.1:9993")
)

func testRelay() *relay {
	return newRelay(&Config{TCPRelay: DefaultTCPRelay}, slog.New(slog.DiscardHandler))
}

// The relay is called for only after a minute without UDP from the internet, by
// two datagrams some seconds apart, and left soon after UDP works.
func TestRelayPolicy(t *testing.T) {
	r := testRelay()
	data := make([]byte, 40)
	now := time.Unix(1000, 0)
	step := func(d time.Duration) (bool, bool) { now = now.Add(d); return r.step(now) }
	quiet := func(name string, d time.Duration) {
		t.Helper()
		if c, x := step(d); c || x {
			t.Fatalf("%s: connect %v, disconnect %v", name, c, x)
		}
	}
	quiet("start", 0)
	r.offer(globalEndpoint, nil, data)
	quiet("too early", 59*time.Second)
	r.received(globalEndpoint.Addr())
	quiet("UDP works", time.Second)
	quiet("UDP worked", 30*time.Second)
	r.asked.Store(false)
	r.received(localEndpoint.Addr()) // says nothing about the internet
	quiet("nobody asks", 31*time.Second)
	if !r.wanted.Load() {
		t.Fatal("a minute of silence doesn't matter")
	}
	r.offer(localEndpoint, nil, data)
	r.offer(globalEndpoint, nil, data[:15])
	quiet("not for the relay", time.Second)
	r.offer(globalEndpoint, nil, data)
	quiet("first", time.Second)
	r.offer(globalEndpoint, nil, data)
	quiet("second too soon", time.Second)
	r.offer(globalEndpoint, nil, data)
	if c, _ := step(2 * time.Second); !c {
		t.Fatal("doesn't connect")
	}
	r.offer(globalEndpoint, nil, data)
	quiet("redials at once", time.Second)
	r.tunnel.Store(&tunnel{queue: make(chan []byte, 8)})
	quiet("connected", 10*time.Minute)
	r.received(globalEndpoint.Addr())
	if _, x := step(time.Second); !x {
		t.Fatal("doesn't leave")
	}
}

func TestRelayBounds(t *testing.T) {
	r := testRelay()
	tun := &tunnel{queue: make(chan []byte, 1000)}
	r.tunnel.Store(tun)
	for range 100 {
		r.offer(globalEndpoint, nil, make([]byte, 1400))
	}
	if n := tun.queued.Load(); n > relayQueue+2000 || r.dropped.Load() == 0 {
		t.Errorf("%d bytes waiting, %d dropped", n, r.dropped.Load())
	}
	full := &tunnel{queue: make(chan []byte)}
	r.tunnel.Store(full)
	r.offer(globalEndpoint, nil, make([]byte, 100)) // must not block
	before := r.dropped.Load()
	r.offer(globalEndpoint, nil, make([]byte, 3000))
	if r.dropped.Load() != before+1 {
		t.Error("an oversized datagram isn't counted")
	}
}

func TestForcedRelay(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	u, err := Open(Config{TCPRelay: netip.MustParseAddrPort(ln.Addr().String()), ForceTCPRelay: true, Version: [3]int{1, 14, 1}})
	if err != nil {
		t.Fatal(err)
	}
	if len(u.Sockets()) != 0 {
		t.Error("has UDP sockets")
	}
	type arrival struct {
		sock SocketID
		from netip.AddrPort
		data []byte
	}
	got := make(chan arrival, 10)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- u.Run(ctx, func(_ int, sock SocketID, from netip.AddrPort, d []byte) {
			got <- arrival{sock, from, bytes.Clone(d)}
		}, func(int) {})
	}()
	payload := datagram('a', 1, 100)
	tx := u.NewSender()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			accepted <- c
		}
	}()
	var conn net.Conn
	for conn == nil { // the first datagrams only call for a connection
		tx.Send(0, globalEndpoint, payload[:10], payload[10:])
		tx.Flush()
		select {
		case conn = <-accepted:
		case <-time.After(20 * time.Millisecond):
		}
	}
	defer conn.Close()
	read := func() []byte {
		var head [5]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil || head[0] != 0x17 {
			t.Fatal(head, err)
		}
		b := make([]byte, binary.BigEndian.Uint16(head[3:]))
		if _, err := io.ReadFull(conn, b); err != nil {
			t.Fatal(err)
		}
		return b
	}
	if b := read(); !bytes.Equal(b, []byte{1, 14, 0, 1}) {
		t.Errorf("greeting %x", b)
	}
	testwait.For(t, 10*time.Second, "the connection", func() bool { return u.Stats().Relay.Connected })
	tx.Send(0, globalEndpoint, payload[:10], payload[10:])
	tx.Flush()
	if b := read(); !bytes.Equal(b, append([]byte{4, 8, 8, 4, 4, 0x27, 0x09}, payload...)) {
		t.Errorf("message %x", b)
	}
	say := func(b []byte) {
		f := binary.BigEndian.AppendUint16([]byte{0x17, 3, 3}, uint16(len(b)))
		if _, err := conn.Write(append(f, b...)); err != nil {
			t.Fatal(err)
		}
	}
	say([]byte{0})
	say(append([]byte{4, 9, 9, 9, 9, 0, 77}, "hello"...))
	a := <-got
	if a.sock != 0 || a.from != netip.MustParseAddrPort("9.9.9.9:77") || string(a.data) != "hello" {
		t.Errorf("got %+v", a)
	}
	say([]byte{99, 1, 2})
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	// A datagram that called for the connection may still have come by it.
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a malformed message doesn't end the connection")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if s := u.Stats().Relay; s.Connected || s.Rx != 1 || s.Tx < 2 {
		t.Errorf("%+v", s)
	}
}

func FuzzRelayed(f *testing.F) {
	f.Add([]byte{4, 1, 2, 3, 4, 0, 5, 6})
	f.Add([]byte{6, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		from, d, err := parseRelayed(b)
		if err == nil && from.IsValid() && len(d) > len(b)-7 {
			t.Error("longer than its message")
		}
	})
}

func TestHasSocket(t *testing.T) {
	u := open(t, Config{NoSecondary: true})
	id := u.Sockets()[0].ID
	if !u.HasSocket(0) || !u.HasSocket(id) || u.HasSocket(id+1) {
		t.Error("open sockets are not told from others")
	}
	if err := u.Close(); err != nil || u.HasSocket(id) {
		t.Error("a closed socket counts as open", err)
	}
}
