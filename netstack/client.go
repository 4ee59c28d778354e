package netstack

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
)

// Client is a host of the VPC inside this process. Its packets take the whole way of
// other hosts' through an engine, for probes.
type Client struct {
	addrs []netip.Addr
	send  func(ip []byte)
	local *localStack

	asking sync.Mutex  // one at a time asks for a path's MTU
	echoes chan []byte // ICMP that came meanwhile
}

// NewClient makes a client with addresses; send takes what it sends. What is sent to it
// goes to [Client.Deliver].
func NewClient(addrs []netip.Addr, send func(ip []byte)) (*Client, error) {
	local, err := newLocalStack(func(_ tcpip.NICID, b []byte) { send(b) })
	if err != nil {
		return nil, err
	}
	if err := local.setAddresses(map[tcpip.NICID][]netip.Addr{vpcNIC: addrs}); err != nil {
		return nil, fmt.Errorf("netstack: %w", err)
	}
	return &Client{addrs: addrs, send: send, local: local, echoes: make(chan []byte, 16)}, nil
}

// Run works until ctx ends, and frees the client.
func (c *Client) Run(ctx context.Context) error {
	c.local.run(ctx)
	return nil
}

// Close frees a client that never ran, too.
func (c *Client) Close() { c.local.close() }

// Deliver takes an IP packet for the client, which isn't kept.
func (c *Client) Deliver(b []byte) {
	var v ipkt.View
	if ipkt.Parse(b, &v) != ipkt.OK {
		return
	}
	if v.Proto == ipkt.ICMP || v.Proto == ipkt.ICMPv6 {
		select {
		case c.echoes <- append([]byte(nil), b...):
		default: // nobody asks
		}
	}
	c.local.inject(vpcNIC, b)
}

// Address returns the client's address of a family, invalid if it has none.
func (c *Client) Address(v6 bool) netip.Addr {
	for _, a := range c.addrs {
		if a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

// ends returns the ends of a connection.
func (c *Client) ends(to netip.AddrPort) (src, dst tcpip.FullAddress, proto tcpip.NetworkProtocolNumber, err error) {
	a := c.Address(to.Addr().Is6())
	if !a.IsValid() {
		return src, dst, 0, fmt.Errorf("there is no address of the family of %s", to.Addr())
	}
	if proto = ipv4.ProtocolNumber; a.Is6() {
		proto = ipv6.ProtocolNumber
	}
	src = tcpip.FullAddress{NIC: vpcNIC, Addr: tcpip.AddrFromSlice(a.AsSlice())}
	dst = tcpip.FullAddress{NIC: vpcNIC, Addr: tcpip.AddrFromSlice(to.Addr().AsSlice()), Port: to.Port()}
	return src, dst, proto, nil
}

// DialTCP connects as a host of the VPC does.
func (c *Client) DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	_, to, proto, err := c.ends(dst)
	if err != nil {
		return nil, err
	}
	conn, err := dialTCP(ctx, c.local.s, tcpip.FullAddress{NIC: vpcNIC}, to, proto)
	if err != nil {
		return nil, err
	}
	return conn, nil
}

// Ping sends an echo request and waits for the reply.
func (c *Client) Ping(ctx context.Context, dst netip.Addr) (time.Duration, error) {
	src, to, proto, err := c.ends(netip.AddrPortFrom(dst, 0))
	if err != nil {
		return 0, err
	}
	p, err := c.local.ping(dst, src, to, proto)
	if err != nil {
		return 0, err
	}
	defer p.Close()
	return p.ask(ctx)
}

// Knock sends a datagram that nobody waits for.
func (c *Client) Knock(dst netip.AddrPort) error {
	src, to, proto, err := c.ends(dst)
	if err != nil {
		return err
	}
	u, err := dialUDP(c.local.s, src, to, proto)
	if err != nil {
		return err
	}
	defer u.Close()
	_, err = u.Write([]byte("ztgate"))
	return err
}

const (
	// echoTimeout is how long one answer may take where several sizes are tried, and
	// echoSteps how many routers may each say something smaller.
	echoTimeout = time.Second
	echoSteps   = 8
)

// PathMTU returns the size in bytes of the largest packet, up to first, that gets to a
// host and back without fragments. Routers on the way that say what fits are believed;
// [ErrNoAnswer] says that packets of the size returned vanish.
func (c *Client) PathMTU(ctx context.Context, dst netip.Addr, first int) (int, error) {
	src := c.Address(dst.Is6())
	if !src.IsValid() {
		return 0, fmt.Errorf("there is no address of the family of %s", dst)
	}
	c.asking.Lock()
	defer c.asking.Unlock()
	for len(c.echoes) > 0 {
		<-c.echoes
	}
	size := first
	for seq := range echoSteps {
		ident := uint16(nat.LocalPortFirst + c.local.ident.Add(1)%(nat.LocalPortLast-nat.LocalPortFirst))
		request := echoRequest(src, dst, ident, uint16(seq), size)
		if request == nil {
			break
		}
		c.send(request)
		mtu, err := c.answer(ctx, ident, size)
		if err != nil || mtu == size {
			return size, err
		}
		size = mtu
	}
	return 0, ErrNoAnswer
}

// answer waits for the answer to an echo request. It returns the request's size, or the
// one that a router says.
func (c *Client) answer(ctx context.Context, ident uint16, size int) (int, error) {
	timeout := time.NewTimer(echoTimeout)
	defer timeout.Stop()
	for {
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-timeout.C:
			return 0, ErrNoAnswer
		case b := <-c.echoes:
			var v ipkt.View
			if ipkt.Parse(b, &v) != ipkt.OK {
				continue
			}
			msg := b[v.L4:]
			switch {
			case len(msg) < 8:
			case (msg[0] == 0 || msg[0] == 129) && binary.BigEndian.Uint16(msg[4:]) == ident:
				return size, nil
			case msg[0] == 3 && msg[1] == 4 && quoted(msg[8:], ident):
				return smaller(int(binary.BigEndian.Uint16(msg[6:])), size), nil
			case v.V6 && msg[0] == 2 && quoted(msg[8:], ident):
				return smaller(int(binary.BigEndian.Uint32(msg[4:])), size), nil
			}
		}
	}
}

