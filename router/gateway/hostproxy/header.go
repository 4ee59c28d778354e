package hostproxy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/pires/go-proxyproto"

	"ztgate/router/config"
)

// headerBuffer is how much is read at once of a connection that begins with a header. The
// library takes 107 bytes of version 1, and of version 2 up to 4 KiB behind the first 16.
const headerBuffer = 512

// ends are a client and where it connected to.
type ends struct{ from, to netip.AddrPort }

// errNoHeader says that a header didn't come, or not as a whole in time.
var errNoHeader = errors.New("no header came in time")

// readHeader reads a PROXY header. Without ends it is about a connection of the load
// balancer's own. What came behind it is returned too.
func readHeader(c net.Conn, timeout time.Duration) (said ends, rest []byte, err error) {
	if err := c.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return said, nil, err
	}
	r := bufio.NewReaderSize(c, headerBuffer)
	h, err := proxyproto.Read(r)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return said, nil, errNoHeader
	}
	if err != nil {
		return said, nil, err
	}
	if said, err = endsOf(h); err != nil {
		return said, nil, err
	}
	rest, err = r.Peek(r.Buffered())
	if err != nil {
		return said, nil, err
	}
	return said, rest, c.SetReadDeadline(time.Time{})
}

// endsOf returns what a header says of its client. Addresses that are no TCP client's are
// refused, but those of a header that says nothing.
func endsOf(h *proxyproto.Header) (e ends, err error) {
	if h.Command.IsLocal() {
		return e, nil
	}
	from, to, ok := h.TCPAddrs()
	if !ok {
		return e, fmt.Errorf("a header for %v", h.SourceAddr)
	}
	e = ends{unmapped(from), unmapped(to)}
	if a := e.from.Addr(); !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.Is4() != e.to.Addr().Is4() {
		return ends{}, fmt.Errorf("a header from %v to %v", from, to)
	}
	return e, nil
}

func unmapped(a interface{ AddrPort() netip.AddrPort }) netip.AddrPort {
	ap := a.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// appendHeader appends the header of a version.
func appendHeader(b []byte, version string, e ends) ([]byte, error) {
	v := byte(2)
	if version == "v1" {
		v = 1
	}
	text, err := proxyproto.HeaderProxyFromAddrs(v, net.TCPAddrFromAddrPort(e.from), net.TCPAddrFromAddrPort(e.to)).Format()
	return append(b, text...), err
}

// greet takes the connection of a load balancer, which says first for whom it is.
func (r *Proxy) greet(l *listener, client net.Conn) {
	f := *l.forward.Load()
	own, err := endsOfConn(client)
	if err != nil {
		abort(client)
		return
	}
	result := r.mayGreet(f, own)
	e := &entry{client: clientOf(own.from.Addr()), end: func() { abort(client) }}
	if result == "" && !r.admit(e, "tcp", r.headers) {
		result = relayLimit
	}
	if result != "" {
		r.count("tcp", result)
		abort(client)
		return
	}
	said, rest, err := readHeader(client, r.limits.Header)
	if !r.leave(e) {
		return // all is closed
	}
	if err != nil {
		result = relayBadHeader
		if errors.Is(err, errNoHeader) {
			result = relayNoHeader
		}
		r.count("tcp", result)
		r.note(f, own.from, reasonHeader)
		abort(client)
		return
	}
	if !said.from.IsValid() {
		said = own
	}
	r.take(f, client, said, own.from, bytes.Clone(rest))
}

// mayGreet says why nobody is listened to there, "" if the header may come: only who is
// named as a load balancer, and may itself connect.
func (r *Proxy) mayGreet(f config.Forward, own ends) string {
	if !slices.ContainsFunc(f.AcceptProxy, func(p netip.Prefix) bool { return p.Contains(own.from.Addr()) }) {
		r.note(f, own.from, reasonSource)
		return relayUntrusted
	}
	if !r.allows(f, own.from) {
		return relayRefused
	}
	return ""
}

// endsOfConn are the ends of a connection itself.
func endsOfConn(c net.Conn) (e ends, err error) {
	from, ok1 := c.RemoteAddr().(*net.TCPAddr)
	to, ok2 := c.LocalAddr().(*net.TCPAddr)
	if !ok1 || !ok2 {
		return e, errors.New("it has ended already")
	}
	return ends{unmapped(from), unmapped(to)}, nil
}
