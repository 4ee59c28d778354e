package hostproxy

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
	"golang.org/x/sys/unix"

	"ztgate/internal/testwait"
	"ztgate/router/config"
	"ztgate/router/lab/labtest"
)

// use changes the forward that the proxy serves.
func (b *between) use(t *testing.T, edit func(*config.Forward)) {
	t.Helper()
	f := config.Forward{Proto: "tcp", Side: config.SideVPC, Listen: b.at, To: netip.AddrPortFrom(b.at.Addr(), 443), Masquerade: true}
	edit(&f)
	if err := b.Set([]config.Forward{f}); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

// got reads a header and so many bytes behind it.
func got(t *testing.T, c net.Conn, n int) (*proxyproto.Header, string) {
	t.Helper()
	r := bufio.NewReader(c)
	h, err := proxyproto.Read(r)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		t.Fatal(err)
	}
	return h, string(b)
}

// TestSendsHeader: the host is told who the client is, before the client says anything.
func TestSendsHeader(t *testing.T) {
	for family, addr := range loopbacks {
		for version, number := range map[string]byte{"v1": 1, "v2": 2} {
			t.Run(family+"/"+version, func(t *testing.T) {
				b := newBetween(t, addr, Limits{})
				b.use(t, func(f *config.Forward) { f.ProxyProtocol = version })
				client := b.dial(t, addr)
				host := b.accept(t)
				h, _ := got(t, host, 0)
				if h.Version != number || h.SourceAddr.String() != client.LocalAddr().String() || h.DestinationAddr.String() != b.at.String() {
					t.Errorf("%+v, want %s to %s", h, client.LocalAddr(), b.at)
				}
				write(t, client, "hello")
				if _, err := io.ReadFull(host, make([]byte, 5)); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

const (
	v1Header = "PROXY TCP4 203.0.113.5 198.51.100.7 40000 25\r\n"
	v6Header = "PROXY TCP6 2001:db8::5 2001:db8::7 40000 25\r\n"
)

func v2Header(t *testing.T, command proxyproto.ProtocolVersionAndCommand) string {
	t.Helper()
	h := proxyproto.HeaderProxyFromAddrs(2, &net.TCPAddr{IP: net.IPv4(203, 0, 113, 5), Port: 40000}, &net.TCPAddr{IP: net.IPv4(198, 51, 100, 7), Port: 25})
	h.Command = command
	if err := h.SetTLVs([]proxyproto.TLV{{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte("mail.example")}}); err != nil {
		t.Fatal(err)
	}
	b, err := h.Format()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestAcceptsHeader: the client is whom the load balancer says, for the host, for the
// policy and for what is shown.
func TestAcceptsHeader(t *testing.T) {
	addr := loopbacks["IPv4"]
	const carried = "203.0.113.5:40000"
	for name, tt := range map[string]struct{ header, from string }{
		"v1":      {v1Header, carried},
		"v1 IPv6": {v6Header, "[2001:db8::5]:40000"},
		"v2":      {v2Header(t, proxyproto.PROXY), carried},
		"its own": {v2Header(t, proxyproto.LOCAL), ""},
		"unknown": {"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBetween(t, addr, Limits{})
			b.use(t, func(f *config.Forward) {
				f.ProxyProtocol, f.AcceptProxy = "v2", []netip.Prefix{netip.PrefixFrom(addr, 32)}
			})
			client := b.dial(t, addr)
			want := tt.from
			if want == "" {
				want = client.LocalAddr().String()
			}
			write(t, client, tt.header+"first")
			h, first := got(t, b.accept(t), 5)
			if tlvs, err := h.TLVs(); h.SourceAddr.String() != want || first != "first" || len(tlvs) > 0 || err != nil {
				t.Errorf("%+v, %q, want %s", h, first, want)
			}
			list := b.Connections()
			if len(list) != 1 || list[0].Client.String() != want || list[0].Behind != addr || !list[0].Source.IsValid() || list[0].Out != 5 {
				t.Errorf("shown are %+v, want %s", list, want)
			}
		})
	}
}

// TestRefusesHeader: who isn't named, or says nothing that makes sense, is refused, and it
// is counted and shown why.
func TestRefusesHeader(t *testing.T) {
	addr := loopbacks["IPv4"]
	other := netip.MustParseAddr("127.0.0.2")
	for name, tt := range map[string]struct {
		from           netip.Addr
		says           string
		forbids        bool
		result, reason string
	}{
		"somebody else":       {other, v1Header, false, relayUntrusted, "proxy_source"},
		"plain":               {addr, "GET / HTTP/1.1\r\n\r\n", false, relayBadHeader, "proxy_header"},
		"nothing in time":     {addr, "", false, relayNoHeader, "proxy_header"},
		"a part in time":      {addr, "\r\n\r\n\x00\r\nQUIT\n\x21", false, relayNoHeader, "proxy_header"},
		"too long":            {addr, "PROXY TCP4 " + strings.Repeat("1", 200), false, relayBadHeader, "proxy_header"},
		"too long by version": {addr, "\r\n\r\n\x00\r\nQUIT\n\x21\x11\xff\xff", false, relayBadHeader, "proxy_header"},
		"of a socket":         {addr, "\r\n\r\n\x00\r\nQUIT\n\x21\x31\x00\xd8" + strings.Repeat("x", 216), false, relayBadHeader, "proxy_header"},
		"of nobody":           {addr, "PROXY TCP4 0.0.0.0 198.51.100.7 40000 25\r\n", false, relayBadHeader, "proxy_header"},
		"refused by policy":   {addr, v1Header, true, relayRefused, "policy"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBetween(t, addr, Limits{Header: 200 * time.Millisecond})
			b.plane.forbids.Store(tt.forbids)
			b.use(t, func(f *config.Forward) { f.AcceptProxy = []netip.Prefix{netip.PrefixFrom(addr, 32)} })
			client, err := b.tryDial(tt.from)
			if err == nil {
				defer client.Close()
				_ = client.SetDeadline(time.Now().Add(patience))
				if _, err := io.WriteString(client, tt.says); !errors.Is(err, unix.ECONNRESET) { // who has been told so isn't told again
					labtest.Reset(t, "the client", client)
				}
			} else if !errors.Is(err, unix.ECONNRESET) { // it may be refused before it is noticed
				t.Fatal(err)
			}
			testwait.For(t, patience, "the count", func() bool { return b.results(t, "tcp", tt.result) == 1 })
			if got := b.plane.noted.Load().(string); !strings.HasPrefix(got, tt.reason+" ") {
				t.Errorf("shown is %q, want %s", got, tt.reason)
			}
			if b.plane.dialled.Load() != nil {
				t.Error("the host was connected to")
			}
		})
	}
}

// TestHeaderPlaces: load balancers that say nothing take no places from others, and more
// than there are for them are refused.
func TestHeaderPlaces(t *testing.T) {
	addr := loopbacks["IPv4"]
	b := newBetween(t, addr, Limits{Connections: 64, Header: patience})
	b.use(t, func(f *config.Forward) { f.AcceptProxy = []netip.Prefix{netip.PrefixFrom(addr, 32)} })
	for range 64 / dialShare {
		b.dial(t, addr)
	}
	testwait.For(t, patience, "all to wait", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.headers.open) == 64/dialShare
	})
	b.refused(t, addr)
	if n := b.results(t, "tcp", relayLimit); n != 1 {
		t.Errorf("%v refused, want 1", n)
	}
	b.use(t, func(*config.Forward) {})
	client := b.dial(t, addr)
	write(t, client, "x")
	if _, err := io.ReadFull(b.accept(t), make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

// TestInside: forwards that the plane relays are served apart from those on the host's own
// addresses.
func TestInside(t *testing.T) {
	b := newBetween(t, loopbacks["IPv4"], Limits{})
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = free.Close()
	at := free.Addr().(*net.TCPAddr).AddrPort()
	f := config.Forward{Proto: "tcp", Side: config.SideVPC, Listen: at, To: at, Masquerade: true, ProxyProtocol: "v1"}
	if err := b.SetInside([]config.Forward{f}); err != nil {
		t.Fatal(err)
	}
	for _, to := range []netip.AddrPort{at, b.at} {
		client, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(to))
		if err != nil {
			t.Fatal(err)
		}
		host := b.accept(t)
		if to == at {
			if h, _ := got(t, host, 0); h.SourceAddr.String() != client.LocalAddr().String() {
				t.Errorf("%+v", h)
			}
		}
		_ = client.Close()
	}
	if err := b.SetInside(nil); err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("tcp", at.String()); err == nil {
		_ = c.Close()
		t.Error("a removed forward still answers")
	}
	b.dial(t, b.at.Addr())
}

// script is a connection that says something, in pieces.
type script struct {
	net.Conn
	says  []byte
	piece int
}

func (s *script) Read(b []byte) (int, error) {
	if len(s.says) == 0 {
		return 0, io.EOF
	}
	n := copy(b, s.says[:min(s.piece, len(s.says))])
	s.says = s.says[n:]
	return n, nil
}

func (*script) SetReadDeadline(time.Time) error { return nil }

// FuzzHeader: whatever a load balancer sends is a header with what came behind it, or an
// error; and what is sent on says the same.
func FuzzHeader(f *testing.F) {
	f.Add([]byte(v1Header+"rest"), 3)
	f.Add([]byte(v6Header), 100)
	f.Add([]byte("PROXY UNKNOWN\r\n"), 20)
	f.Add([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x01\x02\x03\x04\x05\x06\x07\x08\x00\x01\x00\x02rest"), 500)
	f.Add([]byte("\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"), 500)
	f.Fuzz(func(t *testing.T, says []byte, piece int) {
		s := &script{says: says, piece: max(piece, 1)}
		e, rest, err := readHeader(s, time.Second)
		if err != nil {
			return
		}
		if all := append(rest, s.says...); !bytes.HasSuffix(says, all) || len(all) == len(says) {
			t.Fatalf("%q is no rest of %q", all, says)
		}
		if !e.from.IsValid() {
			return
		}
		for _, version := range []string{"v1", "v2"} {
			b, err := appendHeader(nil, version, e)
			if err != nil {
				t.Fatalf("%+v: %v", e, err)
			}
			if again, _, err := readHeader(&script{says: b, piece: len(b)}, time.Second); err != nil || again != e {
				t.Fatalf("%+v became %+v, %v", e, again, err)
			}
		}
	})
}