// smaller is what a router said, or a guess if it didn't say.
func smaller(mtu, size int) int {
	if mtu <= 0 || mtu >= size {
		return size - 8
	}
	return mtu
}

// quoted reports whether an ICMP error is about an echo request of ours.
func quoted(b []byte, ident uint16) bool {
	at := 40
	if len(b) > 0 && b[0]>>4 == 4 {
		at = int(b[0]&15) * 4
	}
	return len(b) >= at+8 && binary.BigEndian.Uint16(b[at+4:]) == ident
}

// echoRequest makes a packet of a size that mustn't be cut, nil if it would be too small.
func echoRequest(src, dst netip.Addr, ident, seq uint16, size int) []byte {
	at, typ, proto := 20, byte(8), uint8(ipkt.ICMP)
	if dst.Is6() {
		at, typ, proto = 40, 128, ipkt.ICMPv6
	}
	if size < at+8 || size > 65535 {
		return nil
	}
	b := make([]byte, size)
	msg := b[at:]
	msg[0] = typ
	binary.BigEndian.PutUint16(msg[4:], ident)
	binary.BigEndian.PutUint16(msg[6:], seq)
	if dst.Is6() {
		b[0], b[6], b[7] = 0x60, proto, 64
		binary.BigEndian.PutUint16(b[4:], uint16(len(msg)))
		copy(b[8:], src.AsSlice())
		copy(b[24:], dst.AsSlice())
		binary.BigEndian.PutUint16(msg[2:], ipkt.Checksum(msg, ipkt.PseudoSum(true, src.As16(), dst.As16(), proto, len(msg))))
		return b
	}
	b[0], b[6], b[8], b[9] = 0x45, 0x40, 64, proto
	binary.BigEndian.PutUint16(b[2:], uint16(size))
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	ipkt.FixHeader(b)
	binary.BigEndian.PutUint16(msg[2:], ipkt.Checksum(msg, 0))
	return b
}
