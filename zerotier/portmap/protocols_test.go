package portmap

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const publicAddress = "44.7.7.7"

// newGateway finds a free address of loopback to be the router. The returned socket is
// its port.
func newGateway(t *testing.T, port int) (Gateway, *net.UDPConn) {
	t.Helper()
	for range 20 {
		g := Gateway{netip.AddrFrom4([4]byte{127, byte(1 + rand.IntN(250)), byte(rand.IntN(250)), byte(2 + rand.IntN(250))}), netip.MustParseAddr("127.0.0.1")}
		conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(g.Addr, uint16(port))))
		if err == nil {
			t.Cleanup(func() { _ = conn.Close() })
			return g, conn
		}
	}
	t.Skip("this system has no spare loopback addresses")
	return Gateway{}, nil
}

// answer serves a socket with f until the test ends; nil = no answer.
func answer(conn *net.UDPConn, f func(request []byte) [][]byte) {
	go func() {
		for {
			var b [2048]byte
			n, from, err := conn.ReadFromUDPAddrPort(b[:])
			if err != nil {
				return
			}
			for _, a := range f(b[:n]) {
				_, _ = conn.WriteToUDPAddrPort(a, from)
			}
		}
	}()
}

func own40000() (uint16, error) { return 40000, nil }

func notOwn() (uint16, error) { return 0, errors.New("the port was opened") }

// patience is the test's context, which ends soon if no answer is to count.
func patience(t *testing.T, want Result) context.Context {
	if want != NoAnswer {
		return t.Context()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

// wantResult checks an error's kind.
func wantResult(t *testing.T, err error, want Result) {
	t.Helper()
	if got := resultOf(err); got != want {
		t.Errorf("got %v (%v), want %v", got, err, want)
	}
}

// pcpServer answers as a router would.
func pcpServer(external string, port uint16, seconds uint32) func([]byte) [][]byte {
	return func(q []byte) [][]byte {
		a := bytes.Clone(q)
		a[1] |= pcpResponse
		a[2], a[3] = 0, 0
		copy(a[8:24], make([]byte, 16))
		if q[1] == opMap {
			binary.BigEndian.PutUint32(a[4:], min(seconds, binary.BigEndian.Uint32(q[4:])))
			binary.BigEndian.PutUint16(a[42:], port)
			e := netip.MustParseAddr(external).As16()
			copy(a[44:], e[:])
		}
		return [][]byte{a}
	}
}

func TestPCP(t *testing.T) {
	t.Parallel()
	g, conn := newGateway(t, pcpPort)
	serve := pcpServer(publicAddress, 41000, 300)
	var mu sync.Mutex
	var seen [][]byte
	answer(conn, func(q []byte) [][]byte {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, bytes.Clone(q))
		if len(seen) == 1 {
			return nil // lost
		}
		return serve(q)
	})
	p := &pcp{g, newNonce()}
	ep, granted, err := p.request(t.Context(), own40000, 0)
	if err != nil || ep.String() != publicAddress+":41000" || granted != 300*time.Second {
		t.Fatalf("%v for %v, %v", ep, granted, err)
	}
	if err := p.release(t.Context(), Mapping{Port: 40000}); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(seen) != 4 {
		t.Fatalf("%d requests, want the announcement twice, the mapping, and its end", len(seen))
	}
	client := netip.MustParseAddr("127.0.0.1").As16()
	want := append([]byte{2, 1, 0, 0, 0, 0, 2, 88}, client[:]...) // RFC 6887 §7.1, §11.1
	want = append(want, p.nonce[:]...)
	want = append(want, 17, 0, 0, 0, 0x9c, 0x40, 0x9c, 0x40)
	want = append(want, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0)
	if !bytes.Equal(seen[2], want) {
		t.Errorf("request to map\n%x, want\n%x", seen[2], want)
	}
	copy(want[4:], []byte{0, 0, 0, 0})
	copy(want[42:], []byte{0, 0})
	if !bytes.Equal(seen[3], want) {
		t.Errorf("request to end it\n%x, want\n%x", seen[3], want)
	}
}

func TestPCPHostile(t *testing.T) {
	good := pcpServer(publicAddress, 41000, 300)
	change := func(f func(a []byte) []byte) func([]byte) [][]byte {
		return func(q []byte) [][]byte {
			a := good(q)[0]
			if q[1] == opMap {
				a = f(a)
			}
			return [][]byte{a}
		}
	}
	for _, c := range []struct {
		name  string
		serve func([]byte) [][]byte
		want  Result
	}{
		{"silent", func([]byte) [][]byte { return nil }, NoAnswer},
		{"NAT-PMP only", func([]byte) [][]byte { return [][]byte{{0, 0x80, 0, 1, 0, 0, 0, 0}} }, NoAnswer},
		{"announcements unknown", func(q []byte) [][]byte {
			a := good(q)
			if q[1] == opAnnounce {
				a[0][3] = 4
			}
			return a
		}, Mapped},
		{"not authorised", change(func(a []byte) []byte { a[3] = 2; return a }), Refused},
		{"other version", change(func(a []byte) []byte { a[0] = 3; return a }), Refused},
		{"other nonce", change(func(a []byte) []byte { a[24] ^= 1; return a }), BadAnswer},
		{"other port", change(func(a []byte) []byte { a[41] ^= 1; return a }), BadAnswer},
		{"TCP", change(func(a []byte) []byte { a[36] = 6; return a }), NoAnswer},
		{"short", change(func(a []byte) []byte { return a[:56] }), NoAnswer},
		{"long", change(func(a []byte) []byte { return append(a, make([]byte, 1500)...) }), NoAnswer},
		{"empty", change(func([]byte) []byte { return nil }), NoAnswer},
		{"a request", change(func(a []byte) []byte { a[1] = opMap; return a }), NoAnswer},
		{"flood", func(q []byte) [][]byte {
			if q[1] == opMap {
				return make([][]byte, 2*maxPCPAnswers)
			}
			return good(q)
		}, BadAnswer},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			g, conn := newGateway(t, pcpPort)
			answer(conn, c.serve)
			_, _, err := (&pcp{g, newNonce()}).request(patience(t, c.want), own40000, 0)
			wantResult(t, err, c.want)
		})
	}
}

