package hostproxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"ztgate/netstack"
)

// echoKey is whose echo requests go by one socket.
type echoKey struct {
	member         member
	client, server netip.Addr
	id             uint16
}

// echoSession sends the requests of a client to a host, and has the last ones by their
// sequence numbers.
type echoSession struct {
	entry
	socket *echoSocket

	mu   sync.Mutex // guards what follows
	sent map[uint16]*netstack.EchoRequest
}

// maxEchoes requests of a session wait for their answers.
const maxEchoes = 64

// Echo implements [netstack.Host].
func (in *Inbound) Echo(r *netstack.EchoRequest) bool {
	p := in.p
	key := echoKey{member{r.Network, r.Member}, r.Client.Addr(), r.Server.Addr(), r.ID}
	p.mu.Lock()
	x := in.echoes[key]
	p.mu.Unlock()
	if x == nil {
		x = &echoSession{sent: map[uint16]*netstack.EchoRequest{}}
		hold(&x.entry, r.Handover, x.close)
		if !p.admit(&x.entry, protoICMP, p.udp) {
			p.count(protoICMP, relayLimit)
			return false
		}
		socket, err := in.ping(r.Server.Addr())
		if err != nil {
			in.cant.Store(&err)
			p.leave(&x.entry)
			p.count(protoICMP, relayUnreachable)
			r.Unreachable()
			return true
		}
		in.cant.Store(nil)
		x.socket = socket
		p.mu.Lock()
		another := in.echoes[key] != nil // its worker was faster
		if !another {
			in.echoes[key] = x
		}
		p.mu.Unlock()
		if another || !in.begin(&x.entry, func() {
			x.receive(p)
			x.close()
			in.forgetEcho(key)
			if p.leave(&x.entry) {
				p.count(protoICMP, relayOK)
			}
		}) {
			if !another {
				in.forgetEcho(key)
			}
			p.leave(&x.entry)
			_ = socket.Close()
			return true // lost: who pings asks again
		}
	}
	x.touch(p.now())
	x.send(r)
	return true
}

func (in *Inbound) forgetEcho(key echoKey) {
	in.p.mu.Lock()
	defer in.p.mu.Unlock()
	delete(in.echoes, key)
}

// CantPing says why pings of overlay hosts go nowhere, nil if they do.
func (in *Inbound) CantPing() error {
	if err := in.cant.Load(); err != nil {
		return *err
	}
	return nil
}

func (x *echoSession) close() {
	if x.socket != nil {
		_ = x.socket.Close()
	}
}

func (x *echoSession) send(r *netstack.EchoRequest) {
	x.mu.Lock()
	if len(x.sent) >= maxEchoes {
		clear(x.sent)
	}
	waits := *r
	waits.Data = nil // a member could fill the memory with them
	x.sent[r.Seq] = &waits
	x.mu.Unlock()
	err := x.socket.request(r.Seq, r.TTL, r.Data)
	if unreachable(err) && x.fail() > 0 { // that was of an earlier one
		err = x.socket.request(r.Seq, r.TTL, r.Data)
	}
	if unreachable(err) {
		r.Unreachable()
	}
}

func unreachable(err error) bool {
	return errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.ECONNREFUSED)
}

// receive gives the client its answers until the socket is closed.
func (x *echoSession) receive(p *Proxy) {
	for x.receiveOne(p) {
	}
}

func (x *echoSession) receiveOne(p *Proxy) (more bool) {
	if x.socket.wait() != nil {
		return false
	}
	b := p.packets.Get().(*[]byte)
	defer p.packets.Put(b)
	seq, data, err := x.socket.answer(*b)
	switch {
	case errors.Is(err, os.ErrClosed):
		return false
	case unreachable(err):
		x.fail()
	case err != nil || data == nil:
	default:
		x.mu.Lock()
		r := x.sent[seq]
		delete(x.sent, seq)
		x.mu.Unlock()
		x.answered.Store(true)
		x.touch(p.now())
		if r != nil {
			r.Reply(data)
		}
	}
	return true
}

// fail tells the client of the errors that came, and returns how many.
func (x *echoSession) fail() int {
	troubles := x.socket.troubles()
	for _, t := range troubles {
		x.mu.Lock()
		r := x.sent[t.seq]
		delete(x.sent, t.seq)
		x.mu.Unlock()
		switch {
		case r == nil:
		case t.exceeded:
			r.Exceeded(t.router)
		default:
			r.Unreachable()
		}
	}
	return len(troubles)
}

// echoSocket sends echo requests to one host: by a ping socket of the kernel where we may
// have one, else by a raw one.
type echoSocket struct {
	*os.File
	v6  bool
	raw bool
	id  uint16 // of a raw one
}

