package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"ztgate/netstack"
)

// hostDialer uses the kernel's stack, as a member does.
type hostDialer struct {
	device string     // that everything leaves by; "" = by the kernel's routes
	source netip.Addr // invalid = the kernel chooses
}

func (d hostDialer) DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	nd := net.Dialer{Control: d.bind}
	if d.source.IsValid() {
		nd.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(d.source, 0))
	}
	return nd.DialContext(ctx, "tcp", dst.String())
}

// bind keeps a socket on the device.
func (d hostDialer) bind(_, _ string, c syscall.RawConn) (err error) {
	if d.device == "" {
		return nil
	}
	if cerr := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), d.device) }); cerr != nil {
		return cerr
	}
	if err != nil {
		return fmt.Errorf("bind to %s: %w", d.device, err)
	}
	return nil
}

// dialHost connects by the kernel's stack.
func dialHost(ctx context.Context, network string, dst netip.AddrPort) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, network, dst.String())
}

// Ping sends one echo request. It needs a group in net.ipv4.ping_group_range, or
// CAP_NET_RAW.
func (d hostDialer) Ping(ctx context.Context, dst netip.Addr) (time.Duration, error) {
	e, err := d.openEcho(dst)
	if err != nil {
		return 0, err
	}
	defer e.conn.Close()
	defer context.AfterFunc(ctx, func() { _ = e.conn.SetDeadline(time.Unix(1, 0)) })()
	if deadline, ok := ctx.Deadline(); ok {
		if err := e.conn.SetDeadline(deadline); err != nil {
			return 0, err
		}
	}
	return e.ask(1, 0)
}

// echo asks one host for echoes.
type echo struct {
	conn  *os.File // connected
	v6    bool
	raw   bool // the identifier is ours, and IPv4 headers come along
	ident int
}

// openEcho opens a socket for echo requests to a host, one for ICMP alone where the
// kernel lets us and a raw one else.
func (d hostDialer) openEcho(dst netip.Addr) (_ *echo, err error) {
	family, proto := unix.AF_INET, unix.IPPROTO_ICMP
	if dst.Is6() {
		family, proto = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	e := &echo{v6: dst.Is6(), ident: os.Getpid() & 0xffff}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPROTONOSUPPORT) {
		e.raw = true
		fd, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	}
	if err != nil {
		return nil, fmt.Errorf("open a socket for echo requests: %w", err)
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
		}
	}()
	if d.device != "" {
		if err := unix.BindToDevice(fd, d.device); err != nil {
			return nil, fmt.Errorf("bind to %s: %w", d.device, err)
		}
	}
	if d.source.IsValid() {
		if err := unix.Bind(fd, sockaddr(d.source)); err != nil {
			return nil, fmt.Errorf("send from %s: %w", d.source, err)
		}
	}
	if err := unix.Connect(fd, sockaddr(dst)); err != nil {
		return nil, fmt.Errorf("connect to %s: %w", dst, err)
	}
	e.conn = os.NewFile(uintptr(fd), "echo socket")
	return e, nil
}

func sockaddr(a netip.Addr) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4()}
	}
	return &unix.SockaddrInet6{Addr: a.As16()}
}

// ask sends an echo request with so many bytes of data and waits for the reply until
// the connection's deadline.
func (e *echo) ask(seq, size int) (time.Duration, error) {
	var request, reply icmp.Type = ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply
	proto := unix.IPPROTO_ICMP
	if e.v6 {
		request, reply, proto = ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply, unix.IPPROTO_ICMPV6
	}
	msg := icmp.Message{Type: request, Body: &icmp.Echo{ID: e.ident, Seq: seq, Data: make([]byte, size)}}
	b, err := msg.Marshal(nil)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if _, err := e.conn.Write(b); err != nil {
		return 0, err
	}
	buf := make([]byte, 1<<16)
	for {
		n, err := e.conn.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return 0, netstack.ErrNoAnswer
		}
		if err != nil {
			return 0, err
		}
		got := buf[:n]
		if e.raw && !e.v6 && n > 0 {
			got = got[min(n, int(got[0]&15)*4):]
		}
		m, err := icmp.ParseMessage(proto, got)
		if err != nil || m.Type != reply {
			continue
		}
		if r, ok := m.Body.(*icmp.Echo); ok && r.Seq == seq && (!e.raw || r.ID == e.ident) {
			return time.Since(began), nil
		}
	}
}

// echoTimeout is how long one answer may take where several sizes are tried.
const echoTimeout = time.Second

// pathMTU returns the size in bytes of the largest packet, up to first, that gets to a
// host and back without fragments. Routers on the way that say what fits are believed;
// [netstack.ErrNoAnswer] says that packets of the size returned vanish.
func (d hostDialer) pathMTU(ctx context.Context, dst netip.Addr, first int) (int, error) {
	e, err := d.openEcho(dst)
	if err != nil {
		return 0, err
	}
	defer e.conn.Close()
	level, discover, always, known, headers := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO, unix.IP_MTU, ipv4.HeaderLen+8
	if e.v6 {
		level, discover, always, known, headers = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO, unix.IPV6_MTU, ipv6.HeaderLen+8
	}
	raw, err := e.conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	option := func(f func(fd int) error) error {
		var err error
		if cerr := raw.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
			return cerr
		}
		return err
	}
	if err := option(func(fd int) error { return unix.SetsockoptInt(fd, level, discover, always) }); err != nil {
		return 0, fmt.Errorf("forbid fragments: %w", err)
	}
	size := first
	for seq := range 8 { // each router says something smaller
		deadline := time.Now().Add(echoTimeout)
		if end, ok := ctx.Deadline(); ok && end.Before(deadline) {
			deadline = end
		}
		if err := e.conn.SetDeadline(deadline); err != nil {
			return 0, err
		}
		_, err := e.ask(seq+1, size-headers)
		if !errors.Is(err, unix.EMSGSIZE) {
			return size, err
		}
		mtu := 0
		if err := option(func(fd int) (err error) { mtu, err = unix.GetsockoptInt(fd, level, known); return err }); err != nil {
			return 0, fmt.Errorf("ask for the path's MTU: %w", err)
		}
		if mtu >= size {
			mtu = size - 8 // the router didn't say how much
		}
		if size = mtu; size < headers {
			break
		}
	}
	return 0, netstack.ErrNoAnswer
}