// Only the router's answer counts, and a context that ends stops the wait.
func TestPCPOtherSender(t *testing.T) {
	t.Parallel()
	g, conn := newGateway(t, pcpPort)
	_, other := newGateway(t, pcpPort)
	serve := pcpServer(publicAddress, 41000, 300)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer cancel()
		for range 2 {
			var b [2048]byte
			n, from, err := conn.ReadFromUDPAddrPort(b[:])
			if err != nil {
				return
			}
			for _, a := range serve(b[:n]) {
				_, _ = other.WriteToUDPAddrPort(a, from)
			}
		}
	}()
	_, _, err := (&pcp{g, newNonce()}).request(ctx, notOwn, 0)
	wantResult(t, err, NoAnswer)
}

// natPMPServer answers as a router would (RFC 6886 §3.2, §3.3).
func natPMPServer(external string, port uint16, seconds uint32) func([]byte) [][]byte {
	return func(q []byte) [][]byte {
		a := []byte{0, q[1] | 0x80, 0, 0, 0, 0, 0, 9}
		switch {
		case q[0] != 0:
			return [][]byte{{0, q[1] | 0x80, 0, 1, 0, 0, 0, 9}}
		case q[1] == 0:
			e := netip.MustParseAddr(external).As4()
			a = append(a, e[:]...)
		case q[1] == 1:
			a = append(a, q[4], q[5])
			a = binary.BigEndian.AppendUint16(a, port)
			a = binary.BigEndian.AppendUint32(a, min(seconds, binary.BigEndian.Uint32(q[8:])))
		}
		return [][]byte{a}
	}
}