// openEcho opens a socket for a host. Its error says what is missing.
func openEcho(to netip.Addr) (*echoSocket, error) {
	family, proto := unix.AF_INET, unix.IPPROTO_ICMP
	var addr unix.Sockaddr
	if to.Is6() {
		family, proto = unix.AF_INET6, unix.IPPROTO_ICMPV6
		addr = &unix.SockaddrInet6{Addr: to.As16()}
	} else {
		addr = &unix.SockaddrInet4{Addr: to.As4()}
	}
	const flags = unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	s := &echoSocket{v6: to.Is6()}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|flags, proto)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		s.raw = true
		fd, err = unix.Socket(family, unix.SOCK_RAW|flags, proto)
	}
	if err != nil {
		return nil, fmt.Errorf("open a socket for pings: %w: let net.ipv4.ping_group_range hold this process's group, or give the capability NET_RAW", err)
	}
	if err := unix.Connect(fd, addr); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	level, option := unix.IPPROTO_IP, unix.IP_RECVERR
	if s.v6 {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	}
	_ = unix.SetsockoptInt(fd, level, option, 1) // else: errors aren't told
	s.id = uint16(fd)<<4 | uint16(os.Getpid())&15
	s.File = os.NewFile(uintptr(fd), "pings to "+to.String())
	return s, nil
}

// request sends an echo request.
func (s *echoSocket) request(seq uint16, ttl uint8, data []byte) error {
	b := make([]byte, 8, 8+len(data))
	b[0] = 8
	level, option := unix.IPPROTO_IP, unix.IP_TTL
	if s.v6 {
		b[0] = 128
		level, option = unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS
	}
	binary.BigEndian.PutUint16(b[4:], s.id) // of a ping socket the kernel puts in its own
	binary.BigEndian.PutUint16(b[6:], seq)
	b = append(b, data...)
	if s.raw && !s.v6 {
		binary.BigEndian.PutUint16(b[2:], internetSum(b))
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	if err := raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), level, option, int(max(ttl, 1))) }); err != nil {
		return err
	}
	// Where nobody answers ARP the socket is full for seconds, and a worker of the plane must
	// not wait: the request is lost as on any link.
	var werr error
	if err := raw.Write(func(fd uintptr) bool {
		_, werr = unix.Write(int(fd), b)
		return true
	}); err != nil {
		return err
	}
	return werr
}

// wait waits for a message or an error; it ends with an error when the socket is closed.
func (s *echoSocket) wait() error {
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n != 0
	})
}

// answer reads the next message. data is nil if that is no answer to us.
func (s *echoSocket) answer(b []byte) (seq uint16, data []byte, err error) {
	n, err := s.Read(b)
	if err != nil {
		return 0, nil, err
	}
	b = b[:n]
	if s.raw && !s.v6 { // with its IP header
		if len(b) < 20 || len(b) < int(b[0]&15)*4 {
			return 0, nil, nil
		}
		b = b[int(b[0]&15)*4:]
	}
	reply := map[bool]byte{false: 0, true: 129}[s.v6]
	if len(b) < 8 || b[0] != reply || s.raw && binary.BigEndian.Uint16(b[4:]) != s.id {
		return 0, nil, nil
	}
	return binary.BigEndian.Uint16(b[6:]), b[8:], nil
}

// trouble is an ICMP error about a request.
type trouble struct {
	seq      uint16
	exceeded bool // its hops were used up
	router   netip.Addr
}

// troubles reads the errors that came (ip(7), IP_RECVERR).
func (s *echoSocket) troubles() (out []trouble) {
	raw, err := s.SyscallConn()
	if err != nil {
		return nil
	}
	b, oob := make([]byte, 512), make([]byte, 512)
	_ = raw.Control(func(fd uintptr) {
		for len(out) < maxEchoes {
			n, oobn, _, _, err := unix.Recvmsg(int(fd), b, oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
			if err != nil {
				return
			}
			if t, ok := troubleOf(s.v6, b[:n], oob[:oobn]); ok {
				out = append(out, t)
			}
		}
	})
	return out
}

// troubleOf reads an error from the request that it is about and from what the kernel says
// besides: a sock_extended_err and the address of who sent it.
func troubleOf(v6 bool, request, oob []byte) (t trouble, ok bool) {
	level, kind, exceeded, at, size := int32(unix.IPPROTO_IP), int32(unix.IP_RECVERR), byte(11), 16+4, 4
	if v6 {
		level, kind, exceeded, at, size = unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 3, 16+8, 16
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(request) < 8 {
		return t, false
	}
	for _, m := range messages {
		if m.Header.Level != level || m.Header.Type != kind || len(m.Data) < at+size {
			continue
		}
		t.seq, t.exceeded = binary.BigEndian.Uint16(request[6:]), m.Data[4] != unix.SO_EE_ORIGIN_LOCAL && m.Data[5] == exceeded
		t.router, _ = netip.AddrFromSlice(m.Data[at : at+size])
		return t, true
	}
	return t, false
}

// internetSum is the checksum of RFC 1071.
func internetSum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i]) << 8
		if i+1 < len(b) {
			sum += uint32(b[i+1])
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
