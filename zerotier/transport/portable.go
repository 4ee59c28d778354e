//go:build !linux || portableudp

package transport

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/ipv4"
)

// socket is one bound socket, without offloads.
type socket struct {
	place
	id     SocketID
	local  netip.AddrPort
	worker int

	conn   *net.UDPConn
	gro    bool // always false, as gso
	gso    atomic.Bool
	failed atomic.Bool

	ttl sync.RWMutex // held for writing while the socket has an unusual TTL
}

func openSocket(_ place, ep netip.AddrPort, _ bool, _ int) (*socket, error) {
	network := "udp4"
	if ep.Addr().Is6() {
		network = "udp6"
	}
	var lc net.ListenConfig
	conn, err := lc.ListenPacket(context.Background(), network, ep.String())
	if err != nil {
		return nil, err
	}
	s := &socket{conn: conn.(*net.UDPConn)}
	_ = s.conn.SetReadBuffer(bufferSize) // the system may allow less
	_ = s.conn.SetWriteBuffer(bufferSize)
	return s, nil
}

func setMark(int, int) {}

func (s *socket) close() error { return s.conn.Close() }

const (
	recvBuffer    = 1 << 16
	maxReadErrors = 100 // in a row make the reader give the socket up
	readErrorWait = 10 * time.Millisecond
)

// read is a worker: it hands the datagrams of s to handle until s is closed.
func (u *UDP) read(s *socket, handle func(int, SocketID, netip.AddrPort, []byte), flush func(int)) {
	buf := make([]byte, recvBuffer)
	failures := 0
	for {
		n, from, err := s.conn.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			if failures++; failures == maxReadErrors {
				u.log.Warn("udp socket failed", "endpoint", s.local, "error", err)
				s.failed.Store(true)
				return
			}
			time.Sleep(readErrorWait)
			continue
		}
		failures = 0
		if u.relay != nil {
			u.relay.received(from.Addr().Unmap())
		}
		handle(s.worker, s.id, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), buf[:n:n])
		flush(s.worker)
		u.stats.rx.add(&Direction{Datagrams: 1, Bytes: uint64(n), Messages: 1, Syscalls: 1, Batches: 1})
	}
}

// Sender sends datagrams of one goroutine, each with its own system call.
type Sender struct {
	u   *UDP
	buf []byte
	sum Direction
}

// NewSender returns a sender for one goroutine.
func (u *UDP) NewSender() *Sender { return &Sender{u: u} }

// Send sends the datagram head || data.
func (s *Sender) Send(sock SocketID, to netip.AddrPort, head, data []byte) {
	if len(head) > 0 {
		s.buf = append(append(s.buf[:0], head...), data...)
		data = s.buf
	}
	s.put(sock, to, data, 0)
}

// SendTTL sends a datagram with its own time to live, IPv4 only: to an IPv6
// destination it is sent with the usual hop limit (chapter 02 §8.4).
func (s *Sender) SendTTL(sock SocketID, to netip.AddrPort, data []byte, ttl int) {
	s.put(sock, to, data, ttl)
}

func (s *Sender) put(id SocketID, to netip.AddrPort, data []byte, ttl int) {
	if a := to.Addr(); to.Port() == 0 || !a.IsValid() || a.IsUnspecified() {
		s.drop(DropAddress)
		return
	}
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if r := s.u.relay; r != nil && ttl == 0 && r.wanted.Load() {
		if r.offer(to, nil, data); r.force {
			return
		}
	}
	t := s.u.table.Load()
	if one, ok := t.byID[id]; ok && one.local.Addr().Is4() == to.Addr().Is4() {
		s.write(one, to, data, ttl)
		return
	}
	socks := t.family(to.Addr()) // all sockets asked for, or its own is gone
	if len(socks) == 0 {
		s.drop(DropNoSocket)
	}
	for _, one := range socks {
		s.write(one, to, data, ttl)
	}
}

func (s *Sender) write(sock *socket, to netip.AddrPort, data []byte, ttl int) {
	var err error
	if ttl > 0 && to.Addr().Is4() {
		err = sock.writeTTL(to, data, ttl)
	} else {
		sock.ttl.RLock()
		_, err = sock.conn.WriteToUDPAddrPort(data, to)
		sock.ttl.RUnlock()
	}
	switch {
	case err == nil:
		s.sum.Datagrams++
		s.sum.Bytes += uint64(len(data))
		s.sum.Messages++
		s.sum.Syscalls++
	case errors.Is(err, net.ErrClosed):
		s.drop(DropNoSocket)
	default:
		s.drop(DropOther)
	}
}

func (s *socket) writeTTL(to netip.AddrPort, data []byte, ttl int) error {
	s.ttl.Lock()
	defer s.ttl.Unlock()
	p := ipv4.NewConn(s.conn)
	usual, err := p.TTL()
	if err != nil {
		return err
	}
	if err := p.SetTTL(ttl); err != nil {
		return err
	}
	_, err = s.conn.WriteToUDPAddrPort(data, to)
	return errors.Join(err, p.SetTTL(usual))
}

// Flush ends a batch. Datagrams are sent as they come, so it only counts.
func (s *Sender) Flush() {
	if s.sum != (Direction{}) {
		s.sum.Batches++
		s.u.stats.tx.add(&s.sum)
	}
}

func (s *Sender) drop(r DropReason) { s.u.stats.drops[r].Add(1) }