func TestNATPMP(t *testing.T) {
	good := natPMPServer(publicAddress, 41000, 300)
	onMap := func(a []byte) func([]byte) [][]byte {
		return func(q []byte) [][]byte {
			if q[1] == 1 {
				return [][]byte{a}
			}
			return good(q)
		}
	}
	for _, c := range []struct {
		name  string
		serve func([]byte) [][]byte
		own   func() (uint16, error)
		want  Result
	}{
		{"good", good, own40000, Mapped},
		{"silent", func([]byte) [][]byte { return nil }, notOwn, NoAnswer},
		{"private address", natPMPServer("10.0.0.1", 41000, 300), notOwn, NotPublic},
		{"not authorised", onMap([]byte{0, 0x81, 0, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0}), own40000, Refused},
		{"other port", onMap([]byte{0, 0x81, 0, 0, 0, 0, 0, 9, 1, 1, 2, 2, 0, 0, 1, 0}), own40000, BadAnswer},
		{"short", onMap([]byte{0, 0x81, 0}), own40000, BadAnswer},
		{"empty", onMap(nil), own40000, BadAnswer},
		{"long", onMap(make([]byte, 1400)), own40000, BadAnswer},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			g, conn := newGateway(t, pcpPort)
			answer(conn, c.serve)
			n := &natPMP{g}
			ep, granted, err := n.request(patience(t, c.want), c.own, 0)
			wantResult(t, err, c.want)
			if err != nil {
				return
			}
			if ep.String() != publicAddress+":41000" || granted != 300*time.Second {
				t.Errorf("%v for %v", ep, granted)
			}
			if err := n.release(t.Context(), Mapping{Port: 40000}); err != nil {
				t.Error(err)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err := (&natPMP{home}).request(ctx, notOwn, 0)
	wantResult(t, err, NoAnswer)
}

// igdServer is a router with UPnP, which a test can spoil.
type igdServer struct {
	Gateway
	http     netip.AddrPort
	location string
	describe http.HandlerFunc
	control  string // URL in the description
	urlBase  string
	service  string
	external string

	mu     sync.Mutex
	reject func(action, body string) int // error code of the device
	calls  []string                      // action and arguments
}

// newIGDServer starts a router that spoil may change before.
func newIGDServer(t *testing.T, spoil func(*igdServer)) *igdServer {
	t.Helper()
	s := &igdServer{control: "/ctl", external: publicAddress, service: serviceTypes[1]}
	var ssdp *net.UDPConn
	s.Gateway, ssdp = newGateway(t, ssdpPort)
	l, err := net.Listen("tcp4", s.Addr.String()+":0")
	if err != nil {
		t.Fatal(err)
	}
	s.http = netip.MustParseAddrPort(l.Addr().String())
	s.location = "http://" + s.http.String() + "/root.xml"
	spoil(s)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /root.xml", func(w http.ResponseWriter, r *http.Request) {
		if s.describe != nil {
			s.describe(w, r)
			return
		}
		_, _ = io.WriteString(w, s.description())
	})
	mux.HandleFunc("POST /ctl", s.act)
	srv := &http.Server{Handler: mux}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })
	answer(ssdp, func(q []byte) [][]byte {
		st := regexp.MustCompile(`\nST: (\S+)`).FindSubmatch(q)
		if !bytes.HasPrefix(q, []byte("M-SEARCH * HTTP/1.1\r\n")) || st == nil {
			return nil
		}
		return [][]byte{[]byte("rubbish"), searchAnswer(s.location, string(st[1]))}
	})
	return s
}

func searchAnswer(location, st string) []byte {
	return fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nST: %s\r\nUSN: uuid:1::%s\r\nEXT:\r\nSERVER: x\r\nLOCATION: %s\r\n\r\n", st, st, location)
}

func (s *igdServer) description() string {
	return `<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0"><specVersion><major>1</major><minor>0</minor></specVersion>` +
		`<URLBase>` + s.urlBase + `</URLBase><device><deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:1</deviceType><deviceList><device><deviceList><device>` +
		`<serviceList><service><serviceType>` + s.service + `</serviceType><serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId>` +
		`<controlURL>` + s.control + `</controlURL><eventSubURL>/evt</eventSubURL><SCPDURL>/scpd.xml</SCPDURL></service></serviceList>` +
		`</device></deviceList></device></deviceList></device></root>`
}

func (s *igdServer) act(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	_, action, _ := strings.Cut(strings.Trim(r.Header.Get("SOAPAction"), `"`), "#")
	args := regexp.MustCompile(`<New(\w+)>([^<]*)</New`).FindAllStringSubmatch(string(body), -1)
	call := action
	for _, a := range args {
		call += " " + a[1] + "=" + a[2]
	}
	s.mu.Lock()
	s.calls = append(s.calls, call)
	reject := s.reject
	s.mu.Unlock()
	code, out := 0, ""
	if reject != nil {
		code = reject(action, string(body))
	}
	if action == "GetExternalIPAddress" {
		out = "<NewExternalIPAddress>" + s.external + "</NewExternalIPAddress>"
	}
	reply := fmt.Sprintf(`<u:%sResponse xmlns:u="%s">%s</u:%sResponse>`, action, s.service, out, action)
	if code != 0 {
		w.WriteHeader(500)
		reply = fmt.Sprintf(`<s:Fault><faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail><UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>%d</errorCode><errorDescription>no</errorDescription></UPnPError></detail></s:Fault>`, code)
	}
	_, _ = fmt.Fprintf(w, `<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" s:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>%s</s:Body></s:Envelope>`, reply)
}

func (s *igdServer) called(action string) (out []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.calls {
		if rest, ok := strings.CutPrefix(c, action+" "); ok {
			out = append(out, rest)
		}
	}
	return out
}

func TestUPnP(t *testing.T) {
	for _, service := range serviceTypes {
		t.Run(service, func(t *testing.T) {
			s := newIGDServer(t, func(s *igdServer) { s.service = service })
			u := &upnp{Gateway: s.Gateway, description: "ZeroTier/0123456789"}
			for range 2 { // new, renewed
				ep, granted, err := u.request(t.Context(), own40000, 0)
				if err != nil || ep.String() != publicAddress+":40000" || granted != lease {
					t.Fatalf("%v for %v, %v", ep, granted, err)
				}
			}
			const want = "RemoteHost= ExternalPort=40000 Protocol=UDP InternalPort=40000 InternalClient=127.0.0.1 Enabled=1 PortMappingDescription=ZeroTier/0123456789@40000 LeaseDuration=600"
			expect(t, "mappings", s.called("AddPortMapping"), []string{want, want})
			if err := u.release(t.Context(), Mapping{External: netip.MustParseAddrPort(publicAddress + ":40000")}); err != nil {
				t.Error(err)
			}
			expect(t, "ends", s.called("DeletePortMapping"), []string{"RemoteHost= ExternalPort=40000 Protocol=UDP"})
		})
	}
}

// The external port may be another host's, and some devices know no leases.
func TestUPnPRejections(t *testing.T) {
	t.Parallel()
	s := newIGDServer(t, func(s *igdServer) {
		s.reject = func(action, body string) int {
			switch {
			case action != "AddPortMapping":
				return 0
			case !strings.Contains(body, "<NewLeaseDuration>0<"):
				return upnpPermanentOnly
			case !strings.Contains(body, "<NewExternalPort>40003<"):
				return upnpConflict
			}
			return 0
		}
	})
	u := &upnp{Gateway: s.Gateway}
	ep, granted, err := u.request(t.Context(), own40000, 0)
	if err != nil || ep.Port() != 40003 || granted != lease {
		t.Errorf("%v for %v, %v", ep, granted, err)
	}
	s.mu.Lock()
	s.reject = func(action, _ string) int {
		if action == "AddPortMapping" {
			return upnpConflict
		}
		return 0
	}
	s.mu.Unlock()
	before := len(s.called("AddPortMapping"))
	_, _, err = u.request(t.Context(), own40000, 0)
	wantResult(t, err, Refused)
	expect(t, "tries", len(s.called("AddPortMapping"))-before, upnpTries)
	before = len(s.called("AddPortMapping"))
	_, _, err = u.request(t.Context(), own40000, 65530) // no port above 65535
	wantResult(t, err, Refused)
	expect(t, "tries", len(s.called("AddPortMapping"))-before, 6)
}

func TestUPnPHostile(t *testing.T) {
	var visits atomic.Int64
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	victim := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { visits.Add(1) })}
	go func() { _ = victim.Serve(l) }()
	t.Cleanup(func() { // when the cases are through
		if n := visits.Load(); n != 0 {
			t.Errorf("another host was asked %d times", n)
		}
		_ = victim.Close()
	})
	elsewhere := "http://" + l.Addr().String()

	endless := func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := io.WriteString(w, strings.Repeat("<a>", 1000)); err != nil {
				return
			}
		}
	}
	for _, c := range []struct {
		name  string
		spoil func(*igdServer)
		want  Result
	}{
		{"location on another host", func(s *igdServer) { s.location = elsewhere + "/root.xml" }, NoAnswer},
		{"location by name", func(s *igdServer) { s.location = "http://localhost/root.xml" }, NoAnswer},
		{"location of another scheme", func(s *igdServer) { s.location = "file:///etc/passwd" }, NoAnswer},
		{"location with a password", func(s *igdServer) { s.location = "http://a:b@" + s.http.String() + "/root.xml" }, NoAnswer},
		{"no location", func(s *igdServer) { s.location = "" }, NoAnswer},
		{"redirect", func(s *igdServer) {
			s.describe = func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, elsewhere, http.StatusFound) }
		}, BadAnswer},
		{"redirect to itself", func(s *igdServer) {
			s.describe = func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, "/root.xml", http.StatusFound)
			}
		}, BadAnswer},
		{"not there", func(s *igdServer) { s.describe = http.NotFound }, BadAnswer},
		{"endless description", func(s *igdServer) { s.describe = endless }, BadAnswer},
		{"endless header", func(s *igdServer) {
			s.describe = func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("X", strings.Repeat("x", 2*maxHeader))
				_, _ = io.WriteString(w, s.description())
			}
		}, BadAnswer},
		{"no XML", func(s *igdServer) {
			s.describe = func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }
		}, BadAnswer},
		{"no service", func(s *igdServer) { s.service = "urn:schemas-upnp-org:service:Layer3Forwarding:1" }, Refused},
		{"control on another host", func(s *igdServer) { s.control = elsewhere + "/ctl" }, BadAnswer},
		{"base on another host", func(s *igdServer) { s.urlBase = elsewhere }, Mapped}, // is not used
		{"private address", func(s *igdServer) { s.external = "192.168.0.2" }, NotPublic},
		{"no address", func(s *igdServer) { s.external = "" }, BadAnswer},
		{"name for an address", func(s *igdServer) { s.external = "localhost" }, BadAnswer},
		{"refusal", func(s *igdServer) { s.reject = func(string, string) int { return 606 } }, Refused},
		{"endless answer", func(s *igdServer) { s.external = strings.Repeat("1", 2*maxBody) }, BadAnswer},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newIGDServer(t, c.spoil)
			own := notOwn
			if c.want == Mapped {
				own = own40000
			}
			_, _, err := (&upnp{Gateway: s.Gateway}).request(patience(t, c.want), own, 0)
			wantResult(t, err, c.want)
			if err != nil && len(short(err)) > 300 {
				t.Errorf("an error of %d bytes goes to the log", len(short(err)))
			}
		})
	}
}

// A router that never finishes its answer costs no more than the time given.
func TestUPnPSlow(t *testing.T) {
	t.Parallel()
	asked := make(chan struct{})
	s := newIGDServer(t, func(s *igdServer) {
		s.describe = func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, "<root>")
			_ = http.NewResponseController(w).Flush()
			close(asked)
			<-r.Context().Done()
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	_, _, err := (&upnp{Gateway: s.Gateway}).request(ctx, notOwn, 0)
	wantResult(t, err, BadAnswer)
}

// Another host's answer to a search isn't heard.
func TestUPnPOtherSender(t *testing.T) {
	t.Parallel()
	g, conn := newGateway(t, ssdpPort)
	_, other := newGateway(t, ssdpPort)
	go func() {
		for {
			var b [2048]byte
			_, from, err := conn.ReadFromUDPAddrPort(b[:])
			if err != nil {
				return
			}
			_, _ = other.WriteToUDPAddrPort(searchAnswer("http://"+g.Addr.String()+"/", deviceType+"1"), from)
		}
	}()
	_, err := (&upnp{Gateway: g}).search(patience(t, NoAnswer))
	wantResult(t, err, NoAnswer)
}

// The whole way with a router that speaks NAT-PMP only.
func TestMapperNATPMP(t *testing.T) {
	t.Parallel()
	g, conn := newGateway(t, pcpPort)
	answer(conn, natPMPServer(publicAddress, 41000, 600))
	changes := make(chan struct{}, 10)
	m := New(Config{
		Gateways: func() ([]Gateway, error) { return []Gateway{g}, nil },
		OpenPort: own40000, OnChange: func() { changes <- struct{}{} },
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { m.Run(ctx); close(done) }()
	<-changes
	if got := m.Mappings(); len(got) != 1 || got[0].External.String() != publicAddress+":41000" || got[0].Protocol != "natpmp" {
		t.Errorf("%+v", got)
	}
	cancel()
	<-done
	<-changes
	if got := m.Mappings(); len(got) != 0 {
		t.Errorf("%+v after the end", got)
	}
}

func FuzzPCP(f *testing.F) {
	q := (&pcp{home, pcpNonce{1}}).mapRequest(40000, 40000, lease)
	f.Add(pcpServer(publicAddress, 41000, 300)(q)[0])
	f.Add([]byte{0, 0x80, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		if a, err := parsePCP(b, opMap); err == nil && (len(b) < pcpHeader+pcpMap || !a.external.IsValid()) {
			t.Errorf("%+v from %x", a, b)
		}
		_, _ = parsePCP(b, opAnnounce)
	})
}

func FuzzSearch(f *testing.F) {
	f.Add(searchAnswer("http://192.168.1.1:5000/root.xml", deviceType+"1"))
	f.Add(searchAnswer("http://192.168.1.1@10.0.0.1/", deviceType+"1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if u := parseSearch(b, home.Addr); u != nil && !reaches(u, home.Addr) {
			t.Errorf("leads to %s", u)
		}
	})
}

// reaches says where an HTTP client would connect to, by other means than leadsTo.
func reaches(u *url.URL, to netip.Addr) bool {
	host := u.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return host == to.String()
}

func FuzzDevice(f *testing.F) {
	s := igdServer{control: "/ctl", service: serviceTypes[0], urlBase: "http://192.168.1.1:80/"}
	f.Add([]byte(s.description()))
	s.control = "http://10.0.0.1/"
	f.Add([]byte(s.description()))
	location, err := url.Parse("http://192.168.1.1:5000/root.xml")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := parseDevice(b, location, home.Addr)
		if err == nil && (len(list) == 0 || len(list) > maxServices) {
			t.Errorf("%d services", len(list))
		}
		for _, s := range list {
			if !reaches(&s.ControlURL.URL, home.Addr) {
				t.Errorf("leads to %s", &s.ControlURL.URL)
			}
		}
	})
}
